"""All routes, in one table: the server and the OpenAPI document are both made from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from templated.api import handlers as h
from templated.api.errors import Handler
from templated.model.api import (
    BuildRequest,
    CloneRequest,
    ExecFrame,
    ExecRequest,
    Info,
    Operation,
    OperationEvent,
    PoolRequest,
    PoolView,
)
from templated.model.clone import CloneView
from templated.model.generation import TemplateView
from templated.services.reports.events import Event


@dataclass(frozen=True)
class Route:
    """One method and path. `answer` is the type of the body, `stream` its media type if lines."""

    method: str
    path: str
    handler: Handler
    summary: str
    answer: Any = None
    status: int = 200
    body: Any = None
    stream: str = ""
    query: dict[str, str] = field(default_factory=dict)


_NDJSON = "application/x-ndjson"
_TEXT = "text/plain"
_BYTES = "application/octet-stream"

ROUTES: tuple[Route, ...] = (
    Route("GET", "/v1/info", h.info, "The daemon", Info),
    Route("GET", "/v1/openapi.json", h.openapi, "This document", dict[str, Any]),
    Route("GET", "/v1/clones", h.list_clones, "All clones", list[CloneView]),
    Route(
        *("POST", "/v1/clones", h.create_clones, "Start one clone, or several"),
        answer=CloneView | list[CloneView],
        status=201,
        body=CloneRequest,
    ),
    Route("GET", "/v1/clones/{name}", h.show_clone, "One clone", CloneView),
    Route("DELETE", "/v1/clones/{name}", h.remove_clone, "End a clone", status=204),
    Route(
        *(
            "POST",
            "/v1/clones/{name}/exec",
            h.exec_in_clone,
            "Run a command in a clone",
        ),
        answer=ExecFrame,
        body=ExecRequest,
        stream=_NDJSON,
    ),
    Route(
        *(
            "GET",
            "/v1/clones/{name}/logs",
            h.logs,
            "The serial console of a clone",
            str,
        ),
        stream=_TEXT,
        query={
            "lines": "how many of the last lines",
            "follow": "true: go on with new output",
        },
    ),
    Route(
        *(
            "GET",
            "/v1/clones/{name}/files",
            h.get_file,
            "Read a file of a clone",
            bytes,
        ),
        stream=_BYTES,
        query={"path": "absolute path in the guest"},
    ),
    Route(
        *("PUT", "/v1/clones/{name}/files", h.put_file, "Write a file of a clone"),
        status=204,
        body=bytes,
        query={"path": "absolute path in the guest", "mode": "octal, 644 by default"},
    ),
    Route(
        *("GET", "/v1/events", h.events, "What happened", Event),
        stream=_NDJSON,
        query={"follow": "true: go on with new events"},
    ),
    Route("GET", "/v1/templates", h.list_templates, "All templates", list[TemplateView]),
    Route("GET", "/v1/templates/{name}", h.show_template, "One template", TemplateView),
    Route("DELETE", "/v1/templates/{name}", h.remove_template, "Remove builds", status=204),
    Route(
        *(
            "POST",
            "/v1/templates/{name}/build",
            h.build_template,
            "Build a template",
            Operation,
        ),
        status=202,
        body=BuildRequest,
    ),
    Route(
        *(
            "POST",
            "/v1/templates/{name}/rollback",
            h.rollback,
            "Serve the build before",
        ),
        answer=TemplateView,
    ),
    Route("GET", "/v1/pools", h.list_pools, "All pools", list[PoolView]),
    Route("GET", "/v1/pools/{template}", h.show_pool, "The pools of a template", PoolView),
    Route(
        *("PUT", "/v1/pools/{template}", h.set_pool, "Set the sizes of pools"),
        answer=PoolView,
        body=PoolRequest,
    ),
    Route("GET", "/v1/operations/{id}", h.show_operation, "Long work", Operation),
    Route(
        *(
            "GET",
            "/v1/operations/{id}/events",
            h.operation_events,
            "Its events",
            OperationEvent,
        ),
        stream=_NDJSON,
    ),
    Route("GET", "/metrics", h.metrics, "Prometheus metrics", str, stream=_TEXT),
)
