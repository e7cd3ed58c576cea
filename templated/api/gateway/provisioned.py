"""Operations on provisioned concurrency: instances that are kept for a version or an alias."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from templated.api.gateway.call import Call, json_answer, page, paged
from templated.api.gateway.errors import Refused, wrong
from templated.api.gateway.shapes import Provision
from templated.model.function import ProvisionedView, Readiness


async def put_provisioned(call: Call) -> web.Response:
    """Keep instances for a version or an alias; they are there a moment later."""
    wanted = await call.decode(Provision)
    name, qualifier = _qualified(call)
    count = wanted.provisioned_concurrent_executions
    call.detail = f"{qualifier} {count}"
    await call.desk.functions.registry.provision(name, qualifier, count)
    return json_answer(_told(_found(call, name, qualifier)), 202)


async def get_provisioned(call: Call) -> web.Response:
    """What is kept for a version or an alias; with `List=ALL` for all of a function."""
    if call.query.get("List"):
        return _listed(call)
    return json_answer(_told(_found(call, *_qualified(call))))


async def delete_provisioned(call: Call) -> web.Response:
    """Keep none any more."""
    name, qualifier = _qualified(call)
    call.detail = f"{qualifier} none"
    _found(call, name, qualifier)
    await call.desk.functions.registry.provision(name, qualifier, None)
    return web.Response(status=204)


def _listed(call: Call) -> web.Response:
    if call.query["List"] != "ALL":
        raise wrong("List has to be ALL, or to be left out")
    name, arn = call.alone, call.desk.place.arn
    views = list(call.desk.functions.kept.views(name))
    chosen, mark = page(call, views, lambda view: view.qualifier)
    shown = [{"FunctionArn": arn(name, view.qualifier), **_told(view)} for view in chosen]
    return paged("ProvisionedConcurrencyConfigs", shown, mark)


def _qualified(call: Call) -> tuple[str, str]:
    target = call.target
    if target.qualifier is None:
        raise wrong("Qualifier is missing: a version or an alias")
    return target.name, target.qualifier


def _found(call: Call, name: str, qualifier: str) -> ProvisionedView:
    for view in call.desk.functions.kept.views(name):
        if view.qualifier == qualifier:
            return view
    raise Refused(
        "ProvisionedConcurrencyConfigNotFoundException",
        f"No Provisioned Concurrency Config found for {name}:{qualifier}",
        status=404,
    )


def _told(view: ProvisionedView) -> dict[str, Any]:
    told: dict[str, Any] = {
        "RequestedProvisionedConcurrentExecutions": view.requested,
        "AvailableProvisionedConcurrentExecutions": view.available,
        "AllocatedProvisionedConcurrentExecutions": view.allocated,
        "Status": view.status.value,
        "LastModified": f"{view.changed.removesuffix('Z')}+0000",
    }
    if view.status is Readiness.FAILED:
        told["StatusReason"] = view.reason
    return told
