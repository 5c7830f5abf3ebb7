"""Triton finds a compiled kernel in its cache by a hash of the source, in which each constant is its `cache_key` or its
repr: every constant of every launch has all that kernels fold of it in that hash."""

import ast
import importlib.util
import inspect
import re
import sys
from copy import copy
from dataclasses import fields, is_dataclass, replace
from functools import cache

import pytest
import torch
import triton.language as tl
from triton.runtime.jit import JITCallable
from tritonshare.kernels.geometry import Record

from bench.launches import record_call
from bench.steps import STEPS
from tests.ops import OPS

pytestmark = pytest.mark.codegen
ARCH = "sm_90"


@cache
def launches():
    """Those of every op's cases and of every optimizer's step."""
    of_ops = [
        launch
        for op in OPS
        for case in op.cases
        if {"tiny", "edge", "codegen"} & {*case.tags}
        for launch in record_call(op, case, torch.bfloat16, ARCH).launches
    ]
    return of_ops + [launch for step in STEPS for launch in step.launches(ARCH)[0]]


def told_whole(value):
    """Whether Triton's key of a constant has all that a kernel can read of it."""
    if type(value) is tuple:
        return all(map(told_whole, value)) and not any(isinstance(v, JITCallable | Record) for v in value)
    if isinstance(value, Record):
        return is_dataclass(value) and all(told_in_record(getattr(value, f.name)) for f in fields(value))
    return value is None or type(value) in (bool, int, float, str) or isinstance(value, tl.dtype | JITCallable)


def told_in_record(value):
    """The same of a record's field: of tuples a record's key has the keys of their items."""
    return all(map(told_in_record, value)) if isinstance(value, tuple) else told_whole(value)


def test_every_constant_is_whole_in_the_key():
    constants = {(launch.kernel, *item) for launch in launches() for item in launch.launcher.constants.items()}
    assert not [constant for constant in constants if not told_whole(constant[2])]
    assert any(isinstance(value, Record) for *_, value in constants)


def records():
    """Of each class of records that a kernel takes, or another record has: a launch, and the record's class."""
    found = {}
    for launch in launches():
        todo = [v for v in launch.launcher.constants.values() if isinstance(v, Record)]
        while todo:
            record = todo.pop()
            found.setdefault(type(record), launch)
            todo += [v for f in fields(record) if isinstance(v := getattr(record, f.name), Record)]
    return found


def source_hash(launch, **constants):
    """What Triton looks a launch up by, with other constants in place of its own."""
    launcher = copy(launch.launcher)
    launcher.constants = {**launcher.constants, **constants}
    return replace(launch, launcher=launcher).source(ARCH).hash()


def read_again(record, module):
    """The record, and those in it, as classes of a module that was read again."""
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    values = {name: read_again(v, module) if isinstance(v, Record) else v for name, v in values.items()}
    return getattr(module, type(record).__name__)(**values)


def module_of_text(cls, text, tmp_path, monkeypatch):
    """The module of a class as if its file had this text."""
    name = cls.__module__
    file = tmp_path / f"{name}.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
    return module


def test_the_key_follows_the_text_that_derives_a_property(tmp_path, monkeypatch):
    """An edit of a property's body, which leaves every field alone, as an upgrade of the library may be."""
    tried = 0
    for cls, launch in records().items():
        text = inspect.getsource(sys.modules[cls.__module__])
        body = inspect.getsource(cls)
        edited = re.sub(r"(cached_property\n(?:.*\n)+?        return )", r"\g<1>1 * ", body, count=1)
        if "cached_property" not in body:
            continue  # it derives nothing
        assert edited != body
        same = module_of_text(cls, text, tmp_path, monkeypatch)
        changed = module_of_text(cls, text.replace(body, edited), tmp_path, monkeypatch)
        for name, record in launch.launcher.constants.items():
            if isinstance(record, Record) and type(record).__module__ == cls.__module__:
                tried += 1
                assert source_hash(launch, **{name: read_again(record, same)}) == source_hash(launch)
                assert source_hash(launch, **{name: read_again(record, changed)}) != source_hash(launch)
    assert tried


def test_the_key_follows_the_values_and_the_class():
    for launch in records().values():
        for name, record in launch.launcher.constants.items():
            if isinstance(record, Record):
                for f in fields(record):
                    if type(value := getattr(record, f.name)) is int:
                        other = replace(record, **{f.name: value + 1})
                        assert source_hash(launch, **{name: other}) != source_hash(launch)


def test_records_derive_nothing_with_other_modules_of_the_package():
    """Their key has the text of their own module."""
    for cls in records():
        tree = ast.parse(inspect.getsource(sys.modules[cls.__module__]))
        imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom | ast.Import)]
        names = [f"{'.' * getattr(n, 'level', 0)}{getattr(n, 'module', None) or n.names[0].name}" for n in imported]
        assert not [n for n in names if n.startswith((".", "tritonshare", "kernels"))]
