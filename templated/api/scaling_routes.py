"""The routes of scaling: a part of the table in `routes`."""

from __future__ import annotations

from aiohttp import web

from templated.api.answers import SERVICES, json_answer
from templated.api.route import Route, get
from templated.errors import Conflict
from templated.model.access import Role
from templated.model.scaling import ScaleDetail, ScaleView
from templated.services.upkeep.scale_views import ScaleViews


async def list_scaling(request: web.Request) -> web.Response:
    """The rows are cheap, but there may be thousands of them."""
    return json_answer(_views(request).all())


async def show_scaling(request: web.Request) -> web.Response:
    """One of them, with what is learned."""
    qualifier = request.query.get("qualifier") or None
    return json_answer(_views(request).one(request.match_info["name"], qualifier))


def _views(request: web.Request) -> ScaleViews:
    views = request.app[SERVICES].scaling
    if views is None:
        raise Conflict(
            "scaling is switched off", hint="set scaling.enabled in the daemon's configuration"
        )
    return views


SCALING_ROUTES: tuple[Route, ...] = (
    get(
        "/v1/scaling",
        list_scaling,
        "How many instances of each version there should be",
        list[ScaleView],
        needs=Role.VIEWER,
    ),
    get(
        "/v1/scaling/{name}",
        show_scaling,
        "All that scaling knows of one version",
        ScaleDetail,
        needs=Role.VIEWER,
        query={"qualifier": "a version or an alias; by default the one that was asked for last"},
    ),
)
