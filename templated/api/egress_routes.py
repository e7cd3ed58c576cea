"""The routes of egresses: a part of the table in `routes`."""

from __future__ import annotations

import asyncio

from aiohttp import web

from templated.api.answers import SERVICES, json_answer
from templated.api.errors import body_of
from templated.api.gate import note
from templated.api.route import Route, delete, get, post
from templated.model.access import Role
from templated.model.egress import EgressSpec, EgressView


async def list_egresses(request: web.Request) -> web.Response:
    """By name."""
    return json_answer(request.app[SERVICES].egresses.views())


async def show_egress(request: web.Request) -> web.Response:
    """One of them."""
    return json_answer(request.app[SERVICES].egresses.view(request.match_info["name"]))


async def create_egress(request: web.Request) -> web.Response:
    """A caller who goes away changes nothing: it is made, or nothing of it is left."""
    wanted = await body_of(request, EgressSpec)
    note(target=wanted.name, detail=f"{wanted.interface} {wanted.address}")
    egresses = request.app[SERVICES].egresses
    return json_answer(await asyncio.shield(egresses.create(wanted)), 201)


async def switch_egress(request: web.Request) -> web.Response:
    """The standby is the active one when this answers."""
    egresses = request.app[SERVICES].egresses
    return json_answer(await asyncio.shield(egresses.switch(request.match_info["name"])))


async def remove_egress(request: web.Request) -> web.Response:
    """Its forwarders, its bridges and its routes go."""
    await asyncio.shield(request.app[SERVICES].egresses.remove(request.match_info["name"]))
    return web.Response(status=204)


EGRESS_ROUTES: tuple[Route, ...] = (
    get(
        "/v1/egresses",
        list_egresses,
        "Named ways out of the host",
        list[EgressView],
        needs=Role.VIEWER,
    ),
    post(
        "/v1/egresses",
        create_egress,
        "Make a way out of the host",
        EgressView,
        body=EgressSpec,
        status=201,
        needs=Role.ADMIN,
    ),
    get("/v1/egresses/{name}", show_egress, "One way out", EgressView, needs=Role.VIEWER),
    post(
        "/v1/egresses/{name}/switch",
        switch_egress,
        "Have the standby forwarder take over",
        EgressView,
        needs=Role.OPERATOR,
    ),
    delete(
        "/v1/egresses/{name}", remove_egress, "Take a way out of the host away", needs=Role.ADMIN
    ),
)
