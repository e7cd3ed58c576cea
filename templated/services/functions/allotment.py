"""The arithmetic of instances that are kept: what cannot be is refused with the sum."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from templated.errors import InvalidRequest
from templated.journal import FunctionRow
from templated.model.function import Provisioned


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What bounds the instances of all functions together; None: nothing does."""

    concurrency: int | None = None
    clones: int | None = None

    def bounds(self) -> list[tuple[str, int]]:
        """Each by the name that it has in the configuration."""
        named = [("functions.concurrency", self.concurrency), ("limits.clones", self.clones)]
        return [(name, number) for name, number in named if number is not None]


def require_sense(name: str, row: FunctionRow, provisioned: Collection[Provisioned]) -> None:
    """Raise InvalidRequest when a function is to keep more instances than it may have."""
    parts = [f"{one.count} for {one.qualifier}" for one in provisioned]
    if row.least:
        parts.insert(0, f"{row.least} by its min")
    kept = row.least + sum(one.count for one in provisioned)
    what = f"function {name} is to keep {_sum(parts, kept)}"
    if row.most is not None and kept > row.most:
        raise InvalidRequest(
            f"{what}, and its max is {row.most}",
            hint=f"keep less, or: templated function scale {name} --max {kept}",
        )
    if row.reserved is not None and kept > row.reserved:
        raise InvalidRequest(
            f"{what}, and {row.reserved} of its requests may run at once",
            hint=f"keep less, or: templated function reserve {name} {kept}",
        )


def require_room(name: str, kept: Mapping[str, int], more: int, capacity: Capacity) -> None:
    """Raise InvalidRequest when a function cannot keep so many instances more than now, beside
    what all keep."""
    own = kept.get(name, 0) + more
    others = sum(kept.values()) - kept.get(name, 0)
    for key, most in capacity.bounds():
        if own + others > most:
            raise InvalidRequest(
                f"{own} kept for {name} + {others} for other functions = {own + others} "
                f"instances, and {key} is {most}",
                hint=f"at most {max(0, most - others)} can be kept for it; keep less, or raise "
                f"{key}",
            )


def _sum(parts: list[str], total: int) -> str:
    return f"{' + '.join(parts)} = {total} instances" if len(parts) > 1 else f"{total} instances"
