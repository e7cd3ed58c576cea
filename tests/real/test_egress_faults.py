"""Egresses that run short, that the host refuses, and whose links flap."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from templated.errors import HostError
from templated.model.egress import Role
from tests.real.egress_parts import (
    Daemon,
    answer,
    both,
    daemon,
    left_running,
    rigged,
    server,
    until,
)
from tests.real.egress_rig import FIXED, NEEDS, Flows, Rig, run

pytestmark = NEEDS
# Flows that begin together and stay; it prints how many of them the server has taken.
MANY = """
import select, socket, time
flows = [socket.socket() for _ in range(%d)]
for flow in flows:
    flow.setblocking(False)
    flow.connect_ex(("172.20.0.1", 7))
poll, there = select.poll(), set()
for flow in flows:
    poll.register(flow, select.POLLIN)
end = time.monotonic() + 1.5
while (left := end - time.monotonic()) > 0:
    for fd, _ in poll.poll(1000 * left):
        there.add(fd)
        poll.unregister(fd)
print(len(there))
try:
    other = socket.create_connection(("172.20.0.2", 7), 2)
    print(other.recv(99).decode())
except OSError as error:
    print(error)
"""


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with rigged(tmp_path) as made:
        yield made


def test_no_port_is_left(rig: Rig, tmp_path: Path) -> None:
    """More flows to one server than the address has ports: they are refused, and that is told."""

    async def scenario() -> None:
        async with daemon(rig, tmp_path) as made:
            rig.vpc.ip("addr", "add", "172.20.0.2/16", "dev", "eth0")
            view = await made.egresses.create(rig.spec(forwarders=1))
            rig.mark(view.mark)
            # The rule as it is, but for the range: 64,512 flows would take long.
            ports = "flush chain ip forwarder translate; add rule ip forwarder translate"
            ports += f" oifname out meta l4proto tcp snat to {FIXED}:2000-2007"
            run("nsenter", "-n", "-t", str(view.forwarders[0].pid), "nft", ports)
            with server(rig):
                told = await asyncio.to_thread(rig.clone.run, "python3", "-c", MANY % 12)
            # To another server the same ports are free.
            assert told.split() == ["8", FIXED]
            view = await until(made, lambda view: view.forwarders[0].exhausted >= 4)
            assert "no port left" in view.problem
            refused = "templated_egress_flows_refused_total"
            assert (made.metrics.registry.get_sample_value(refused, {"egress": "acme"}) or 0) >= 4
            await made.egresses.remove("acme")

    asyncio.run(scenario())


def _refusing(directory: Path, table: str) -> str:
    """A PATH whose nft refuses what makes a table that begins so."""
    real = shutil.which("nft")
    directory.mkdir()
    (directory / "nft").write_text(
        f"""#!/bin/sh
given=$(cat)
case $given in *"{table}"*) echo "Error: Could not process rule: No space" >&2; exit 1;; esac
printf '%s\\n' "$given" | exec {real} "$@"
"""
    )
    (directory / "nft").chmod(0o755)
    return f"{directory}:{os.environ['PATH']}"


@pytest.mark.parametrize("table", ["table ip forwarder", "table netdev tl"])
def test_nft_refuses_the_rules(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    """Those of the forwarder, or of the host for it: the error says so, and nothing stays."""
    refusing = _refusing(tmp_path / "bin", table)

    async def scenario() -> None:
        before = rig.shown()
        async with daemon(rig, tmp_path) as made:
            with monkeypatch.context() as first:
                first.setenv("PATH", refusing)
                with pytest.raises(HostError) as caught:
                    await made.egresses.create(rig.spec())
            assert "nft failed: Error: Could not process rule" in caught.value.message
            assert "\n" not in caught.value.message
            assert made.egresses.views() == [] and await made.rows.egresses() == []
            assert rig.shown() == before and not left_running(rig)
            assert list(rig.directory.iterdir()) == []

    asyncio.run(scenario())


def _inside(rig: Rig, made: Daemon, up: str) -> None:
    rig.host.ip("link", "set", made.egresses._egresses["acme"].plan.port(1), up)


def _outside(rig: Rig, made: Daemon, up: str) -> None:
    pid = made.egresses.view("acme").forwarders[0].pid
    run("nsenter", "-n", "-t", str(pid), "ip", "link", "set", "out", up)


@pytest.mark.long
@pytest.mark.parametrize("leg", [_inside, _outside])
def test_a_link_that_flaps(
    rig: Rig, tmp_path: Path, leg: Callable[[Rig, Daemon, str], None]
) -> None:
    """The other forwarder takes over, once, and keeps it: flows do not go to and fro."""

    async def scenario() -> None:
        async with daemon(rig, tmp_path) as made:
            view = await made.egresses.create(rig.spec())
            rig.mark(view.mark)
            rig.watch()
            flows = await asyncio.to_thread(Flows, rig, 50, 5.0)
            try:
                await asyncio.sleep(0.5)
                for _ in range(6):
                    for way in ("down", "up"):
                        await asyncio.to_thread(leg, rig, made, way)
                        await asyncio.sleep(0.2)
                lost, _, sources = await asyncio.to_thread(flows.result)
            finally:
                flows.close()
            assert (lost, sources, rig.wrong()) == (0, {FIXED}, 0)
            view = await until(made, both)
            assert (view.active, view.failovers) == (2, 1)
            assert not [one.number for one in view.forwarders if one.role is Role.FAULT]
            with server(rig):
                assert await asyncio.to_thread(answer, rig) == FIXED
            await made.egresses.remove("acme")

    asyncio.run(scenario())


@pytest.mark.long
def test_a_lane_that_cannot_be_made(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The egress says why, serves with what it has, and has the lane once it can be made."""
    refusing = _refusing(tmp_path / "bin", "table ip forwarder")

    async def scenario() -> None:
        before = rig.shown()
        async with daemon(rig, tmp_path) as made:
            view = await made.egresses.create(rig.spec(max=2, bandwidth="64KiB", forwarders=1))
            rig.mark(view.mark)
            flows = await asyncio.to_thread(Flows, rig, 200, 30.0)
            try:
                with monkeypatch.context() as first:
                    first.setenv("PATH", refusing)
                    await until(made, lambda view: "cannot be kept" in view.problem)
                    view = await until(made, lambda view: len(view.lanes) == 1)
                    assert view.active == 1 and "No space" in view.problem
                view = await until(made, lambda view: len(view.lanes) == 2, 30)
                await until(made, lambda view: not view.problem)
                lost, _, sources = await asyncio.to_thread(flows.result)
            finally:
                flows.close()
            assert (lost, sources) == (0, {FIXED})
            await made.egresses.remove("acme")
        rig.host.run("nft", "delete", "table", "ip", "marks")
        assert rig.shown() == before

    asyncio.run(scenario())
