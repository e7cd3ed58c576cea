"""What a request to the agent does."""

from __future__ import annotations

import binascii
import errno
import gc
import os
import struct
import time
from collections.abc import Callable

from .execution import Execution, run_hooks
from .kernel import System
from .port import Port
from .wire import (
    CHUNK,
    IDENTIFY,
    PACKED,
    PAGE,
    QUICK,
    QUICK_DATA,
    QUICK_HEAD,
    REHEARSAL,
    SEEN,
    STEPS,
    VERSION,
    Refused,
    decode,
    join,
)

TYPE_CHECKING = False  # a module less in every guest
if TYPE_CHECKING:
    from typing import Any

# What a request of the wrong kind can raise: an offset without end is an OverflowError.
BAD = (ArithmeticError, LookupError, RecursionError, TypeError, ValueError, struct.error)
SPARE = 100_000
"""Bytes; below the size from which malloc(3) gives memory back at once."""


class Agent(Port):
    """The agent on a port. `serve` runs until `stop` is set."""

    def __init__(self, fd_in: int, fd_out: int, system: System) -> None:
        super().__init__(fd_in, fd_out)
        self._system = system
        self.stop = False
        self._identified = False
        self._marked_at = 0.0
        self._hooks: list[str] | None = None
        self._parked = False
        self.extra: dict[Any, Callable[[dict[str, Any]], dict[str, Any] | None]] = {}
        """What else this agent can do: of one with a function's code, see functions."""

    def serve(self) -> None:
        """Answer requests until `stop`."""
        while not self.stop:
            if self._parked:
                self._park()
            self.turn(None)

    def _park(self) -> None:
        """Be frozen in a plain read, and answer identify there; return on anything else.

        A clone's first code is what follows that read, and an idle one has run no other.
        """
        data = b""
        os.set_blocking(self._in, True)
        try:
            while True:
                data = os.read(self._in, PAGE)
                line = data.strip()
                if line or not data:  # more than the empty lines of a new connection, or its end
                    reply = self._quick(line)
                    if reply is None:
                        break
                    os.write(self._out, reply)
                    self._marked_at = time.monotonic()
        except (Refused, OSError, *BAD):
            pass  # it is tried once more below, where a failure is answered
        os.set_blocking(self._in, False)
        self._parked, self._connected = False, True
        self._begin()
        self._take(data)
        self._receive()

    def handle(self, line: bytes) -> None:
        """Answer a request; whatever it contains, the agent goes on."""
        number = None
        try:
            request = self._parse(line)
            if not isinstance(request, dict):
                raise Refused("invalid", "a request must be an object")
            number = self._number(request)
            name = request.get("cmd")
            command = COMMANDS.get(name)  # type: ignore[arg-type]
            if command is not None:
                result = command(self, request)
            elif (extra := self.extra.get(name)) is not None:
                result = extra(request)
            else:
                raise Refused("unknown_command", f"no command {name!r}")
            if result is not None:
                self.reply(number, result, self.connection)
                if command in (Agent.quiesce, Agent.identify):
                    self.mark()
        except Refused as error:
            self.refuse(number, error.code, str(error))
        except OSError as error:
            code = errno.errorcode.get(error.errno or 0, "os").lower()
            self.refuse(number, code, str(error))
        except BAD as error:
            self.refuse(number, "invalid", f"{type(error).__name__}: {error}")

    def mark(self) -> None:
        """Remember this moment: the host's next clock tells what time it was then."""
        self._marked_at = time.monotonic()

    def set_clock(self, seconds: float) -> None:
        """Set the wall clock to what it is, when it was `seconds` at the last mark."""
        if self._marked_at:
            seconds += time.monotonic() - self._marked_at
        self._system.set_clock(seconds)

    def _number(self, request: dict[str, Any]) -> int | str:
        """The id of a request; another kind of one might not go into its reply."""
        number = request.get("id")
        if not isinstance(number, (int, str)):
            raise Refused("invalid", "the id of a request must be an integer or a string")
        return number

    def _parse(self, line: bytes) -> Any:
        try:
            return decode(line.decode())
        except ValueError:
            self._begin()
            raise

    def ping(self, request: dict[str, Any]) -> dict[str, Any]:
        """Say that the agent is there."""
        return {
            "version": VERSION,
            "pid": os.getpid(),
            "time": time.time(),
            "identified": self._identified,
        }

    def identify(self, request: dict[str, Any]) -> dict[str, Any]:
        """Become the machine that `packed` describes; returns what the kernel then says."""
        return {"seen": self._become(str(request["packed"]).encode()).decode()}

    def _quick(self, line: bytes) -> bytes | None:
        """The reply to an identify of the shape that the host gives it; None for all else."""
        head = line[:QUICK_HEAD]
        if line[QUICK_HEAD:QUICK_DATA] != QUICK or head[:6] != b'{"id":' or len(head) > 20:
            return None
        seen = self._become(line[QUICK_DATA:-2])
        return join((head, b',"ok":true,"result":{"seen":"', seen, b'"}}\n'))

    def _become(self, packed: bytes) -> bytes:
        """Take the identity that PACKED tells of; returns SEEN. Straight on: every turn costs."""
        values = PACKED.unpack(binascii.unhexlify(packed))
        step, entropy, now, mac, ip, prefix, gateway = values[:7]
        name, hosts, machine_id, boot_id, uid, dns, facts = values[7:]
        system = self._system
        write, read = system.write, system.read
        system.add_entropy(entropy)
        if self._marked_at:  # `now` was then, not now
            now += time.monotonic() - self._marked_at
        system.set_clock(now)
        name = name.rstrip()
        system.set_hostname(name)
        write("hostname", join((name, b"\n")))
        write("hosts", join((hosts.rstrip(), b"\n")))
        if step == IDENTIFY:
            write("machine-id", join((machine_id, b"\n")))
            write("boot_id", join((boot_id, b"\n")))
            write("uuid", join((uid, b"\n")))
            dns = dns.rstrip()
            if dns:
                write("resolv.conf", join((dns, b"\n")))
            system.set_mac(mac)
            system.set_address(ip, prefix, gateway)
        hooks, self._hooks = self._hooks, None
        if hooks is None:
            hooks = system.hooks()
        if step == REHEARSAL:  # what follows is a claim, with these hooks
            hooks, self._hooks, self._parked = [], hooks, not self.sources
        if hooks:
            run_hooks(hooks, {"step": STEPS[step], **decode(facts.decode())})
        write("identity.json", join((facts.rstrip(), b"\n")))
        self._identified = True
        ip, netmask = system.address()
        seen = SEEN.pack(system.mac(), ip, netmask, time.time())
        texts = (seen, system.hostname(), read("machine-id"), read("boot_id"), read("uuid"))
        return binascii.hexlify(join(texts))

    def clock(self, request: dict[str, Any]) -> dict[str, Any]:
        """Shift the wall clock by `adjust` seconds."""
        self._system.set_clock(time.time() + float(request["adjust"]))
        return {"time": time.time()}

    def quiesce(self, request: dict[str, Any]) -> dict[str, Any]:
        """Prepare to be frozen: no address, clean file systems, no garbage to collect later."""
        self._system.clear_address()
        self._system.forget()
        self._system.sync()
        self._hooks = self._system.hooks()  # none can come while it is frozen
        gc.collect()
        gc.freeze()
        # Leaves the heap room for what comes next: more of it from the kernel would be code that
        # each clone has to translate.
        _ = b" " * SPARE
        self._parked = not self.sources
        return {"executions": len(self.sources)}

    def execute(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """Start a command; its reply follows when it ends."""
        cwd = request.get("cwd") or "/"
        try:
            self.sources.add(Execution(self, request))
            self._parked = False  # it came right behind a quiesce, and needs the loop
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            if error.filename == cwd:
                raise Refused("bad_cwd", f"{cwd}: {error.strerror}") from error
            missing = not isinstance(error, PermissionError)
            return {
                "exit_code": 127 if missing else 126,
                "signal": None,
                "timed_out": False,
                "error": "not_found" if missing else "not_executable",
            }
        return None

    def put(self, request: dict[str, Any]) -> dict[str, Any]:
        """Write one chunk of a file; it appears under its name with the last one."""
        path, offset = os.fspath(request["path"]), int(request.get("offset", 0))
        part = path + ".templated-part"
        data = binascii.a2b_base64(request["data"])
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if offset == 0 else 0)
        descriptor = os.open(part, flags, 0o600)
        try:
            view = memoryview(data)
            while view:
                count = os.pwrite(descriptor, view, offset)
                offset, view = offset + count, view[count:]
            if request.get("eof"):
                os.fchmod(descriptor, int(request.get("mode", 0o644)) & 0o7777)
        finally:
            os.close(descriptor)
        if request.get("eof"):
            try:
                os.replace(part, path)
            except OSError as error:
                if error.errno != errno.EBUSY:  # another file is mounted over it
                    raise
                with open(part, "rb") as source, open(path, "wb") as target:
                    target.write(source.read())
                os.unlink(part)
        return {"size": offset}

    def get(self, request: dict[str, Any]) -> dict[str, Any]:
        """Read one chunk of a file."""
        offset = int(request.get("offset", 0))
        length = min(int(request.get("length", CHUNK)), CHUNK)
        descriptor = os.open(request["path"], os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            data = os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)
        # Files in /proc have size 0: only an empty read tells their end.
        eof = len(data) == 0 or 0 < status.st_size <= offset + len(data)
        text = binascii.b2a_base64(data, newline=False).decode()
        mode = status.st_mode & 0o7777
        return {"data": text, "eof": eof, "size": status.st_size, "mode": mode}


COMMANDS: dict[str, Callable[[Agent, dict[str, Any]], dict[str, Any] | None]] = {
    "ping": Agent.ping,
    "identify": Agent.identify,
    "clock": Agent.clock,
    "exec": Agent.execute,
    "put": Agent.put,
    "get": Agent.get,
    "quiesce": Agent.quiesce,
}
