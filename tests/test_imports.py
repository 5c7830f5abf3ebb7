"""Which module of tritonshare imports which: without a circle, and downwards in the map of CONTRIBUTING.md. Imports
within functions count; those under `if TYPE_CHECKING:` do not, since they run nowhere. And what importing costs."""

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch

from tritonshare import launch

pytestmark = pytest.mark.reference
ROOT = Path(__file__).parents[1]
PACKAGE = "tritonshare"


@cache
def modules():
    """Files by the dotted names of their modules."""
    named = {}
    for path in (*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "kernels").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] == "kernels":  # installed as tritonshare.kernels
            parts = (PACKAGE, *parts)
        named[".".join(parts).removesuffix(".__init__")] = path
    return named


def nodes(tree):
    """Every node of a syntax tree but those under `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from nodes(node)


def imported(source, name, is_package=False):
    """The modules of tritonshare that the module `name` imports, by its text."""
    within = name.split(".") if is_package else name.split(".")[:-1]
    found = set()
    for node in nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = within[: len(within) + 1 - node.level] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            full = {alias.name: f"{base}.{alias.name}" for alias in node.names}
            found |= {full[name] if full[name] in modules() else base for name in full}
    found = {one for one in found if one.split(".")[0] == PACKAGE}
    # whoever imports a.b.c runs a and a.b, too; within them they run already
    packages = {one[:i] for one in found for i, letter in enumerate(one) if letter == "." and one[:i] != PACKAGE}
    around = {name[:i] for i, letter in enumerate(name) if letter == "."}
    return (found | packages - around) - {name}


@cache
def graph():
    return {name: imported(path.read_text(), name, path.name == "__init__.py") for name, path in modules().items()}


def circle(graph):
    """The modules of a circle, or None."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def rooms():
    """What CONTRIBUTING.md lists as the files and folders of tritonshare, from top to bottom."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split("    tritonshare/ ", 1)[1].split("\n    tests/ ", 1)[0]
    return [name.removesuffix("/").removesuffix(".py") for name in re.findall(r"^ {4,6}(\w+(?:\.py|/)) ", text, re.M)]


def room(name):
    """The line of the map that a module belongs to."""
    return [*name.split("."), "__init__"][1]


def test_imports_have_no_circle():
    assert circle(graph()) is None


def test_imports_point_down_the_map():
    height = {name: -i for i, name in enumerate(rooms())}
    assert set(height) == set(map(room, modules())), "the map and the package"
    upwards = [
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in others
        if height[room(other)] > height[room(name)]
    ]
    assert upwards == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def f():\n    from . import plan", {"tritonshare.plan"}),
        ("from .. import ArgumentError", {"tritonshare"}),
        ("from ..ops.nearest import NEAREST", {"tritonshare.ops", "tritonshare.ops.nearest"}),
        ("import tritonshare.gate as g, math", {"tritonshare.gate"}),
        ("if x:\n    from tritonshare.nn import FeatureMaps", {"tritonshare.nn"}),
        ("if TYPE_CHECKING:\n    from . import plan", set()),
        ("import torch", set()),
    ],
)
def test_imports_are_found_wherever_they_stand(text, found):
    level = "tritonshare.measure.tune" if ".." in text else "tritonshare.launch"
    assert imported(text, level) == found


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None


def loaded_by(statement):
    """The modules of a process that has run a statement."""
    code = f"import sys; {statement}; print(*sys.modules)"
    return {*subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()}


@pytest.mark.once
def test_importing_leaves_the_expensive_to_whom_needs_it():
    """torch's compiler, which costs more than torch, and the packages of the extra `train`."""
    new = loaded_by("import torch; import tritonshare") - loaded_by("import torch")
    heavy = {"torch._dynamo", "torch._inductor", "sklearn", "matplotlib", "tqdm", "safetensors", "sympy"}
    assert new & heavy == set()
    assert "tritonshare.functional" in new


def test_a_function_is_marked_constant_as_torch_marks_it():
    marked = vars(torch._dynamo.assume_constant_result(lambda: None))
    assert vars(launch.traced_path_of).items() >= marked.items()
