"""The report on a compressed model: bytes, bits and errors of its layers, as a table."""

from __future__ import annotations

from dataclasses import dataclass

from ..files import sentence


@dataclass(frozen=True)
class Layer:
    """One layer. Errors are those against the original layer: the relative L2 error, and the largest absolute one."""

    name: str  # "" is the model itself
    kind: str  # the class of the original layer
    shape: tuple[int, ...] | None  # the weight's; None if there is none
    bits: int | None  # how many an index has; None if the layer is not shared
    bytes_before: int  # of its parameters and buffers in a state_dict; a tensor that layers share is counted once
    bytes_after: int
    note: str = ""  # why the layer was not changed, or what else was done to it
    weight_error: float | None = None
    weight_error_max: float | None = None
    groups: tuple[tuple[int, ...], ...] = ()  # from similar_filters: output channels that are alike
    output_error: float | None = None  # the error of its outputs on the sample, given its inputs in the original model


@dataclass(frozen=True)
class Report:
    """The layers, in the model's order; `print(report)` shows a table that ends with the sums."""

    layers: tuple[Layer, ...]
    output_error: float | None = None  # relative L2 error of the model's outputs on the sample
    rule: str = ""  # how bits were chosen, if a limit was given

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def bits(self) -> dict[str, int]:
        """Bits of the shared layers, by name."""
        return {layer.name: layer.bits for layer in self.layers if layer.bits is not None}

    def __str__(self) -> str:
        heads = (
            "layer",
            "kind",
            "weight",
            "bits",
            "bytes before",
            "after",
            "weight error",
            "largest",
            "output error",
            "",
        )
        rows = [heads, *map(_row, self.layers)]
        total = ("total", "", "", "", f"{self.bytes_before:,}", f"{self.bytes_after:,}", "", "")
        rows.append((*total, _number(self.output_error), smaller(self.bytes_before, self.bytes_after)))
        shown = [column for column in zip(*rows, strict=True) if any(column[1:-1]) or column[0] == ""]
        widths = [max(map(len, column)) for column in shown]
        texts = (0, 1, 2, len(shown) - 1)  # these to the left, numbers to the right
        lines = [
            "  ".join(f"{cell:<{width}}" if at in texts else f"{cell:>{width}}" for at, (cell, width) in
                      enumerate(zip(row, widths, strict=True))).rstrip()
            for row in zip(*shown, strict=True)
        ]  # fmt: skip
        return "\n".join([*lines, *([self.rule] if self.rule else [])])


def smaller(before: int, after: int) -> str:
    return f"{before / after:.2f}x smaller" if after else ""


def _row(layer: Layer) -> tuple[str, ...]:
    return (
        sentence(layer.name, 60) or "(model)",
        layer.kind,
        "" if layer.shape is None else "x".join(map(str, layer.shape)),
        "" if layer.bits is None else str(layer.bits),
        f"{layer.bytes_before:,}",
        f"{layer.bytes_after:,}",
        _number(layer.weight_error),
        _number(layer.weight_error_max),
        _number(layer.output_error),
        layer.note,
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
