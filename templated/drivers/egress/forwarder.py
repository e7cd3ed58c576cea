"""A forwarder: what it is at present, and what it does about what happens to it.

keepalived decides which of two is the active one. Here its choice is followed, told to the daemon,
and vetoed (`release`, a file that keepalived tracks) for as long as

  asked       the daemon asked for a switch
  inside      the host is not reached: it would be the active one of nobody
  contested   another one answers under the fixed address, though keepalived does not hear it: the
              links between the two are cut. Who comes second goes.

A veto is no failure of its own: with none of them left, it is a standby again.

Of a lane that is not the first one nobody answers outside. There the host's rule that leads the
lane's ports to a MAC tells which of two is the active one: who took over last.

Between two hosts the other one is looked for, since no daemon hears both (`peer`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

from msgspec import structs

from templated.drivers.egress import legs, rules, vxlan
from templated.drivers.egress.arp import Arp, Heard
from templated.drivers.egress.child import Child
from templated.drivers.egress.counters import count, flows_without_port, guarded, steered
from templated.drivers.egress.namespaces import inside
from templated.drivers.egress.peer import Watch
from templated.drivers.egress.programs import Files, conntrackd_config, keepalived_config
from templated.drivers.host.programs import run, run_here
from templated.errors import HostError, TemplatedError
from templated.model.egress import ForwarderSpec, ForwarderView, Role

_log = logging.getLogger(__name__)
LINGER = 2.0
"""Seconds for which packets that are on their way still leave after a planned switch."""
_ROLES = {"MASTER": Role.ACTIVE, "BACKUP": Role.STANDBY, "FAULT": Role.FAULT}
_TICK, _REPORT = 0.5, 2.0
_SILENCE = 3
"""Ticks without an answer of the host after which it is out of reach."""
_ASKED, _PAUSE = 8, 0.1
"""How often, and with which pause in seconds, one that took over asks whether the one before still
answers: the namespace of one that was killed does, until it has gone."""
_REMEMBERED = 5
"""Counts for which it is told that flows were refused."""
_HOLD = 1.0
"""Seconds times its seat after which a contested one asks again: they never retry together."""
_PATIENCE = 3.0
"""Seconds that the other host, which has just come back, may take to be heard."""
_UNASKED = 30.0
"""Seconds that one waits which cannot ask."""


class Forwarder:
    """One forwarder, in its namespaces. `changed` is called whenever its view has changed."""

    def __init__(self, spec: ForwarderSpec, files: Files, host: int, own: int) -> None:
        self._spec = spec
        self._files = files
        self._host, self._own = host, own
        self.changed: Callable[[], None] = lambda: None
        self._view = ForwarderView(
            number=spec.number, lane=spec.lane + 1, role=Role.STARTING, since=_now()
        )
        self._vetoes: set[str] = set()
        self._problems: dict[str, str] = {}
        self._silent = 0
        self._counted, self._size = time.monotonic(), 0
        """When bytes were counted, and how many there were."""
        self._peer = Watch(spec)
        self._since_refused = 0
        self._steered = False
        """Since it is the active one, what comes for its ports was led to it."""
        self._announcing = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._inside = self._outside = None  # type: Arp | None
        self._keepalived = Child(
            _keepalived(files), files.log, before=self._write_keepalived, ended=self._left_alone
        )
        self._conntrackd = Child(
            ["conntrackd", "-C", str(files.conntrackd)],
            files.log,
            before=self._write_conntrackd,
            ended=self.report,
        )

    @property
    def view(self) -> ForwarderView:
        """What it is at present."""
        children = (self._keepalived, self._conntrackd)
        problems = [*self._problems.values(), *(c.problem for c in children if c.problem)]
        return structs.replace(
            self._view,
            pid=int(os.readlink("/proc/self")),
            restarts=sum(child.restarts for child in children),
            error="; ".join(problems),
            peer=self._peer.state,
        )

    async def prepare(self, *, fresh: bool) -> None:
        """Listen on the legs. `fresh`: the fixed address must be nobody's yet.

        Raises HostError when it is taken, or a leg cannot be used; nothing was sent under it then.
        """
        self._inside = self._arp("in", self._spec.plan.shared)
        self._outside = self._arp("out", self._spec.egress.fixed)
        if self._peer.wanted and await self._peer.sends():
            return  # the address is the other host's at present, as it should be
        if fresh:
            await self._check_free()
        elif self._peer.wanted and (mac := await self._other()):
            self._contested(mac)  # before it does harm: the links between the hosts are cut

    async def run(self) -> None:
        """Serve until cancelled; then the addresses are given up."""
        fifo = self._open_notify()
        try:
            async with asyncio.TaskGroup() as group:
                if self._spec.egress.forwarders > 1:
                    group.create_task(self._keepalived.keep())
                    group.create_task(self._conntrackd.keep())
                else:
                    self._serve_alone()
                group.create_task(self._watch())
                group.create_task(self._announce())
                if self._peer.wanted:
                    group.create_task(self._look_for_peer())
        finally:
            asyncio.get_running_loop().remove_reader(fifo)
            os.close(fifo)
            for arp in (self._inside, self._outside):
                if arp is not None:
                    arp.close()
            legs.give_up_addresses(self._spec)

    def resign(self) -> None:
        """Have the other forwarder take over. What is on its way meanwhile still leaves."""
        if self._view.role is Role.ACTIVE:
            run_here("nft", "-f", "-", stdin=rules.linger(self._spec, LINGER))
            self._veto("asked", "asked to switch")
            asyncio.get_running_loop().call_later(LINGER / 2, self._lift, "asked")

    def report(self) -> None:
        """Tell who listens what is known now."""
        self.changed()

    # --- what keepalived says -----------------------------------------------------------------

    def _open_notify(self) -> int:
        """Hear keepalived. Open for writing, too: it would end whenever keepalived does."""
        path = self._files.notify
        path.unlink(missing_ok=True)
        os.mkfifo(path, 0o600)
        fifo = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        asyncio.get_running_loop().add_reader(fifo, self._notified, fifo)
        return fifo

    def _notified(self, fifo: int) -> None:
        for line in os.read(fifo, 4096).decode(errors="replace").splitlines():
            words = line.split()
            if len(words) > 2 and words[0] == "INSTANCE" and words[2] in _ROLES:
                self._become(_ROLES[words[2]])

    def _become(self, role: Role) -> None:
        old = self._view.role
        if role is old:
            return
        takeovers = self._view.takeovers + (role is Role.ACTIVE)
        self._view = structs.replace(self._view, role=role, since=_now(), takeovers=takeovers)
        _log.info("%s is %s now, after %s", self._spec.label, role, old)
        if role is Role.ACTIVE:
            self._problems.pop("leg", None)
            self._steer()
            self._spawn(self._took_over())
        elif role is Role.FAULT and not self._vetoes:
            self._problems["leg"] = f"no carrier: {legs.without_carrier() or 'for a moment'}"
        elif role is Role.STANDBY:
            self._problems.pop("leg", None)
            with contextlib.suppress(HostError):
                legs.set_up_out(self._spec)  # its routes went if it was down
            if old is Role.ACTIVE:
                self._spawn(self._conntrackd_do("-n"))
        self.report()

    def _left_alone(self) -> None:
        """keepalived has ended: the addresses stay where they are unless they are taken away."""
        legs.give_up_addresses(self._spec)
        if self._view.role is not Role.STARTING:
            self._view = structs.replace(self._view, role=Role.FAULT, since=_now())
        self.report()

    async def _took_over(self) -> None:
        """The flows that were copied here are this one's own now, and nobody else has them."""
        await self._conntrackd_do("-R")
        await self._conntrackd_do("-B")
        if self._spec.lane:
            return
        for _ in range(_ASKED):
            await asyncio.sleep(_PAUSE)
            mac = await self._other()
            if not mac or self._view.role is not Role.ACTIVE:
                return
        self._contested(mac)

    def _steer(self) -> None:
        """Of a lane that is not the first: what comes for its ports comes here from now on."""
        self._steered = False
        try:
            legs.steer(self._spec, self._host)
            self._steered = True
        except HostError as error:
            _log.warning("%s: cannot steer its ports: %s", self._spec.label, error)

    def _check_steering(self) -> None:
        """Who took over later is the active one; a rule that somebody flushed is made again."""
        if self._spec.lane == 0 or self._view.role is not Role.ACTIVE:
            return
        with inside(self._host):
            mac = steered(self._spec)
        if not mac or not self._steered:
            self._steer()
        elif mac != legs.mac(self._spec, "out"):
            self._contested(mac)

    async def _conntrackd_do(self, option: str) -> None:
        if self._conntrackd.running:
            try:
                await run("conntrackd", "-C", str(self._files.conntrackd), option, timeout=10)
            except HostError as error:
                _log.warning("conntrackd %s: %s", option, error.message)

    # --- vetoes -------------------------------------------------------------------------------

    def _veto(self, reason: str, why: str) -> None:
        self._problems[reason] = why
        self._vetoes.add(reason)
        self._write_release()
        self.report()

    def _lift(self, reason: str) -> None:
        self._problems.pop(reason, None)
        self._vetoes.discard(reason)
        self._write_release()
        self.report()

    def _write_release(self) -> None:
        self._files.release.write_text(f"{int(bool(self._vetoes))}\n")

    def _contested(self, mac: str) -> None:
        self._view = structs.replace(self._view, contested=self._view.contested + 1)
        why = f"{mac} sends under {self._spec.egress.fixed}, too, and is not heard inside"
        _log.warning("%s: %s", self._spec.label, why)
        self._veto("contested", why)
        self._spawn(self._wait_for_peace())

    async def _wait_for_peace(self) -> None:
        """Until the other one is silent, or keepalived would hear it."""
        quiet, asked = 0, 0
        while quiet < 2:
            await asyncio.sleep(_HOLD * self._spec.seat)
            if await self._peer.sends():
                break
            asked += 1
            quiet = 0 if await self._stays(asked) else quiet + 1
        self._lift("contested")

    async def _stays(self, asked: int) -> bool:
        """Whether the other one still has the address, after so many questions."""
        if self._spec.lane:  # nobody answers for it, and so it is only given some time
            return asked * _HOLD * self._spec.seat < _UNASKED
        return bool(await self._other())

    async def _other(self) -> str:
        """The MAC of another one that has the fixed address; empty: there is none, or no leg."""
        if self._outside is None:
            return ""
        try:
            return await self._outside.holder(self._spec.egress.fixed, times=2, spacing=0.05)
        except OSError:
            return ""

    async def _check_free(self) -> None:
        fixed = self._spec.egress.fixed
        assert self._outside is not None
        try:
            mac = await self._outside.holder(fixed)
        except OSError as error:
            raise HostError(f"cannot send on {self._spec.egress.interface}: {error}") from error
        if mac and self._peer.wanted and await self._peer.sends(_PATIENCE):
            return
        if mac:
            hint = "take an address that nobody has"
            if self._peer.wanted:
                hint += f"; if it is the other host's forwarder, let UDP port {vxlan.PORT} through"
            raise HostError(
                f"{fixed} is taken: {mac} answers for it on {self._spec.egress.interface}",
                hint=hint,
            )

    # --- the legs -----------------------------------------------------------------------------

    def _arp(self, leg: str, ip: str) -> Arp:
        def hear(heard: Heard) -> None:
            if heard.ip == ip and self._view.role is Role.ACTIVE:
                if leg == "in" or self._spec.lane == 0:
                    self._announcing.set()
            elif leg == "in" and heard.ip == self._spec.plan.host:
                self._silent = 0
            elif leg == "in":
                self._peer.heard(heard)

        try:
            arp = Arp(leg)
        except OSError as error:
            raise HostError(f"cannot listen on {leg}: {error.strerror}") from error
        arp.on_heard(hear)
        return arp

    async def _announce(self) -> None:
        """Say again that the addresses are here, once somebody else said so and was wrong."""
        while True:
            await self._announcing.wait()
            for pause in (0.02, 0.3, 1.0):
                await asyncio.sleep(pause)
                self._say_here()
            self._announcing.clear()

    def _say_here(self) -> None:
        if self._view.role is not Role.ACTIVE:
            return
        said = [(self._inside, self._spec.plan.shared)]
        if self._spec.lane == 0:
            said.append((self._outside, self._spec.egress.fixed))
        for arp, ip in said:
            with contextlib.suppress(OSError):
                if arp is not None:
                    arp.announce(ip)

    async def _look_for_peer(self) -> None:
        while True:
            if await self._peer.look(self._inside, active=self._view.role is Role.ACTIVE):
                self.report()
            await asyncio.sleep(_TICK)

    async def _watch(self) -> None:
        """Every half second: are the host and the interface there? Every two: count."""
        ticks = 0
        while True:
            await asyncio.sleep(_TICK)
            ticks += 1
            try:
                self._check_host()
                self._check_out()
                if ticks % round(_REPORT / _TICK) == 0:
                    self._count()
                    self.report()
            except TemplatedError as error:
                self._problems["check"] = error.message
            else:
                self._problems.pop("check", None)

    def _check_host(self) -> None:
        self._silent += 1
        with contextlib.suppress(OSError):
            if self._inside is not None:
                plan = self._spec.plan
                self._inside.ask(plan.host, plan.own(self._spec.seat))
        if self._silent > _SILENCE and "inside" not in self._vetoes:
            self._veto("inside", f"the host does not answer at {self._spec.plan.host}")
        elif self._silent <= 1 and "inside" in self._vetoes:
            self._lift("inside")

    def _check_out(self) -> None:
        """The operator's interface may go, and `out` with it; and come back."""
        interface = self._spec.egress.interface
        if _there("out"):
            self._problems.pop("interface", None)
            return
        self._problems["interface"] = f"interface {interface} has gone"
        if self._outside is not None:
            self._outside.close()
            self._outside = None
            self.report()
        with inside(self._host):
            back = _there(interface)
        if back:
            legs.make_out(self._spec, self._host, self._own)
            legs.set_up_out(self._spec)
            self._outside = self._arp("out", self._spec.egress.fixed)
            self._problems.pop("interface", None)
            if self._spec.egress.forwarders > 1:
                self._keepalived.restart()  # it knows the leg that has gone
            else:
                self._serve_alone()
            self.report()

    def _serve_alone(self) -> None:
        legs.take_addresses(self._spec)
        self._steer()
        self._become(Role.ACTIVE)
        self._say_here()

    def _count(self) -> None:
        counters, flows = count(self._spec)
        try:
            with inside(self._host):
                counters |= guarded(self._spec)
        except HostError:  # somebody flushed the host's rules
            legs.guard(self._spec, self._host)
        now, size = time.monotonic(), sum(counters.get(way, (0, 0))[1] for way in ("out", "in"))
        rate = round((size - self._size) / (now - self._counted))
        self._counted, self._size = now, size
        exhausted = flows_without_port()
        self._note_refused(exhausted > self._view.exhausted)
        self._view = structs.replace(
            self._view, counters=counters, flows=flows, rate=rate, exhausted=exhausted
        )
        self._check_steering()

    def _note_refused(self, more: bool) -> None:
        """Flows were refused, which is told for a while."""
        self._since_refused = 0 if more else self._since_refused + 1
        if more:
            fixed = self._spec.egress.fixed
            self._problems["ports"] = f"flows are refused: {fixed} has no port left"
        elif self._since_refused >= _REMEMBERED:
            self._problems.pop("ports", None)

    # --- files --------------------------------------------------------------------------------

    def _write_keepalived(self) -> None:
        for stale in self._files.directory.glob("keepalived*.pid"):
            stale.unlink()
        self._write_release()
        self._files.keepalived.write_text(keepalived_config(self._spec, self._files))

    def _write_conntrackd(self) -> None:
        self._files.control.unlink(missing_ok=True)
        self._files.control.with_suffix(".lock").unlink(missing_ok=True)
        self._files.conntrackd.write_text(conntrackd_config(self._spec, self._files))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _keepalived(files: Files) -> list[str]:
    pids = files.directory / "keepalived"
    return [
        *("keepalived", "--dont-fork", "--log-console", "--vrrp"),
        *("--use-file", str(files.keepalived)),
        *("--pid", f"{pids}.pid", "--vrrp_pid", f"{pids}-vrrp.pid"),
    ]


def _there(name: str) -> bool:
    try:
        return bool(socket.if_nametoindex(name))
    except OSError:
        return False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
