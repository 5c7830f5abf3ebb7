"""PTX text -> a record of its kernel: parameters, shared symbols, registers and basic blocks.

It reads what LLVM's NVPTX backend and Triton's inline assembly emit: one entry, no calls.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

Operand = str | tuple  # a name, a number or an address as written; a tuple of those that stood in braces


class PtxError(ValueError):
    """PTX that the emulator cannot run."""


@dataclass(frozen=True)
class Parameter:
    name: str
    bytes: int


@dataclass(frozen=True)
class Instruction:
    """`@!guard opcode operands;` at `line` (file:line:column) of the source."""

    opcode: str
    operands: tuple[Operand, ...] = ()
    guard: str = ""  # a predicate register
    negated: bool = False
    line: str = ""
    text: str = ""

    def __str__(self) -> str:
        return f"{self.line or 'no line'}: {self.text}"


@dataclass
class Block:
    """Instructions of which only the last may jump or wait for other threads."""

    number: int
    instructions: list[Instruction]
    target: int | None = None  # the block that its branch leads to

    @property
    def last(self) -> Instruction:
        return self.instructions[-1]


@dataclass
class Symbols:
    """Arrays in a memory space, laid out one behind the other: name -> offset."""

    offsets: dict[str, int] = field(default_factory=dict)
    size: int = 0

    def add(self, name: str, size: int, align: int) -> None:
        self.offsets[name] = -(-self.size // align) * align
        self.size = self.offsets[name] + size


@dataclass
class Kernel:
    name: str
    parameters: list[Parameter]
    threads: int  # of a program
    registers: dict[str, str] = field(default_factory=dict)  # name -> type without its dot: pred, b32, ...
    shared: Symbols = field(default_factory=Symbols)
    local: Symbols = field(default_factory=Symbols)  # of each thread
    blocks: list[Block] = field(default_factory=list)

    @property
    def instructions(self) -> list[Instruction]:
        return [i for block in self.blocks for i in block.instructions]


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.MULTILINE)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", re.DOTALL)
_THREADS = re.compile(r"\.(?:reqntid|maxntid)\s+([\d,\s]+)")
_ARRAY = re.compile(r"\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.b(\d+)\s+([\w$]+)\[(\d*)\]")
_LINE_DIRECTIVE = re.compile(r"^(\s*\.(?:loc|pragma)\b[^\n;]*);?$", re.MULTILINE)  # ends without a semicolon
_TOKEN = re.compile(r"\s*(?:([{}])|([$\w%]+):(?!:)|([^;{]*(?:\{[^}]*\}[^;{]*)*);)")
_STATEMENT = re.compile(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_ENDS_BLOCK = re.compile(r"bra|ret|exit|trap|bar\.(sync|cta|arrive|red)|barrier|mbarrier\.(try|test)_wait")


def parse(text: str) -> Kernel:
    text = _COMMENT.sub("", text)
    entry = _ENTRY.search(text)
    if entry is None:
        raise PtxError("there is no entry")
    name, parameters, directives = entry.groups()
    threads = 1
    for axis in _THREADS.search(directives)[1].split(","):
        threads *= int(axis)
    kernel = Kernel(name, [_parameter(p) for p in parameters.split(",") if p.strip()], threads)
    for space, align, bits, symbol, elements in _ARRAY.findall(text):
        getattr(kernel, space).add(symbol, int(elements or 0) * int(bits) // 8, int(align or 16))
    _Body(kernel, dict(_FILE.findall(text))).read(_LINE_DIRECTIVE.sub(r"\1;", text[entry.end() :]))
    return kernel


def _parameter(declaration: str) -> Parameter:
    words = declaration.split()
    bits = next(int(re.sub(r"\D", "", w)) for w in words if re.fullmatch(r"\.[busf]\d+", w))
    name, _, elements = words[-1].partition("[")
    return Parameter(name, bits // 8 * int(elements.rstrip("]") or 1) if elements else bits // 8)


class _Body:
    """Fills in a kernel's registers and blocks. Braces of inline assembly open scopes with registers of their own."""

    def __init__(self, kernel: Kernel, files: dict[str, str]) -> None:
        self.kernel, self.files = kernel, files
        self.scopes: list[dict[str, str]] = [{}]
        self.scope_count = 0
        self.labels: dict[str, int] = {}
        self.blocks: list[list[Instruction]] = [[]]
        self.line = ""

    def read(self, text: str) -> None:
        position = 0
        while self.scopes:
            token = _TOKEN.match(text, position)
            if token is None:
                raise PtxError(f"{self.kernel.name}: cannot read {text[position : position + 80].strip()!r}")
            position = token.end()
            brace, label, statement = token.groups()
            if brace == "{":
                self.scopes.append({})
                self.scope_count += 1
            elif brace == "}":
                self.scopes.pop()
            elif label:
                if self.blocks[-1]:
                    self.blocks.append([])
                self.labels[label] = len(self.blocks) - 1
            elif statement.strip():
                self._statement(" ".join(statement.split()))
        self._finish()

    def _statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self._declare(text)
        elif text.startswith(".loc "):
            file, line, column = text.replace(",", " ").split()[1:4]
            self.line = f"{self.files.get(file, file).rsplit('/', 1)[-1]}:{line}:{column}"
        elif text.startswith((".branchtargets", ".callprototype")):
            raise PtxError(f"{self.kernel.name}: cannot run {text}")
        elif not text.startswith("."):
            instruction = self._instruction(text)
            self.blocks[-1].append(instruction)
            if _ENDS_BLOCK.match(instruction.opcode):
                self.blocks.append([])

    def _declare(self, text: str) -> None:
        _, kind, names = text.split(None, 2)
        for name in names.replace(" ", "").split(","):
            ranged = re.fullmatch(r"([%\w$]+)<(\d+)>", name)
            for each in [f"{ranged[1]}{i}" for i in range(int(ranged[2]))] if ranged else [name]:
                known_as = each
                if len(self.scopes) > 1:
                    known_as = self.scopes[-1][each] = f"{each}@{self.scope_count}"
                self.kernel.registers[known_as] = kind[1:]

    def _instruction(self, text: str) -> Instruction:
        match = _STATEMENT.fullmatch(text)
        if match is None:
            raise PtxError(f"{self.kernel.name}: cannot read {text!r}")
        negated, guard, opcode, operands = match.groups()
        renamed = {old: new for scope in self.scopes for old, new in scope.items()}
        found = tuple(_operand(o, renamed) for o in _split(operands))
        return Instruction(opcode, found, renamed.get(guard, guard or ""), bool(negated), self.line, text)

    def _finish(self) -> None:
        if not self.blocks[-1]:
            self.blocks[-1].append(Instruction("ret", text="ret"))
        for number, instructions in enumerate(self.blocks):
            block = Block(number, instructions)
            if block.last.opcode.startswith("bra"):
                block.target = self.labels[block.last.operands[0]]
            self.kernel.blocks.append(block)


def _split(text: str) -> list[str]:
    """The parts between commas that stand in no brackets."""
    found, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            found.append(text[start:i].strip())
            start = i + 1
    return [part for part in (*found, text[start:].strip()) if part]


def _operand(text: str, renamed: dict[str, str]) -> Operand:
    if text.startswith("{"):
        return tuple(_operand(part, renamed) for part in _split(text[1:-1]))
    if text.startswith("[") and "," in text:
        raise PtxError(f"cannot address {text}")
    return re.sub(r"[%$\w]+", lambda m: renamed.get(m[0], m[0]), text) if renamed else text


def names_in(operand: Operand) -> list[str]:
    """The names and numbers that stand in an operand."""
    if isinstance(operand, tuple):
        return [name for part in operand for name in names_in(part)]
    return re.findall(r"[%$\w@.]+", operand)
