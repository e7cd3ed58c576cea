"""The client for programs that wait: HTTP over the daemon's unix socket, by http.client.

Its import costs 15 to 20 ms of `templated ls`. That leaves the start-up far within its bound, so
there is no reason for HTTP code of our own; aiohttp or anything on asyncio would cost 100 ms.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import socket
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from templated.client import requests
from templated.client.failures import (
    CONNECT_SECONDS,
    cut_off,
    no_answer,
    nonsense,
    reported,
    unreachable,
)
from templated.client.requests import Request, Stream
from templated.model.socket import default_socket

P = ParamSpec("P")
T = TypeVar("T")
CHUNK = 65536


def _one(make: Callable[P, Request[T]]) -> Callable[Concatenate[Client, P], T]:
    """The method that sends what `make` describes, and returns the answer."""

    @functools.wraps(make)
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        from templated.client.answers import reader

        with self.open(make(*args, **kwargs)) as answer:
            return reader(make)(answer.whole())

    return method


def _many(make: Callable[P, Stream[T]]) -> Callable[Concatenate[Client, P], Iterator[T]]:
    """The method that sends what `make` describes, and returns the items as they come."""

    @functools.wraps(make)
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        from templated.client.answers import answer_type, reader

        request = make(*args, **kwargs)
        read, raw = reader(make), answer_type(make) is bytes
        with self.open(request) as answer:
            for item in answer.chunks() if raw else answer.lines(request):
                yield read(item)

    return method


class Client:
    """The API on one socket. Every method raises TemplatedError, and nothing else, on failure.

    By default each request has a connection of its own, and the client may be used by several
    threads; with `keep_alive` it has one that is kept, and one user. `timeout`, in seconds,
    bounds each answer that is no stream, in place of the bound that the request has.
    """

    def __init__(
        self, path: str | None = None, *, keep_alive: bool = False, timeout: float | None = None
    ) -> None:
        self.path = path or default_socket()
        self._keep_alive = keep_alive
        self._timeout = timeout
        self._kept: list[_Connection] = []

    info = _one(requests.info)
    openapi = _one(requests.openapi)
    metrics = _one(requests.metrics)
    events = _many(requests.events)
    audit = _many(requests.audit)
    list_clones = _one(requests.list_clones)
    create_clone = _one(requests.create_clone)
    create_clones = _one(requests.create_clones)
    show_clone = _one(requests.show_clone)
    remove_clone = _one(requests.remove_clone)
    exec_in_clone = _many(requests.exec_in_clone)
    logs = _many(requests.logs)
    get_file = _one(requests.get_file)
    put_file = _one(requests.put_file)
    list_templates = _one(requests.list_templates)
    show_template = _one(requests.show_template)
    remove_template = _one(requests.remove_template)
    build_template = _one(requests.build_template)
    rollback = _one(requests.rollback)
    list_images = _one(requests.list_images)
    list_pools = _one(requests.list_pools)
    show_pool = _one(requests.show_pool)
    set_pool = _one(requests.set_pool)
    list_policies = _one(requests.list_policies)
    show_policy = _one(requests.show_policy)
    apply_policy = _one(requests.apply_policy)
    trace_packet = _one(requests.trace_packet)
    list_egresses = _one(requests.list_egresses)
    show_egress = _one(requests.show_egress)
    create_egress = _one(requests.create_egress)
    switch_egress = _one(requests.switch_egress)
    remove_egress = _one(requests.remove_egress)
    list_scaling = _one(requests.list_scaling)
    show_scaling = _one(requests.show_scaling)
    list_functions = _one(requests.list_functions)
    show_function = _one(requests.show_function)
    deploy_function = _one(requests.deploy_function)
    remove_function = _one(requests.remove_function)
    publish_function = _one(requests.publish_function)
    set_alias = _one(requests.set_alias)
    remove_alias = _one(requests.remove_alias)
    set_concurrency = _one(requests.set_concurrency)
    scale_function = _one(requests.scale_function)
    set_function_network = _one(requests.set_function_network)
    provision_function = _one(requests.provision_function)
    unprovision_function = _one(requests.unprovision_function)
    invoke_function = _one(requests.invoke_function)
    queue_event = _one(requests.queue_event)
    function_logs = _many(requests.function_logs)
    function_events = _one(requests.function_events)
    retry_event = _one(requests.retry_event)
    purge_events = _one(requests.purge_events)
    list_code = _one(requests.list_code)
    prefetch_code = _one(requests.prefetch_code)
    verify_code = _one(requests.verify_code)
    collect_code = _one(requests.collect_code)
    show_operation = _one(requests.show_operation)
    operation_events = _many(requests.operation_events)

    def close(self) -> None:
        """Disconnect what `keep_alive` kept."""
        while self._kept:
            self._kept.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def json(self, request: Request[Any]) -> Any:
        """The answer as the JSON that it is, also what this version does not know of it.

        None for an answer that is empty. Needs no import of msgspec.
        """
        with self.open(request) as answer:
            body = answer.whole()
        return _decoded(body) if body.strip() else None

    def json_lines(self, request: Stream[Any]) -> Iterator[Any]:
        """The items of the answer as the JSON that they are, each as soon as it is there."""
        with self.open(request) as answer:
            for line in answer.lines(request):
                yield _decoded(line)

    def open(self, request: Request[Any]) -> Answer:
        """Send a request and return the answer, which the caller closes; its body is not read.

        An answer that is not a success is raised as the error that its body holds.
        """
        timeout = request.timeout
        if self._timeout is not None and not isinstance(request, Stream):
            timeout = self._timeout
        connection = self._kept.pop() if self._kept else _Connection(self.path)
        connection.bound(timeout)
        try:
            with _explained(timeout):
                response = connection.exchange(request)
            answer = Answer(connection, response, timeout, self._keep)
            answer.check()
            return answer
        except BaseException:
            connection.close()
            raise

    def _keep(self, connection: _Connection) -> None:
        if self._keep_alive:
            self._kept.append(connection)
        else:
            connection.close()


class Answer:
    """An answer whose body is still to be read. A context manager: leaving it disconnects."""

    def __init__(
        self,
        connection: _Connection,
        response: http.client.HTTPResponse,
        timeout: float | None,
        keep: Callable[[_Connection], None],
    ) -> None:
        self._connection = connection
        self._response = response
        self._timeout = timeout
        self._keep = keep

    def check(self) -> None:
        """Raise the error that the answer is, if it is one."""
        if self._response.status >= 400:
            raise reported(self._response.status, self._response.reason, self.whole())

    def header(self, name: str) -> str:
        """A header of the answer; empty when it is not there."""
        return self._response.headers.get(name, "")

    def whole(self) -> bytes:
        """The whole body."""
        return b"".join(self.chunks())

    def json(self) -> Any:
        """The whole body as the JSON that it is."""
        return _decoded(self.whole())

    def lines(self, request: Stream[Any]) -> Iterator[bytes]:
        """The lines of the body as they come.

        Raises DaemonUnavailable when the last one is not the last that the stream has.
        """
        last = rest = b""
        # Not by http.client's readline, which takes a connection that breaks for the end.
        for chunk in self.chunks():
            *whole, rest = (rest + chunk).split(b"\n")
            for line in filter(None, whole):
                yield (last := line)
        if rest:
            yield (last := rest)
        if request.end is not None:
            request.end.check(last)

    def chunks(self) -> Iterator[bytes]:
        """The body as it comes. DaemonUnavailable when it ends before it is complete."""
        while data := self._read(self._response.read1, CHUNK):
            yield data
        if self._response.length:  # http.client passes over this end of a body in silence
            raise cut_off(http.client.IncompleteRead(b"", self._response.length))

    def _read(self, read: Callable[..., bytes], *arguments: int) -> bytes:
        with _explained(self._timeout):
            return read(*arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        whole = self._response.isclosed() or self._response.length == 0
        self._response.close()
        if whole and not self._response.will_close:
            self._keep(self._connection)
        else:
            self._connection.close()


class _Connection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path
        self._bound: float | None = None

    def bound(self, timeout: float | None) -> None:
        """Set the seconds to wait for each part of the next answer."""
        self._bound = timeout
        if self.sock is not None:
            self.sock.settimeout(timeout)

    def connect(self) -> None:
        """Connect; raises what `unreachable` makes of a failure."""
        try:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(min(self._bound or CONNECT_SECONDS, CONNECT_SECONDS))
            self.sock.connect(self._path)
        except OSError as error:
            raise unreachable(error, self._path) from None
        self.sock.settimeout(self._bound)

    def exchange(self, request: Request[Any]) -> http.client.HTTPResponse:
        """Send a request and wait for the head of its answer."""
        # A daemon that refuses a body answers before it has read all of it, and closes: the
        # answer is then there to be read, and says more than "broken pipe".
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.request(request.method, request.target, request.content, request.headers)
        return self.getresponse()


@contextlib.contextmanager
def _explained(timeout: float | None) -> Iterator[None]:
    """Turn errors of the socket and the HTTP parser into errors for people."""
    try:
        yield
    except TimeoutError:
        raise no_answer(timeout) from None
    except (http.client.HTTPException, ConnectionError) as error:
        raise cut_off(error) from error


def _decoded(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError as error:
        raise nonsense(f"not JSON: {error}") from None
