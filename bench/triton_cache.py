"""Triton's cache of compiled kernels as one file, to be brought back from one machine and taken to another.

A kernel compiled elsewhere is taken (Triton 3.6 to 3.9) if what its key is a digest of is the same there: Triton's
Python sources and its libtriton.so, so that version, build and Python must be the same; the version of ptxas, the arch
and the kernel's options; the kernel's source with its line number, its signature and constants; the environment
variables that change what is compiled. No path is part of the key, but a kernel's list of files names them by absolute
paths, which are set anew where it is unpacked.
"""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

TEXTS = {".source", ".ttir", ".ttgir", ".llir", ".ptx"}  # on the way to the binary: no launch reads them


def pack(file: Path, folder: Path) -> None:
    """What a launch needs of the cache in `folder`."""
    partial = file.with_name(f"{file.name}.part")
    with tarfile.open(partial, "w:xz", preset=3) as tar:  # a tenth; the smallest takes thrice as long for a fifth less
        for path in sorted(folder.glob("*/*")):
            if path.is_file() and path.suffix not in TEXTS:
                tar.add(path, path.relative_to(folder))
    os.replace(partial, file)


def unpack(file: Path, folder: Path) -> None:
    with tarfile.open(file) as tar:
        tar.extractall(folder, filter="data")
    for group in folder.glob("*/__grp__*.json"):
        paths = [group.parent.absolute() / name for name in json.loads(group.read_text())["child_paths"]]
        group.write_text(json.dumps({"child_paths": {path.name: str(path) for path in paths if path.exists()}}))
