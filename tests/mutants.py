"""Single-line mutants of the kernels, each run against its op's tests in the interpreter: a mutant that lives is a test
that is missing, or is listed in SAME with the reason that it is no other kernel.

    python -m tests.mutants                              a sample of each file of kernels/
    python -m tests.mutants segment_sum nearest --each 20 --seed 1
    python -m tests.mutants segment_sum --all
    python -m tests.mutants activation --line "x < 3.0"  those of lines with this text

Exits with 1 where one lives. Not part of `make test`: it takes minutes.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
OPS = "tests/test_ops_interpreter.py"
SPLITS = "tests/test_similarity_splits.py"
# what to run for a file: arguments of pytest
TESTS = {
    "activation": (OPS, "-k", "test_gate and conv2d_act_pool and (kinks or (act_ and float32)) and not shared"),
    "adaptive_update": ("tests/test_adaptive_update.py", "tests/test_optim_exactness.py"),
    "codebook": (OPS, "-k", "shared_linear or (test_gate and shared_conv2d_act_pool and not float16)"),
    "conv2d_act_pool": (OPS, "-k", "(test_gate or exact) and conv2d_act_pool and not shared and not float16"),
    "nearest": (OPS, SPLITS, "-k", "nearest and not float16"),
    "pooling": (OPS, "-k", "(test_gate or exact) and conv2d_act_pool and not shared and not float16"),
    "reduce": (OPS, "-k", "test_gate and conv2d_act_pool-split"),
    "segment_sum": (OPS, "-k", "segment_sum and (gate or exact)"),
    "shared_conv2d_act_pool": (OPS, "-k", "(test_gate or exact) and shared_conv2d_act_pool and not float16"),
    "shared_linear": (OPS, "-k", "shared_linear"),
    "similarity": (OPS, SPLITS, "-k", "similarity_weight and not float16 or (weight- or sum-)"),
    "similarity_reduce": (OPS, SPLITS, "-k", "similarity_reduce and not float16 or (max- or sum- or softmax-)"),
    "similarity_weight": (OPS, SPLITS, "-k", "similarity_weight and not float16 or weight-"),
    "tile": (OPS, "-k", "test_gate and conv2d_act_pool and not shared and not float16"),
}
# (file, a line's text, what it became): why no test can tell
SAME: dict[tuple[str, str, str], str] = {
    ("codebook", "if shared.books > 1:", "if (shared.books >= 1):"): "with one book, rows are in book 0",
}

COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mod, ast.Mod: ast.FloorDiv}
CALLS = {"minimum": "maximum", "maximum": "minimum", "min": "max", "max": "min"}


class Mutant(NamedTuple):
    file: str
    line: int
    before: str
    after: str
    text: str  # of the whole file

    @property
    def reason(self) -> str | None:
        """Why it is the same kernel."""
        return SAME.get((self.file, self.before, self.after))


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in place of an expression: one step beside it."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        yield ast.Compare(node.left, [COMPARISONS[type(node.ops[0])]()], node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr):  # a mask less
        yield node.left
        yield node.right
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CALLS:
        yield ast.Call(ast.Attribute(node.func.value, CALLS[node.func.attr]), node.args, node.keywords)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "where":
        yield node.args[1]
        yield node.args[2]


def is_kernel(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)


def mutants(file: str, text: str) -> list[Mutant]:
    """Of the bodies of a file's jit functions: one expression, on one line, is another."""
    lines, found = text.splitlines(keepends=True), {}
    for function in filter(is_kernel, ast.walk(ast.parse(text))):
        for node in (n for statement in function.body for n in ast.walk(statement)):
            if not isinstance(node, ast.expr) or node.lineno != node.end_lineno:
                continue
            line = lines[node.lineno - 1].encode()  # columns count bytes
            for other in changes(node):
                new = f"({ast.unparse(ast.fix_missing_locations(other))})".encode()
                after = (line[: node.col_offset] + new + line[node.end_col_offset :]).decode()
                whole = "".join([*lines[: node.lineno - 1], after, *lines[node.lineno :]])
                key = node.lineno, after
                found[key] = Mutant(file, node.lineno, line.decode().strip(), after.strip(), whole)
    return list(found.values())


def tree(folder: Path) -> None:
    """A copy of what tests of kernels need, in which `tritonshare.kernels` is the copy's."""
    for name in ("kernels", "tritonshare", "tests", "bench"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "tritonshare" / "kernels").symlink_to(folder / "kernels")


def passes(folder: Path, file: str, seconds: float) -> bool:
    """Whether the file's tests pass in the copy; what does not end, or ends the process by an
    address that is nobody's, has failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "--lane", "interpreter", *TESTS[file]]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    if done.returncode > 1:  # 1: a test failed, and less than 0 a signal; else nothing ran
        raise SystemExit(f"tests.mutants: {' '.join(command)}\n{done.stdout.decode()}{done.stderr.decode()}")
    return done.returncode == 0


def fate(mutant: Mutant, folder: Path, seconds: float) -> str:
    """"killed", "lives", or "same" with its reason."""
    if mutant.reason is not None:
        return f"same: {mutant.reason}"
    place = folder / "kernels" / f"{mutant.file}.py"
    original = place.read_text()
    place.write_text(mutant.text)
    try:
        return "lives" if passes(folder, mutant.file, seconds) else "killed"
    finally:
        place.write_text(original)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="*", help=f"of {', '.join(TESTS)} (default: all)")
    parser.add_argument("--each", type=int, default=4, help="mutants of a file")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--all", action="store_true", help="every mutant, no sample")
    parser.add_argument("--line", default="", help="only of lines with this text, all of them")
    parser.add_argument("--seconds", type=float, default=900, help="after which a mutant that does not end is killed")
    args = parser.parse_args(argv)
    if unknown := set(args.files) - set(TESTS):
        parser.error(f"no file of kernels with tests here: {', '.join(sorted(unknown))}")

    lived = tried = 0
    with tempfile.TemporaryDirectory() as temporary:
        tree(folder := Path(temporary))
        for file in args.files or TESTS:
            found = [m for m in mutants(file, (ROOT / "kernels" / f"{file}.py").read_text()) if args.line in m.before]
            if not (args.all or args.line):
                found = random.Random(args.seed).sample(found, min(args.each, len(found)))
            for mutant in sorted(found, key=lambda m: m.line):
                told = fate(mutant, folder, args.seconds)
                lived, tried = lived + (told == "lives"), tried + 1
                print(f"{told:7} {file}.py:{mutant.line}: {mutant.before}  ->  {mutant.after}", flush=True)
    print(f"{tried - lived} of {tried} are told")
    return int(lived > 0)


if __name__ == "__main__":
    raise SystemExit(main())
