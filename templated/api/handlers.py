"""What each route does: parse, call a service, answer. No logic of its own."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import generate_latest

from templated import __version__
from templated.api.errors import body_of
from templated.errors import Busy, HostError, InvalidRequest, TemplatedError
from templated.model.api import (
    BuildRequest,
    CloneRequest,
    ExecFrame,
    ExecRequest,
    Info,
    PoolRequest,
)
from templated.model.names import check_clone_name
from templated.services.clones.registry import LOG_BYTES
from templated.services.daemon import Services
from templated.services.machines.vm import tail
from templated.services.reports.events import Event

SERVICES = web.AppKey("services", Services)
_FOLLOW_INTERVAL = 0.2
_FILE_TIMEOUT = 30.0
# Frames of up to 64 KiB that wait for a slow reader before its request is ended.
_MAX_UNREAD = 512


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json"
    )


async def info(request: web.Request) -> web.Response:
    services = request.app[SERVICES]
    config = services.context.config
    return _json(
        Info(
            version=__version__,
            pid=os.getpid(),
            accel=services.context.host.known_accelerator(),
            qemu_version=await _qemu_version(services),
            state_dir=config.state_dir,
            shm_dir=config.shm_dir,
            metrics=config.metrics.listen if config.metrics else None,
            transport=config.restore.transport,
            clones=len(services.clones),
        )
    )


async def _qemu_version(services: Services) -> str:
    try:
        return (await services.context.hypervisor.version()).version
    except HostError as error:
        return error.message


async def openapi(request: web.Request) -> web.Response:
    from templated.api.openapi import document

    return _json(document())


async def list_clones(request: web.Request) -> web.Response:
    return _json(request.app[SERVICES].clones.views())


async def create_clones(request: web.Request) -> web.Response:
    wanted = await body_of(request, CloneRequest)
    services = request.app[SERVICES]
    views = await services.clones.create(wanted)
    return _json(views if wanted.count is not None else views[0], 201)


async def show_clone(request: web.Request) -> web.Response:
    return _json(request.app[SERVICES].clones.view(request.match_info["name"]))


async def remove_clone(request: web.Request) -> web.Response:
    # A client that goes away half-way must not leave half a clone.
    await asyncio.shield(request.app[SERVICES].clones.remove(request.match_info["name"]))
    return web.Response(status=204)


async def exec_in_clone(request: web.Request) -> web.StreamResponse:
    wanted = await body_of(request, ExecRequest)
    try:
        stdin = base64.b64decode(wanted.stdin, validate=True) if wanted.stdin else None
    except binascii.Error as error:
        raise InvalidRequest(f"stdin is not base64: {error}") from None
    agent = request.app[SERVICES].clones.running(request.match_info["name"]).agent
    output: asyncio.Queue[ExecFrame | None] = asyncio.Queue()

    def sink(stream: str, data: bytes) -> None:
        if output.qsize() > _MAX_UNREAD:
            raise Busy("the client does not read the command's output")
        kind: Any = stream
        output.put_nowait(ExecFrame(stream=kind, data=base64.b64encode(data).decode()))

    async def work() -> None:
        try:
            result = await agent.exec(
                list(wanted.argv),
                timeout=wanted.timeout,
                sink=sink,
                stdin=stdin,
                env=wanted.env,
            )
            end = ExecFrame(**msgspec.structs.asdict(result), done=True)
        except TemplatedError as error:
            end = ExecFrame(error=error.message, done=True)
        output.put_nowait(end)
        output.put_nowait(None)

    async def frames() -> AsyncIterator[bytes]:
        task = asyncio.create_task(work())
        try:
            while (frame := await output.get()) is not None:
                yield msgspec.json.encode(frame) + b"\n"
        finally:
            task.cancel()
            await asyncio.wait({task})

    return await _stream(request, frames(), "application/x-ndjson")


async def logs(request: web.Request) -> web.StreamResponse:
    clones = request.app[SERVICES].clones
    name = request.match_info["name"]
    wanted = _number(request, "lines", 1000)
    if not _flag(request, "follow"):
        lines = clones.serial_log(name, wanted)
        return web.Response(text="".join(f"{line}\n" for line in lines))
    path = clones.running(name).places.serial_log

    async def follow() -> AsyncIterator[bytes]:
        position = path.stat().st_size
        yield "".join(f"{line}\n" for line in tail(path, wanted, LOG_BYTES)).encode()
        while True:
            await asyncio.sleep(_FOLLOW_INTERVAL)
            try:
                size = path.stat().st_size
            except OSError:
                return  # the clone was removed
            position = min(position, size)
            if size > position:
                with open(path, "rb") as log:
                    log.seek(position)
                    chunk = log.read(65536)
                position += len(chunk)
                yield chunk

    return await _stream(request, follow(), "text/plain")


async def get_file(request: web.Request) -> web.Response:
    agent = request.app[SERVICES].clones.running(request.match_info["name"]).agent
    content = await agent.get(_guest_path(request), _FILE_TIMEOUT)
    return web.Response(body=content, content_type="application/octet-stream")


async def put_file(request: web.Request) -> web.Response:
    agent = request.app[SERVICES].clones.running(request.match_info["name"]).agent
    try:
        mode = int(request.query.get("mode", "644"), 8)
    except ValueError:
        raise InvalidRequest("mode is not an octal number", hint="as in mode=644") from None
    await agent.put(_guest_path(request), await request.read(), mode & 0o7777, _FILE_TIMEOUT)
    return web.Response(status=204)


async def events(request: web.Request) -> web.StreamResponse:
    bus = request.app[SERVICES].context.events

    async def lines() -> AsyncIterator[bytes]:
        source = bus.follow() if _flag(request, "follow") else _each(bus.recent())
        async for event in source:
            yield msgspec.json.encode(event) + b"\n"

    return await _stream(request, lines(), "application/x-ndjson")


async def _each(items: list[Event]) -> AsyncIterator[Event]:
    for item in items:
        yield item


async def list_templates(request: web.Request) -> web.Response:
    templates = request.app[SERVICES].templates
    views = []
    for name in templates.names():
        with contextlib.suppress(TemplatedError):
            views.append(await templates.view(name))
    return _json(views)


async def show_template(request: web.Request) -> web.Response:
    name = request.match_info["name"]
    return _json(await request.app[SERVICES].templates.view(name, full=True))


async def remove_template(request: web.Request) -> web.Response:
    await asyncio.shield(request.app[SERVICES].templates.remove(request.match_info["name"]))
    return web.Response(status=204)


async def build_template(request: web.Request) -> web.Response:
    services = request.app[SERVICES]
    name = check_clone_name(request.match_info["name"])
    wanted = await body_of(request, BuildRequest)
    spec = await services.templates.prepare_build(name, wanted)
    operation = services.operations.start(
        "build", name, lambda progress: services.templates.build(spec, progress)
    )
    return _json(operation, 202)


async def rollback(request: web.Request) -> web.Response:
    name = request.match_info["name"]
    return _json(await asyncio.shield(request.app[SERVICES].templates.rollback(name)))


async def list_pools(request: web.Request) -> web.Response:
    return _json(request.app[SERVICES].pools.views())


async def show_pool(request: web.Request) -> web.Response:
    return _json(request.app[SERVICES].pools.view(request.match_info["template"]))


async def set_pool(request: web.Request) -> web.Response:
    wanted = await body_of(request, PoolRequest)
    pools = request.app[SERVICES].pools
    return _json(await asyncio.shield(pools.set(request.match_info["template"], wanted)))


async def show_operation(request: web.Request) -> web.Response:
    operation, _ = request.app[SERVICES].operations.get(request.match_info["id"])
    return _json(operation)


async def operation_events(request: web.Request) -> web.StreamResponse:
    _, progress = request.app[SERVICES].operations.get(request.match_info["id"])

    async def lines() -> AsyncIterator[bytes]:
        async for event in progress.follow():
            yield msgspec.json.encode(event) + b"\n"

    return await _stream(request, lines(), "application/x-ndjson")


async def metrics(request: web.Request) -> web.Response:
    registry = request.app[SERVICES].context.metrics.registry
    return web.Response(
        body=generate_latest(registry),
        headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
    )


async def _stream(
    request: web.Request, chunks: AsyncIterator[bytes], content_type: str
) -> web.StreamResponse:
    """Send chunks as they come; a client that goes away ends the source."""
    response = web.StreamResponse(headers={"Content-Type": content_type})
    try:
        async with contextlib.aclosing(chunks):  # type: ignore[type-var]
            await response.prepare(request)
            async for chunk in chunks:
                await response.write(chunk)
            await response.write_eof()
    except ConnectionError:
        pass  # nobody is there to tell
    return response


def _flag(request: web.Request, name: str) -> bool:
    return request.query.get(name, "") in ("true", "1", "yes")


def _number(request: web.Request, name: str, default: int) -> int:
    try:
        value = int(request.query.get(name, default))
    except ValueError:
        raise InvalidRequest(f"{name} is not a number") from None
    if not 0 <= value <= 100_000:
        raise InvalidRequest(f"{name} must be between 0 and 100000")
    return value


def _guest_path(request: web.Request) -> str:
    path = request.query.get("path", "")
    if not path.startswith("/"):
        raise InvalidRequest("path must be an absolute path in the guest", hint="as in NAME:/tmp/x")
    return path
