"""Whether Triton has compiled code that touches too early what a matrix instruction of sm_90 still works on.

    assert hazards(compiled) == []

On sm_90 a matrix instruction (wgmma) is in flight until a wait has seen its end. Meanwhile it reads its operands, from
shared memory, the first one also from registers, and writes its sums, which nothing else may read or write. (A copy is
passed on: Triton's waits name copies of what they wait for, and ptxas waits by itself before it makes one.) A pipelined
loop may leave some in flight and go into its next round. Triton has compiled loops in which that round writes an
operand of theirs:

    shared memory  a tile that is loaded for a product and for something else has one buffer less than the waits need,
                   and the tile after it is copied into the buffer that is being read (3.6 to 3.9)
    registers      an operand that is computed has the same registers in every round (3.6)

TTGIR shows the first, PTX the second and what happens to sums. Both are followed as they would run, for as many rounds
of a loop as it takes to come back to the same buffers.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass, field
from typing import NamedTuple

from triton.compiler import CompiledKernel

__all__ = ["hazards", "overwritten_buffers", "touched_registers"]


def hazards(compiled: CompiledKernel) -> list[str]:
    """What a kernel touches too early, as sentences; other chips have no such instruction."""
    if "wgmma" not in compiled.asm.get("ptx", ""):
        return []
    return [*overwritten_buffers(compiled.asm["ttgir"]), *touched_registers(compiled.asm["ptx"])]


# TTGIR. Looked at is what decides which buffer is written or read, and when: scalar integers, buffers, copies,
# products, waits, loops and branches.


def overwritten_buffers(ttgir: str) -> list[str]:
    """Writes to shared memory that a product in flight reads."""
    run = _Run(ttgir)
    run.block(_parse(ttgir))
    return [*run.problems]


@dataclass
class _Op:
    """A line; of a loop or a branch, with the lines in it."""

    name: str
    results: list[str]
    operands: list[str]  # the values that the line names before its types, in order
    text: str
    regions: list[list[_Op]] = field(default_factory=list)


_LINE = re.compile(r'(?:(%[\w.:-]+) = )?"?([\w.]+)"?(.*)')
_VALUE = re.compile(r"%[\w.-]+(?:#\d+)?")


def _parse(ttgir: str) -> list[_Op]:
    blocks: list[list[_Op]] = [[]]
    for line in map(str.strip, ttgir.splitlines()):
        if line.startswith("}"):
            blocks.pop()
        elif match := _LINE.match(line):
            result, name, rest = match.groups()
            blocks[-1].append(_Op(name, _names(result or ""), _VALUE.findall(rest.split(" : ")[0]), rest))
        if line.endswith("{"):  # of what the last line began, or "} else {"
            blocks[-1][-1].regions.append([])
            blocks.append(blocks[-1][-1].regions[-1])
    return blocks[0]


def _names(result: str) -> list[str]:
    """%a:2 is %a#0 and %a#1."""
    name, _, count = result.partition(":")
    return [f"{name}#{i}" for i in range(int(count))] if count else [name]


_COMPARISONS = {"slt": operator.lt, "sle": operator.le, "sgt": operator.gt, "sge": operator.ge, "eq": operator.eq}
_SUMS = {"arith.addi": operator.add, "arith.subi": operator.sub, "arith.muli": operator.mul}


@dataclass(frozen=True)
class _Buffer:
    """One of an allocation's buffers; of number None any of them."""

    allocation: str
    number: int | None = None

    def may_be(self, other: _Buffer) -> bool:
        return self.allocation == other.allocation and (None in (self.number, other.number) or self == other)


class _Run:
    """A program on its way: what is known of its values, and which products are in flight, with what they read."""

    def __init__(self, ttgir: str) -> None:
        buffers = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x", ttgir)
        pending = re.findall(r"pendings = (\d+)", ttgir)
        self.rounds = max(map(int, buffers), default=1) + max(map(int, pending), default=0) + 1
        self.values: dict[str, int | _Buffer | None] = {}
        self.flying: list[tuple[str, list[_Buffer]]] = []
        self.problems: dict[str, None] = {}  # each once, in order

    def block(self, ops: list[_Op]) -> list[int | _Buffer | None]:
        """Run lines; what they yield."""
        for op in ops:
            found = self.found(op, [self.values.get(name) for name in op.operands])
            self.values.update(zip(op.results, found or [None] * len(op.results), strict=False))
        yielded = ops[-1].operands if ops and ops[-1].name == "scf.yield" else []
        return [self.values.get(name) for name in yielded]

    def found(self, op: _Op, given: list[int | _Buffer | None]) -> list[int | _Buffer | None] | None:
        """What a line gives, where that is known."""
        if op.name == "arith.constant":
            number = re.match(r" (-?\d+) :", op.text)
            return [int(number[1])] if number else None
        if op.name in _SUMS and None not in given:
            return [_SUMS[op.name](*given)]
        if op.name == "arith.cmpi" and None not in given:
            compare = _COMPARISONS.get(op.text.split(",")[0].strip())
            return [int(compare(*given))] if compare else None
        if op.name == "arith.select" and given[0] is not None:
            return [given[1] if given[0] else given[2]]
        if op.name == "ttg.local_alloc":
            buffer = _Buffer(op.results[0])
            if given:  # its contents
                self.write(op, [buffer])
            return [buffer]
        if op.name == "ttg.memdesc_index":
            return [_Buffer(given[0].allocation, given[1])]
        if op.name.startswith("ttg.memdesc_"):
            return given[:1]  # a part of the buffer, or another view of it
        if "copy_global_to_local" in op.name or op.name == "ttg.local_store":
            return self.write(op, given)
        if op.name == "ttng.warp_group_dot":
            self.flying.append((op.results[0], [b for b in given if isinstance(b, _Buffer)]))
            return self.land(None if "isAsync = true" in op.text else 0)
        if op.name == "ttng.warp_group_dot_wait":
            self.land(int(re.search(r"pendings = (\d+)", op.text)[1]))
            return given
        if op.name == "scf.for":
            return self.loop(op, given)
        if op.name == "scf.if":
            return self.branch(op)
        for _ in range(self.rounds if op.name == "scf.while" else 1):
            for region in op.regions:
                self.block(region)
        return None

    def write(self, op: _Op, given: list[int | _Buffer | None]) -> None:
        for buffer in (b for b in given if isinstance(b, _Buffer)):
            for product, operands in self.flying:
                if any(buffer.may_be(read) for read in operands):
                    self.problems[f"{op.results[0]} writes a buffer of {buffer.allocation} that {product} reads"] = None

    def land(self, pending: int | None) -> None:
        """All products end but the last so many; None: none does."""
        if pending is not None:
            self.flying = self.flying[max(0, len(self.flying) - pending) :]

    def loop(self, op: _Op, given: list[int | _Buffer | None]) -> list[int | _Buffer | None]:
        counter, *carried = op.operands[0], *op.operands[4::2]
        (start, _end, step), values = given[1:4], given[5::2]
        for i in range(self.rounds):
            self.values[counter] = None if start is None or step is None else start + i * step
            self.values.update(zip(carried, values, strict=True))
            values = self.block(op.regions[0])
        return [None] * len(op.results)  # it depends on how many rounds there were

    def branch(self, op: _Op) -> None:
        before, ends = self.flying, []
        for region in op.regions:
            self.flying = [*before]
            self.block(region)
            ends.append(self.flying)
        self.flying = max([before, *ends] if len(ends) == 1 else ends, key=len)  # at the worst


# PTX. Matrix instructions are committed in groups; a wait leaves so many of the latest groups in flight.


def touched_registers(ptx: str) -> list[str]:
    """Instructions that write a register which a matrix instruction in flight reads, or touch one of its sums."""
    program, labels = _statements(ptx)
    problems: dict[str, None] = {}  # each once, in order
    seen, waiting = set(), [(0, _Flight())]
    while waiting:
        place, flight = waiting.pop()
        while place < len(program) and (place, flight) not in seen:
            seen.add((place, flight))
            condition, opcode, operands = program[place]
            if written := _written(operands) & flight.read:
                problems[f"{opcode} writes {', '.join(sorted(written))}, which a matrix instruction reads"] = None
            if touched := _touched(condition, opcode, operands) & flight.sums:
                problems[f"{opcode} touches {', '.join(sorted(touched))}, where a matrix instruction sums"] = None
            flight = flight.after(opcode, operands)
            place += 1
            if opcode.startswith("bra"):
                waiting.append((labels[operands], flight))
            if opcode.startswith(("bra", "ret")) and not condition:
                break
    return [*problems]


class _Group(NamedTuple):
    """Registers of matrix instructions that are committed together."""

    read: frozenset[str] = frozenset()
    sums: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Flight:
    """The groups in flight; the last one is not committed yet."""

    groups: tuple[_Group, ...] = (_Group(),)

    @property
    def read(self) -> frozenset[str]:
        return frozenset().union(*(group.read for group in self.groups))

    @property
    def sums(self) -> frozenset[str]:
        return frozenset().union(*(group.sums for group in self.groups))

    def after(self, opcode: str, operands: str) -> _Flight:
        *committed, last = self.groups
        if opcode.startswith("wgmma.mma_async"):
            sums, *read = _lists(operands)
            return _Flight((*committed, _Group(last.read.union(*read), last.sums | sums)))
        if opcode.startswith("wgmma.commit_group"):
            return _Flight((*self.groups, _Group()))
        if opcode.startswith("wgmma.wait_group"):
            return _Flight((*committed[max(0, len(committed) - int(operands)) :], last))
        if copied := _copied(opcode, operands):
            to, of = copied
            found = (_Group(g.read, g.sums | {to}) if of in g.sums else g for g in self.groups)
            return _Flight(tuple(found))
        return self


def _lists(operands: str) -> list[frozenset[str]]:
    """A matrix instruction's registers in braces: its sums, and the first operand where it is in registers."""
    return [frozenset(_REGISTER.findall(text)) for text in re.findall(r"{(.*?)}", operands)]


def _copied(opcode: str, operands: str) -> list[str] | None:
    """A register, and the one that is copied to it."""
    found = operands.replace(" ", "").split(",") if opcode.startswith("mov.b32") else []
    return found if len(found) == 2 and all(map(_REGISTER.fullmatch, found)) else None


def _touched(condition: str | None, opcode: str, operands: str) -> frozenset[str]:
    """All registers of an instruction but the one that is copied; of a matrix instruction not its sums, to which
    several may add in turn."""
    if opcode.startswith("wgmma.mma_async"):
        return frozenset().union(*_lists(operands)[1:])
    if copied := _copied(opcode, operands):
        return frozenset(copied[:1])
    return frozenset(_REGISTER.findall(f"{condition or ''} {operands}"))


_REGISTER = re.compile(r"%\w+")
_STATEMENT = re.compile(r"[{\s]*(@!?%\w+)?\s*([a-z][\w.:]*)\s*(.*)")
_LABEL = re.compile(r"(\$L__BB\w+):")


def _written(operands: str) -> frozenset[str]:
    """Registers of the first operand: what an instruction writes, unless that is an address."""
    return frozenset(_REGISTER.findall(re.match(r"{.*?}|[^,[]*", operands)[0]))


def _statements(ptx: str) -> tuple[list[tuple[str | None, str, str]], dict[str, int]]:
    """Instructions as (condition, opcode, operands), and where labels are among them."""
    program: list[tuple[str | None, str, str]] = []
    labels: dict[str, int] = {}
    for line in ptx[ptx.index("\n{") :].splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(program)
            continue
        for text in line.partition("//")[0].split(";"):
            if statement := _STATEMENT.match(text):
                condition, opcode, operands = statement.groups()
                program.append((condition, opcode, operands.strip()))
    return program, labels
