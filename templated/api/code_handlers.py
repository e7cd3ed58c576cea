"""The handlers of the routes of code; as `handlers`, without other logic."""

from __future__ import annotations

import asyncio

from aiohttp import web

from templated.api.answers import SERVICES, json_answer
from templated.model.code import check_digest


async def list_code(request: web.Request) -> web.Response:
    return json_answer(await request.app[SERVICES].functions.code.views())


async def prefetch_code(request: web.Request) -> web.Response:
    digest = check_digest(request.match_info["digest"])
    return json_answer(await request.app[SERVICES].functions.code.prefetch(digest))


async def verify_code(request: web.Request) -> web.Response:
    # It goes on to its end: what is damaged is found, whoever waits for the answer.
    return json_answer(await asyncio.shield(request.app[SERVICES].functions.code.verify()))


async def collect_code(request: web.Request) -> web.Response:
    return json_answer(await asyncio.shield(request.app[SERVICES].functions.code.gc()))
