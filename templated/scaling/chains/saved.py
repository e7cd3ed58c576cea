"""Edges as plain data, for a file or a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import isfinite
from typing import Any

from templated.scaling.chains.edges import REMEMBERED, Edge, Outcome

_LONGEST_NAME = 256


def save(edges: Iterable[Edge], now: float) -> dict[str, Any]:
    """What JSON can hold. Ages are kept instead of times: the clock may be another one later."""
    return {
        "edges": [
            {
                "caller": edge.caller,
                "callee": edge.callee,
                "traced": edge.traced,
                "age": max(now - edge.seen, 0.0),
                "runs": [outcome and list(outcome) for outcome in edge.outcomes],
            }
            for edge in edges
        ]
    }


def load(plain: Mapping[str, Any], now: float) -> Iterator[Edge]:
    """The edges of what `save` gave. What is broken is left out."""
    rows = plain.get("edges")
    for row in rows if isinstance(rows, list) else ():
        try:
            yield _edge(row, now)
        except (LookupError, TypeError, ValueError, OverflowError):
            continue


def _edge(row: Mapping[str, Any], now: float) -> Edge:
    names = [row["caller"], row["callee"]]
    if not all(isinstance(name, str) and 0 < len(name) <= _LONGEST_NAME for name in names):
        raise ValueError
    age = float(row["age"])
    if not 0 <= age < float("inf"):
        raise ValueError
    edge = Edge(names[0], names[1], row["traced"] is True, now - age)
    edge.ran(*(_outcome(run) for run in row["runs"][-REMEMBERED:]))
    return edge


def _outcome(run: Any) -> Outcome | None:
    if run is None:
        return None
    first, last, count = float(run[0]), float(run[1]), int(run[2])
    if not (0 <= first <= last and isfinite(last) and 1 <= count <= 1000):
        raise ValueError
    return Outcome(first, last, count)
