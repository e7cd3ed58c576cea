"""States and what may follow what: one guard for every entity that has a life.

An entity has an enum of its states and a table. All code changes a state by `move`, so that a move
that the table does not have is found where it is made, and is never stored.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TypeAlias, TypeVar

from templated.errors import Defect

S = TypeVar("S", bound=enum.Enum)
Table: TypeAlias = Mapping[S, frozenset[S]]
"""Every state, and the states that may follow it; none for a last one."""


def move(table: Table[S], old: S, new: S, what: str) -> S:
    """Return `new`, the state after `old`. Raises Defect when the table does not allow that.

    `what` names the entity in the error, as in "clone fn-123".
    """
    if new not in table[old]:
        raise Defect(f"{what} is {old.value}, it cannot become {new.value}")
    return new
