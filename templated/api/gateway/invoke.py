"""Invoke: run a request now, accept it for later, or only say whether it could be run."""

from __future__ import annotations

import base64

from aiohttp import web

from templated.api.gateway.body import too_large
from templated.api.gateway.call import Call
from templated.api.gateway.errors import Refused, wrong
from templated.errors import InvalidRequest
from templated.services.functions.payloads import checked
from templated.services.functions.queue import MAX_EVENT
from templated.services.functions.traces import HEADER

_TYPE, _LOG = "X-Amz-Invocation-Type", "X-Amz-Log-Type"
# Headers that would mean something there, and have to be told instead of ignored.
_NOT_HERE = ("X-Amz-Client-Context", "X-Amz-Tenant-Id", "X-Amz-Durable-Execution-Name")
_TAIL = 4096


async def invoke(call: Call) -> web.Response:
    """Run a function."""
    kind, tail = call.headers.get(_TYPE, "RequestResponse"), call.headers.get(_LOG, "None")
    for name in _NOT_HERE:
        if name in call.headers:
            raise wrong(f"{name} is not supported here")
    if kind not in ("RequestResponse", "Event", "DryRun"):
        raise wrong("InvocationType has to be RequestResponse, Event or DryRun")
    if tail not in ("None", "Tail"):
        raise wrong("LogType has to be None or Tail")
    payload = await _payload(call.body)
    if kind == "DryRun":
        call.desk.functions.registry.resolve(call.target.name, call.target.qualifier)
        return web.Response(status=204)
    if kind == "Event":
        return await _later(call, payload)
    return await _now(call, payload, tail=tail == "Tail")


async def _later(call: Call, payload: bytes) -> web.Response:
    target = call.target
    if len(payload) > MAX_EVENT:
        raise too_large(MAX_EVENT, "Invoke")
    call.id = await call.desk.functions.queue.enqueue(
        target.name, target.qualifier, payload, trace=call.headers.get(HEADER, "")
    )
    return web.Response(status=202)


async def _now(call: Call, payload: bytes, *, tail: bool) -> web.Response:
    target = call.target
    outcome = await call.desk.functions.router.invoke(
        target.name, target.qualifier, payload, trace=call.headers.get(HEADER, "")
    )
    view = outcome.view
    headers = {"X-Amz-Executed-Version": view.version, HEADER: f"Root={view.trace}"}
    if view.error is not None:
        headers["X-Amz-Function-Error"] = view.error
    if tail:
        headers["X-Amz-Log-Result"] = base64.b64encode(outcome.log[-_TAIL:]).decode()
    return web.Response(body=bytes(view.payload), content_type="application/json", headers=headers)


async def _payload(body: bytes) -> bytes:
    """The event of a request, `{}` for an empty one. Raises Refused when it is not JSON."""
    try:
        return await checked(body)
    except InvalidRequest as error:
        message = f"Could not parse request body into json: {error.message}"
        raise Refused("InvalidRequestContentException", message) from None
