"""A real qemu-ga on this host, in namespaces that stand for a guest (qemu_ga.sh)."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from templated.drivers.guest import ExecResult, HostKey, IdentityOrder, Output, Step
from templated.drivers.qga.agent import GaAgent

needs_qemu_ga = pytest.mark.skipif(
    shutil.which("qemu-ga") is None or os.geteuid() != 0,
    reason="needs the package qemu-guest-agent, and root",
)
_SCRIPT = Path(__file__).with_name("qemu_ga.sh")
_NAMESPACES = (
    *("unshare", "--user", "--map-root-user", "--mount", "--uts", "--net", "--pid"),
    *("--fork", "--kill-child", "--mount-proc", "--", "sh"),
)


@contextmanager
def qemu_ga(folder: Path, *options: str) -> Iterator[Path]:
    """A qemu-ga that runs; yields its socket. It ends with all that it has started."""
    place, path = folder / "guest", folder / "agent"
    place.mkdir()
    command = [*_NAMESPACES, str(_SCRIPT), str(place), str(path), *options]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 30
        while not path.exists():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.02)
        yield path
    finally:
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)  # the first process of its namespace, so all of it
        process.wait(10)


@asynccontextmanager
async def connected(path: Path) -> AsyncIterator[GaAgent]:
    """A connection to it."""
    agent = GaAgent(path)
    try:
        await agent.connect()
        yield agent
    finally:
        await agent.close()


def play(folder: Path, body: Callable[[GaAgent], Coroutine[Any, Any, None]], *options: str) -> None:
    """Run `body` on a connection to a new qemu-ga."""

    async def main(path: Path) -> None:
        async with connected(path) as agent:
            await body(agent)

    with qemu_ga(folder, *options) as path:
        asyncio.run(main(path))


async def run(agent: GaAgent, *argv: str, **options: Any) -> tuple[str, str, ExecResult]:
    """Stdout, stderr and the end of a command."""
    streams, result = {"stdout": b"", "stderr": b""}, ExecResult()
    async for part in agent.exec(list(argv), timeout=options.pop("timeout", 10.0), **options):
        if isinstance(part, Output):
            streams[part.stream] += part.data
        else:
            result = part
    return streams["stdout"].decode(), streams["stderr"].decode(), result


def order(number: int, step: Step = Step.IDENTIFY, **changes: Any) -> IdentityOrder:
    """An identity, different in all by its number."""
    values: dict[str, Any] = {
        "step": step,
        "hostname": f"clone-{number}",
        "machine_id": f"{number:032x}",
        "boot_id": f"{number:08x}-0000-4000-8000-000000000000",
        "uuid": f"{number:08x}-1111-4000-8000-000000000000",
        "mac": f"02:00:00:00:00:{number:02x}",
        "ip": f"10.77.0.{number}",
        "prefix": 16,
        "gateway": "10.77.255.1",
        "dns": ["10.77.255.2", "10.77.255.3"],
        "time": 1_700_000_000.25,
        "entropy": bytes([number] * 64),
        "host_keys": (
            HostKey("ed25519", f"private it's {number}\nend\n", f"ssh-ed25519 {number}\n"),
        ),
    }
    return IdentityOrder(**{**values, **changes})
