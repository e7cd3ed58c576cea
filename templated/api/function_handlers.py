"""The handlers of the routes of functions; as `handlers`, without other logic."""

from __future__ import annotations

import base64

from aiohttp import web

from templated.api.answers import SERVICES, flag, json_answer, number, stream
from templated.api.errors import body_of, decoded
from templated.api.gate import note
from templated.errors import InvalidRequest
from templated.model.function import (
    MAX_PAYLOAD,
    Accepted,
    AliasRequest,
    AliasView,
    ConcurrencyRequest,
    DeployRequest,
    ProvisionRequest,
    PublishRequest,
    ScaleRequest,
    check_qualifier,
)
from templated.model.policy import KEYS, NetworkRequest
from templated.model.socket import LOG_HEADER
from templated.services.functions.functions import Functions, version_view
from templated.services.functions.shifts import PATIENCE
from templated.services.functions.traces import HEADER

_CHUNK = 1 << 18
# Seconds that instances of another version may take to be ready.
_LONGEST = 3600


async def list_functions(request: web.Request) -> web.Response:
    return json_answer(_functions(request).views())


async def show_function(request: web.Request) -> web.Response:
    return json_answer(_functions(request).view(_name(request)))


async def deploy_function(request: web.Request) -> web.Response:
    functions, name = _functions(request), _name(request)
    patience = number(request, "ready", int(PATIENCE), _LONGEST)
    wanted = decoded(request.query.get("settings") or "{}", DeployRequest, "settings")
    # Which settings, not what they are: values of the environment may be secrets.
    given = [key for key in wanted.__struct_fields__ if getattr(wanted, key) is not None]
    note(target=name, detail=" ".join(given))
    async with functions.uploads.receive(request.content.iter_chunked(_CHUNK)) as archive:
        note(target=name, detail=" ".join(["code", *given] if archive else given))
        await functions.networks.deploy(name, wanted, archive)
    functions.shifts.hurry(name, patience)
    if not flag(request, "background"):
        await functions.shifts.settled(name)
    return json_answer(functions.view(name))


async def set_function_network(request: web.Request) -> web.Response:
    functions, name = _functions(request), _name(request)
    wanted = await body_of(request, NetworkRequest)
    note(target=name, detail=" ".join(key for key in KEYS if getattr(wanted, key) is not None))
    await functions.networks.change(name, wanted)
    return json_answer(functions.view(name))


async def remove_function(request: web.Request) -> web.Response:
    version = request.query.get("version")
    note(target=_name(request), detail=f"version {version}" if version is not None else "")
    await _functions(request).registry.remove(_name(request), version)
    return web.Response(status=204)


async def publish_function(request: web.Request) -> web.Response:
    wanted = await body_of(request, PublishRequest)
    version = await _functions(request).registry.publish(
        _name(request), description=wanted.description, digest=wanted.digest
    )
    note(target=_name(request), detail=f"version {version.label}")
    return json_answer(version_view(version), 201)


async def set_alias(request: web.Request) -> web.Response:
    wanted = await body_of(request, AliasRequest)
    alias = request.match_info["alias"]
    weights = " ".join(f"{label}={weight:g}" for label, weight in wanted.versions.items())
    note(target=_name(request), detail=f"{alias} {weights}")
    made = await _functions(request).shifts.move(
        _name(request),
        alias,
        wanted.versions,
        description=wanted.description,
        within=number(request, "ready", int(PATIENCE), _LONGEST),
    )
    return json_answer(
        AliasView(name=made.name, versions=made.versions, description=made.description)
    )


async def remove_alias(request: web.Request) -> web.Response:
    alias = request.match_info["alias"]
    note(target=_name(request), detail=alias)
    await _functions(request).registry.remove_alias(_name(request), alias)
    return web.Response(status=204)


async def set_concurrency(request: web.Request) -> web.Response:
    functions, wanted = _functions(request), await body_of(request, ConcurrencyRequest)
    shown = "none" if wanted.reserved is None else wanted.reserved
    note(target=_name(request), detail=f"reserved {shown}")
    await functions.registry.reserve(_name(request), wanted.reserved)
    return json_answer(functions.view(_name(request)))


async def scale_function(request: web.Request) -> web.Response:
    functions, wanted = _functions(request), await body_of(request, ScaleRequest)
    given = {"min": wanted.min, "max": wanted.max}
    note(
        target=_name(request),
        detail=" ".join(f"{k} {v}" for k, v in given.items() if v is not None),
    )
    await functions.registry.scale(_name(request), least=wanted.min, most=wanted.max)
    return json_answer(functions.view(_name(request)))


async def provision_function(request: web.Request) -> web.Response:
    functions, wanted = _functions(request), await body_of(request, ProvisionRequest)
    qualifier = check_qualifier(request.match_info["qualifier"])
    note(target=_name(request), detail=f"{qualifier} {wanted.count}")
    await functions.registry.provision(_name(request), qualifier, wanted.count)
    return json_answer(functions.view(_name(request)))


async def unprovision_function(request: web.Request) -> web.Response:
    qualifier = check_qualifier(request.match_info["qualifier"])
    note(target=_name(request), detail=f"{qualifier} none")
    await _functions(request).registry.provision(_name(request), qualifier, None)
    return web.Response(status=204)


async def invoke_function(request: web.Request) -> web.Response:
    functions, name = _functions(request), _name(request)
    qualifier = request.query.get("qualifier") or None
    if qualifier is not None:
        check_qualifier(qualifier)
    later = flag(request, "event")
    note(target=f"{name}:{qualifier}" if qualifier else name, detail="event" if later else "")
    payload = await _payload(request)
    trace = request.headers.get(HEADER, "")
    if later:
        event = await functions.queue.enqueue(name, qualifier, payload, trace=trace)
        return json_answer(Accepted(id=event), 202)
    outcome = await functions.router.invoke(name, qualifier, payload, trace=trace)
    answer = json_answer(outcome.view)
    if flag(request, "tail"):
        answer.headers[LOG_HEADER] = base64.b64encode(outcome.log).decode()
    return answer


async def function_logs(request: web.Request) -> web.StreamResponse:
    functions, name = _functions(request), _name(request)
    functions.registry.latest(name)  # a name that is not one of a function is never a path
    count = number(request, "lines", 1000)
    if flag(request, "follow"):
        return await stream(request, functions.logs.follow(name, count), "text/plain")
    text = await functions.logs.tail(name, count)
    return web.Response(body=text, content_type="text/plain", charset="utf-8")


async def function_events(request: web.Request) -> web.Response:
    functions, name = _functions(request), _name(request)
    functions.registry.latest(name)
    return json_answer(await functions.queue.views(name))


async def retry_event(request: web.Request) -> web.Response:
    functions, name = _functions(request), _name(request)
    event = request.match_info["event"]
    note(target=name, detail=event)
    functions.registry.latest(name)
    return json_answer(Accepted(id=await functions.queue.retry(name, event)), 202)


async def purge_events(request: web.Request) -> web.Response:
    functions, name = _functions(request), _name(request)
    note(target=name)
    functions.registry.latest(name)
    count = await functions.queue.purge(name)
    note(target=name, detail=f"{count} dead letters")
    return web.Response(status=204)


def _functions(request: web.Request) -> Functions:
    return request.app[SERVICES].functions


def _name(request: web.Request) -> str:
    return request.match_info["name"]


async def _payload(request: web.Request) -> bytes:
    """The body, of which no more than may be is ever held."""
    parts, size = [], 0
    async for chunk in request.content.iter_chunked(_CHUNK):
        size += len(chunk)
        if size > MAX_PAYLOAD:
            raise InvalidRequest(f"the payload is larger than {MAX_PAYLOAD >> 20} MiB")
        parts.append(chunk)
    return b"".join(parts)
