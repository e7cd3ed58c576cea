"""`bench neighbours`: what clones notice of one beside them that does all that it can."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from templated.bench.session import Session, require_memory
from templated.bench.stats import summarize
from templated.client import Client
from templated.drivers.host.procfs import mapped_bytes
from templated.errors import GuestError, HostError, TemplatedError

_FLOOD = """
echo $$ >/run/flood
(while :; do echo "a line that nobody reads"; done >/dev/console 2>/dev/null) &
(while :; do dd if=/dev/zero of=/flood bs=1M count=8 conv=fsync 2>/dev/null; done) &
yes flood
"""
"""A busy CPU, a console, a disk, and an answer of the agent without end."""
_END = "kill -KILL -$(cat /run/flood)"
"""All of it is in one group of processes, as the agent starts a command in one of its own."""
_WITHIN = 30.0


def measure_neighbours(session: Session, n: int, rounds: int) -> dict[str, Any]:
    """Time commands in n clones, in turns without and beside a clone that floods.

    Raises GuestError when a command fails or no flood begins. The clones are left to the session.
    """
    require_memory(n + 1)
    good = []
    for k in range(1, n + 1):
        session.progress(f"clone {k} of {n}")
        good.append(session.make(f"good-{k}").name)
    evil = session.make("evil").name
    for name in (*good, evil):
        _command(session.client, name)  # a first one takes several times as long
    samples: dict[str, list[float]] = {"alone": [], "beside": []}
    daemon: dict[str, int] = {}
    for number in range(1, rounds + 1):
        session.progress(f"round {number} of {rounds}")
        samples["alone"] += [_command(session.client, name) for name in good]
        daemon.setdefault("before", _daemon_kib(session.client))
        with _flood(Client(session.client.path), evil):
            samples["beside"] += [_command(session.client, name) for name in good]
            daemon["most"] = max(daemon.get("most", 0), _daemon_kib(session.client))
    alone, beside = (summarize(values) for values in samples.values())
    return {
        "kind": "neighbours",
        "template": session.template,
        "clones": n,
        "rounds": rounds,
        "alone": alone.as_dict(),
        "beside": beside.as_dict(),
        "ratios": {
            "p50": round(beside.p50 / alone.p50, 3),
            "p99": round(beside.p99 / alone.p99, 3),
        },
        "daemon_kib": daemon,
        "samples_ms": samples,
    }


def _command(client: Client, name: str) -> float:
    """Milliseconds of a command in a clone, by the API."""
    begin = time.perf_counter()
    *_, end = client.exec_in_clone(name, ["true"])
    if end.exit_code != 0:
        raise GuestError(f"`true` ended with {end.exit_code} in {name}")
    return (time.perf_counter() - begin) * 1000


@contextlib.contextmanager
def _flood(client: Client, name: str) -> Iterator[None]:
    """The flood goes on while the block runs, and its answer is read.

    Raises GuestError when it does not begin or end.
    """
    begun = threading.Event()

    def read() -> None:
        with contextlib.suppress(TemplatedError):
            for _ in client.exec_in_clone(name, ["sh", "-c", _FLOOD]):
                begun.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        if not begun.wait(_WITHIN):
            raise GuestError(f"no flood began in {name}")
        yield
    finally:
        for _ in client.exec_in_clone(name, ["sh", "-c", _END]):
            pass
        reader.join(_WITHIN)
    if reader.is_alive():
        raise GuestError(f"the flood in {name} does not end")


def _daemon_kib(client: Client) -> int:
    """The daemon's memory (PSS)."""
    pid = client.info().pid
    mapped = mapped_bytes(pid)
    if mapped is None:
        raise HostError(
            f"cannot read the memory of the daemon (pid {pid})",
            hint="run the bench as the daemon's user",
        )
    return mapped.proportional >> 10
