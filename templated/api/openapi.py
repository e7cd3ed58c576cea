"""The OpenAPI document, made from the routes and the types of their bodies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from templated import __version__
from templated.api.route import Route
from templated.model.access import Right
from templated.model.api import ErrorBody

_REF = "#/components/schemas/{name}"
_RAW = {str: {"type": "string"}, bytes: {"type": "string", "format": "binary"}}


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """The whole document, OpenAPI 3.1."""
    bodies = [t for r in routes for t in (r.answer, r.body, *r.also.values())]
    types = [t for t in bodies if t not in (None, str, bytes)]
    schemas, components = msgspec.json.schema_components([*types, ErrorBody], ref_template=_REF)
    by_type = {
        repr(kind): schema for kind, schema in zip([*types, ErrorBody], schemas, strict=True)
    }
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, by_type)
    described = {
        "openapi": "3.1.0",
        "info": {"title": "templated", "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }
    # Through JSON, since defaults in the schemas can be tuples and structs.
    decoded: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(described))
    return decoded


def _operation(route: Route, by_type: dict[str, Any]) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"\{(\w+)\}", route.path)
    ]
    parameters += [
        {"name": name, "in": "query", "description": text, "schema": {"type": "string"}}
        for name, text in route.query.items()
    ]
    answers: dict[str, Any] = {str(route.status): {"description": route.summary}}
    if route.answer is not None:
        media = route.stream or "application/json"
        schema = _schema(route.answer, by_type)
        answers[str(route.status)]["content"] = {media: {"schema": schema}}
    for status, kind in route.also.items():
        content = {"application/json": {"schema": _schema(kind, by_type)}}
        answers[str(status)] = {"description": route.summary, "content": content}
    error = {"schema": by_type[repr(ErrorBody)]}
    answers["default"] = {
        "description": "An error",
        "content": {"application/json": error},
    }
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": route.name,
        "x-templated-right" if isinstance(route.needs, Right) else "x-templated-role": route.needs,
        "parameters": parameters,
        "responses": answers,
    }
    if route.body is not None:
        media = "application/octet-stream" if route.body is bytes else "application/json"
        schema = _schema(route.body, by_type)
        operation["requestBody"] = {
            "required": True,
            "content": {media: {"schema": schema}},
        }
    return operation


def _schema(kind: Any, by_type: dict[str, Any]) -> Any:
    return _RAW.get(kind) or by_type[repr(kind)]
