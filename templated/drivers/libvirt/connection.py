"""A connection to this host's libvirt that never waits without a bound.

libvirt-python is imported with the first connection, so that nothing needs it where libvirt is not
used. Its calls block, and one to a daemon that hangs does not come back: each runs in a thread of
its own, which is left behind when its time is over. From asyncio, await `ask`; elsewhere, `call`.

Sources: https://libvirt.org/html/libvirt-libvirt-host.html for opening and closing,
https://libvirt.org/html/libvirt-virterror.html for the codes of errors.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from templated.drivers.libvirt.address import SYSTEM, check_local
from templated.errors import Conflict, HostError, HypervisorError, NotFound, TemplatedError, Timeout
from templated.timing import within

T = TypeVar("T")

BOUND = 10.0
"""Seconds that a call takes at most, unless its caller says more."""
# Calls that were given up and have not come back, each with a thread. With so many, none begins.
_MOST_STUCK = 16
_stuck: set[Future[Any]] = set()
# libvirtd works on five requests of a connection at once, and then reads no more of it
# (max_client_requests in libvirtd.conf).
_AT_ONCE = 4

# Names in the binding: it is not imported here.
_MISSING = ("NO_DOMAIN", "NO_NETWORK", "NO_STORAGE_POOL", "NO_STORAGE_VOL", "NO_DOMAIN_METADATA")
_CONFLICTS = ("OPERATION_INVALID", "DOM_EXIST", "RESOURCE_BUSY")
_DENIED = ("AUTH_FAILED", "AUTH_CANCELLED", "AUTH_UNAVAILABLE", "ACCESS_DENIED", "OPERATION_DENIED")


@dataclass(frozen=True)
class Versions:
    """What a daemon says of itself, as `9.0.0`. `hypervisor` is QEMU's."""

    libvirt: str
    hypervisor: str


class Connection:
    """One connection; threads may share it. `connect` and `connect_async` make one.

    A call that takes too long breaks it: whatever is asked of it after that is refused at once, and
    the caller opens another one.
    """

    def __init__(self, uri: str, handle: Any, bound: float) -> None:
        self.uri = uri
        self._handle = handle
        self._bound = bound
        self._broken = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turns = asyncio.Semaphore(_AT_ONCE)

    @property
    def alive(self) -> bool:
        """False once it is closed or broken. That the daemon has gone shows with the next call."""
        with contextlib.suppress(binding().libvirtError):
            return not self._broken and bool(self._handle.isAlive())
        return False

    def call(self, what: str, work: Callable[[Any], T], *, bound: float | None = None) -> T:
        """Run `work` with the binding's virConnect, and return what it returns. Blocks.

        `what` is the subject of an error's sentence, as in "the list of domains". Raises NotFound
        for a domain, network, pool or volume that is not there, Conflict where its state does not
        allow the work, HostError where the user may not do it, HypervisorError for all else that
        libvirt says, and Timeout, which leaves the connection broken. What `work` raises of its
        own passes as it is.
        """
        limit = self._bound if bound is None else bound
        future = self._begun(what, work)
        with self._errors(what, limit, future):
            return future.result(limit)

    async def ask(self, what: str, work: Callable[[Any], T], *, bound: float | None = None) -> T:
        """As `call`, without blocking the loop, when fewer than four of its calls are under way.

        The wait for that turn has the same bound, and breaks nothing. When cancelled, `work` goes
        on unseen; it keeps its turn, and counts as one that hangs, until it comes back.
        """
        limit = self._bound if bound is None else bound
        turn_over = await self._turn(what, limit)
        try:
            future = self._begun(what, work)
        except BaseException:
            turn_over()
            raise
        future.add_done_callback(partial(_told, asyncio.get_running_loop(), turn_over))
        with self._errors(what, limit, future):
            async with asyncio.timeout(limit):
                return await asyncio.wrap_future(future)

    def versions(self) -> Versions:
        """Raises as `call`."""
        libvirt, qemu = self.call(
            "libvirt's version", lambda c: (c.getLibVersion(), c.getVersion())
        )
        return Versions(_dotted(libvirt), _dotted(qemu))

    def close(self) -> None:
        """Let go of it, within the bound; raises nothing. Once broken or closed, does nothing."""
        if self._broken:
            return
        self._broken = True
        # The daemon may have gone, or hang: there is nothing left to close then.
        with contextlib.suppress(Exception):
            _thread(self._handle.close).result(self._bound)

    async def _turn(self, what: str, limit: float) -> Callable[[], None]:
        """Wait for a turn; what gives it back. Raises Timeout."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._turns = loop, asyncio.Semaphore(_AT_ONCE)
        turns = self._turns
        async with within(limit, f"{what}: the wait for other calls of {self.uri}"):
            await turns.acquire()
        return turns.release

    def _begun(self, what: str, work: Callable[[Any], T]) -> Future[T]:
        if self._broken:
            raise HypervisorError(f"{what}: the connection to {self.uri} is closed or broken")
        return _thread(lambda: work(self._handle))

    @contextlib.contextmanager
    def _errors(self, what: str, limit: float, future: Future[Any]) -> Iterator[None]:
        try:
            yield
        except asyncio.CancelledError:
            _stuck.add(future)  # whose bound was shorter than ours; it may come back yet
            raise
        except TimeoutError:
            self._broken = True
            _stuck.add(future)
            message = f"{what}: {self.uri} did not answer within {limit:g} s"
            raise Timeout(message, hint="restart libvirtd: its VMs go on") from None
        except Exception as error:
            if not isinstance(error, binding().libvirtError):
                raise
            raise _ours(error, what) from error


def connect(uri: str = SYSTEM, *, read_only: bool = False, bound: float = BOUND) -> Connection:
    """Open a connection to a libvirt of this host. Blocks, for at most `bound` seconds.

    `bound` is that of its later calls, too. Raises InvalidRequest for a URI that leads elsewhere,
    HostError when libvirt-python is not installed, nothing answers or the user may not connect,
    and Timeout. A read-only one can look at everything but passwords, and change nothing.
    """
    future = _opening(uri, read_only)
    with _open_errors(uri, bound, future):
        return Connection(uri, future.result(bound), bound)


async def connect_async(
    uri: str = SYSTEM, *, read_only: bool = False, bound: float = BOUND
) -> Connection:
    """As `connect`, without blocking the loop."""
    future = _opening(uri, read_only)
    with _open_errors(uri, bound, future):
        async with asyncio.timeout(bound):
            return Connection(uri, await asyncio.wrap_future(future), bound)


@functools.cache
def binding() -> Any:
    """The module `libvirt`, which prints no errors of its own any more.

    HostError when it is not installed. Reads files the first time.
    """
    try:
        import libvirt
    except ImportError:
        raise HostError(
            "libvirt-python is not installed",
            hint="scripts/setup installs it; elsewhere: apt install python3-libvirt",
        ) from None
    libvirt.registerErrorHandler(lambda context, error: None, None)
    return libvirt


def _told(loop: asyncio.AbstractEventLoop, what: Callable[[], None], _: Future[Any]) -> None:
    """From a thread whose call is over; the loop may have ended before it."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(what)


def _opening(uri: str, read_only: bool) -> Future[Any]:
    check_local(uri)

    def work() -> Any:
        libvirt = binding()
        return libvirt.openReadOnly(uri) if read_only else libvirt.open(uri)

    return _thread(work)


@contextlib.contextmanager
def _open_errors(uri: str, bound: float, future: Future[Any]) -> Iterator[None]:
    start = "systemctl start libvirtd, or virtqemud; " if uri == SYSTEM else ""
    hint = f"{start}`virsh --connect {uri} list` tries the same"
    try:
        yield
    except asyncio.CancelledError:
        _stuck.add(future)
        raise
    except TimeoutError:
        _stuck.add(future)
        raise Timeout(f"{uri} did not answer within {bound:g} s", hint=hint) from None
    except TemplatedError:
        raise
    except Exception as error:
        raise HostError(f"cannot connect to {uri}: {error}", hint=hint) from error


def _ours(error: Any, what: str) -> TemplatedError:
    """An error of libvirt in the project's tree."""
    libvirt, code = binding(), error.get_error_code()
    message = f"{what}: {error.get_error_message() or error}"

    def among(names: tuple[str, ...]) -> bool:
        return any(code == getattr(libvirt, f"VIR_ERR_{name}") for name in names)

    if among(_MISSING):
        return NotFound(message, hint="virsh lists what there is")
    if among(_CONFLICTS):
        return Conflict(message, hint="virsh tells its state")
    if among(_DENIED):
        return HostError(message, hint="run it as root, or join the group libvirt")
    return HypervisorError(message, hint="libvirtd's log has more")


def _thread(work: Callable[[], T]) -> Future[T]:
    """Run `work` in a thread that does not keep the process alive."""
    _stuck.difference_update([future for future in list(_stuck) if future.done()])
    if len(_stuck) >= _MOST_STUCK:
        raise Timeout(f"libvirt hangs: {len(_stuck)} calls have not come back", hint="restart it")
    future: Future[T] = Future()
    # Running, so that who stops waiting does not cancel it.
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - who waits for it raises it
            future.set_exception(error)

    threading.Thread(target=run, name="libvirt", daemon=True).start()
    return future


def _dotted(version: int) -> str:
    return f"{version // 1_000_000}.{version // 1000 % 1000}.{version % 1000}"
