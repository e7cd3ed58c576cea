"""What deciding costs: CPU time of rounds, one each second, over the number of functions."""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from templated.scaling import Bounds, Policy, Scaler

COUNTS = (125, 250, 500, 1000, 2000)
# Virtual seconds before the measured ones, so that all minutes have begun, and measured ones.
_BEFORE, _MEASURED = 120, 120
# Seconds that a request takes, and seconds between a function's requests: from the least to the
# most, evenly by their logarithm, as most functions of a platform are seldom invoked.
_TAKES, _LEAST, _MOST = 0.2, 1.0, 3600.0
_SEED = 1
_MIB = 128.0
_RUNS = 3


def measure_cost(
    tell: Callable[[str], None],
    counts: Sequence[int] = COUNTS,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, Any]:
    """CPU milliseconds of a round for each number of functions, with memory in plenty and short,
    and of telling one change of demand."""
    rows = []
    for count in counts:
        tell(f"cost, {count} functions")
        plenty, event = _best(count, None, clock)
        short, _ = _best(count, count / 8 * _MIB, clock)
        rows.append(
            {
                "functions": count,
                "round_ms": round(plenty, 4),
                "core_percent": round(plenty / 10, 4),
                "us_each": round(1000 * plenty / count, 3),
                "short_round_ms": round(short, 4),
                "short_core_percent": round(short / 10, 4),
                "event_us": round(event * 1000, 3),
            }
        )
    first, last = rows[0], rows[-1]
    return {
        "rows": rows,
        "growth": round(last["us_each"] / first["us_each"], 3) if first["us_each"] else None,
    }


def _best(count: int, memory: float | None, clock: Callable[[], float]) -> tuple[float, float]:
    """The least of some runs: what else the machine does only adds."""
    runs = [_run(count, memory, clock) for _ in range(_RUNS)]
    return min(rounds for rounds, _ in runs), min(event for _, event in runs)


def _run(count: int, memory: float | None, clock: Callable[[], float]) -> tuple[float, float]:
    """CPU milliseconds of the average round, and of the average change."""
    scaler = Scaler(Policy(memory=memory))
    for number in range(count):
        scaler.add(str(number), Bounds(mib=_MIB))
    changes = _changes(count, random.Random(_SEED))  # noqa: S311 - no secret is made of it
    following = next(changes)
    rounds = events = told = 0.0
    for second in range(_BEFORE + _MEASURED):
        due = []
        while following[0] < second:
            due.append(following)
            following = next(changes)
        begin = clock()
        for at, key, level in due:
            scaler.under_way(key, at, level)
        middle = clock()
        scaler.round(float(second))
        if second >= _BEFORE:
            events += middle - begin
            told += len(due)
            rounds += clock() - middle
    return 1000 * rounds / _MEASURED, 1000 * events / max(1.0, told)


def _changes(count: int, draw: random.Random) -> Iterator[tuple[float, str, int]]:
    """Changes of the requests under way, in their order, without an end."""
    rates = [_LEAST * (_MOST / _LEAST) ** draw.random() for _ in range(count)]
    coming = [(draw.random() * min(mean, _BEFORE), number, 1) for number, mean in enumerate(rates)]
    levels = [0] * count
    heapq.heapify(coming)
    while True:
        at, number, step = heapq.heappop(coming)
        levels[number] += step
        yield at, str(number), levels[number]
        if step > 0:
            heapq.heappush(coming, (at + _TAKES, number, -1))
            heapq.heappush(coming, (at + draw.expovariate(1 / rates[number]), number, 1))
