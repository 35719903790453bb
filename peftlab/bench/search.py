"""Where the best learning rate lies: rates are tried until the best has a worse one on either side.

A search walks on one ladder, two rungs a decade, which is the same for every method. It begins
with three rungs around a first guess and goes on beyond the end that is best, until the best rate
is inside the tried ones or `MOST` are tried. So every method gets as many tries as it needs, and a
first guess that was bad costs tries and nothing else.
"""

from __future__ import annotations

import math

MOST = 7  # rates that one search may try
LADDER = tuple(float(f"{digit}e{power}") for power in range(-7, 3) for digit in (1, 3))


def around(guess: float) -> tuple[float, ...]:
    """The three rungs that a search begins with: the nearest to the guess and its neighbours.

    Raises ValueError for a guess that is outside the ladder, or at its end.
    """
    if not LADDER[1] <= guess <= LADDER[-2]:
        raise ValueError(f"a rate of {guess}: allowed is {LADDER[1]} to {LADDER[-2]}")
    at = min(range(len(LADDER)), key=lambda i: abs(math.log(LADDER[i] / guess)))
    return LADDER[at - 1 : at + 2]


def best(merits: dict[float, tuple]) -> float:
    """The rate with the largest merit; of equal ones the smaller rate."""
    return max(sorted(merits), key=merits.__getitem__)


def inside(merits: dict[float, tuple]) -> bool:
    """Whether a smaller and a larger rate than the best were tried."""
    return min(merits) < best(merits) < max(merits)


def further(merits: dict[float, tuple]) -> float | None:
    """The next rate to try: beyond the end that is best. None if the search is over."""
    if inside(merits) or len(merits) >= MOST:
        return None
    at = LADDER.index(best(merits))
    step = 1 if best(merits) == max(merits) else -1
    return LADDER[at + step] if 0 <= at + step < len(LADDER) else None
