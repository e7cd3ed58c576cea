"""`bench burst`: many clones requested at the same moment."""

from __future__ import annotations

import threading
import time
from collections import Counter
from functools import partial
from typing import Any

from templated.bench.session import POOLED, Session, require_memory
from templated.bench.stats import summarize
from templated.bench.threads import run_threads
from templated.errors import IdentityError
from templated.model.clone import CloneView

DISTINCT = ("uuid", "mac", "ip", "hostname", "machine_id", "boot_id")
"""The parts of an identity that no two clones may share."""


def measure_burst(session: Session, n: int, path: str | None) -> dict[str, Any]:
    """n requests at once, one clone each; all of them are up before any is removed.

    Raises the error of the first request that failed, or IdentityError when two share something.
    The clones are left to the session.
    """
    require_memory(n)
    if path in POOLED:
        session.pools.fill(str(path), n)
    session.progress(f"{n} at once")
    clones, walls, wall = _at_once(session, n, path)
    check_distinct(clones)
    return {
        "kind": "burst",
        "template": session.template,
        "unit": "ms",
        "n": n,
        "paths": dict(Counter(clone.path.value for clone in clones)),
        "wall_ms": round(wall * 1000, 1),
        "per_second": round(n / wall, 2),
        "request": summarize(walls).as_dict(),
        "total": summarize([c.total_ms for c in clones if c.total_ms is not None]).as_dict(),
        "distinct": list(DISTINCT),
        "samples_ms": [round(value, 3) for value in walls],
    }


def _at_once(
    session: Session, n: int, path: str | None
) -> tuple[list[CloneView], list[float], float]:
    """The clones, milliseconds of each request, and seconds until the last was answered."""
    clones: list[CloneView] = []
    walls: list[float] = []
    failed: list[BaseException] = []
    ready = threading.Barrier(n)

    def one(number: int) -> None:
        ready.wait()
        begin = time.perf_counter()
        try:
            clones.append(session.make(f"burst-{number}", path))
            walls.append((time.perf_counter() - begin) * 1000)
        except BaseException as error:  # noqa: BLE001  # raised again in the main thread
            failed.append(error)

    begin = time.perf_counter()
    # A clone that came up later would not be removed; the daemon bounds each start.
    run_threads([partial(one, number) for number in range(n)], lambda: None)
    wall = time.perf_counter() - begin
    if failed:
        raise failed[0]
    return clones, walls, wall


def check_distinct(clones: list[CloneView]) -> None:
    """IdentityError when two clones share a part of their identity."""
    for key in DISTINCT:
        values = Counter(
            clone.uuid if key == "uuid" else getattr(clone.identity, key) for clone in clones
        )
        value, times = values.most_common(1)[0]
        if times > 1:
            raise IdentityError(
                f"{times} clones have the same {key}: {value}",
                hint="this is a defect; `templated ls` and the daemon's log show these clones",
            )
