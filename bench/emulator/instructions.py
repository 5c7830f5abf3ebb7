"""What each PTX instruction becomes: NumPy expressions, and calls of the machine for memory and neighbours."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from .matrix import shape_of
from .ptx import Operand
from .translate import Translator, is_float, numpy_of, width

_HANDLERS: dict[str, Callable[..., None]] = {}


def write_instruction(t: Translator, operands: Sequence[Operand]) -> None:
    name = t.parts[0]
    if name in _NOTHING:
        return
    if name in _PLAIN:
        _plain(t, *operands)
    else:
        _HANDLERS[name](t, *operands)


def _instruction(*names: str):
    def register(handler):
        _HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


# Instructions that are one expression: it, the kinds of its operands, the kind of its result. T is the instruction's
# type, U and B unsigned and bits of its width, p a predicate, 4 a u32.
_PLAIN = {
    "and": ("{} & {}", "TT", "T"),
    "or": ("{} | {}", "TT", "T"),
    "xor": ("{} ^ {}", "TT", "T"),
    "not": ("~{}", "T", "T"),
    "rem": ("rem_int({}, {})", "TT", "T"),
    "selp": ("np.where({2}, {0}, {1})", "BBp", "B"),
    "cvta": ("{}", "T", "T"),
    "bfe": ("bfe({}, {}, {})", "T44", "T"),
    "bfi": ("bfi({}, {}, {}, {})", "TT44", "T"),
    "prmt": ("prmt({}, {}, {})", "444", "4"),
    "popc": ("popc({})", "T", "4"),
    "clz": ("clz({})", "T", "4"),
    "brev": ("brev({})", "T", "T"),
    "bfind": ("bfind({})", "T", "4"),
    "copysign": ("np.copysign({1}, {0})", "TT", "T"),
    "activemask": ("warps.vote('ballot', X.full(c_True), X.masked(M))", "", "4"),
}
_NOTHING = ("membar", "griddepcontrol", "nanosleep", "prefetch", "prefetchu", "setmaxnreg", "discard", "applypriority")


def _plain(t: Translator, target: str, *operands: Operand) -> None:
    expression, takes, gives = _PLAIN[t.parts[0]]
    bits = width(t.kind) if t.kind != "pred" else 0
    kinds = {"T": t.kind, "B": f"b{bits}", "U": f"u{bits}", "p": "pred", "4": "u32"}
    t.read("1", "pred")  # c_True
    values = [t.read(o, kinds[k]) for o, k in zip(operands, takes, strict=False)]
    t.write(target, f"({expression.format(*values)})", kinds[gives])


# Arithmetic. Pairs of halves are worked with as [threads, 2].


def _floats(t: Translator, operands: Sequence[Operand]) -> list[str]:
    """Expressions of floating-point operands, subnormals flushed where the instruction says so."""
    if t.kind in ("f16x2", "bf16x2"):
        return [f"halves_{t.kind[:-2]}({t.read(o, 'b32')})" for o in operands]
    found = [t.read(o, t.kind) for o in operands]
    return [f"flush({e})" for e in found] if t.has("ftz") and t.kind == "f32" else found


def _write_float(t: Translator, target: str, expression: str, kind: str = "") -> None:
    """NaN as a GPU makes it, subnormals flushed, clamped, rounded to the type."""
    kind = kind or t.kind
    t.emit(f"t = {expression}")
    if kind.endswith("x2"):
        return t.write(target, f"pack_{kind[:-2]}(t)", "b32")
    t.emit("if X.invalid: t = X.clean(t)")
    if t.has("ftz") and kind == "f32":
        t.emit("t = flush(t)")
    if t.has("sat"):
        t.emit("t = saturate(t)")
    if t.has("relu"):
        t.emit("t = np.where(t < 0, t.dtype.type(0), t)")
    t.write(target, "f32_to_bf16(t)" if kind == "bf16" else "t", kind)


def _floating(t: Translator) -> bool:
    return is_float(t.kind.removesuffix("x2"))


def _integer_pairs(t: Translator, operands: Sequence[Operand]) -> list[str]:
    return [f"{t.read(o, 'b32')}.view({'i' if t.kind[0] == 's' else 'u'}16).reshape(-1, 2)" for o in operands]


@_instruction("add", "sub")
def _sum(t: Translator, target, a, b):
    symbol = "+" if t.parts[0] == "add" else "-"
    if _floating(t):
        x, y = _floats(t, (a, b))
        return _write_float(t, target, f"{x} {symbol} {y}")
    if t.has("sat"):
        x, y = (f"{t.read(o, 's32')}.astype(i64)" for o in (a, b))
        return t.write(target, f"saturate_int({x} {symbol} {y}, i32)", "s32")
    if t.kind.endswith("x2"):
        x, y = _integer_pairs(t, (a, b))
        return t.write(target, f"({x} {symbol} {y}).view(u32).reshape(-1)", "b32")
    x, y = (t.read(o, "u" + t.kind[1:]) for o in (a, b))
    t.write(target, f"({x} {symbol} {y})", "u" + t.kind[1:])


def _product(t: Translator, a, b) -> tuple[str, str]:
    """A product of integers, or its upper half, and its kind."""
    if t.has("wide"):
        kind = t.kind[0] + str(2 * width(t.kind))
        x, y = (f"{t.read(o, t.kind)}.astype({numpy_of(kind)})" for o in (a, b))
        return f"({x} * {y})", kind
    if t.has("hi"):
        return f"mul_hi({t.read(a, t.kind)}, {t.read(b, t.kind)})", t.kind
    kind = "u" + t.kind[1:]
    return f"({t.read(a, kind)} * {t.read(b, kind)})", kind


@_instruction("mul")
def _mul(t: Translator, target, a, b):
    if _floating(t):
        x, y = _floats(t, (a, b))
        return _write_float(t, target, f"{x} * {y}")
    t.write(target, *_product(t, a, b))


@_instruction("mad", "fma")
def _mad(t: Translator, target, a, b, c):
    if not _floating(t):
        product, kind = _product(t, a, b)
        return t.write(target, f"({product} + {t.read(c, kind)})", kind)
    if t.kind == "f64":  # rounded twice, as NumPy has no wider type
        return _write_float(t, target, "{} * {} + {}".format(*_floats(t, (a, b, c))))
    values = ", ".join(_floats(t, (a, b, c)))
    wide = f"fma_wide({values})"
    by_kind = {"f32": f"fma32({values})", "f16": f"{wide}.astype(f16)", "bf16": f"round_to_odd({wide})"}
    _write_float(t, target, by_kind.get(t.kind, wide))


@_instruction("div")
def _div(t: Translator, target, a, b):
    if _floating(t):
        x, y = _floats(t, (a, b))
        return _write_float(t, target, f"{x} / {y}")
    t.write(target, f"div_int({t.read(a, t.kind)}, {t.read(b, t.kind)})", t.kind)


@_instruction("neg", "abs")
def _sign(t: Translator, target, a):
    """Of floats the sign bits alone change, whatever else they hold."""
    negates, kind = t.parts[0] == "neg", t.kind
    if not _floating(t):
        expression = f"(-{t.read(a, 'u' + kind[1:])})" if negates else f"np.abs({t.read(a, kind)})"
        return t.write(target, expression, "u" + kind[1:] if negates else kind)
    bits = width(kind)
    signs = 0x80008000 if kind.endswith("x2") else 1 << (bits - 1)
    constant = t.constant(signs if negates else ~signs, f"u{bits}")
    t.write(target, f"({t.read(a, f'b{bits}')} {'^' if negates else '&'} {constant})", f"b{bits}")


@_instruction("min", "max")
def _extreme(t: Translator, target, *operands):
    which = t.parts[0]
    if _floating(t):
        found, *rest = _floats(t, operands)
        for other in rest:
            pair = f"f{which}({found}, {other})"
            found = f"nan_of({found}, {other}, {pair})" if t.has("NaN") else pair
        return _write_float(t, target, found)
    if t.kind.endswith("x2"):
        a, b = _integer_pairs(t, operands)
        return t.write(target, f"np.{which}imum({a}, {b}).view(u32).reshape(-1)", "b32")
    a, b = (t.read(o, t.kind) for o in operands)
    t.write(target, f"np.{which}imum({a}, {b})", t.kind)


_FUNCTIONS = {
    "sqrt": "np.sqrt",
    "rcp": "reciprocal",
    "rsqrt": "rsqrt_approx",
    "ex2": "exp2_approx",
    "lg2": "log2_approx",
    "sin": "np.sin",
    "cos": "np.cos",
    "tanh": "tanh_approx",
}


@_instruction(*_FUNCTIONS)
def _function(t: Translator, target, a):
    (value,) = _floats(t, (a,))
    if t.parts[0] == "tanh" and t.kind != "f32":
        raise NotImplementedError("tanh of halves")
    _write_float(t, target, f"{_FUNCTIONS[t.parts[0]]}({value})")


@_instruction("testp")
def _testp(t: Translator, target, a):
    tests = {"finite": "np.isfinite", "infinite": "np.isinf", "number": "~np.isnan", "notanumber": "np.isnan"}
    t.write(target, f"({tests[t.parts[1]]}({t.read(a, t.kind)}))", "pred")


# Bits.


@_instruction("shl", "shr")
def _shift(t: Translator, target, a, n):
    left = t.parts[0] == "shl"
    kind = t.kind if t.kind[0] == "s" and not left else "u" + t.kind[1:]
    count = t.number(n)
    if count is not None and 0 <= count < width(kind):
        constant = t.constant(count, numpy_of(kind))
        return t.write(target, f"({t.read(a, kind)} {'<<' if left else '>>'} {constant})", kind)
    t.write(target, f"shift_{'left' if left else 'right'}({t.read(a, kind)}, {t.read(n, 'u32')})", kind)


@_instruction("shf")
def _funnel(t: Translator, target, low, high, count):
    values = ", ".join(t.read(o, "u32") for o in (low, high, count))
    t.write(target, f"funnel({values}, {t.has('l')}, {t.has('wrap')})", "u32")


@_instruction("lop3")
def _lop3(t: Translator, target, a, b, c, table):
    values = ", ".join(t.read(o, "b32") for o in (a, b, c))
    t.write(target, f"lop3({values}, {t.number(table)})", "b32")


@_instruction("mov")
def _mov(t: Translator, target, source):
    if isinstance(target, tuple):  # a register apart
        bits = width(t.kind) // len(target)
        for i, each in enumerate(target):
            shift = t.constant(i * bits, f"u{width(t.kind)}")
            t.write(each, f"({t.read(source, t.kind)} >> {shift}).astype(u{bits})", f"b{bits}")
    elif isinstance(source, tuple):  # registers together
        bits, whole = width(t.kind) // len(source), f"u{width(t.kind)}"
        terms = [
            f"({t.read(each, f'b{bits}')}.astype({whole}) << {t.constant(i * bits, whole)})"
            for i, each in enumerate(source)
        ]
        t.write(target, f"({' | '.join(terms)})", f"b{width(t.kind)}")
    else:
        kind = "pred" if t.kind == "pred" else f"b{width(t.kind)}"
        t.write(target, t.read(source, kind), kind)


# Comparisons and conversions.

_SYMBOLS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">",
            "hs": ">="}  # fmt: skip


def _compared(comparison: str, x: str, y: str, floating: bool) -> str:
    nan = f"(np.isnan({x}) | np.isnan({y}))"
    if comparison in ("num", "nan"):
        return nan if comparison == "nan" else f"~{nan}"
    if floating and comparison not in _SYMBOLS:  # ltu and the like hold of NaN, too
        return f"(({x} {_SYMBOLS[comparison[:-1]]} {y}) | {nan})"
    ordered = f"({x} {_SYMBOLS[comparison]} {y})"
    return f"({ordered} & ~{nan})" if floating and comparison == "ne" else ordered


@_instruction("setp")
def _setp(t: Translator, target, a, b, *more):
    names = target.split("|")
    if t.kind in ("f16x2", "bf16x2"):  # a predicate for each half
        x, y = _floats(t, (a, b))
        t.emit(f"t = {_compared(t.parts[1], x, y, True)}")
        values = [f"t[:, {i}]" for i in range(len(names))]
    else:
        t.emit(f"t = {_compared(t.parts[1], t.read(a, t.kind), t.read(b, t.kind), _floating(t))}")
        values = ["t", "~t"][: len(names)]
    combine = next(("&|^"[i] for i, p in enumerate(("and", "or", "xor")) if t.has(p)), None)
    for name, value in zip(names, values, strict=True):
        t.write(name, f"({value} {combine} {t.read(more[0], 'pred')})" if combine else value, "pred")


@_instruction("cvt")
def _cvt(t: Translator, target, *sources):
    to, source = t.parts[-2:]
    rounding = next((p for p in t.parts[1:-2] if re.fullmatch(r"r[nzmp]i?|rna", p)), None)
    clipped = "np.where({0} < 0, f32(0), {0})" if t.has("relu") else "{}"
    if to in ("f16x2", "bf16x2"):
        if len(sources) != 2:
            raise NotImplementedError("a conversion of packed values")
        high, low = (clipped.format(t.read(s, source)) for s in sources)
        halves = ", ".join(f"f32_to_{to[:-2]}({half}, '{rounding or 'rn'}')" for half in (low, high))
        return t.write(target, f"join({halves})", "b32")
    value = t.read(sources[0], source)
    if to == "tf32":
        return t.write(target, f"f32_to_tf32({clipped.format(value)}, '{rounding or 'rz'}')", "b32")
    if is_float(to):
        return _to_float(t, target, clipped.format(value), to, source, rounding)
    kind = numpy_of(to)
    if is_float(source):
        expression = f"float_to_int({value}, {kind}, '{rounding}')"
    else:
        expression = f"saturate_int({value}, {kind})" if t.has("sat") else f"{value}.astype({kind})"
    t.write(target, expression, to)


def _to_float(t: Translator, target: str, value: str, to: str, source: str, rounding: str | None) -> None:
    if not is_float(source):  # an integer, exact in fp64 up to 53 bits
        if to == "f32" and rounding in (None, "rn"):
            return t.write(target, f"{value}.astype(f32)", to)
        value, source = f"{value}.astype(f64)", "f64"
    if t.has("ftz") and source == "f32":
        value = f"flush({value})"
    if rounding is not None and rounding.endswith("i"):
        value, rounding = f"to_whole({value}, '{rounding}')", "rn"
    rounding = rounding or "rn"
    if to == "f64":
        value = f"{value}.astype(f64)"
    elif to == "f32":
        value = f"f64_to_f32({value}, '{rounding}')" if source == "f64" else f"{value}.astype(f32)"
    elif not (source == to == "f16"):
        value = f"round_to_odd({value})" if source == "f64" else f"{value}.astype(f32)"
        return t.write(target, f"f32_to_{to}({value}, '{rounding}')", "b16")
    _write_float(t, target, value, to)


# Memory.


def _space(t: Translator) -> str:
    spaces = ("global", "shared", "param", "local")
    return next((s for p in t.parts for s in spaces if p.split("_")[0] == s), "global")


def _several(operand: Operand) -> tuple:
    return operand if isinstance(operand, tuple) else (operand,)


def _list(t: Translator, operands: Operand, kind: str) -> str:
    return "[" + ", ".join(t.read(o, kind) for o in _several(operands)) + "]"


@_instruction("ld", "ldu")
def _ld(t: Translator, target, address, *_):
    space, size, targets = _space(t), width(t.kind) // 8, _several(target)
    if space == "param":
        name, _, offset = address.strip("[] ").partition("+")
        values = [f"X.parameter('{name.strip()}', {int(offset or 0) + i * size}, {size})" for i in range(len(targets))]
    else:
        where = t.address(address, 64 if space == "global" else 32)
        t.emit(f"t = X.memory.load('{space}', {t.at}, {where}, {t.mask}, {size}, {len(targets)})")
        values = [f"t[{i}]" for i in range(len(targets))]
    signed = t.kind[0] == "s"
    for each, value in zip(targets, values, strict=True):
        t.write(each, f"{value}.view(i{8 * size})" if signed else value, t.kind if signed else f"b{8 * size}")


@_instruction("st")
def _st(t: Translator, address, value, *_):
    space = _space(t)
    where = t.address(address, 64 if space == "global" else 32)
    t.emit(f"X.memory.store('{space}', {t.at}, {where}, {t.mask}, {_list(t, value, f'b{width(t.kind)}')})")


_VERBS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")


@_instruction("atom")
def _atom(t: Translator, target, address, *values):
    space, verb = _space(t), next(p for p in t.parts if p in _VERBS)
    kind = t.kind if t.kind.endswith("x2") or t.kind == "bf16" else numpy_of(t.kind)
    where = t.address(address, 64 if space == "global" else 32)
    given = _list(t, values, f"b{width(t.kind)}")
    t.emit(f"t = X.memory.atomic('{space}', {t.at}, '{verb}', '{kind}', {where}, {t.mask}, {given})")
    t.write(target, "t", f"b{width(t.kind)}")


@_instruction("red")
def _red(t: Translator, address, *values):
    _atom(t, "_", address, *values)


@_instruction("cp")
def _cp(t: Translator, *operands):
    verb = ".".join(t.parts[1:3])
    if verb in ("async.ca", "async.cg"):
        to, source, size, *rest = operands
        given = t.read(rest[0], "u32") if rest and "cache_hint" not in t.kind else "None"
        places = f"{t.address(to, 32)}, {t.address(source, 64)}"
        t.emit(f"X.asynchronous.copy({t.at}, {places}, {t.mask}, {t.number(size)}, {given})")
    elif verb == "async.commit_group":
        t.emit(f"X.asynchronous.commit('copy', {t.mask})")
    elif verb == "async.wait_group":
        t.emit(f"X.asynchronous.wait('copy', {t.number(operands[0])}, {t.mask}, R)")
    elif verb == "async.wait_all":
        t.emit(f"X.asynchronous.commit('copy', {t.mask})")
        t.emit(f"X.asynchronous.wait('copy', 0, {t.mask}, R)")
    else:
        raise NotImplementedError(verb)


@_instruction("fence")
def _fence(t: Translator, *_):
    if t.has("proxy"):
        t.emit(f"X.order(True, {t.mask})")


# Warps.


def _active(t: Translator) -> str:
    return f"X.masked({t.mask})"


@_instruction("shfl")
def _shfl(t: Translator, target, value, lane, clamp, *_):
    found, _, valid = target.partition("|")
    bounds = f"{t.read(lane, 'u32')}, {t.read(clamp, 'u32')}"
    t.emit(f"t, ok = warps.shuffle('{t.parts[2]}', X.full({t.read(value, 'b32')}), {bounds})")
    t.write(found, "t", "b32")
    if valid:
        t.write(valid, "ok", "pred")


@_instruction("vote")
def _vote(t: Translator, target, predicate, *_):
    kind = t.parts[2]
    value = f"X.full({t.read(predicate, 'pred')})"
    t.write(target, f"warps.vote('{kind}', {value}, {_active(t)})", "b32" if kind == "ballot" else "pred")


@_instruction("redux")
def _redux(t: Translator, target, value, *_):
    kind = t.kind.replace("b", "u")
    t.write(target, f"warps.redux('{t.parts[2]}', X.full({t.read(value, kind)}), {_active(t)})", kind)


@_instruction("elect")
def _elect(t: Translator, target, *_):
    found, _, elected = target.partition("|")
    t.write(elected, "X.elected", "pred")
    t.write(found, t.constant(0, "u32"), "b32")


# Matrices.


def _shape(t: Translator) -> str:
    return next(p for p in t.parts if re.fullmatch(r"m\d+n\d+k\d+", p))


@_instruction("ldmatrix")
def _ldmatrix(t: Translator, target, address):
    targets = _several(target)
    place = f"{t.address(address, 32)}, {t.mask}"
    t.emit(f"t = X.memory.load_matrices({t.at}, {place}, {len(targets)}, {t.has('trans')})")
    for i, each in enumerate(targets):
        t.write(each, f"t[{i}]", "b32")


@_instruction("stmatrix")
def _stmatrix(t: Translator, address, value):
    place = f"{t.address(address, 32)}, {t.mask}"
    t.emit(f"X.memory.store_matrices({t.at}, {place}, {_list(t, value, 'b32')}, {t.has('trans')})")


@_instruction("mma")
def _mma(t: Translator, d, a, b, c):
    types, shape = tuple(t.parts[-4:]), _shape(t)
    m, n, k = shape_of(shape)
    if (m, n) != (16, 8):
        raise NotImplementedError(f"mma of {shape}")
    operands = [f"[X.full(r) for r in {_list(t, operand, 'b32')}]" for operand in (a, b, c)]
    t.emit(f"X.flops('{types[1]}', {(m, n, k)}, {_active(t)})")
    t.emit(f"t = mma({types}, {', '.join(operands)})")
    for i, each in enumerate(_several(d)):
        t.write(each, f"t[{i}]", "b32")


@_instruction("wgmma")
def _wgmma(t: Translator, *operands):
    verb = t.parts[1]
    if verb == "commit_group":
        t.emit(f"X.asynchronous.commit('wgmma', {t.mask})")
    elif verb == "wait_group":
        t.emit(f"X.asynchronous.wait('wgmma', {t.number(operands[0])}, {t.mask}, R)")
    elif verb == "mma_async":
        shape = _shape(t)
        types = tuple(t.parts[t.parts.index(shape) + 1 :])
        d, a, b, scale, *signs = operands
        left = str(tuple(t.places[r] for r in a)) if isinstance(a, tuple) else t.read(a, "b64")
        right = f"{t.read(b, 'b64')}, {t.read(scale, 'pred')}"
        to = tuple(t.places[r] for r in d)
        signs = tuple(t.number(s) for s in signs)
        t.emit(f"X.asynchronous.product({t.at}, '{shape}', {types}, {to}, {left}, {right}, {signs}, {t.mask}, R)")


# Order and control: the scheduler does what a block's last instruction says.


@_instruction("bra", "ret", "exit")
def _leave(t: Translator, *_):
    t.emit(f"return {t.guard or 'None'}")


@_instruction("bar", "barrier")
def _bar(t: Translator, *operands):
    if t.parts[1] == "warp":
        return t.emit(f"X.order(False, {t.mask})")
    if t.guard or {"cluster", "arrive", "red"} & set(t.parts):
        raise NotImplementedError("this barrier")
    number = t.read(operands[0], "u32") if operands else t.constant(0, "u32")
    count = t.read(operands[1], "u32") if len(operands) > 1 else t.constant(t.kernel.threads, "u32")
    t.emit(f"return {number}, {count}")


@_instruction("trap")
def _trap(t: Translator, *_):
    t.emit(f"X.trap({t.at}, {t.mask})")


@_instruction("createpolicy")
def _createpolicy(t: Translator, target, *_):
    t.write(target, t.constant(0, "u64"), "b64")
