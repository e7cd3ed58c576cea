"""Functions: code that is attached, a runtime that has loaded it, one request at a time.

The runtime asks for requests by AWS Lambda's Runtime API: `next` gives it one, `response` or
`error` ends it. Ours asks over a socket that it inherits, others on ADDRESS.
https://docs.aws.amazon.com/lambda/latest/dg/runtimes-api.html

    EMPTY -load-> STARTING -next-> READY -invoke-> BUSY -response, error-> READY
    any of the last three -the runtime ends, or its init fails-> ENDED
"""

from __future__ import annotations

import binascii
import math
import os
import socket
import time
from collections.abc import Callable, Sequence

from .code import Drive
from .commands import Agent
from .events import event_of, exit_failure, failure, order_of
from .execution import ENVIRONMENT
from .http import Connection, Request, Server
from .port import QUEUE_LIMIT, Source
from .runtimes import NOBODY, RESIDENT, Process
from .wire import MAX_PAYLOAD, PART, WHOLE, Refused, encode, join

TYPE_CHECKING = False  # a module less in every guest
if TYPE_CHECKING:
    from typing import Any

ADDRESS = ("127.0.0.1", 9001)
API = b"/2018-06-01/runtime/"
NEXT, INIT_ERROR = API + b"invocation/next", API + b"init/error"
INVOCATION, ORDER = API + b"invocation/", API + b"init/order"
RESPONSE, ASKS = b"/response HTTP/1.1\r\nContent-Length: ", b"GET " + NEXT + b" HTTP/1.1"
END = b"\r\n\r\n"
ASKING = ASKS + END
TAKEN = b'HTTP/1.1 202 Accepted\r\nContent-Length: 15\r\n\r\n{"status":"OK"}'
KEPT, PIECE = 64 << 10, 64
"""Bytes of output between two requests that are kept for the next one, the last; each piece has a
size of its own."""
EMPTY, STARTING, READY, BUSY, ENDED = "empty", "starting", "ready", "busy", "ended"

Done = Callable[["dict[str, Any]"], None]


class Functions(Source):
    """What an agent knows of the function on its machine. Tests put other things in its place."""

    def __init__(
        self,
        agent: Agent,
        drive: Drive,
        *,
        address: tuple[str, int] = ADDRESS,
        resident: Sequence[str] = RESIDENT,
        user: int | None = NOBODY,
    ) -> None:
        self._agent, self._drive = agent, drive
        self._resident_argv, self._user = resident, user
        self.state = EMPTY
        self.deadline: float | None = None
        self._done: Done | None = None
        self._number: Any = None
        self._connection = 0
        self._kept: list[tuple[str, bytes]] = []
        self._kept_bytes = 0
        self._parts = bytearray()
        self._event: bytes | bytearray | None = None
        """A request that nobody has asked for yet."""
        self._id = b""
        self._head = b""
        """How our runtime begins its answer to the request under way."""
        self._asks = Request(ASKS)
        self._waiting: list[Connection] = []
        self._how = ""
        self._order: bytes | None = None
        self._reader: Connection | None = None
        self._began = self._mount_ms = 0.0
        self._paused = False
        self._server = Server(agent, address, self._serve)
        self.process: Process | None = None
        self._resident: Connection | None = None
        self.start_resident()
        agent.extra.update(
            {
                "load": self.load,
                "invoke": self.invoke,
                "part": self.part,
                "rehearse": self.rehearse,
            }
        )

    def close(self) -> None:
        """End the runtime and let go of the address."""
        if self.process is not None:
            self.process.kill()
        self._server.close()

    # What the host asks for

    def load(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """Attach the code, prove it, start its handler; the reply follows when it has started."""
        self.require_empty()
        uuid, order = binascii.unhexlify(request["uuid"]), order_of(request)
        seconds = float(request["timeout"])
        if not math.isfinite(seconds):
            raise Refused("invalid", "the timeout must be a number")
        self.own(request)
        self.start(uuid, order, seconds, self.reply)
        return None

    def part(self, request: dict[str, Any]) -> dict[str, Any]:
        """Keep a part of a payload that is too large for one message."""
        offset, data = int(request["offset"]), binascii.a2b_base64(request["data"])
        if offset == 0:
            self._parts = bytearray()
        if offset != len(self._parts) or len(data) + offset > MAX_PAYLOAD:
            raise Refused("invalid", "a part of a payload that does not fit")
        self._parts += data
        return {"size": len(self._parts)}

    def invoke(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """Give the function a request; the reply follows when it has answered."""
        if self.state == ENDED:
            return {**self._exit(""), "begun": False}
        if self.state != READY:
            raise Refused("not_ready", f"the function takes no request: it is {self.state}")
        size = request.get("size")
        event: bytes | bytearray
        if size is None:
            payload = request["payload"].encode()
            event = join((event_of(request, len(payload)), payload))
        else:
            # In place: a machine of 128 MiB has no room for many copies of 6 MiB.
            event, self._parts = self._parts, bytearray()
            if len(event) != size:
                raise Refused("invalid", "a payload that is not whole")
            event[:0] = event_of(request, size)
        now = request.get("time")
        if now is not None:
            self._agent.set_clock(float(now))
        self.own(request)
        self.give(request["request"].encode(), event, self.reply)
        return None

    def rehearse(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """Load and invoke once, and undo it."""
        raise Refused("unknown_command", "no rehearsal here")

    def require_empty(self) -> None:
        """Raise Refused unless a function can be loaded."""
        if self.state != EMPTY:
            raise Refused("loaded", f"this machine has a function already: it is {self.state}")

    def own(self, request: dict[str, Any]) -> None:
        """From now on what is printed belongs to this request."""
        self._number, self._connection = request["id"], self._agent.connection
        if self._kept:
            kept, self._kept, self._kept_bytes = self._kept, [], 0
            for name, data in kept:
                self.output(name, data)

    def reply(self, result: dict[str, Any]) -> None:
        """Send the end of the request under way, and mark the clock."""
        number, self._number = self._number, None
        self._agent.reply(number, result, self._connection)
        self._agent.mark()

    # How a function starts, and gets a request

    def start(self, uuid: bytes | None, order: dict[str, Any], seconds: float, done: Done) -> None:
        """Attach the code and start the runtime; `done` is told how that went.

        Raises OSError and Refused; then nothing is attached.
        """
        begin = time.monotonic()
        try:
            if self.process is None:
                self.start_resident()
            self._drive.attach(uuid)
        except BaseException:
            self._number = None
            raise
        now = time.monotonic()
        self._mount_ms, self._began = (now - begin) * 1000, now
        self.state, self._done, self._how = STARTING, done, ""
        self.wait_until(now + seconds)
        if order["runtime"] == "python":
            self._order = encode({**order, "root": self._drive.root}).encode()
            self._give_order()
        else:
            self._start_bootstrap(order)

    def start_resident(self) -> None:
        """Start our Python, which waits for an order. Raises OSError."""
        ours, theirs = socket.socketpair()
        try:
            self.process = self._start(self._resident_argv, ENVIRONMENT, "/", theirs)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._resident = self._server.add(ours)
        self._resident.quick = self._quick

    def _start_bootstrap(self, order: dict[str, Any]) -> None:
        """Start the code's own runtime in place of ours."""
        if self.process is not None:
            self.process.kill()
            self.process = None
        root = self._drive.root
        env = {**ENVIRONMENT, **order["env"]}
        env.update(
            AWS_LAMBDA_RUNTIME_API=self._server.address,
            _HANDLER=order["handler"],
            LAMBDA_TASK_ROOT=root,
        )
        path = root + "/bootstrap"
        try:
            self.process = self._start((path,), env, root)
        except OSError as error:
            why = f"{path} cannot be executed: {error.strerror}"
            if not os.path.exists(path):
                why = f"the code has no file named bootstrap in {root}"
            elif not os.access(path, os.X_OK):
                why = f"{path} is not executable: set its mode (chmod +x) before it is deployed"
            self._fail(failure("Runtime.InvalidEntrypoint", why))

    def _start(
        self,
        argv: Sequence[str],
        env: dict[str, str],
        cwd: str,
        end: socket.socket | None = None,
    ) -> Process:
        user = self._user
        return Process(
            self._agent,
            argv,
            env if user is None else {**env, "HOME": "/tmp", "USER": "nobody"},
            cwd,
            user=user,
            printed=self.output,
            ended=self.on_end,
            end=end,
        )

    def detach(self) -> None:
        """Take the code away again. Raises OSError while something of it is in use."""
        self._drive.detach()

    def wait_until(self, deadline: float) -> None:
        """Have `expire` called then, unless something is over before."""
        self.deadline = deadline
        self._agent.sources.add(self)

    def refuse_request(self, code: str, message: str) -> None:
        """Send the bad end of the request under way."""
        number, self._number = self._number, None
        if self._connection == self._agent.connection:
            self._agent.refuse(number, code, message)

    def _give_order(self) -> None:
        reader, order = self._reader, self._order
        if reader is not None and order is not None:
            self._reader = self._order = None
            reader.answer(200, order)
            reader.resume()

    def give(self, number: bytes, event: bytes | bytearray, done: Done) -> None:
        """Give the runtime a request; `done` is told how it ended."""
        self.state, self._id, self._done = BUSY, number, done
        self._head = join((b"POST ", INVOCATION, number, RESPONSE))
        while self._waiting:
            connection = self._waiting.pop(0)
            connection.raw(event)
            if not connection.closed:
                connection.resume()
                return
        self._event = event

    def finish(self, result: dict[str, Any]) -> None:
        """The request under way, or the start, is over: tell who waits for it."""
        done, self._done, self.deadline = self._done, None, None
        if not self._paused:
            self._agent.sources.discard(self)
        if done is not None:
            done(result)

    # What the runtime says

    def _serve(self, connection: Connection, request: Request) -> None:
        path = request.path
        if request.method == b"POST":
            if path.startswith(INVOCATION):
                number, _, what = path[len(INVOCATION) :].partition(b"/")
                self._on_answer(connection, request, number, what)
                return
            if path == INIT_ERROR:
                self._on_init_error(connection, request)
                return
        elif request.method == b"GET":
            if path == NEXT:
                self.on_next(connection)
                return
            if path == ORDER and connection is self._resident:
                self.on_waiting(connection)
                return
        else:
            connection.answer(405, failure("InvalidMethod", "GET and POST are known"))
            return
        connection.answer(404, failure("NotFound", "the Runtime API has no such path"))

    def _quick(self, connection: Connection, data: bytes) -> bool:
        """Take an answer with the question for the next request behind it, as our runtime sends
        them; false for all else. That the answer was taken it reads with the next request.
        """
        head, end = self._head, len(data) - len(ASKING)
        if self.state != BUSY or not data.startswith(head) or data[end:] != ASKING:
            return False
        begin = data.find(END, len(head)) + len(END)
        if data[len(head) : begin - len(END)] != b"%d" % (end - begin):
            return False
        connection.hold(self._asks, TAKEN)
        self._answered(data[begin:end], None)
        self.on_next(connection)
        return True

    def on_waiting(self, connection: Connection) -> None:
        """The resident runtime waits for an order."""
        self._reader = connection
        self._give_order()

    def on_next(self, connection: Connection) -> None:
        """A runtime asks for a request; with the first time it has started."""
        self._waiting = [one for one in self._waiting if not one.closed]
        if self.state == STARTING:
            self._waiting.append(connection)
            self.state = READY
            init_ms = (time.monotonic() - self._began) * 1000
            self._drain()
            self.finish({"mount_ms": self._mount_ms, "init_ms": init_ms})
        elif self._event is not None:
            event, self._event = self._event, None
            connection.raw(event)
            if connection.closed:
                self._event = event
        else:
            self._waiting.append(connection)

    def _on_answer(
        self, connection: Connection, request: Request, number: bytes, what: bytes
    ) -> None:
        """The end of a request."""
        if self.state != BUSY or number != self._id or what not in (b"response", b"error"):
            text = "it is not the request under way"
            connection.answer(400, failure("InvalidRequestID", text))
            return
        error: str | None = None
        body, status = request.body, 202
        if body is None:
            text = f"Response payload size exceeded maximum allowed payload size ({MAX_PAYLOAD})."
            body, error = failure("Function.ResponseSizeTooLarge", text), "Unhandled"
            status = 413
        elif what == b"error":
            kind = request.headers.get(b"lambda-runtime-function-error-type", b"")
            error = "Handled" if kind == b"Handled" else "Unhandled"
        self._answered(body, error)
        if status == 202:
            connection.answer(202, b'{"status":"OK"}')
        else:
            connection.answer(413, bytes(body))

    def _answered(self, body: bytes | bytearray, error: str | None) -> None:
        self.state = READY
        self._drain()
        result = self._carry(body)
        if error is not None:
            result["error"] = error
        self.finish(result)

    def _on_init_error(self, connection: Connection, request: Request) -> None:
        if self.state != STARTING:
            connection.answer(403, failure("InvalidStateTransition", "it has started already"))
            return
        connection.answer(202, b'{"status":"OK"}')
        self._fail(request.body or failure("Runtime.Unknown", "no reason given"))

    def _fail(self, payload: bytes | bytearray) -> None:
        self.state = ENDED
        self._how = self._how or "its init failed"
        self._drain()
        self.finish({**self._carry(payload), "failed": True})

    def on_end(self, how: str) -> None:
        """The runtime has ended. What it has said before counts."""
        for connection in list(self._server.connections):
            while connection.receive():
                pass
        self.process = self._reader = self._resident = None
        self._how = how
        state, begun, self._event = self.state, self._event is None, None
        if state == STARTING:
            self._fail(exit_failure(how, ""))
        elif state == BUSY:
            self.state = ENDED
            self.finish({**self._exit(how), "begun": begun})
        elif state == READY:
            self.state = ENDED

    def _exit(self, how: str) -> dict[str, Any]:
        payload = exit_failure(self._how, self._id.decode() if how else "")
        return {"payload": payload.decode(), "error": "Unhandled", "ended": how or self._how}

    # What the function prints

    def _drain(self) -> None:
        """Take what was printed before the answer that came just now.

        When nothing else was ready together with it, nothing was: pipes are ready at once.
        """
        if (self._agent.ready > 1 or self._paused) and self.process is not None:
            self.process.drain()

    def output(self, name: str, data: bytes) -> None:
        """Give it to the host, or keep it until there is a request that it belongs to."""
        if self._number is None:
            self._kept.append((name, data))
            self._kept_bytes += len(data) + PIECE
            while self._kept_bytes > KEPT and len(self._kept) > 1:
                self._kept_bytes -= len(self._kept.pop(0)[1]) + PIECE
            return
        text = binascii.b2a_base64(data, newline=False).decode()
        frame = {"id": self._number, "stream": name, "data": text}
        self._agent.send(frame, self._connection)
        if self._agent.queued > QUEUE_LIMIT:
            self._agent.sources.add(self)
            self.pause()

    def pause(self) -> None:
        """Leave what is printed in its pipes: the host takes it too slowly."""
        if self.process is not None:
            self._paused = True
            self.process.pause()

    def resume(self) -> None:
        """Go on."""
        if self._paused and self.process is not None:
            self._paused = False
            self.process.resume()

    def expire(self) -> None:
        """The start takes too long."""
        seconds = time.monotonic() - self._began
        self.deadline = None
        if self.state == STARTING:
            self._how = "its init took too long"
            text = f"Init timed out after {seconds:.2f} seconds"
            self._fail(failure("Sandbox.Timedout", text))

    def _carry(self, payload: bytes | bytearray) -> dict[str, Any]:
        """A reply with a payload; a large one is sent before it."""
        if len(payload) <= WHOLE:
            try:
                return {"payload": payload.decode()}
            except UnicodeDecodeError:
                text = binascii.b2a_base64(payload, newline=False).decode()
                return {"payload": text, "base64": True}
        for start in range(0, len(payload), PART):
            text = binascii.b2a_base64(payload[start : start + PART], newline=False).decode()
            frame = {"id": self._number, "stream": "payload", "data": text}
            self._agent.send(frame, self._connection)
        return {"size": len(payload)}
