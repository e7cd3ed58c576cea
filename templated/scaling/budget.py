"""What stays when the memory for all that is kept ready is short."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

# Ranks of instances that are not up for choice: with a request, and promised to the user.
SERVING, PROMISED = -math.inf, -1e9


class Claim(NamedTuple):
    """Instances of one function that one forecast is about. What is worth most sorts first."""

    rank: float
    """Minus the worth: the chance to avoid a cold start in the next minute, for each GiB."""
    key: str
    first: int
    """The place of the first one among the function's instances, from 1."""
    size: int
    mib: float
    """Of one instance."""


def share(claims: Iterable[Claim], memory: float) -> tuple[dict[str, int], float]:
    """How many instances of each function stay, and the worth that was not enough.

    The claims of a function lie one behind the other. Serving instances stay in any case.
    """
    kept: dict[str, int] = {}
    room = memory
    refused = 0.0
    for claim in sorted(claims):
        fits = claim.size
        if claim.rank > SERVING:
            # What follows one that was refused is worth no more, and would leave a hole.
            if kept.get(claim.key, 0) != claim.first - 1:
                continue
            fits = min(fits, max(0, math.floor(room / claim.mib + 1e-9)))
            if fits < claim.size:
                refused = max(refused, -claim.rank)
        kept[claim.key] = claim.first - 1 + fits
        room -= fits * claim.mib
    return kept, refused
