"""Named places at which a test kills the daemon, breaks a call, or never lets it return.

All of them are off unless the environment names some:

    TEMPLATED_FAILPOINTS="process.spawn=kill,qmp.cont=error#2"
    TEMPLATED_FAILPOINTS=@FILE      the same, read again at each place, so that a test can change it

`kill` is a SIGKILL of this process. `error` is the error that such a call raises; `error:ENOSPC`
one with that number. `hang` never returns. `#2` means the second time only.

A place costs a look at one global while they are off:

    if failpoints.armed:
        failpoints.hit("slot.overlay")
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import logging
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from templated.errors import ConfigError

T = TypeVar("T")
log = logging.getLogger(__name__)
VARIABLE = "TEMPLATED_FAILPOINTS"
_LONGEST_HANG = 300.0
"""Seconds after which a thread goes on: it can't be cancelled, and would keep its process."""
_POLL = 0.02
_FORM = re.compile(
    r"(?P<name>[^=]+)=(?P<kind>[a-z]+)(:(?P<error>E[A-Z0-9]+))?(#(?P<nth>[1-9]\d*))?"
)


class Kind(enum.Enum):
    """What happens at a place."""

    KILL = "kill"
    ERROR = "error"
    HANG = "hang"


_STEP = frozenset({Kind.KILL})
"""Between two calls, where nothing can fail."""
_INLINE = frozenset({Kind.KILL, Kind.ERROR})
"""A call on the event loop that takes no time worth speaking of. systemd's watchdog is the bound
on one that hangs."""
_CALL = frozenset(Kind)
"""A call that leaves the process, and is awaited or has a thread of its own."""

_STEPS = (
    "build.activated",
    "build.booted",
    "build.frozen",
    "build.proven",
    "clone.registered",
    "recover.adopted",
    "recover.removed",
    "refill.made",
    "refill.waiting",
    "rm.ended",
    "rm.killed",
    "rm.moved",
    "start.confirmed",
    "start.recorded",
    "start.taken",
)
_INLINES = (
    "build.disk",
    "build.freeze",
    "build.manifest",
    "build.manifest-fsync",
    "build.manifest-rename",
    "build.mkdir",
    "cold.rename",
    "process.spawn",
    "process.watch",
)
_AGENT = (
    *("connect", "ping", "identify", "clock", "quiesce", "exec", "put", "get"),
    *("rehearse", "load", "part", "invoke"),
)
_QMP = (
    *("greeting", "query-status", "migrate-set-capabilities", "migrate-incoming", "restore"),
    *("cont", "stop", "set_link", "netdev_del", "getfd", "add-fd", "migrate", "save", "quit"),
    *("blockdev-add", "blockdev-reopen"),
)
_WRITES = (
    *("open", "new_slot", "drop_slot", "new_clone", "clone_state", "set_pool", "new_generation"),
    *("activate", "generation_state", "deactivate", "drop_generation"),
    *("deploy", "publish", "set_alias", "drop_alias", "drop_version", "drop_function", "reserve"),
    *("scale", "provision", "unprovision", "set_policy"),
    *("add_egress", "egress_state", "egress_lanes", "drop_egress"),
    *("add_event", "event_state", "drop_event"),
)
READS = (
    *("clones", "free_slots", "pool_sizes", "generations", "active", "policies"),
    "egresses",
    *("functions", "versions", "aliases", "provisioned"),
    *("due_events", "next_due", "events", "event_counts"),
)
_NETWORK = (
    *("open", "find", "list", "bridge", "tap", "label", "enslave", "up", "persist", "delete"),
    "elements",
)
_CALLS = (
    *(f"agent.{command}" for command in _AGENT),
    *(f"qmp.{command}" for command in _QMP),
    *(f"journal.{name}" for name in (*_WRITES, *READS)),
    *(f"journal.{name}.commit" for name in _WRITES if name != "open"),
    *(f"network.{name}" for name in _NETWORK),
    "cgroup.join",
    "cgroup.limit",
    "cgroup.make",
    "cgroup.remove",
    "files.fsync",
    "files.remove",
    "generation.copy",
    "generation.digest",
    "generation.read",
    "generation.seal",
    "program.here",
    "program.start",
    "recover.find",
    "recover.strays",
    "slot.files",
    "slot.listen",
    "slot.open",
    "slot.overlay",
)
POINTS: Mapping[str, frozenset[Kind]] = {
    **dict.fromkeys(_STEPS, _STEP),
    **dict.fromkeys(_INLINES, _INLINE),
    **dict.fromkeys(_CALLS, _CALL),
}
"""Every place, and what can happen there."""


class Injected(OSError):
    """The error of a failed call, where the place names no other."""


@dataclass(frozen=True)
class _Order:
    kind: Kind
    error: int
    nth: int | None


class _Switches:
    """What is switched on, and how often each place was come to since."""

    def __init__(self) -> None:
        self.file: Path | None = None
        self._text = ""
        self._orders: dict[str, _Order] = {}
        self._hits: Counter[str] = Counter()
        # Places are in threads, too.
        self._lock = threading.Lock()

    def read(self, text: str) -> None:
        """Take these and no others. Raises ConfigError; leaves those before then."""
        if text != self._text:
            self._orders = dict(_parsed(part) for part in text.split(",") if part)
            self._text = text
            self._hits.clear()

    def refresh(self) -> None:
        """Read the file again, where there is one; with no descriptor left, what it said holds."""
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.read(self.file.read_text().strip())

    def come_to(self, name: str) -> _Order | None:
        """What is to happen at this place now."""
        if name not in POINTS:
            raise LookupError(f"there is no failpoint {name}")
        with self._lock:
            self.refresh()
            order = self._orders.get(name)
            if order is None:
                return None
            self._hits[name] += 1
            return order if order.nth in (None, self._hits[name]) else None

    def has(self, name: str) -> bool:
        """Whether this place is still switched on."""
        with self._lock:
            self.refresh()
            return name in self._orders


armed = False
"""Whether any place is switched on, or may be later."""
_switches = _Switches()


def arm(text: str) -> None:
    """Switch places on, at the daemon's start. Raises ConfigError for what cannot be read."""
    global armed  # noqa: PLW0603  # one look at a global is all that a place costs
    _switches.file = Path(text[1:]) if text.startswith("@") else None
    if _switches.file is not None:
        try:
            text = _switches.file.read_text().strip()
        except OSError as error:
            why = f"{VARIABLE}: cannot read {_switches.file}: {error.strerror}"
            raise ConfigError(why) from error
    _switches.read(text)
    armed = bool(text or _switches.file)
    if armed:
        log.warning("%s is set: this daemon fails on purpose", VARIABLE)


def hit(name: str, error: Callable[[int, str], Exception] = Injected) -> None:
    """A place in a thread, or one that takes no time. `error` makes what the call would raise."""
    if _order(name, error) is Kind.HANG:
        end = time.monotonic() + _LONGEST_HANG
        while _switches.has(name) and time.monotonic() < end:
            time.sleep(_POLL)


async def reach(name: str, error: Callable[[int, str], Exception] = Injected) -> None:
    """A place on the event loop. A hang ends when it is cancelled."""
    if _order(name, error) is Kind.HANG:
        await asyncio.get_running_loop().create_future()


async def around(
    name: str, work: Awaitable[T], error: Callable[[int, str], Exception] = Injected
) -> T:
    """`work`, with a place in front of it."""
    try:
        await reach(name, error)
    except BaseException:
        if asyncio.iscoroutine(work):
            work.close()
        raise
    return await work


def _order(name: str, error: Callable[[int, str], Exception]) -> Kind | None:
    """What is to be done here; a kill and an error are done."""
    order = _switches.come_to(name)
    if order is None:
        return None
    log.warning("failpoint %s: %s", name, order.kind.value)
    if order.kind is Kind.KILL:
        os.kill(os.getpid(), signal.SIGKILL)
    if order.kind is Kind.ERROR:
        raise error(order.error, f"{os.strerror(order.error)} (failpoint {name})")
    return order.kind


def _parsed(part: str) -> tuple[str, _Order]:
    found = _FORM.fullmatch(part)
    if found is None:
        raise ConfigError(f"{VARIABLE}: {part!r} is not NAME=KIND", hint="as in qmp.cont=error#2")
    name, kind = found["name"], found["kind"]
    if name not in POINTS:
        raise ConfigError(
            f"{VARIABLE}: there is no failpoint {name}", hint="templated/failpoints.py lists them"
        )
    known = sorted(k.value for k in POINTS[name])
    if kind not in known:
        raise ConfigError(f"{VARIABLE}: {name} cannot {kind}", hint=f"it can: {', '.join(known)}")
    number = getattr(errno, found["error"] or "EIO", None)
    if number is None:
        raise ConfigError(f"{VARIABLE}: there is no error {found['error']}")
    nth = int(found["nth"]) if found["nth"] else None
    return name, _Order(Kind(kind), number, nth)
