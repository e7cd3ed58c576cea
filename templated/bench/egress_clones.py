"""Clones that start and end by an egress, for `bench egress --clones`.

A sender is frozen into their template: each clone sends from its first instant on, before it knows
who it is. The host has another route to the VPC meanwhile, which no packet may take: what passed
without its policy would be seen there under another address, or be asked for by ARP.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from templated.bench.netrig import NETWORK, SERVER, Rig
from templated.bench.paths import build_variant
from templated.bench.session import Progress, Session, built_template, session
from templated.bench.threads import together
from templated.client import Client
from templated.model.spec import ExecProbe, NetworkSpec, PoolSpec, SettleProbe, TemplateSpec

_NAME = "bench-sender"
_AT_ONCE = 2
_POOL = PoolSpec(standby=2, warm=2)
_WITHIN, _POLL = 10.0, 0.05
"""Seconds for a member of a pool; without one a clone starts directly."""
_STAYS = 0.2
"""Seconds for which a clone lives on: otherwise it would be gone before its guest has a turn."""
_SENDER = f"""
import pathlib, socket, time
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while True:
    try:
        sender.sendto(b"here", ("{SERVER}", 9))
    except OSError:
        pass
    pathlib.Path("/run/sends").touch()
    time.sleep(0.005)
"""
# Frozen when it is in its loop.
_START = """
setsid python3 -c "$0" >/dev/null 2>&1 </dev/null &
until [ -e /run/sends ]; do sleep 0.1; done
"""


@dataclass(frozen=True)
class Source:
    """What clones are made of: a template that the daemon of this host has built."""

    spec: TemplateSpec
    state_dir: Path
    accel: str


def source(client: Client, template: str | None) -> Source:
    """The template to take. Raises as `built_template`."""
    spec = client.show_template(built_template(client, template)).spec
    assert spec is not None  # it is built
    info = client.info()
    return Source(spec, Path(info.state_dir), info.accel)


def measure_clones(
    client: Client, rig: Rig, made_of: Source, egress: str, count: int, progress: Progress
) -> dict[str, Any]:
    """Start and end so many, two at once, a third of them directly and the others from pools.

    Only policies may mark packets meanwhile. Raises what a build or a start raises.
    """
    progress("building a template that sends")
    with _built(client, made_of.spec, egress):
        # Not before: while it is built a template has no policy.
        rig.host.ip("route", "add", NETWORK, "dev", "vpc0")
        try:
            before = rig.right()
            with session(client, _NAME, progress) as opened:
                paths = _starts(opened, count)
            return {"starts": count, "paths": paths, "packets": rig.right() - before}
        finally:
            rig.host.ip("route", "del", NETWORK, "dev", "vpc0")


@contextlib.contextmanager
def _built(client: Client, spec: TemplateSpec, egress: str) -> Iterator[None]:
    # It is never idle.
    probes = tuple(one for one in spec.probes if not isinstance(one, SettleProbe))
    sends = ExecProbe(name="sends", command=("sh", "-c", _START, _SENDER))
    network = NetworkSpec(egress=egress)
    changed = replace(spec, name=_NAME, network=network, pool=_POOL, probes=(*probes, sends))
    build_variant(client, _NAME, changed)
    try:
        yield
    finally:
        client.remove_template(_NAME)


def _starts(opened: Session, count: int) -> dict[str, int]:
    """How many came by which path."""
    paths: Counter[str] = Counter()
    numbers, ended = iter(range(count)), False

    def work() -> None:
        for number in numbers:
            if ended:
                return
            opened.progress(f"clone {number + 1} of {count}")
            direct = number % 3 == 0
            if not direct:
                _await_member(opened.client)
            clone = opened.make(str(number), "direct" if direct else None)
            paths[clone.path.value] += 1
            time.sleep(_STAYS)
            opened.client.remove_clone(clone.name)

    def stop() -> None:
        nonlocal ended
        ended = True

    together([work] * min(_AT_ONCE, count), stop)
    return dict(paths)


def _await_member(client: Client) -> None:
    deadline = time.monotonic() + _WITHIN
    while time.monotonic() < deadline:
        pool = client.show_pool(_NAME)
        if pool.warm.ready or pool.standby.ready:
            return
        time.sleep(_POLL)
