"""The one place that opens files: reads them with suspicion, replaces them whole, locks them, and words errors.

A reader says how large its file may be. It gets the bytes of a regular file that is no larger, or a FileError: it never
waits (for a pipe, say) and never reads more. A writer first writes all of its files beside their places, then moves
them.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows: no locks there
    fcntl = None

LONGEST = 600  # the longest sentence, in characters
DEEPEST = 32  # how deeply objects and lists may be nested
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # errors of file systems without locks


class FileError(ValueError):
    """A file is not what it should be. The message is the rest of a sentence that begins with the file's name."""


class Busy(ValueError):
    """Another process has the lock. The message is one sentence."""


@dataclass(frozen=True)
class Form:
    """A format of files. Files with a larger number than `version` are refused.

    unmarked: the keys of metadata that were written before formats had a number.
    """

    kind: str
    name: str
    version: int
    unmarked: str = ""


def sentence(text: str, most: int = LONGEST) -> str:
    """`text` as one line that any terminal can show: control characters and the like escaped, and the middle left out
    where it is longer than `most` characters."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
    return line if len(line) <= most else f"{line[: most * 2 // 3]} ... {line[-(most // 3 - 5) :]}"


# Reading.


@contextmanager
def opened(path: Path, most: int, *, private: bool = False) -> Iterator[tuple[BinaryIO, int]]:
    """The regular file at `path`, open for reading, and its size, which is at most `most` bytes.

    private: the file must belong to the current user, be no link, and be writable by nobody else.

    Raises: FileNotFoundError; FileError for everything else.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)  # a pipe must not be waited for
    try:
        if private:
            if path.is_symlink():
                raise FileError("is a symbolic link")
            flags |= getattr(os, "O_NOFOLLOW", 0)  # it may have become a link since
        _check_regular(os.stat(path))  # before it is opened: opening a device may have effects
        with open(os.open(path, flags), "rb") as file:
            facts = os.fstat(file.fileno())
            _check_regular(facts)
            if private and hasattr(os, "getuid"):
                if facts.st_uid != os.getuid():
                    raise FileError("belongs to another user")
                if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                    raise FileError("can be written by other users")
            if facts.st_size > most:
                raise FileError(f"is larger than {most:,} bytes")
            yield file, facts.st_size
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FileError(f"cannot be read ({error.strerror or error})") from error


def _check_regular(facts: os.stat_result) -> None:
    if not stat.S_ISREG(facts.st_mode):
        raise FileError("is a folder" if stat.S_ISDIR(facts.st_mode) else "is not a regular file")


def read(path: Path, most: int, *, private: bool = False) -> bytes:
    """The bytes of a file, opened as by `opened`."""
    with opened(path, most, private=private) as (file, size):
        content = file.read(size + 1)
    if len(content) > size:
        raise FileError("grows while it is read")
    return content


def read_json(path: Path, most: int, *, private: bool = False) -> Any:
    """The JSON value in a file, opened as by `opened`."""
    return parse(read(path, most, private=private))


def parse(content: str | bytes) -> Any:
    """The value of a JSON text, in which no object has a name twice and nothing is nested deeply. Raises FileError."""
    try:
        value = json.loads(content, object_pairs_hook=_object)
        level = [value]
        for _ in range(DEEPEST):
            level = [inner for outer in level for inner in _inside(outer)]
        if level:
            raise FileError(f"is JSON that is nested more than {DEEPEST} times")
        return value
    except (ValueError, RecursionError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"is not JSON ({sentence(str(error), 120)})") from error


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise FileError(f"is JSON with two values of {twice!r:.80}")
    return made


# Writing.


def replace(contents: Mapping[Path, bytes], *, mode: int | None = None, follow: bool = True) -> None:
    """Put each content at its path. Whatever fails, and whoever reads meanwhile, a path has the whole old or new file.

    All contents reach the disk before the first file is replaced: a full disk leaves every path as it was. Permissions
    of a file that is replaced are kept, and a path that is a link stays one: the file that it leads to is replaced.

    mode: the permissions to set, whatever they were. follow: if False, a link is replaced, not the file it leads to.

    Raises: OSError, which names the path.
    """
    with ExitStack() as stack:
        staged = [stack.enter_context(_staged(path, content, mode, follow)) for path, content in contents.items()]
        for path, temporary, target in staged:
            with naming(path):
                os.replace(temporary, target)
        for folder in {target.parent for _, _, target in staged}:
            _sync(folder)


@contextmanager
def naming(what: object) -> Iterator[None]:
    """An OSError within the block gets this name, in place of a temporary file's or of none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(what)) from error


@contextmanager
def _staged(path: Path, content: bytes, mode: int | None, follow: bool) -> Iterator[tuple[Path, str, Path]]:
    """Write `content` to a temporary file beside the target that `path` stands for. Yields path, temporary file,
    target.

    The temporary file has a unique name, and is locked: `_sweep` removes those whose writer was killed.
    """
    with naming(path):
        target, facts = _target(path, follow)
        _sweep(target)
        temporary, file = _temporary(target)
    try:
        with file:
            with naming(path):
                if mode is None and facts is not None:
                    mode = stat.S_IMODE(facts.st_mode)
                    with suppress(OSError, AttributeError):  # only root can change the owner of a file
                        os.fchown(file.fileno(), facts.st_uid, facts.st_gid)
                if mode is not None:
                    os.chmod(temporary, mode)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows replaces no open file
            yield path, temporary, target
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def _target(path: Path, follow: bool) -> tuple[Path, os.stat_result | None]:
    """The file to replace, and its stat result if it exists. Raises OSError if something else is there."""
    target = Path(os.path.realpath(path)) if follow else Path(path)
    try:
        facts = os.lstat(target)
    except FileNotFoundError:
        return target, None
    if stat.S_ISLNK(facts.st_mode):
        if follow:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        return target, None
    if not stat.S_ISREG(facts.st_mode):
        folder = stat.S_ISDIR(facts.st_mode)
        raise OSError(errno.EISDIR if folder else errno.EINVAL, "is a folder" if folder else "is not a regular file")
    return target, facts


def _stem(target: Path) -> str:
    """How names of temporary files for `target` begin: short enough for a file system."""
    return f".{os.fsdecode(os.fsencode(target.name)[:200])}."


def _temporary(target: Path) -> tuple[str, BinaryIO]:
    """A new file beside `target`, locked and open for writing. A link or pipe of that name is not followed."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    while True:
        name = str(target.with_name(f"{_stem(target)}{secrets.token_hex(6)}.tmp"))
        file = open(os.open(name, flags, 0o666), "wb")  # noqa: SIM115  (the caller closes it)
        _lock(file.fileno(), wait=True)
        if os.fstat(file.fileno()).st_nlink:  # not swept away before it was locked
            return name, file
        file.close()


def _sweep(target: Path) -> None:
    """Remove temporary files for `target` that no process has locked any more."""
    ours = re.compile(re.escape(_stem(target)) + r"[0-9a-f]{12}\.tmp")
    names = []
    with suppress(PermissionError):  # a folder may be writable but not readable
        names = os.listdir(target.parent) if fcntl else []
    for name in names:
        if ours.fullmatch(name):
            with suppress(OSError):
                left = target.with_name(name)
                handle = os.open(left, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    assert fcntl is not None  # without it there are no names
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(left)
                finally:
                    os.close(handle)


def _lock(handle: int, wait: bool) -> None:
    """Lock an open file. Raises BlockingIOError where another process has it; file systems without locks do nothing."""
    if fcntl:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise


def _sync(folder: Path) -> None:
    """Make the new names reach the disk, too."""
    if os.name == "posix":  # Windows cannot open a folder
        with suppress(OSError):  # some file systems cannot do it
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


# Locks.


@contextmanager
def held(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Within the block this process alone holds a lock, the file `path`, which is removed afterwards.

    The lock ends with the process, however it ends: a file that is left behind locks nothing. Making it also shows that
    files can be made in the folder. On file systems without locks nothing is locked.

    what: what the lock protects, for the message. wait: whether to wait for another process to release it.

    Raises: Busy; OSError, which names the folder, if the file cannot be made.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    while True:
        with naming(path.parent):
            handle = os.open(path, flags, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError(errno.EINVAL, "is not a regular file", str(path))
            _lock(handle, wait)
            if _same(handle, path):
                break
        except BlockingIOError as error:
            os.close(handle)
            raise Busy(f"{what} is in use by another process") from error
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its former holder has removed it: take a new one
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(path)
        os.close(handle)


def lock_of(path: Path) -> Path:
    """The lock of a single file, for `held`."""
    return path.with_name(f"{_stem(path)}lock")


def _same(handle: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False
