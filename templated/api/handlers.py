"""The handlers of the routes: each parses, calls a service and answers, without other logic."""

from __future__ import annotations

import asyncio
import base64
import os

from aiohttp import web
from prometheus_client.aiohttp import make_aiohttp_handler

from templated import __version__
from templated.api.answers import NDJSON, SERVICES, each, flag, json_answer, lines, number, stream
from templated.api.errors import body_of
from templated.api.gate import allowed, note
from templated.errors import HostError, InvalidRequest
from templated.model.access import Role
from templated.model.api import (
    BuildRequest,
    CloneRequest,
    ExecRequest,
    Info,
    PoolRequest,
)
from templated.model.names import check_clone_name
from templated.services.daemon import Services
from templated.services.templates.images import image_views

# Seconds: a hundred years.
_LONG_AGO = 3_155_760_000


async def info(request: web.Request) -> web.Response:
    services = request.app[SERVICES]
    config = services.context.config
    # First: what was proven of KVM holds for this version.
    qemu_version = await _qemu_version(services)
    return json_answer(
        Info(
            version=__version__,
            pid=os.getpid(),
            accel=services.context.host.known_accelerator(),
            qemu_version=qemu_version,
            state_dir=config.state_dir,
            shm_dir=config.shm_dir,
            metrics=config.metrics.listen if config.metrics else None,
            transport=config.restore.transport,
            confine=config.confine,
            clones=len(services.clones),
            scaling=config.scaling,
        )
    )


async def _qemu_version(services: Services) -> str:
    try:
        return (await services.context.hypervisor.version()).version
    except HostError as error:
        return error.message


async def list_clones(request: web.Request) -> web.Response:
    return json_answer(request.app[SERVICES].clones.views())


async def create_clones(request: web.Request) -> web.Response:
    wanted = await body_of(request, CloneRequest)
    note(target=wanted.name, detail=f"count {wanted.count}" if wanted.count else "")
    services = request.app[SERVICES]
    views = await services.clones.create(wanted)
    return json_answer(views if wanted.count is not None else views[0], 201)


async def show_clone(request: web.Request) -> web.Response:
    return json_answer(request.app[SERVICES].clones.view(request.match_info["name"]))


async def remove_clone(request: web.Request) -> web.Response:
    # A client that goes away half-way must not leave half a clone.
    await asyncio.shield(request.app[SERVICES].clones.remove(request.match_info["name"]))
    return web.Response(status=204)


async def exec_in_clone(request: web.Request) -> web.StreamResponse:
    wanted = await body_of(request, ExecRequest)
    note(detail=wanted.argv[0])  # arguments, environment and input may be secrets
    try:
        stdin = base64.b64decode(wanted.stdin, validate=True) if wanted.stdin else None
    except ValueError as error:  # also for what is not ASCII
        raise InvalidRequest(f"stdin is not base64: {error}") from None
    frames = request.app[SERVICES].guests.exec(
        request.match_info["name"],
        list(wanted.argv),
        timeout=wanted.timeout,
        stdin=stdin,
        env=wanted.env,
    )
    return await stream(request, lines(frames), NDJSON)


async def logs(request: web.Request) -> web.StreamResponse:
    guests = request.app[SERVICES].guests
    name, count = request.match_info["name"], number(request, "lines", 1000)
    if flag(request, "follow"):
        return await stream(request, guests.follow_logs(name, count), "text/plain")
    return web.Response(body=guests.logs(name, count), content_type="text/plain", charset="utf-8")


async def get_file(request: web.Request) -> web.Response:
    guests, path = request.app[SERVICES].guests, _guest_path(request)
    content = await guests.get(request.match_info["name"], path)
    return web.Response(body=content, content_type="application/octet-stream")


async def put_file(request: web.Request) -> web.Response:
    guests, name = request.app[SERVICES].guests, request.match_info["name"]
    path, mode = _guest_path(request), _mode(request)
    await guests.put(name, path, await request.read(), mode)
    return web.Response(status=204)


async def events(request: web.Request) -> web.StreamResponse:
    bus = request.app[SERVICES].context.events
    source = bus.follow() if flag(request, "follow") else each(bus.recent())
    return await stream(request, lines(source), NDJSON)


async def audit(request: web.Request) -> web.StreamResponse:
    entries = await request.app[SERVICES].audit.read(
        number(request, "lines", 1000),
        since=number(request, "since", 0, _LONG_AGO) or None,
        user=request.query.get("user", ""),
    )
    return await stream(request, lines(each(entries)), NDJSON)


async def list_templates(request: web.Request) -> web.Response:
    return json_answer(await request.app[SERVICES].templates.views())


async def show_template(request: web.Request) -> web.Response:
    name = request.match_info["name"]
    view = await request.app[SERVICES].templates.view(name, full=True)
    return json_answer(view if allowed(Role.ADMIN) else view.hidden())


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
    return json_answer(operation, 202)


async def rollback(request: web.Request) -> web.Response:
    name = request.match_info["name"]
    return json_answer(await asyncio.shield(request.app[SERVICES].templates.rollback(name)))


async def list_images(request: web.Request) -> web.Response:
    services = request.app[SERVICES]
    return json_answer(await image_views(services.context.images, services.templates))


async def list_pools(request: web.Request) -> web.Response:
    return json_answer(request.app[SERVICES].pools.views())


async def show_pool(request: web.Request) -> web.Response:
    return json_answer(request.app[SERVICES].pools.view(request.match_info["template"]))


async def set_pool(request: web.Request) -> web.Response:
    wanted = await body_of(request, PoolRequest)
    note(detail=_sizes(wanted))
    pools = request.app[SERVICES].pools
    return json_answer(await asyncio.shield(pools.set(request.match_info["template"], wanted)))


async def show_operation(request: web.Request) -> web.Response:
    operation, _ = request.app[SERVICES].operations.get(request.match_info["id"])
    return json_answer(operation)


async def operation_events(request: web.Request) -> web.StreamResponse:
    _, progress = request.app[SERVICES].operations.get(request.match_info["id"])
    return await stream(request, lines(progress.follow()), NDJSON)


async def metrics(request: web.Request) -> web.StreamResponse:
    return await make_aiohttp_handler(request.app[SERVICES].context.metrics.registry)(request)


def _sizes(wanted: PoolRequest) -> str:
    sizes = {"standby": wanted.standby, "warm": wanted.warm}
    given = [f"{tier} {size}" for tier, size in sizes.items() if size is not None]
    return " ".join([*given, "reset"] if wanted.reset else given)


def _mode(request: web.Request) -> int:
    try:
        return int(request.query.get("mode", "644"), 8) & 0o7777
    except ValueError:
        raise InvalidRequest("mode is not an octal number", hint="as in mode=644") from None


def _guest_path(request: web.Request) -> str:
    path = request.query.get("path", "")
    note(detail=path)
    if not path.startswith("/"):
        raise InvalidRequest("path must be an absolute path in the guest", hint="as in NAME:/tmp/x")
    return path
