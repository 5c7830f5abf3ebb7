"""What became of a model's layers: bytes, bits and errors, as a table."""

from __future__ import annotations

from dataclasses import dataclass

from ..files import sentence


@dataclass(frozen=True)
class Layer:
    """One layer. Errors are against what there was before: relative L2, and the largest of any weight, absolute."""

    name: str  # "" is the model itself
    kind: str  # of the layer before
    shape: tuple[int, ...] | None  # of the weight; None where there is none
    bits: int | None  # of an index; None: not shared
    bytes_before: int  # of all parameters and buffers in a state_dict; what layers have in common counts in the first
    bytes_after: int
    note: str = ""  # why the layer is as it was, or what else became of it
    weight_error: float | None = None
    weight_error_max: float | None = None
    groups: tuple[tuple[int, ...], ...] = ()  # of similar_filters: output channels that are alike
    output_error: float | None = None  # of the layer's outputs on the sample, from the inputs that it had before


@dataclass(frozen=True)
class Report:
    """The layers, in the model's order; `print(report)` shows a table that ends with the sums."""

    layers: tuple[Layer, ...]
    output_error: float | None = None  # of the model's outputs on the sample, relative L2
    rule: str = ""  # how the bits were chosen, where they were

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def bits(self) -> dict[str, int]:
        """Bits by name, of the layers that are shared now."""
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
