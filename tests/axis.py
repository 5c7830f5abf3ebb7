"""What Triton concludes from how an index is written, held against what the index is.

Triton's axis analysis says of every integer tensor, axis by axis: so many neighbours are consecutive, the first of them
is a multiple of so much, so many are equal. Accesses are widened and masks are merged by it. `false_claims` repeats
that analysis with the rules of Triton 3.6, which believes most, computes the tensors of some programs, and compares.
"""

import re
from dataclasses import dataclass, replace
from math import gcd

import numpy as np
from triton import compiler
from triton._C.libtriton import ir

from bench.sass import parse_target

MOST = 2**30  # the divisor of 0


def power_in(number):
    """The largest power of two that divides it."""
    return number & -number if number else MOST


def ttir(launch, target):
    """What Triton's compiler begins with, as text."""
    gpu = parse_target(target)
    backend, source, context = compiler.make_backend(gpu), launch.source(target), ir.context()
    options = backend.parse_options({**launch.launcher.options})
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages = {}
    backend.add_stages(stages, options, source.language)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(gpu, options, functions, modules, context)
    return str(stages["ttir"](module, {"target": gpu}))


@dataclass(frozen=True)
class Seen:
    """A value: what is concluded of it, axis by axis, and what it is; None where that is not known."""

    contiguity: tuple[int, ...] = (1,)
    divisibility: tuple[int, ...] = (1,)
    constancy: tuple[int, ...] = (1,)
    constant: int | None = None
    value: np.ndarray | None = None
    item: int = 1  # of pointers: bytes of an element

    def broken(self):
        """The claims that are not true of the value, as text."""
        if self.value is None or self.value.ndim == 0:
            return []
        told = []
        for axis, (run, divisor, same) in enumerate(
            zip(self.contiguity, self.divisibility, self.constancy, strict=True)
        ):
            lines = np.moveaxis(self.value, axis, -1)
            if run > 1 and (groups(lines, run) != groups(lines, run)[..., :1] + self.item * np.arange(run)).any():
                told.append(f"axis {axis}: {run} in turn")
            if (groups(lines, run)[..., 0] % divisor != 0).any():
                told.append(f"axis {axis}: a multiple of {divisor} every {run}")
            if (groups(lines, same) != groups(lines, same)[..., :1]).any():
                told.append(f"axis {axis}: {same} are equal")
        return told


def groups(lines, size):
    size = min(size, lines.shape[-1])
    return lines.reshape(*lines.shape[:-1], lines.shape[-1] // size, size)


def shape_of(kind):
    """Of a type as it is written; None of one number."""
    found = re.match(r"tensor<((?:\d+x)+)", kind)
    return tuple(map(int, found[1].split("x")[:-1])) if found else None


def unknown(kind):
    rank = len(shape_of(kind) or (1,))
    return Seen((1,) * rank, (1,) * rank, (1,) * rank)


def same_rank(a, b):
    """Both with as many axes: a number has one."""
    return zip(a.contiguity, a.divisibility, a.constancy, b.contiguity, b.divisibility, b.constancy, strict=True)


COMPUTE = {
    "arith.addi": np.add, "arith.subi": np.subtract, "arith.muli": np.multiply, "tt.addptr": np.add,
    "arith.divsi": lambda a, b: np.trunc(a / b).astype(np.int64), "arith.remsi": np.fmod,
    "arith.andi": np.bitwise_and, "arith.ori": np.bitwise_or, "arith.xori": np.bitwise_xor,
    "arith.shli": np.left_shift, "arith.shrsi": np.right_shift, "arith.shrui": np.right_shift,
    "arith.minsi": np.minimum, "arith.maxsi": np.maximum,
}  # fmt: skip
COMPARE = {"slt": np.less, "sle": np.less_equal, "sgt": np.greater, "sge": np.greater_equal, "eq": np.equal,
           "ne": np.not_equal}  # fmt: skip


def concluded(op, a, b, shape):
    """Triton's conclusions of a binary operation."""
    run, divisor, same = [], [], []
    for axis, (run_a, div_a, same_a, run_b, div_b, same_b) in enumerate(same_rank(a, b)):
        size = shape[axis] if shape else 1
        r, d, s = 1, 1, gcd(same_a, same_b)
        if op in ("arith.addi", "arith.subi", "tt.addptr"):
            r = gcd(run_a, same_b) if op == "arith.subi" else max(gcd(same_a, run_b), gcd(run_a, same_b))
            d = gcd(div_a, div_b * a.item if op == "tt.addptr" else div_b)
        elif op == "arith.muli":
            r = max(run_a if b.constant == 1 else 1, run_b if a.constant == 1 else 1)
            d = (1 if run_a > 1 and b.constant != 1 else div_a) * (1 if run_b > 1 and a.constant != 1 else div_b)
        elif op == "arith.divsi":
            if shape and run_a == size and same_b == size:
                s = max(s, gcd(run_a, div_a, div_b))
            if b.constant == 1:
                r, d = run_a, div_a
            elif b.constant and run_a == 1 and b.constant == power_in(b.constant):
                d = max(1, div_a // b.constant)
        elif op == "arith.remsi":
            if shape and run_a == size and same_b == size:
                r = gcd(run_a, div_a, div_b)
            d = gcd(div_a, div_b) if same_b > 1 else 1
        elif op in ("arith.shli", "arith.shrsi", "arith.shrui"):
            r = run_a if b.constant == 0 else 1
            own = 1 if run_a > 1 and b.constant else div_a
            if op == "arith.shli":
                d = own << (b.constant or 0)
            elif b.constant is not None:
                d = max(1, own >> b.constant)
        elif op in ("arith.minsi", "arith.maxsi"):
            r = gcd(run_a, run_b)
            d = gcd(div_a, div_b) if run_a == run_b else gcd(div_a, div_b, run_a, run_b)
        run.append(r)
        divisor.append(min(d, MOST))
        same.append(s)
    return tuple(run), tuple(divisor), tuple(same)


def compared(predicate, a, b, shape):
    """How many neighbours of a comparison are equal."""
    same = []
    for axis, (run_a, div_a, same_a, run_b, div_b, same_b) in enumerate(same_rank(a, b)):
        size = shape[axis] if shape else 1
        s = gcd(same_a, same_b)
        if predicate in ("sgt", "sle") and same_a == size:
            s = max(s, gcd(run_b, div_a, div_b))
        elif predicate in ("slt", "sge") and same_b == size:
            s = max(s, gcd(run_a, div_a, div_b))
        same.append(s)
    return tuple(same)


class Reader:
    """A kernel's text, computed for one program. Loops do their first, second and last round."""

    def __init__(self, text, arguments, program, programs):
        self.text = [re.sub(r" loc\(.*?\)+$", "", line).strip() for line in text.splitlines()]
        self.program, self.programs = program, programs
        self.found = {}
        start = next(i for i, line in enumerate(self.text) if line.startswith("tt.func"))
        names = re.findall(r"(%[\w.]+): (!tt.ptr<\w+>|\w+)(?: \{([^}]*)\})?", self.text[start])
        self.start, env = start + 1, {}
        for number, (name, kind, notes) in enumerate(names):
            divisor = int((re.search(r"tt.divisibility = (\d+)", notes) or [0, 1])[1])
            if kind.startswith("!tt.ptr"):
                env[name] = Seen(divisibility=(divisor,), value=np.array((number + 1) * 2**36), item=item_of(kind))
            else:
                value = arguments.get(name[1:])
                env[name] = Seen(divisibility=(divisor,), value=None if value is None else np.array(value))
        self.run(self.start, self.end(start), env)

    def end(self, line):
        """The line that closes the block which this one opens."""
        depth = 0
        for number in range(line, len(self.text)):
            text = re.sub(r"\{[^{}]*\}", "", self.text[number])
            closed = text.startswith("}") and number > line
            if closed and depth == 1:
                return number
            depth += text.count("{") - (text.count("}") if number > line else 0)
        raise ValueError(self.text[line])

    def run(self, first, last, env):
        """The lines first .. last; what the block yields."""
        line, yielded = first, []
        while line < last:
            text = self.text[line]
            if "scf.for" in text or "scf.if" in text:
                line = (self.loop if "scf.for" in text else self.branch)(line, env)
            elif text.startswith("scf.yield"):
                yielded = [env.get(name) for name in re.findall(r"%[\w.#]+", text.split(" : ")[0])]
            elif match := re.match(r"(%[\w.]+)(?::\d+)? = (\S+)(.*)$", text):
                name, op, rest = match.groups()
                seen = env[name] = self.compute(op, rest, env)
                if told := seen.broken():
                    self.found.setdefault(text, told)
            line += 1
        return yielded

    def bind(self, text, values, kinds, env):
        """Results of a block, whose conclusions are not followed."""
        if match := re.match(r"(%[\w.]+)(?::(\d+))? = ", text):
            names = [match[1]] if match[2] is None else [f"{match[1]}#{i}" for i in range(int(match[2]))]
            for i, name in enumerate(names):
                given = values[i].value if i < len(values) and values[i] is not None else None
                env[name] = replace(unknown(kinds[i] if i < len(kinds) else ""), value=given)

    def loop(self, line, env):
        text, end = self.text[line], self.end(line)
        name, low, high, step = re.search(r"scf.for (%[\w.]+) = (%[\w.]+) to (%[\w.]+) step (%[\w.]+)", text).groups()
        carried = re.findall(r"(%[\w.]+) = (%[\w.#]+)", text.partition("iter_args(")[2].partition(")")[0])
        kinds = types_of(text)
        values = [env.get(initial) for _, initial in carried]
        bounds = [env[n].value for n in (low, high, step)]
        known = all(v is not None for v in bounds)
        rounds = list(range(*map(int, bounds))) if known else [None]
        divisor = (gcd(env[low].divisibility[0], env[step].divisibility[0]),)
        for i in dict.fromkeys(rounds[:2] + rounds[-1:]):
            inner = dict(env)
            inner[name] = Seen(divisibility=divisor, value=None if i is None else np.array(i))
            for (carry, _), value, kind in zip(carried, values, kinds, strict=True):
                inner[carry] = replace(unknown(kind), value=None if value is None else value.value)
            values = self.run(line + 1, end, inner)
        self.bind(text, values, kinds, env)
        return end

    def branch(self, line, env):
        text, end = self.text[line], self.end(line)
        kinds = types_of(text)
        condition = env.get(re.search(r"scf.if (%[\w.]+)", text)[1])
        taken = None if condition is None or condition.value is None else bool(condition.value)
        values = self.run(line + 1, end, dict(env)) if taken is not False else []
        if self.text[end].startswith("} else"):
            first, end = end + 1, self.end(end)
            other = self.run(first, end, dict(env)) if taken is not True else []
            values = other if taken is False else values
        self.bind(text, values if taken is not None else [], kinds, env)
        return end

    def compute(self, op, rest, env):
        names = [env.get(name) for name in re.findall(r"%[\w.#]+", rest.split(" : ")[0])]
        kind = rest.rsplit("->", 1)[-1].rsplit(" : ", 1)[-1].split(", tensor")[0].strip()
        if " to " in kind:
            kind = kind.split(" to ")[1]
        shape = shape_of(kind)
        if op in ("tt.get_program_id", "tt.get_num_programs"):
            return Seen(value=np.array(self.program if op.endswith("id") else self.programs))
        if op == "arith.constant":
            number = re.match(r" (?:dense<)?(-?\d+|true|false)>? :", rest)
            if number is None or "f" in kind.split("x")[-1]:
                return unknown(kind)
            constant = {"true": 1, "false": 0}.get(number[1]) if number[1] in ("true", "false") else int(number[1])
            rank, same = len(shape or (1,)), shape or (1,)
            value = np.full(shape or (), constant, np.int64)
            return Seen((1,) * rank, (power_in(constant),) * rank, same, constant, value)
        if op == "tt.make_range":
            first = int(re.search(r"start = (\d+)", rest)[1])
            return Seen(shape, (power_in(first),), (1,), None, np.arange(first, first + shape[0]))
        if not names or any(n is None for n in names):
            return unknown(kind)
        a = names[0]
        if op in ("arith.extsi", "arith.extui", "arith.trunci", "arith.index_cast"):
            return a
        if op == "tt.splat":
            value = None if a.value is None else np.full(shape, a.value)
            rank = len(shape)
            return replace(a, contiguity=(1,) * rank, divisibility=a.divisibility * rank, constancy=shape, value=value)
        if op == "tt.expand_dims":
            axis = int(re.search(r"axis = (\d+)", rest)[1])
            if a.constant is not None:
                divisor = power_in(a.constant)
            else:
                divisor = gcd(*(1 if run > 1 else d for run, d in zip(a.contiguity, a.divisibility, strict=True)))
            put = lambda of, what: (*of[:axis], what, *of[axis:])  # noqa: E731
            value = None if a.value is None else np.expand_dims(a.value, axis)
            return replace(a, contiguity=put(a.contiguity, 1), divisibility=put(a.divisibility, divisor),
                           constancy=put(a.constancy, 1), value=value)  # fmt: skip
        if op == "tt.broadcast":
            old = shape_of(rest.split(" : ")[1].split(" -> ")[0])
            value = None if a.value is None else np.broadcast_to(a.value, shape)
            run = tuple(1 if o == 1 else r for o, r in zip(old, a.contiguity, strict=True))
            same = tuple(n if o == 1 else s for o, n, s in zip(old, shape, a.constancy, strict=True))
            return replace(a, contiguity=run, constancy=same, value=value)
        if op == "arith.cmpi":
            predicate, b = rest.split(",")[0].strip(), names[1]
            known = a.value is not None and b.value is not None and predicate in COMPARE
            rank = len(shape or (1,))
            value = COMPARE[predicate](a.value, b.value).astype(np.int64) if known else None
            return Seen((1,) * rank, (1,) * rank, compared(predicate, a, b, shape), None, value)
        if op == "arith.select" and len(names) == 3:
            test, a, b = names
            rank = len(shape or (1,))
            if len(test.constancy) != rank:
                test = unknown(kind)
            both = [*zip(a.contiguity, b.contiguity, a.divisibility, b.divisibility, a.constancy, b.constancy,
                         test.constancy, strict=True)]  # fmt: skip
            known = all(n.value is not None for n in names)
            return Seen(
                tuple(gcd(r, q, t) for r, q, _, _, _, _, t in both),
                tuple(gcd(d, e) if r == q else gcd(d, e, r, q) for r, q, d, e, *_ in both),
                tuple(gcd(s, u, t) for *_, s, u, t in both),
                None, np.where(test.value, a.value, b.value) if known else None,
            )  # fmt: skip
        if op in COMPUTE and len(names) == 2:
            b = names[1]
            run, divisor, same = concluded(op, a, b, shape)
            known = a.value is not None and b.value is not None
            offset = b.value * a.item if known and op == "tt.addptr" else b.value
            value = COMPUTE[op](a.value, offset) if known else None
            constant = None
            if a.constant is not None and b.constant is not None and value is not None:
                constant = int(value.flat[0])
            return Seen(run, divisor, same, constant, value, a.item)
        return unknown(kind)


def item_of(kind):
    bits = re.search(r"ptr<\w*?(\d+)", kind)
    return max(1, int(bits[1]) // 8) if bits else 1


def types_of(text):
    """Of a block's results, as its first line writes them."""
    found = re.search(r"-> \((.*?)\)", text)
    return re.findall(r"(?:[\w!.]+<[^<>]*(?:<[^<>]*>)?>)|[\w!.]+", found[1]) if found else []


def false_claims(launch, target):
    """What is concluded of an index of a launch and is not true, by the line of Triton's text that says it. Of programs
    that are the first, the last and some in between."""
    text = ttir(launch, target)
    kernel = launch.launcher.kernel
    names = [p.name for p in kernel.params if p.name not in launch.launcher.constants]
    arguments = {n: v for n, v in zip(names, launch.args, strict=True) if isinstance(v, int)}
    found = {}
    for program in sorted({0, 1, launch.grid // 3, launch.grid // 2, launch.grid - 1} & set(range(launch.grid))):
        found |= Reader(text, arguments, program, launch.grid).found
    return found
