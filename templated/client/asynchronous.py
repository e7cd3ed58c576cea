"""The client for programs on asyncio: HTTP over the daemon's unix socket, by aiohttp."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import aiohttp
from yarl import URL

from templated.client import requests
from templated.client.answers import answer_type, reader
from templated.client.failures import CONNECT_SECONDS, cut_off, no_answer, reported, unreachable
from templated.client.requests import Request, Stream
from templated.model.socket import default_socket

P = ParamSpec("P")
T = TypeVar("T")
# Bytes; a line of a stream may have twice as many.
_BUFFER = 1 << 20


def _one(
    make: Callable[P, Request[T]],
) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]:
    """The method that sends what `make` describes, and returns the answer."""
    read = reader(make)

    @functools.wraps(make)
    async def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        async with self.open(make(*args, **kwargs)) as answer:
            return read(await answer.whole())

    return method


def _many(
    make: Callable[P, Stream[T]],
) -> Callable[Concatenate[AsyncClient, P], AsyncGenerator[T, None]]:
    """The method that sends what `make` describes, and returns the items as they come."""
    read, raw = reader(make), answer_type(make) is bytes

    @functools.wraps(make)
    async def method(
        self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs
    ) -> AsyncGenerator[T, None]:
        request = make(*args, **kwargs)
        async with self.open(request) as answer:
            async for item in answer.chunks() if raw else answer.lines(request):
                yield read(item)

    return method


class AsyncClient:
    """The API on one socket, as `Client`. A context manager, to be used on one event loop.

    Any number of requests may be under way at once, each on a connection of its own. A loop over
    a stream that is left early ends the request when its iterator is closed, as by
    `contextlib.aclosing`, or collected.
    """

    def __init__(
        self, path: str | None = None, *, keep_alive: bool = False, timeout: float | None = None
    ) -> None:
        self.path = path or default_socket()
        self._keep_alive = keep_alive
        self._timeout = timeout
        self._session: aiohttp.ClientSession | None = None

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

    async def close(self) -> None:
        """Disconnect; requests under way end with DaemonUnavailable. Idempotent."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @contextlib.asynccontextmanager
    async def open(self, request: Request[Any]) -> AsyncIterator[AsyncAnswer]:
        """Send a request; the block has the answer, whose body is not read yet.

        An answer that is not a success is raised as the error that its body holds.
        """
        timeout = request.timeout
        if self._timeout is not None and not isinstance(request, Stream):
            timeout = self._timeout
        content = request.content
        connecting = min(timeout or CONNECT_SECONDS, CONNECT_SECONDS)
        with self._explained(timeout):
            response = await self._connected().request(
                request.method,
                URL(f"http://localhost{request.target}", encoded=True),
                data=io.BytesIO(content) if isinstance(content, bytes) else content,
                headers=request.headers,
                timeout=aiohttp.ClientTimeout(sock_connect=connecting, sock_read=timeout),
            )
        async with response:
            answer = AsyncAnswer(response, functools.partial(self._explained, timeout))
            if response.status >= 400:
                body = await answer.whole()
                raise reported(response.status, response.reason or "", body)
            yield answer

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.UnixConnector(self.path, limit=0, force_close=not self._keep_alive)
            self._session = aiohttp.ClientSession(connector=connector, read_bufsize=_BUFFER)
        return self._session

    @contextlib.contextmanager
    def _explained(self, timeout: float | None) -> Iterator[None]:
        """Turn what aiohttp raises into errors for people."""
        try:
            yield
        except aiohttp.ClientConnectorError as error:
            raise unreachable(error.os_error, self.path) from None
        except aiohttp.ConnectionTimeoutError:
            raise unreachable(TimeoutError(), self.path) from None
        except TimeoutError:
            raise no_answer(timeout) from None
        except (aiohttp.ClientError, ConnectionError) as error:
            raise cut_off(error) from error


class AsyncAnswer:
    """An answer whose body is still to be read."""

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        explained: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._response = response
        self._explained = explained

    def header(self, name: str) -> str:
        """A header of the answer; empty when it is not there."""
        return self._response.headers.get(name, "")

    async def whole(self) -> bytes:
        """The whole body."""
        with self._explained():
            return await self._response.read()

    async def lines(self, request: Stream[Any]) -> AsyncIterator[bytes]:
        """The lines of the body as they come.

        Raises DaemonUnavailable when the last one is not the last that the stream has.
        """
        last = b""
        while line := await self._read(self._response.content.readline):
            if line.strip():
                yield (last := line)
        if request.end is not None:
            request.end.check(last)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes. DaemonUnavailable when it ends before it is complete."""
        while data := await self._read(self._response.content.readany):
            yield data

    async def _read(self, read: Callable[[], Coroutine[Any, Any, bytes]]) -> bytes:
        with self._explained():
            return await read()
