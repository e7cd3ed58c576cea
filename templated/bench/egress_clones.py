"""Clones that start and end by an egress, for `bench egress --clones`.

A sender is frozen into their template: each clone sends from its first instant on, before it knows
who it is. The host has another route to the VPC meanwhile, which no packet may take: what passed
without its policy would be seen there under another address, or be asked for by ARP.
"""

from __future__ import annotations

import contextlib
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
_AT_ONCE = 3
_POOL = PoolSpec(standby=1, warm=1)
"""Fewer than start at once: so all paths are taken."""
_SENDER = f"""
import socket, time
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while True:
    try:
        sender.sendto(b"here", ("{SERVER}", 9))
    except OSError:
        pass
    time.sleep(0.005)
"""
_START = 'setsid python3 -c "$0" >/dev/null 2>&1 </dev/null &'


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
    """Start and end so many, some of them at once, by whatever path the daemon takes.

    Only policies may mark packets meanwhile. Raises what a build or a start raises.
    """
    progress("building a template that sends")
    rig.host.ip("route", "add", NETWORK, "dev", "vpc0")
    try:
        with _built(client, made_of.spec, egress):
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
            clone = opened.make(str(number))
            paths[clone.path.value] += 1
            opened.client.remove_clone(clone.name)

    def stop() -> None:
        nonlocal ended
        ended = True

    together([work] * min(_AT_ONCE, count), stop)
    return dict(paths)
