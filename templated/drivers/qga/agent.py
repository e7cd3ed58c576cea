"""qemu-ga as a guest's agent: identity, commands and files by what it offers.

An identity is one command in the guest, a shell script (identity.sh); then the agent itself is
asked for the guest's addresses and its time. Source: qga/qapi-schema.json of QEMU 7.2 and 10.0.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import secrets
import shlex
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import msgspec

from templated import failpoints
from templated.drivers.guest import (
    MAX_FILE,
    Confirmation,
    ExecResult,
    IdentityOrder,
    Output,
    Sink,
    Step,
)
from templated.drivers.guest_functions import Answer, InvokeOrder, Loaded, LoadOrder
from templated.drivers.qga.port import GaPort, forbidden
from templated.errors import Conflict, GuestError, TemplatedError, Timeout
from templated.timing import within

NEEDED = (*("guest-exec", "guest-exec-status", "guest-network-get-interfaces", "guest-get-time"),)
"""The commands without which there is no identity."""
_TASKS = {Step.IDENTIFY: "identify", Step.CLAIM: "claim", Step.REHEARSAL: "rehearsal"}
"""What the script calls them."""
CHUNK = 256 << 10
"""Bytes of a file at once."""
# Seconds between two looks at a command: the first, and the longest.
_FIRST_LOOK, _LONGEST_LOOK = 0.01, 0.25
_SHORT = 60.0
"""Seconds for what the agent does itself: a guest on a busy host may stand still for some."""
_ENDING = 10.0
"""Seconds for what is done after a failure."""
_WHOLE_FILE = 600.0
_DIGITS = 20
"""Of a time in nanoseconds."""
_Nanoseconds = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]


class _Command(msgspec.Struct, frozen=True):
    name: str
    enabled: bool = True


class _Info(msgspec.Struct, frozen=True):
    supported_commands: tuple[_Command, ...] = ()


class _Started(msgspec.Struct, frozen=True):
    pid: int


class _Status(msgspec.Struct, frozen=True, rename="kebab"):
    exited: bool
    exitcode: Annotated[int, msgspec.Meta(ge=0, le=255)] | None = None
    signal: Annotated[int, msgspec.Meta(ge=1, le=127)] | None = None
    out_data: bytes = b""
    err_data: bytes = b""
    out_truncated: bool = False
    err_truncated: bool = False


class _Address(msgspec.Struct, frozen=True, rename="kebab"):
    ip_address: str
    ip_address_type: str
    prefix: int


class _Interface(msgspec.Struct, frozen=True, rename="kebab"):
    name: str
    hardware_address: str = ""
    ip_addresses: tuple[_Address, ...] = ()


class _Part(msgspec.Struct, frozen=True, rename="kebab"):
    count: int
    eof: bool = False
    buf_b64: bytes = b""


@functools.cache
def identity_script() -> str:
    """The script that gives a guest its identity, as a shell there reads it behind its values."""
    return Path(__file__).with_name("identity.sh").read_text()


class GaAgent:
    """A connection to one guest's qemu-ga; see `templated.drivers.agent.GuestAgent`.

    Output of a command comes when it has ended. Functions need our own agent.
    """

    def __init__(self, path: Path) -> None:
        self._port = GaPort(path)
        self._fit = False
        self.marked = time.monotonic()
        self.asked = time.time()

    @property
    def connected(self) -> bool:
        return self._port.connected

    @property
    def absence(self) -> str:
        return (
            "qemu-ga does not answer: install the package qemu-guest-agent in the image, and have "
            "it start at boot"
        )

    async def connect(self) -> None:
        await self._port.connect()

    async def close(self) -> None:
        await self._port.close()

    async def ping(self, timeout: float) -> None:
        if failpoints.armed:
            await failpoints.reach("agent.ping")
        await self._port.agree(timeout)
        if not self._fit:
            info = await self._port.command("guest-info", _Info, timeout)
            allowed = {command.name for command in info.supported_commands if command.enabled}
            for name in NEEDED:
                if name not in allowed:
                    raise forbidden(name)
            self._fit = True

    async def settle(self, timeout: float) -> None:
        async with within(timeout, "cloud-init in the guest"):
            await self._script("task=settle", timeout)

    # --- identity -----------------------------------------------------------------------------

    async def identify(self, timeout: float, identity: IdentityOrder) -> Confirmation:
        async with within(timeout, "the guest's identity"):
            if failpoints.armed:
                await failpoints.reach("agent.identify")
            told = await self._script(assignments(identity), timeout)
            interfaces = await self._port.command(
                "guest-network-get-interfaces", tuple[_Interface, ...], timeout
            )
            asked = time.time()
            now = await self._mark(told)
            mac, ip, prefix = seen_address(interfaces, identity.mac)
            return Confirmation(
                hostname=told.get("hostname", ""),
                machine_id=told.get("machine-id", ""),
                boot_id=told.get("boot_id", ""),
                uuid=told.get("uuid", ""),
                mac=mac,
                ip=ip,
                prefix=prefix,
                time=now / 1e9,
                asked=asked,
            )

    async def adjust_clock(self, seconds: float, timeout: float) -> float:
        async with within(timeout, "the guest's clock"):
            if seconds:
                await self._script(f"task=shift\nshift={int(seconds * 1e9)}\n", timeout)
            # What it takes to set a clock must not make its error look small.
            self.asked = time.time()
            return await self._time() / 1e9

    async def quiesce(self, timeout: float) -> None:
        async with within(timeout, "making the guest ready to be frozen"):
            if failpoints.armed:
                await failpoints.reach("agent.quiesce")
            await self._mark(await self._script("task=quiesce", timeout))

    async def _script(self, values: str, timeout: float) -> dict[str, str]:
        """Run the script; what it tells, by name. Raises GuestError with its last line."""
        given = f"{values}\n{identity_script()}"
        ended = await self._run(["/bin/sh", "-s"], timeout, given.encode())
        if ended is None:
            raise Timeout(f"the guest did not take its identity within {timeout:g} s")
        if ended.exitcode != 0:
            lines = ended.err_data.decode(errors="replace").strip().splitlines()
            why = lines[-1] if lines else f"exit code {ended.exitcode}, signal {ended.signal}"
            raise GuestError(f"the guest did not take its identity: {why}")
        lines = ended.out_data.decode(errors="replace").splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    async def _mark(self, told: dict[str, str]) -> int:
        """Find out when the guest set its mark; returns its time now, in nanoseconds."""
        now, heard = await self._time(), time.monotonic()
        at = told.get("mark", "")
        known = at.isascii() and at.isdigit() and len(at) <= _DIGITS
        passed = (now - int(at)) / 1e9 if known else 0.0
        # What a guest says of it must not lead further than to its own clock.
        self.marked = heard - min(max(passed, 0.0), _SHORT)
        return now

    async def _time(self) -> int:
        return await self._port.command("guest-get-time", _Nanoseconds, _SHORT)

    # --- commands -----------------------------------------------------------------------------

    async def exec(
        self,
        argv: list[str],
        *,
        timeout: float,
        stdin: bytes | None = None,
        env: dict[str, str] | None = None,
    ) -> AsyncGenerator[Output | ExecResult, None]:
        if failpoints.armed:
            await failpoints.reach("agent.exec")
        # Its own `env` would be in place of the whole environment, PATH included.
        pairs = [f"{name}={value}" for name, value in (env or {}).items()]
        # In a session of its own, so that what it starts can be ended with it.
        started = ["setsid", *(["env", *pairs] if pairs else []), *argv]
        ended = await self._run(started, timeout, stdin)
        if ended is None:
            yield ExecResult(timed_out=True, signal=9)
            return
        if ended.out_truncated or ended.err_truncated:
            raise GuestError("the command printed more than the guest's agent keeps")
        if (result := _not_started(ended)) is not None:
            yield result
            return
        if ended.out_data:
            yield Output("stdout", ended.out_data)
        if ended.err_data:
            yield Output("stderr", ended.err_data)
        yield ExecResult(exit_code=ended.exitcode, signal=ended.signal)

    async def _run(
        self, argv: list[str], timeout: float, stdin: bytes | None = None
    ) -> _Status | None:
        """Run a command to its end; None: it was killed after `timeout` seconds.

        Raises as `GaPort.command` does.
        """
        given: dict[str, object] = {"path": argv[0], "arg": argv[1:], "capture_output": True}
        if stdin:
            given["input_data"] = base64.b64encode(stdin).decode()
        started = await self._port.command("guest-exec", _Started, _SHORT, **given)
        try:
            async with asyncio.timeout(timeout):
                return await self._ended(started.pid)
        except TimeoutError:
            await self._kill(started.pid)
            return None

    async def _ended(self, pid: int) -> _Status:
        for pause in _looks():
            status = await self._port.command("guest-exec-status", _Status, _SHORT, pid=pid)
            if status.exited:
                return status
            await asyncio.sleep(pause)
        raise AssertionError("there is always another look")

    async def _kill(self, pid: int) -> None:
        """End a command, its group too if it leads one, and have the agent forget them.

        It keeps how a command ended until it has been asked for that.
        """
        script = 'kill -s KILL -- "-$1" || kill -s KILL "$1"'
        kill = {"path": "/bin/sh", "arg": ["-c", script, "sh", str(pid)]}
        with contextlib.suppress(TemplatedError, TimeoutError):
            async with asyncio.timeout(_ENDING):
                killing = await self._port.command("guest-exec", _Started, _SHORT, **kill)
                await self._ended(killing.pid)
                await self._ended(pid)

    # --- files --------------------------------------------------------------------------------

    async def put(self, path: str, content: bytes, mode: int, timeout: float) -> None:
        if failpoints.armed:
            await failpoints.reach("agent.put")
        # The agent makes files that everybody may write, and follows links: so it makes none.
        part = f"{path}.{secrets.token_hex(8)}.part"
        try:
            await self._file_command(path, timeout, 'umask 077; set -C; : >"$1"', part)
            await self._fill(part, content, timeout)
            name = 'chmod "$1" "$2" && mv -f "$2" "$3"'
            await self._file_command(path, timeout, name, f"{mode & 0o7777:o}", part, path)
        except BaseException:
            with contextlib.suppress(TemplatedError, TimeoutError):
                async with asyncio.timeout(_ENDING):
                    await self._file_command(path, timeout, 'rm -f "$1"', part)
            raise

    async def _file_command(self, path: str, timeout: float, script: str, *words: str) -> None:
        """A step of writing the file `path`, by the guest's shell."""
        ended = await self._run(["/bin/sh", "-c", script, "sh", *words], timeout)
        if ended is None:
            raise Timeout(f"the guest did not write {path} within {timeout:g} s")
        if ended.exitcode != 0:
            said = ended.err_data.decode(errors="replace").strip()
            raise GuestError(f"the guest cannot write {path}: {said or 'no reason given'}")

    async def _fill(self, path: str, content: bytes, timeout: float) -> None:
        """Write what is in a file that is there and empty."""
        handle = await self._open(path, "r+", timeout)
        try:
            for offset in range(0, len(content), CHUNK):
                await self._write(handle, content[offset : offset + CHUNK], timeout)
        finally:
            await self._close(handle, timeout)

    async def get(self, path: str, timeout: float) -> bytes:
        if failpoints.armed:
            await failpoints.reach("agent.get")
        content, handle = bytearray(), await self._open(path, "r", timeout)
        try:
            async with within(_WHOLE_FILE, f"reading {path} in the guest"):
                while not (part := await self._read(handle, timeout)).eof:
                    content += part.buf_b64
                    if len(content) > MAX_FILE:
                        raise GuestError(f"{path} in the guest has more than {MAX_FILE >> 20} MiB")
                content += part.buf_b64
        finally:
            await self._close(handle, timeout)
        return bytes(content)

    async def _open(self, path: str, mode: str, timeout: float) -> int:
        return await self._port.command("guest-file-open", int, timeout, path=path, mode=mode)

    async def _write(self, handle: int, chunk: bytes, timeout: float) -> None:
        data = base64.b64encode(chunk).decode()
        part = await self._port.command(
            "guest-file-write", _Part, timeout, handle=handle, buf_b64=data
        )
        if part.count != len(chunk):
            raise GuestError("the guest has no room for the whole file")

    async def _read(self, handle: int, timeout: float) -> _Part:
        part = await self._port.command(
            "guest-file-read", _Part, timeout, handle=handle, count=CHUNK
        )
        if not part.buf_b64 and not part.eof:
            raise GuestError("the agent answered nonsense: a part of a file that is empty")
        return part

    async def _close(self, handle: int, timeout: float) -> None:
        # The agent keeps what is open; what fails is said by who uses it.
        with contextlib.suppress(TemplatedError):
            await self._port.command("guest-file-close", msgspec.Raw, timeout, handle=handle)

    # --- functions ----------------------------------------------------------------------------

    async def load(self, order: LoadOrder, timeout: float, sink: Sink | None = None) -> Loaded:
        _no_functions()

    async def invoke(self, order: InvokeOrder, timeout: float, sink: Sink | None = None) -> Answer:
        _no_functions()

    async def rehearse_code(self, timeout: float) -> None:
        _no_functions()


def _no_functions() -> NoReturn:
    raise Conflict(
        "this guest has qemu-ga, and functions need the agent of templated",
        hint="take a template with `code: true`, such as python-fn",
    )


def _looks() -> Iterator[float]:
    """Seconds from one look at a command to the next: each costs the guest a turn."""
    pause = _FIRST_LOOK
    while True:
        yield pause
        pause = min(pause * 1.5, _LONGEST_LOOK)


def _not_started(ended: _Status) -> ExecResult | None:
    """How a command ended that could not be started; None: it was.

    setsid(1) and env(1) say so with exit codes of their own.
    """
    error = {127: "not_found", 126: "not_executable"}.get(ended.exitcode or 0)
    if error is None or not ended.err_data.startswith((b"setsid: ", b"env: ")):
        return None
    return ExecResult(exit_code=ended.exitcode, error=error)


def assignments(identity: IdentityOrder) -> str:
    """The values of an identity as the script takes them: assignments of the shell."""
    values = {
        "task": _TASKS[identity.step],
        "time": str(int(identity.time * 1e6) * 1000),
        "entropy": identity.entropy.hex(),
        "hostname": identity.hostname,
        "machine_id": identity.machine_id,
        "boot_id": identity.boot_id,
        "uuid": identity.uuid,
        "mac": identity.mac,
        "ip": identity.ip,
        "prefix": str(identity.prefix),
        "gateway": identity.gateway or "",
        "dns": " ".join(identity.dns),
        "host_keys": " ".join(key.kind for key in identity.host_keys),
    }
    for key in identity.host_keys:
        values[f"{key.kind}_private"] = key.private.rstrip("\n")
        values[f"{key.kind}_public"] = key.public.rstrip("\n")
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())


def seen_address(interfaces: tuple[_Interface, ...], mac: str) -> tuple[str, str, int]:
    """MAC, IPv4 address and prefix that the guest has; all of them, when there are too many.

    Of the interface with this MAC; without one, of the first that is a network card.
    """
    cards = [i for i in interfaces if i.name != "lo" and i.hardware_address]
    own = [i for i in cards if i.hardware_address == mac] or cards[:1]
    addresses = [a for i in own for a in i.ip_addresses if a.ip_address_type == "ipv4"]
    return (
        ", ".join(i.hardware_address for i in own),
        ", ".join(a.ip_address for a in addresses),
        addresses[0].prefix if addresses else 0,
    )
