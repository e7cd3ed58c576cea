"""A real daemon whose places fail on demand, and what must hold after they did."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from templated.client import Client
from templated.errors import RemoteError, TemplatedError
from templated.failpoints import VARIABLE
from templated.model.clone import CloneState, CloneView
from tests.real.harness import Daemon

TEMPLATE = "python-fn"
VICTIM = "victim"
_SETTLE = 20.0
# Bounds of the daemon that hangs run into, short but long enough for a busy host.
START, BOOT, STALL = "3s", "20s", "3s"


class Rig:
    """A daemon with two clones that must never be lost."""

    def __init__(self, daemon: Daemon, built: Daemon, **config: Any) -> None:
        self.daemon = daemon
        daemon.copy_build(built)
        daemon.config["slots"] = {"ready": 0}  # every start makes its own slot, and passes there
        daemon.config["limits"] = {"stall": STALL, "concurrent_starts": 32}
        daemon.config["pools"] = {**daemon.config["pools"], "concurrent_refills": 8}
        daemon.config.update(config)
        self._orders = daemon.places / "failpoints"
        daemon.environment[VARIABLE] = f"@{self._orders}"
        self.namespace: str = config.get("network", {}).get("netns", "")
        self.clean = True
        self._short_bounds()
        self.switch("")
        daemon.start()
        self.files = self._files()
        self.keepers: dict[str, CloneView] = {}
        for number in range(2):
            self.keep(self.client.create_clone(f"keeper-{number}"))

    @property
    def client(self) -> Client:
        return self.daemon.client

    def _short_bounds(self) -> None:
        (path,) = self.daemon.state.glob("generations/*/*/manifest.json")
        manifest = json.loads(path.read_text())
        manifest["spec"]["start_timeout"] = START
        manifest["spec"]["boot_timeout"] = BOOT
        manifest["spec"]["identity"]["timeout"] = START
        path.chmod(0o600)
        path.write_text(json.dumps(manifest))
        path.chmod(0o440)

    def keep(self, clone: CloneView) -> None:
        """From now on this clone, as it was reported, must be there."""
        self.keepers[clone.name] = clone

    # --- failing ------------------------------------------------------------------------------

    def switch(self, orders: str) -> None:
        """Switch on these places and no others."""
        partial = self._orders.with_suffix(".part")
        partial.write_text(orders)
        partial.rename(self._orders)

    def came_to(self, place: str, kind: str, since: int) -> bool:
        """Whether the daemon came to a place, by its log from byte `since` on."""
        return f"failpoint {place}: {kind}\n" in self.daemon.log[since:]

    @contextmanager
    def failing(self, *places: str, kind: str, again: bool = False) -> Iterator[None]:
        """In the block these places fail, each of them once; `again`: each time they are come to,
        and that each must be."""
        since = len(self.daemon.log)
        once = kind.partition(":")[0]
        # `qmp.cont#2` fails the second time; the first time is meant otherwise.
        named = [(place.partition("#")[0], place.partition("#")[2] or "1") for place in places]
        self.switch(
            ",".join(f"{place}={kind}" + ("" if again else f"#{nth}") for place, nth in named)
        )
        try:
            yield
        finally:
            self.switch("")
        missed = [place for place, _ in named if not self.came_to(place, once, since)]
        assert not missed, f"never came to {missed}\n{self.daemon.log[since:]}"

    def killed(self, place: str, act: Callable[[], object] | None = None) -> None:
        """Let the daemon kill itself at a place, which `act` brings it to."""
        with self.failing(place, kind="kill"):
            if act is not None:
                with contextlib.suppress(TemplatedError):
                    act()
            assert self.ended() == -signal.SIGKILL, self.daemon.log

    def ended(self) -> int:
        """The exit code of a daemon that ends by itself."""
        process = self.daemon.process
        assert process is not None
        code = process.wait(60)
        self.daemon.process = None
        self.daemon.socket.unlink(missing_ok=True)
        return code

    def restart(self) -> None:
        """Kill the daemon, if it still runs, and start it."""
        self.daemon.stop(signal.SIGKILL)
        self.daemon.start()

    # --- what must hold -------------------------------------------------------------------------

    def recovered(self) -> list[CloneView]:
        """Start the daemon twice: the first makes all right, the second changes nothing.

        Returns the clones that are no keepers.
        """
        self.restart()
        self.nothing_left()
        clones = self.client.list_clones()
        self.restart()
        assert self.client.list_clones() == clones, "the second restart changed clones"
        self.nothing_left(0)
        assert self.client.list_clones() == clones
        return [clone for clone in clones if clone.name not in self.keepers]

    def recovered_from(self, what: str) -> None:
        """The daemon ended because `what` hung; the next one makes all right, and works."""
        assert f"{what} has not answered for 3 s" in self.daemon.log
        self.recovered()
        self.remove()
        self.nothing_left()

    def nothing_left(self, patience: float = _SETTLE) -> None:
        """All keepers are as they were reported, and nothing is there that no clone has."""
        clones = {clone.name: clone for clone in self.client.list_clones()}
        for name, keeper in self.keepers.items():
            assert clones.get(name) == keeper, f"{clones.get(name)} is not {keeper}"
            assert self.daemon.output(name, "hostname") == f"{name}\n"
        for clone in clones.values():
            if clone.name not in self.keepers and clone.state is CloneState.RUNNING:
                assert self.daemon.output(clone.name, "hostname") == f"{clone.name}\n"
        deadline = time.monotonic() + patience
        while (left := self._differences()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, f"{left}\n{self.daemon.log[-6000:]}"

    def _differences(self) -> dict[str, Any]:
        """What is there and what should be, where the two differ."""
        clones = self.client.list_clones()
        running = sorted(c.pid or 0 for c in clones if c.state is CloneState.RUNNING)
        slots = len(clones)
        rows = {"clones": slots, "slots": slots, "generations": 1, "templates": 1}
        run = self.daemon.places / "run/vm"
        pairs: dict[str, tuple[Any, Any]] = {
            "processes": (sorted(self.daemon.qemus()), running),
            "rows": (self.daemon.rows(), rows),
            "directories": (len(os.listdir(self.daemon.state / "slots")), slots),
            "sockets": (len(os.listdir(run)), slots),
            "files": (self._files(), self.files),
        }
        if self.namespace:
            pairs["taps"] = (len(self.taps()), slots)
            pairs["rules"] = (self.guarded(), sorted(self.taps()))
        return {what: pair for what, pair in pairs.items() if pair[0] != pair[1]}

    def _files(self) -> list[str]:
        places = self.daemon.shm, self.daemon.state / "generations", self.daemon.state / "overlays"
        return sorted(
            str(path)
            for place in places
            for path in place.rglob("*")
            if path.parent != self.daemon.state / "overlays" or path.suffix == ".part"
        )

    def taps(self) -> list[str]:
        """The taps of clones in the daemon's network namespace."""
        links = json.loads(self._in_namespace("ip", "-j", "link"))
        return [link["ifname"] for link in links if link["ifname"].startswith("tp")]

    def guarded(self) -> list[str]:
        """The interfaces that rules let send."""
        listed = json.loads(self._in_namespace("nft", "-j", "list", "ruleset"))
        maps = [item["map"] for item in listed["nftables"] if "map" in item]
        ports = next((m.get("elem", ()) for m in maps if m["name"] == "ports_from"), ())
        return sorted(name for name, _verdict in ports)

    def _in_namespace(self, *command: str) -> str:
        full = ["ip", "netns", "exec", self.namespace, *command]
        return subprocess.run(full, capture_output=True, text=True, check=True, timeout=30).stdout

    # --- what it is asked for -------------------------------------------------------------------

    def clone(self, path: str | None = "direct", name: str = VICTIM) -> CloneView:
        """Start a clone by a path."""
        return self.client.create_clone(name, template=TEMPLATE, path=path)

    def remove(self, name: str = VICTIM) -> None:
        """Remove a clone, if it is there."""
        if any(clone.name == name for clone in self.client.list_clones()):
            self.client.remove_clone(name)

    def ready_for(self, path: str) -> None:
        """Have the daemon where a start by this path comes to all its places."""
        if path in ("standby", "warm"):
            self.pools(standby=int(path == "standby"), warm=int(path == "warm"))
        if path == "cold":
            for layer in (self.daemon.state / "overlays").glob("*"):
                layer.unlink()

    def build(self) -> None:
        """Build the template; raises the error with which the build ends."""
        operation = self.client.build_template(TEMPLATE)
        for _ in self.client.operation_events(operation.id):
            pass
        error = self.client.show_operation(operation.id).error
        if error:
            raise RemoteError(error.code, error.message)

    def pools(self, *, standby: int = 0, warm: int = 0, wait: bool = True) -> None:
        """Set the sizes of the pools, and wait until they have that many members."""
        self.client.set_pool(TEMPLATE, standby=standby, warm=warm)
        deadline = time.monotonic() + 60
        while wait:
            view = self.client.show_pool(TEMPLATE)
            if (view.standby.ready, view.warm.ready) == (standby, warm):
                return
            assert time.monotonic() < deadline, (view, self.daemon.log[-6000:])
            time.sleep(0.02)

    def exec(self, name: str, **options: Any) -> None:
        """Run a command in a clone; raises the error with which the stream ends."""
        *_, end = self.client.exec_in_clone(name, ["true"], **options)
        if end.error:
            raise RemoteError("stream", str(end.error))

    def answers(self, name: str) -> bool:
        """Whether a clone runs a command."""
        try:
            self.exec(name)
        except TemplatedError:
            return False
        return True

    def descriptors(self) -> int:
        """Open files of the daemon."""
        assert self.daemon.process is not None
        return len(os.listdir(f"/proc/{self.daemon.process.pid}/fd"))

    def no_more_descriptors(self, than: int) -> None:
        """The daemon has no more open files than before, once it has noticed who hung up."""
        deadline = time.monotonic() + _SETTLE
        while self.descriptors() > than and time.monotonic() < deadline:
            time.sleep(0.05)
        assert self.descriptors() <= than

    def end(self) -> None:
        """Kill the daemon and its VMs."""
        self.daemon.stop(signal.SIGKILL)
        for pid in self.daemon.qemus():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """Remove all of it."""
        self.end()
        self.daemon.close()


def no_defect(act: Callable[[], object]) -> bool:
    """Whether `act` succeeds, or fails in a way that is foreseen."""
    try:
        act()
    except TemplatedError as error:
        return error.code != "internal"
    return True


def error_line(act: Callable[[], object]) -> str:
    """The one line of the error that `act` raises; a defect is none."""
    with pytest.raises(TemplatedError) as raised:
        act()
    assert raised.value.code != "internal", raised.value
    return raised.value.message
