"""A new op, whole and green, to be changed step by step into the one that is wanted: examples/op under another name.

    python -m tests.new_op row_scale            or: make op NAME=row_scale

It writes kernels/<name>.py and tritonshare/ops/<name>/, and adds the op to tritonshare/ops/__init__.py, functional.py
and pyproject.toml. Nothing is written where one of them is there already.
"""

from __future__ import annotations

import argparse
import keyword
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def renamed(text: str, name: str) -> str:
    camel = "".join(word.capitalize() for word in name.split("_"))
    return text.replace("square", name).replace("SQUARE", name.upper()).replace("Square", camel)


def inserted(text: str, *changes: tuple[str, str]) -> str:
    """The text with a line before each of these places, which it has once."""
    for before, line in changes:
        assert text.count(before) == 1, before
        text = text.replace(before, line + before)
    return text


def files(root: Path, name: str) -> dict[Path, str]:
    """The text of every file that the new op makes or changes."""
    template, package = root / "examples" / "op", root / "tritonshare" / "ops"
    function = (template / "function.py").read_text()
    changes = {
        package / "__init__.py": [
            ("    adaptive_update,\n", f"    {name},\n"),
            ('    "adaptive_update",\n', f'    "{name}",\n'),
        ],
        root / "pyproject.toml": [('"tritonshare.optim"]', f'"tritonshare.ops.{name}", ')],
        root / "tritonshare" / "functional.py": [
            ("from .ops.conv2d_act_pool import", f"from .ops.{name} import {name.upper()}\n"),
            ('    "adaptive_update_",\n', f'    "{name}",\n'),
            ("FUNCTIONS.update(", renamed(function[function.index("def ") :], name) + "\n\n"),
        ],
    }
    found = {path: inserted(path.read_text(), *of) for path, of in changes.items()}
    found[root / "kernels" / f"{name}.py"] = renamed((template / "kernel.py").read_text(), name)
    for path in sorted((template / "ops").glob("*.py")):
        found[package / name / path.name] = renamed(path.read_text(), name)
    return found


def make(root: Path, name: str) -> list[Path]:
    """Make the op in the checkout at `root`, and return the files that are new or changed. Raises ValueError."""
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower():
        raise ValueError(f"{name!r} is no name for an op: it must be an identifier in lower case")
    for path in (root / "kernels" / f"{name}.py", root / "tritonshare" / "ops" / name):
        if path.exists():
            raise ValueError(f"{path.relative_to(root)} is there already")
    written = files(root, name)
    for path, text in written.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    # names in lists and imports by the alphabet
    subprocess.run([sys.executable, "-m", "ruff", "check", "-q", "--fix", *map(str, written)], cwd=root, check=True)
    return list(written)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    try:
        made = make(ROOT, parser.parse_args().name)
    except ValueError as error:
        parser.error(str(error))
    print(*(path.relative_to(ROOT) for path in made), sep="\n")
