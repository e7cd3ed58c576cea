"""Fixtures of the tests that need no VM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from blockbuster import blockbuster_ctx

from tests.unit.cli_daemon import Daemon, serving

pytest.register_assert_rewrite("tests.hypervisor_contract")


@pytest.fixture
def no_blocking_calls() -> Iterator[None]:
    """A blocking call of ours on the event loop fails the test."""
    with blockbuster_ctx("templated") as watch:
        # Looking at local files takes microseconds, less than a thread would.
        for name in ("os.stat", "os.access", "os.scandir", "os.listdir"):
            watch.functions[name].deactivate()
        # /proc is memory.
        procfs = "templated/drivers/host/procfs.py"
        watch.functions["io.TextIOWrapper.read"].can_block_in(procfs, "_stat")
        watch.functions["io.BufferedReader.read"].can_block_in(procfs, "command_line")
        # When the journal closes, nothing else runs any more.
        lock = watch.functions["threading.Lock.acquire"]
        lock.can_block_in("templated/journal/store.py", "close")
        yield


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    """A daemon that knows one clone and one template; the environment points at its socket."""
    with serving(tmp_path / "d.sock") as served:
        monkeypatch.setenv("TEMPLATED_SOCKET", served.socket)
        yield served
