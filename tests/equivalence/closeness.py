"""How near two ways to the same number must be.

In float64 the two differ by rounding alone. The same way in float32 says how much rounding that
is: E, the largest difference between float32 and float64 over the tensor compared. Each way lies
within about E of the exact value and both within 2 E of each other; E is a sample and not a
bound, so it is doubled: 4 E, and in float64, where errors are 2⁻²⁹ times as large, 4 E · 2⁻²⁹.
Outputs are held to 1e-5 of the largest entry as well, whatever E is.
"""

from __future__ import annotations

from models import U32, U64
from torch import Tensor

# The largest of n errors that are spread evenly is below a quarter of their bound with a chance
# of 4⁻ⁿ, and the checks grant 4 E: at 8 entries that happens in one tensor of 65,000.
FEW = 8


def part(single: tuple[Tensor, Tensor], double: tuple[Tensor, Tensor]) -> float:
    """E, as a part of the largest entry."""
    E = max((s.double() - d).abs().max() for s, d in zip(single, double, strict=True))
    return E / double[0].abs().max()


def check(
    single: tuple[Tensor, Tensor],
    double: tuple[Tensor, Tensor],
    what: str = "",
    within: float | None = None,
    rounding: float = 0.0,
) -> None:
    """(one way, the other) in float32 and in float64: equal up to rounding in both.

    `within` bounds the difference in float32, as a part of the largest entry. A tensor of fewer
    than FEW entries is too small a sample for E; `rounding` is then what others of the same
    computation give, as a part of the largest entry.
    """
    largest = double[0].abs().max()
    E = part(single, double) * largest
    if double[0].numel() < FEW:
        E = max(E, rounding * largest)
    apart, precisely = ((a - b).abs().max() for a, b in (single, double))
    assert precisely <= 4 * E * U64 / U32, f"{what}: {precisely:.1e}, E {E:.1e}"
    assert apart <= 4 * E, f"{what}: {apart:.1e}, E {E:.1e}"
    assert within is None or apart <= within * largest, f"{what}: {apart:.1e} of {largest:.1e}"
