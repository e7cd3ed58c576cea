"""The loop: an order, a handler, and then request after request."""

from __future__ import annotations

# Not all of these are used here: they are what handlers usually import, which is slow at first.
import base64
import collections
import datetime as dt
import functools
import gc
import io
import json
import logging
import os
import random
import re
import socket
import sys
import time
import traceback
from typing import Any

from .load import Handler, LoadError, load, report, stack

USUAL = (base64, collections, dt, functools, io, logging, random, re, traceback)
API = b"/2018-06-01/runtime/"
ORDER = b"GET " + API + b"init/order HTTP/1.1\r\n\r\n"
NEXT = b"GET " + API + b"invocation/next HTTP/1.1\r\n\r\n"
INVOCATION = b" HTTP/1.1\r\nContent-Length: "
UNHANDLED = b"\r\nLambda-Runtime-Function-Error-Type: Unhandled"
MAX_PAYLOAD = 6 << 20
CHUNK = 1 << 16
SITE = "/usr/lib/python3/dist-packages"
FACTS = (
    ("AWS_LAMBDA_FUNCTION_NAME", ""),
    ("AWS_LAMBDA_FUNCTION_VERSION", "$LATEST"),
    ("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", ""),
    ("AWS_LAMBDA_LOG_GROUP_NAME", ""),
    ("AWS_LAMBDA_LOG_STREAM_NAME", ""),
)
"""Variables that a context tells, and what it says without them."""
TRACE = "_X_AMZN_TRACE_ID"
join = b"".join
_DECODER, _ENCODER = json.JSONDecoder(), json.JSONEncoder()
scan = _DECODER.scan_once  # type: ignore[attr-defined]


def _default(value: object) -> object:
    # Looked up each time: some put one of their own into JSONEncoder.
    return _ENCODER.default(value)


_PARTS = (
    _default,
    json.encoder.encode_basestring,
    None,
    ": ",
    ", ",
    False,
    False,
    False,
)


def encode(value: object) -> str:
    """JSON as Lambda has it. Raises what json.dumps raises, and ValueError for a NaN."""
    return "".join(json.encoder.c_make_encoder({}, *_PARTS)(value, 0))  # type: ignore[attr-defined]


def decode(text: str) -> Any:
    """What JSON says, as json.loads does, without its searches for space around it."""
    try:
        value, end = scan(text, 0)
    except StopIteration:
        return _DECODER.decode(text)
    return value if end == len(text) else _DECODER.decode(text)


class Gone(Exception):
    """What was loaded has to be forgotten."""


class Context:
    """What a handler is told of its request and its function."""

    identity = None
    client_context = None

    def __init__(self, number: str, arn: str, deadline: int, facts: tuple[str, ...]) -> None:
        """`facts` has a text for each of FACTS."""
        self.aws_request_id = number
        self.invoked_function_arn = arn
        self._deadline = deadline
        self.function_name, self.function_version, self.memory_limit_in_mb = facts[:3]
        self.log_group_name, self.log_stream_name = facts[3:]

    def get_remaining_time_in_millis(self) -> int:
        """Milliseconds until this request's time is over, not below 0."""
        return max(0, self._deadline - int(time.time() * 1000))

    def log(self, message: object) -> None:
        """Print a message as it is."""
        sys.stdout.write(str(message))

    def __repr__(self) -> str:
        return f"Context({', '.join(f'{k}={v!r}' for k, v in vars(self).items() if k[0] != '_')})"


class Runtime:
    """The runtime on its socket to the agent. `run` does not end by itself."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._socket.set_inheritable(False)
        self._send, self._receive = self._socket.sendall, self._socket.recv
        self._pid = os.getpid()
        self._rest = b""
        self._facts: tuple[str, ...] = ()
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        # As in Lambda: what handlers log is printed, without any setting of theirs.
        logging.basicConfig(stream=sys.stdout, format="[%(levelname)s]\t%(asctime)s\t%(message)s")
        self._modules = set(sys.modules)
        self._path = list(sys.path)
        self._environment = dict(os.environ)
        gc.collect()
        gc.freeze()

    def run(self) -> None:
        """Load what is ordered, and serve requests until it is to be forgotten, for ever."""
        while True:
            self._send(ORDER)
            _, order = self._read()
            handler = self._load(decode(order.decode()))
            if handler is not None:
                try:
                    self._serve(handler)
                except Gone:
                    pass
            handler = None
            self._forget()

    def _load(self, order: dict[str, Any]) -> Handler | None:
        root, given, environment = order["root"], order["env"], os.environ
        # It was seeded before the freeze, and all clones would go on alike.
        random.seed()
        environment.update(given)
        environment["LAMBDA_TASK_ROOT"] = root
        environment["_HANDLER"] = order["handler"]
        self._facts = tuple([given.get(*fact) for fact in FACTS])
        os.chdir(root)
        more = given.get("PYTHONPATH", "").split(":")
        sys.path[:0] = [root, *filter(None, more)]
        # No invalidate_caches(): it imports a dozen modules. What is stale `_forget` has dropped.
        kind, message, trace = "", "", []
        try:
            return load(order["handler"], root)
        except LoadError as error:
            kind, message, trace = error.kind, str(error), error.trace
        except Exception as error:  # noqa: BLE001 - whatever users' code raises
            kind, message, trace = type(error).__name__, _text(error), stack(error)
        report(kind, message, trace)
        body = _failure(kind, message, trace)
        self._send(b"POST %sinit/error%s%d\r\n\r\n%s" % (API, INVOCATION, len(body), body))
        self._read()
        return None

    def _serve(self, handler: Handler) -> None:
        send, environment, facts = self._send, os.environ, self._facts
        stdout, stderr = sys.stdout, sys.stderr
        send(NEXT)
        while True:
            head, body = self._read()
            fields = {}
            for line in head.split(b"\r\n"):
                name, _, value = line.partition(b": ")
                fields[name] = value
            number = fields[b"Lambda-Runtime-Aws-Request-Id"]
            trace = fields.get(b"Lambda-Runtime-Trace-Id")
            if trace is not None:
                environment[TRACE] = trace.decode()
            elif TRACE in environment:
                del environment[TRACE]
            context = Context(
                number.decode(),
                fields[b"Lambda-Runtime-Invoked-Function-Arn"].decode(),
                int(fields[b"Lambda-Runtime-Deadline-Ms"]),
                facts,
            )
            todo = [body]
            del body
            what, kind, answer = self._answer(handler, todo, context)
            if os.getpid() != self._pid:
                os._exit(0)  # a fork that came back from the handler
            try:
                stdout.flush()
                stderr.flush()
            except ValueError:
                pass  # the handler has closed it
            # The next request is asked for together with the end of this one: a turn less.
            length = b"%d" % len(answer)
            parts = (b"POST ", API, b"invocation/", number, what, INVOCATION, length, kind)
            head = join((*parts, b"\r\n\r\n"))
            if len(answer) < CHUNK:
                send(join((head, answer, NEXT)))
            else:
                send(head)
                send(answer)
                del answer
                send(NEXT)
            self._read()

    def _answer(
        self, handler: Handler, todo: list[bytes | bytearray], context: Context
    ) -> tuple[bytes, bytes, bytes]:
        """Where the end of the request goes, a field of its head, and its body.

        The request is taken out of `todo`: of a large one there must be no copy for longer than
        it is needed.
        """
        stage = "Runtime.UnmarshalError", "Unable to unmarshal input: "
        try:
            event = decode(todo.pop().decode())
            stage = "", ""
            result = handler(event, context)
            del event
            stage = "Runtime.MarshalError", "Unable to marshal response: "
            answer = encode(result).encode()
            if len(answer) <= MAX_PAYLOAD:
                return b"/response", b"", answer
            size = f"exceeded maximum allowed payload size ({MAX_PAYLOAD} bytes)."
            kind, message, trace = "Function.ResponseSizeTooLarge", f"Response payload {size}", []
        except Exception as error:  # noqa: BLE001 - whatever users' code raises
            kind, message = stage[0] or type(error).__name__, stage[1] + _text(error)
            trace = [] if stage[0] else stack(error)
        report(kind, message, trace)
        return b"/error", UNHANDLED, _failure(kind, message, trace)

    def _read(self) -> tuple[bytes, bytes | bytearray]:
        """The next answer of the agent, without its first line. Gone when it says so."""
        data = self._rest or self._receive(CHUNK)
        while (end := data.find(b"\r\n\r\n")) < 0:
            data += self._more()
        first, _, head = data[:end].partition(b"\r\n")
        at = head.rfind(b"Content-Length: ") + 16
        size, begin = int(head[at:].partition(b"\r\n")[0]), end + 4
        body: bytes | bytearray
        if len(data) < begin + size:
            body, have = bytearray(size), len(data) - begin
            view = memoryview(body)
            view[:have] = data[begin:]
            while have < size:
                count = self._socket.recv_into(view[have:])
                if not count:
                    os._exit(0)  # the agent has gone
                have += count
            self._rest = b""
        else:
            self._rest, body = data[begin + size :], data[begin : begin + size]
        if first[9:12] == b"410":
            raise Gone
        return head, body

    def _more(self) -> bytes:
        data = self._receive(CHUNK)
        if not data:
            os._exit(0)  # the agent has gone
        return data

    def _forget(self) -> None:
        """Undo `_load`: another function may come, and must find nothing of this one."""
        os.chdir("/")
        root = os.environ.get("LAMBDA_TASK_ROOT", "")
        os.environ.clear()
        os.environ.update(self._environment)
        sys.path[:] = self._path
        for name in set(sys.modules) - self._modules:
            del sys.modules[name]
        # By its time alone it would look the same, and its old listing would be used.
        for name in [name for name in sys.path_importer_cache if name.startswith(root)]:
            del sys.path_importer_cache[name]
        gc.collect()


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - it is users' code, too
        return "its message cannot be had"


def _failure(kind: str, message: str, trace: list[str]) -> bytes:
    body = {"errorMessage": message, "errorType": kind, "stackTrace": trace}
    return json.dumps(body).encode()


def leave(error: BaseException) -> None:
    """End this process at once as `error` says; threads of the handler would hold it up."""
    code = 1
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        code = error.code or 0
    elif isinstance(error, SystemExit):
        sys.stderr.write(f"{error.code}\n")
    else:
        traceback.print_exception(error)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    os._exit(code & 0xFF)
