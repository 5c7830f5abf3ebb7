"""What a GPU can do at the most, for modelled floors."""

from __future__ import annotations

from dataclasses import dataclass

from tritonshare.op import Cost


@dataclass(frozen=True)
class Roofs:
    """Rates that a long copy and a large matrix product reach."""

    name: str
    bytes_per_second: float
    flops_per_second: dict[str, float]  # by how products are computed

    def floor(self, cost: Cost, product: str) -> float:
        """The least time of a pass, in microseconds: MODELLED, the larger of its bytes' and its products' time."""
        return 1e6 * max(cost.bytes / self.bytes_per_second, cost.flops / self.flops_per_second[product])


# Copy and bf16 were measured on this GPU through torch (8.6 GB copied; an 8192^3 product of random numbers); TF32 and
# fp32 are the vendor's rates scaled alike. No kernel of this library has been timed on it yet.
H200 = Roofs("H200", 4.3e12, {"fp16": 790e12, "bf16": 790e12, "tf32": 400e12, "ieee": 67e12})
