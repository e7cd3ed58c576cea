"""`bench compare`: other ways to bring up the same guest, on the same machine, in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from templated.bench.contenders.base import Contender, Once
from templated.bench.contenders.kata import Kata
from templated.bench.contenders.libvirt import LibvirtDriver
from templated.bench.contenders.loadvm import LoadVm
from templated.bench.contenders.ours import BareLoop, Ours
from templated.bench.contenders.talk import FullStream
from templated.bench.contenders.virsh import VirshRestore
from templated.bench.session import Row, Session
from templated.bench.stats import summarize_rows
from templated.errors import TemplatedError

NAMES = (
    *("cold", "virsh-restore", "libvirt-direct", "loadvm", "incoming-cat", "kata-recipe"),
    "libvirt-standby",
    *("floor", "direct", "standby", "warm"),
)
"""From the slowest to the fastest."""


def contenders(session: Session, names: Sequence[str] = NAMES) -> list[Contender]:
    """The contenders with these names, in the order of NAMES."""
    made: list[Contender] = [
        Ours(session, "cold"),
        VirshRestore(session),
        LibvirtDriver(session, "direct"),
        LoadVm(session),
        FullStream(session),
        Kata(session),
        LibvirtDriver(session, "standby"),
        BareLoop(session),
        *(Ours(session, path) for path in ("direct", "standby", "warm")),
    ]
    return [contender for contender in made if contender.name in names]


def measure_compare(session: Session, entered: Sequence[Contender], n: int) -> dict[str, Any]:
    """n rounds, each of one start of every contender. One that cannot run is in `skipped`.

    A contender that fails in the middle is out from there on: its figures do not count.
    """
    skipped: dict[str, str] = {}
    rows: dict[str, list[Row]] = {}
    with contextlib.ExitStack() as stack:
        starts = _opened(session, entered, stack, skipped)
        for i in range(n):
            # The order turns round by round, so that none always follows the same one.
            for name in _turned(list(starts), i):
                session.pools.settled()
                session.progress(f"round {i + 1} of {n}: {name}")
                try:
                    rows.setdefault(name, []).append(starts[name]())
                except TemplatedError as error:
                    skipped[name] = f"round {i + 1}: {error.message}"
                    del starts[name]
                    rows.pop(name, None)
        session.progress("cleaning up")
    paths = {c.name: summarize_rows(rows[c.name]) for c in entered if c.name in rows}
    return {
        "kind": "compare",
        "template": session.template,
        "unit": "ms",
        "n": n,
        "paths": paths,
        "about": {contender.name: contender.about for contender in entered},
        "skipped": skipped,
        "ratios": _to_direct(paths),
    }


def _opened(
    session: Session,
    entered: Sequence[Contender],
    stack: contextlib.ExitStack,
    skipped: dict[str, str],
) -> dict[str, Once]:
    """Set every contender up, and start each once before anything counts."""
    starts: dict[str, Once] = {}
    for contender in entered:
        session.progress(f"setting up {contender.name}")
        try:
            once = stack.enter_context(contender.opened())
            once()
        except TemplatedError as error:
            skipped[contender.name] = error.message
        else:
            starts[contender.name] = once
    return starts


def _turned(names: list[str], by: int) -> list[str]:
    at = by % len(names) if names else 0
    return names[at:] + names[:at]


def _to_direct(paths: dict[str, dict[str, Any]]) -> dict[str, float]:
    """p50 of each contender in multiples of direct's."""
    if "direct" not in paths:
        return {}
    direct = paths["direct"]["p50"]
    return {f"{name}_to_direct": round(row["p50"] / direct, 2) for name, row in paths.items()}
