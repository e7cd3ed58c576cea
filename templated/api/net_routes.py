"""The routes of network policies: a part of the table in `routes`."""

from __future__ import annotations

from aiohttp import web

from templated.api.answers import SERVICES, json_answer
from templated.api.route import Route, get, post
from templated.model.access import Role
from templated.model.policy import PolicyView, TraceView


async def list_policies(request: web.Request) -> web.Response:
    """All of them, with their counters."""
    return json_answer(await request.app[SERVICES].nets.views())


async def show_policy(request: web.Request) -> web.Response:
    """One, by the name of its template, its function, or a clone."""
    return json_answer(await request.app[SERVICES].nets.view(request.match_info["name"]))


async def apply_policy(request: web.Request) -> web.Response:
    """As the template's file has it now; no build and no restart."""
    services, name = request.app[SERVICES], request.match_info["name"]
    await services.templates.apply_network(name)
    return web.Response(status=204)


async def trace_packet(request: web.Request) -> web.Response:
    """Nothing is sent."""
    target = request.query.get("target", "")
    return json_answer(await request.app[SERVICES].nets.trace(request.match_info["name"], target))


NET_ROUTES: tuple[Route, ...] = (
    get(
        "/v1/policies",
        list_policies,
        "The network policies in force",
        list[PolicyView],
        needs=Role.VIEWER,
    ),
    get(
        "/v1/policies/{name}",
        show_policy,
        "The policy of a template, a function, or a clone",
        PolicyView,
        needs=Role.VIEWER,
    ),
    post(
        "/v1/policies/{name}",
        apply_policy,
        "Put the policy of a template's file in force",
        None,
        status=204,
        needs=Role.ADMIN,
    ),
    get(
        "/v1/clones/{name}/trace",
        trace_packet,
        "What would happen to a packet that a clone sends",
        TraceView,
        needs=Role.VIEWER,
        query={"target": "ADDRESS[:PORT[/PROTO]]; without a port a ping"},
    ),
)
