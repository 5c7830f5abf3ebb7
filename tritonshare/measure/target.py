"""Finds a function that the user names on a command line: package.module:function, or path/to/file.py:function."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


class TargetError(ValueError):
    """The name does not lead to a usable function. The message is one sentence."""


def load(target: str) -> Callable[[], Any]:
    """The function of that name. Its module is imported, as `python -m` and `python FILE` would find it."""
    where, colon, name = target.rpartition(":")
    if not (colon and where and name):
        raise TargetError(f"{target!r} is not of the form package.module:function or path/to/file.py:function")
    module = _from_file(Path(where)) if where.endswith(".py") else _from_name(where)
    function = getattr(module, name, None)
    if function is None:
        raise TargetError(f"{where} has no {name!r}")
    if not callable(function):
        raise TargetError(f"{name!r} of {where} is {type(function).__name__}, not a function")
    return function


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise TargetError(f"there is no file {path}")
    _search(path.resolve().parent)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's code can raise anything
        raise TargetError(f"{path} cannot be imported ({type(error).__name__}: {error})") from error
    return module


def _from_name(name: str) -> ModuleType:
    _search(Path.cwd())
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # the user's code can raise anything
        raise TargetError(f"{name} cannot be imported ({type(error).__name__}: {error})") from error


def _search(folder: Path) -> None:
    """Search this folder for modules, too."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def model_of(target: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What the function returns: a module, and example inputs."""
    function = load(target)
    try:
        made = function()
    except (Exception, SystemExit) as error:  # the user's code can raise anything
        raise TargetError(f"{target} raised {type(error).__name__}: {error}") from error
    if not isinstance(made, (tuple, list)) or not made or not callable(made[0]):
        raise TargetError(f"{target} must return (module, *example inputs), but returned {type(made).__name__}")
    return made[0], tuple(made[1:])
