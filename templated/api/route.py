"""One row of the table of routes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from templated.api.errors import Handler
from templated.model.access import Need, Right


@dataclass(frozen=True)
class Route:
    """One method and path. `answer` is the type of the body, `stream` its media type if lines.

    `needs` is the role or the right that a caller must have.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    needs: Need
    answer: Any = None
    status: int = 200
    body: Any = None
    stream: str = ""
    query: Mapping[str, str] = field(default_factory=dict)
    also: Mapping[int, Any] = field(default_factory=dict)
    """Other answers that are none of an error: the types of their bodies, by status."""
    everyday: bool = False
    """It is what the daemon is there for, some hundred times a second: the function's own log and
    the metrics tell of it, and only who may not is recorded."""

    @property
    def name(self) -> str:
        """The name of the operation, in OpenAPI and in the audit log."""
        return self.handler.__name__

    @property
    def recorded(self) -> bool:
        """Whether requests are audited: all that change something or reach into a guest."""
        changes = self.method != "GET" or isinstance(self.needs, Right)
        return changes and not self.everyday


def get(
    path: str,
    handler: Handler,
    summary: str,
    answer: Any,
    *,
    needs: Need,
    stream: str = "",
    query: Mapping[str, str] | None = None,
) -> Route:
    """A route that only looks."""
    return Route("GET", path, handler, summary, needs, answer, stream=stream, query=query or {})


def post(
    path: str,
    handler: Handler,
    summary: str,
    answer: Any,
    *,
    needs: Need,
    body: Any = None,
    status: int = 200,
    stream: str = "",
    query: Mapping[str, str] | None = None,
    also: Mapping[int, Any] | None = None,
    everyday: bool = False,
) -> Route:
    """A route that does something."""
    return Route(
        *("POST", path, handler, summary, needs, answer, status, body, stream),
        query=query or {},
        also=also or {},
        everyday=everyday,
    )


def put(
    path: str,
    handler: Handler,
    summary: str,
    answer: Any = None,
    *,
    needs: Need,
    body: Any,
    query: Mapping[str, str] | None = None,
) -> Route:
    """A route that sets the resource at its path; 204 when its answer is empty."""
    status = 204 if answer is None else 200
    return Route("PUT", path, handler, summary, needs, answer, status, body, query=query or {})


def delete(
    path: str,
    handler: Handler,
    summary: str,
    *,
    needs: Need,
    query: Mapping[str, str] | None = None,
) -> Route:
    """A route that removes the resource at its path."""
    return Route("DELETE", path, handler, summary, needs, status=204, query=query or {})
