"""The daemon's only memory: see `store`; the rows of functions are in `functions`."""

from __future__ import annotations

from templated.journal.egresses import EgressRow, EgressRows
from templated.journal.functions import FunctionRow, FunctionRows
from templated.journal.rows import CloneRow, EventRow, GenerationRow, now
from templated.journal.store import Journal

__all__ = [
    "CloneRow",
    "EgressRow",
    "EgressRows",
    "EventRow",
    "FunctionRow",
    "FunctionRows",
    "GenerationRow",
    "Journal",
    "now",
]
