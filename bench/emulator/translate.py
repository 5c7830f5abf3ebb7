"""PTX -> Python functions of NumPy statements, one function for each basic block.

A register is an array of raw bits with one element per thread, or a single one that all threads share; it is never
written into, only replaced. A register that lives in one block is a local variable of its function, the others are
entries of the list `R`. Each block has two functions: for all threads, and for those of a mask `M` alone. `X` is the
machine (machine.py). What an instruction becomes is in instructions.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import cache

import numpy as np

from . import arithmetic, control, matrix, warps
from .counters import class_of
from .ptx import Block, Instruction, Kernel, Operand, PtxError, names_in, parse

SHARED_BASE = 1024  # address of a program's shared memory; the first KiB is the system's on sm_90
_POISON = 0xFFFBFFFBFFFBFFFB  # in registers: NaN as a float of any size, wild as an address
_NUMBER = re.compile(r"-?(0[xX][\da-fA-F]+|\d+)U?")
_SPECIAL = re.compile(
    r"%(?:(tid|ntid|ctaid|nctaid)\.([xyz])"
    r"|(laneid|warpid|clock|clock64|globaltimer|smid|dynamic_smem_size|total_smem_size))"
)
_WRITES_NO_REGISTER = ("st.", "red.", "cp.", "stmatrix", "wgmma", "bar", "bra", "mbarrier")


def width(kind: str) -> int:
    """Bits of a type; a pair of halves has 32."""
    return 1 if kind == "pred" else 32 if kind.endswith("x2") else int(re.search(r"\d+$", kind)[0])


def is_float(kind: str) -> bool:
    return kind in ("f16", "bf16", "f32", "f64")


def numpy_of(kind: str) -> str:
    """The name of the NumPy type that a value of a PTX type is worked with as. Pairs and b* are raw bits."""
    if kind == "bf16":
        return "f32"
    return kind if is_float(kind) else ("i" if kind[0] == "s" else "u") + str(width(kind))


class Code:
    """A kernel that can be run."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.instructions = kernel, kernel.instructions
        self.ranks = np.array([*control.ranks(kernel), len(kernel.blocks) + 1])  # the last: of threads that are done
        translator = Translator(kernel)
        self.initial = translator.initial
        self.blocks = [CodeBlock(translator, block) for block in kernel.blocks]


class CodeBlock:
    """A block's functions, made when they are first asked for."""

    def __init__(self, translator: Translator, block: Block) -> None:
        self.translator, self.block = translator, block
        self.target = block.target
        self.classes = Counter(class_of(i.opcode) for i in block.instructions)
        self.leaves = block.last.opcode in ("ret", "exit")
        self.waits = block.last.opcode.startswith(("bar.sync", "bar.cta", "barrier"))
        self._functions: dict[bool, Callable] = {}

    def function(self, masked: bool) -> Callable:
        if masked not in self._functions:
            self._functions[masked] = self.translator.compile(self.block, masked)
        return self._functions[masked]


@cache
def translate(text: str) -> Code:
    return Code(parse(text))


class Translator:
    """Writes functions' text. `parts` and `at` are of the instruction that is being written."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.registers = kernel, kernel.registers
        self.starts, count = [], 0
        for block in kernel.blocks:
            self.starts.append(count)
            count += len(block.instructions)
        shared, local = self._sorted_registers()
        self.locals = {name: f"v{i}" for i, name in enumerate(local)}
        self.places = {name: i for i, name in enumerate(shared)}
        self.initial = [self._poison(name) for name in shared]
        self.constants: dict[str, np.ndarray] = {}
        self.lines: list[str] = []
        self.masked, self.guard, self.at = False, "", 0
        self.parts: list[str] = []

    # Registers.

    def _sorted_registers(self) -> tuple[list[str], list[str]]:
        """Those that live in R, and those of one block only, which writes them unconditionally before it reads them.
        What wgmma works on is written later than its instruction, and stays in R."""
        block_of: dict[str, int] = {}
        lasting: set[str] = set()
        for block in self.kernel.blocks:
            for i in block.instructions:
                writes = set() if i.opcode.startswith(_WRITES_NO_REGISTER) else set(names_in(i.operands[:1]))
                reads = {*names_in(i.operands[1:]), i.guard}
                for name in [*names_in(i.operands), i.guard]:
                    if name not in self.registers:
                        continue
                    if name not in block_of:
                        block_of[name] = block.number
                        if name not in writes or name in reads or i.guard:
                            lasting.add(name)
                    if block_of[name] != block.number or i.opcode.startswith("wgmma.mma"):
                        lasting.add(name)
        return [n for n in block_of if n in lasting], [n for n in block_of if n not in lasting]

    def _poison(self, name: str) -> np.ndarray:
        if self.registers[name] == "pred":
            return np.zeros(1, bool)
        bits = width(self.registers[name])
        return np.array([_POISON & (1 << bits) - 1], f"u{bits // 8}")

    # A block's function.

    def compile(self, block: Block, masked: bool) -> Callable:
        from .instructions import write_instruction  # it needs this module's names

        self.masked, self.lines = masked, []
        for at, instruction in enumerate(block.instructions, self.starts[block.number]):
            self.at = at
            self._begin(instruction)
            try:
                write_instruction(self, instruction.operands)
            except (KeyError, TypeError, ValueError, StopIteration, NotImplementedError) as error:
                raise PtxError(f"{self.kernel.name}: cannot run {instruction} ({error!r})") from error
        body = "\n    ".join(self.lines)
        space = {**vars(arithmetic), **self.constants, "np": np, "warps": warps, "mma": matrix.mma}
        exec(compile(f"def block(R, X, M):\n    {body}\n", f"<{self.kernel.name} block {block.number}>", "exec"), space)
        return space["block"]

    def _begin(self, instruction: Instruction) -> None:
        self.parts = instruction.opcode.replace("::", "_").split(".")
        self.guard = ""
        if instruction.guard:
            self.emit(f"g = {'~' * instruction.negated}{self.register(instruction.guard)}")
            self.guard = "g"

    def emit(self, line: str) -> None:
        self.lines.append(line)

    @property
    def mask(self) -> str:
        """The threads that an access is made for."""
        if self.guard and self.masked:
            return "(g & M)"
        return self.guard or ("M" if self.masked else "None")

    @property
    def kind(self) -> str:
        """The type at the end of the opcode."""
        return self.parts[-1]

    def has(self, modifier: str) -> bool:
        return modifier in self.parts

    # Operands.

    def register(self, name: str) -> str:
        return self.locals.get(name) or f"R[{self.places[name]}]"

    def number(self, text: Operand) -> int | None:
        """An integer immediate's value."""
        if not isinstance(text, str) or not _NUMBER.fullmatch(text):
            return None
        digits = text.rstrip("U")
        return int(digits, 16 if "x" in digits.lower() else 10)

    def constant(self, value: int | float, numpy_type: str) -> str:
        """The name of an array of one element."""
        if numpy_type[0] == "f":
            array = np.array([value], f"f{int(numpy_type[1:]) // 8}")
        else:
            size = int(numpy_type[1:]) // 8
            array = np.array([int(value) & (1 << 8 * size) - 1], f"u{size}").view(f"{numpy_type[0]}{size}")
        name = f"c_{numpy_type}_{array.tobytes().hex()}"
        self.constants[name] = array
        return name

    def read(self, operand: Operand, kind: str) -> str:
        """An expression of an operand's value as a type: bf16 as fp32; pairs and b* as raw bits."""
        bits = width(kind)
        if operand in self.registers:
            declared, found = self.registers[operand], self.register(operand)
            if declared == "pred":
                return found
            if width(declared) != bits:
                found += f".astype(u{bits})"
            if kind == "bf16":
                return f"bf16_to_f32({found})"
            return found if numpy_of(kind)[0] == "u" else f"{found}.view({numpy_of(kind)})"
        if operand.startswith("!"):
            return f"(~{self.read(operand[1:], kind)})"
        if kind == "pred":
            name = f"c_{bool(self.number(operand))}"
            self.constants[name] = np.array([name == "c_True"])
            return name
        value = self.number(operand)
        if operand[:2].lower() in ("0f", "0d"):  # a float by its bits, as fp32 or fp64
            bits_of = np.array([int(operand[2:], 16)], "u4" if operand[1] in "fF" else "u8")
            value = bits_of[0] if numpy_of(kind)[0] == "u" else bits_of.view(f"f{bits_of.itemsize}")[0]
        elif value is not None and kind in ("f16", "bf16"):  # by its bits, too
            half = np.array([value & 0xFFFF], np.uint16)
            value = half.view(np.float16)[0] if kind == "f16" else arithmetic.bf16_to_f32(half)[0]
        if value is not None:
            return self.constant(value, numpy_of(kind))
        if match := _SPECIAL.fullmatch(operand):
            found = f"X.{match[1]}['{match[2]}']" if match[1] else f"X.special('{match[3]}')"
            return found if bits == 32 else f"{found}.astype(u{bits})"
        for symbols in (self.kernel.shared, self.kernel.local):
            if operand in symbols.offsets:
                return self.constant(SHARED_BASE + symbols.offsets[operand], f"u{bits}")
        raise ValueError(f"unknown operand {operand}")

    def write(self, target: str, expression: str, kind: str) -> None:
        """Assign an expression whose arrays are of a type; of bf16, of its bits."""
        if target == "_":
            return
        if self.registers[target] != "pred":
            stored = numpy_of("b16" if kind == "bf16" else kind)
            letter, has, wanted = stored[0], int(stored[1:]), width(self.registers[target])
            if letter == "i" and has < wanted:
                expression, has = f"({expression}).astype(i{wanted})", wanted
            if letter != "u":
                expression = f"({expression}).view(u{has})"
            if has != wanted:
                expression = f"({expression}).astype(u{wanted})"
        found = self.register(target)
        mask = self.guard
        if self.masked and target not in self.locals:
            mask = "(g & M)" if mask else "M"
        self.emit(f"{found} = np.where({mask}, {expression}, {found})" if mask else f"{found} = {expression}")

    def address(self, text: str, bits: int) -> str:
        """[register + offset] as an array of addresses."""
        terms = text.strip("[] ").replace("+-", "+ -").split("+")
        offset = sum(self.number(t.strip()) or 0 for t in terms)
        found = [self.read(t.strip(), f"u{bits}") for t in terms if self.number(t.strip()) is None]
        if offset or not found:
            found.append(self.constant(offset, f"u{bits}"))
        return " + ".join(found)
