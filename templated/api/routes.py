"""All routes, in one table: the server and the OpenAPI document are both made from it."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from templated.api import handlers as h
from templated.api.answers import NDJSON, json_answer
from templated.api.code_routes import CODE_ROUTES
from templated.api.egress_routes import EGRESS_ROUTES
from templated.api.function_routes import FUNCTION_ROUTES
from templated.api.net_routes import NET_ROUTES
from templated.api.openapi import document
from templated.api.route import Route, delete, get, post, put
from templated.api.scaling_routes import SCALING_ROUTES
from templated.model.access import Right, Role
from templated.model.api import (
    AuditEntry,
    BuildRequest,
    CloneRequest,
    Event,
    ExecFrame,
    ExecRequest,
    ImageView,
    Info,
    Operation,
    OperationEvent,
    PoolRequest,
    PoolView,
)
from templated.model.clone import CloneView
from templated.model.generation import TemplateView

_TEXT = "text/plain"
_BYTES = "application/octet-stream"
_PATH = {"path": "absolute path in the guest"}
_MODE = {"mode": "octal, 644 by default"}
_LOGS = {"lines": "how many of the last lines", "follow": "true: go on with new output"}
_EVENTS = {"follow": "true: go on with new events"}
_AUDIT = {
    "lines": "how many of the last entries, 1000 by default",
    "since": "only of the last so many seconds",
    "user": "only of this user name or uid",
}


async def openapi(request: web.Request) -> web.Response:
    """The document that describes the table below."""
    return json_answer(document(ROUTES))


ROUTES: tuple[Route, ...] = (
    get("/v1/info", h.info, "The daemon", Info, needs=Role.VIEWER),
    get("/v1/openapi.json", openapi, "This document", dict[str, Any], needs=Role.VIEWER),
    get("/v1/clones", h.list_clones, "All clones", list[CloneView], needs=Role.VIEWER),
    post(
        "/v1/clones",
        h.create_clones,
        "Start one clone, or several",
        CloneView | list[CloneView],
        body=CloneRequest,
        status=201,
        needs=Role.OPERATOR,
    ),
    get("/v1/clones/{name}", h.show_clone, "One clone", CloneView, needs=Role.VIEWER),
    delete("/v1/clones/{name}", h.remove_clone, "End a clone", needs=Role.OPERATOR),
    post(
        "/v1/clones/{name}/exec",
        h.exec_in_clone,
        "Run a command in a clone",
        ExecFrame,
        body=ExecRequest,
        stream=NDJSON,
        needs=Right.EXEC,
    ),
    get(
        "/v1/clones/{name}/logs",
        h.logs,
        "The serial console of a clone",
        str,
        stream=_TEXT,
        query=_LOGS,
        needs=Role.OPERATOR,
    ),
    get(
        "/v1/clones/{name}/files",
        h.get_file,
        "Read a file of a clone",
        bytes,
        stream=_BYTES,
        query=_PATH,
        needs=Right.COPY,
    ),
    put(
        "/v1/clones/{name}/files",
        h.put_file,
        "Write a file of a clone",
        body=bytes,
        query=_PATH | _MODE,
        needs=Right.COPY,
    ),
    get(
        "/v1/events",
        h.events,
        "What happened",
        Event,
        stream=NDJSON,
        query=_EVENTS,
        needs=Role.VIEWER,
    ),
    get(
        "/v1/audit",
        h.audit,
        "Who changed what",
        AuditEntry,
        stream=NDJSON,
        query=_AUDIT,
        needs=Role.ADMIN,
    ),
    get("/v1/templates", h.list_templates, "All templates", list[TemplateView], needs=Role.VIEWER),
    get("/v1/templates/{name}", h.show_template, "One template", TemplateView, needs=Role.VIEWER),
    delete("/v1/templates/{name}", h.remove_template, "Remove builds", needs=Role.ADMIN),
    post(
        "/v1/templates/{name}/build",
        h.build_template,
        "Build a template",
        Operation,
        body=BuildRequest,
        status=202,
        needs=Role.ADMIN,
    ),
    post(
        "/v1/templates/{name}/rollback",
        h.rollback,
        "Serve the build before",
        TemplateView,
        needs=Role.ADMIN,
    ),
    get(
        "/v1/images", h.list_images, "What templates boot from", list[ImageView], needs=Role.VIEWER
    ),
    get("/v1/pools", h.list_pools, "All pools", list[PoolView], needs=Role.VIEWER),
    get(
        "/v1/pools/{template}", h.show_pool, "The pools of a template", PoolView, needs=Role.VIEWER
    ),
    put(
        "/v1/pools/{template}",
        h.set_pool,
        "Set the sizes of pools",
        PoolView,
        body=PoolRequest,
        needs=Role.OPERATOR,
    ),
    get("/v1/operations/{id}", h.show_operation, "Long work", Operation, needs=Role.VIEWER),
    get(
        "/v1/operations/{id}/events",
        h.operation_events,
        "Its events",
        OperationEvent,
        stream=NDJSON,
        needs=Role.VIEWER,
    ),
    *FUNCTION_ROUTES,
    *CODE_ROUTES,
    *NET_ROUTES,
    *EGRESS_ROUTES,
    *SCALING_ROUTES,
    get("/metrics", h.metrics, "Prometheus metrics", str, stream=_TEXT, needs=Role.VIEWER),
)
