"""The routes of functions: a part of the table in `routes`."""

from __future__ import annotations

from typing import Any

from templated.api import function_handlers as h
from templated.api.route import Route, delete, get, post, put
from templated.model.access import Role
from templated.model.function import (
    Accepted,
    AliasRequest,
    AliasView,
    ConcurrencyRequest,
    EventView,
    FunctionView,
    InvokeView,
    ProvisionRequest,
    PublishRequest,
    ScaleRequest,
    VersionView,
)
from templated.model.policy import NetworkRequest
from templated.model.socket import LOG_HEADER

_NAME = "/v1/functions/{name}"
_READY = "seconds that instances may take to be ready before requests go to them; 0: at once"
_SETTINGS = {
    "settings": "a DeployRequest as JSON; what it leaves out stays as it is",
    "ready": f"{_READY}; then they go to them in any case",
    "background": "true: answer before requests go to the new code",
}
_VERSION = {"version": "remove this version alone"}
_INVOKE = {
    "qualifier": "a version or an alias; $LATEST by default",
    "event": "true: accept it, and run it later",
    "tail": f"true: the end of the log, in base64, in the header {LOG_HEADER}",
}
_LOGS = {"lines": "how many of the last lines", "follow": "true: go on with new output"}

FUNCTION_ROUTES: tuple[Route, ...] = (
    get("/v1/functions", h.list_functions, "All functions", list[FunctionView], needs=Role.VIEWER),
    get(_NAME, h.show_function, "One function", FunctionView, needs=Role.VIEWER),
    put(
        _NAME,
        h.deploy_function,
        "Deploy a function: a zip of its code, or nothing to keep that",
        FunctionView,
        body=bytes,
        query=_SETTINGS,
        needs=Role.ADMIN,
    ),
    delete(
        _NAME,
        h.remove_function,
        "Remove a function, or a version",
        query=_VERSION,
        needs=Role.ADMIN,
    ),
    post(
        f"{_NAME}/versions",
        h.publish_function,
        "Make a numbered version of $LATEST",
        VersionView,
        body=PublishRequest,
        status=201,
        needs=Role.ADMIN,
    ),
    put(
        f"{_NAME}/aliases/{{alias}}",
        h.set_alias,
        "Point an alias at one version, or at two",
        AliasView,
        body=AliasRequest,
        query={"ready": f"{_READY}; then the alias stays as it was"},
        needs=Role.ADMIN,
    ),
    delete(f"{_NAME}/aliases/{{alias}}", h.remove_alias, "Remove an alias", needs=Role.ADMIN),
    put(
        f"{_NAME}/concurrency",
        h.set_concurrency,
        "Set how many requests may run at once",
        FunctionView,
        body=ConcurrencyRequest,
        needs=Role.ADMIN,
    ),
    put(
        f"{_NAME}/scale",
        h.scale_function,
        "Set how many instances are kept, and how many there may be",
        FunctionView,
        body=ScaleRequest,
        needs=Role.ADMIN,
    ),
    put(
        f"{_NAME}/network",
        h.set_function_network,
        "Set a function's network policy, for all that runs, too",
        FunctionView,
        body=NetworkRequest,
        needs=Role.ADMIN,
    ),
    put(
        f"{_NAME}/provisioned/{{qualifier}}",
        h.provision_function,
        "Keep instances ready for a version or an alias",
        FunctionView,
        body=ProvisionRequest,
        needs=Role.ADMIN,
    ),
    delete(
        f"{_NAME}/provisioned/{{qualifier}}",
        h.unprovision_function,
        "Keep none ready for a version or an alias any more",
        needs=Role.ADMIN,
    ),
    post(
        f"{_NAME}/invoke",
        h.invoke_function,
        "Run a request, or accept it",
        InvokeView,
        body=Any,
        query=_INVOKE,
        also={202: Accepted},
        needs=Role.OPERATOR,
        everyday=True,
    ),
    get(
        f"{_NAME}/logs",
        h.function_logs,
        "What a function printed",
        str,
        stream="text/plain",
        query=_LOGS,
        needs=Role.OPERATOR,
    ),
    get(
        f"{_NAME}/events",
        h.function_events,
        "Asynchronous events that are not done",
        list[EventView],
        needs=Role.OPERATOR,
    ),
    post(
        f"{_NAME}/events/{{event}}/retry",
        h.retry_event,
        "Run the event of a dead letter once more, later, under a new id",
        Accepted,
        status=202,
        needs=Role.OPERATOR,
    ),
    delete(f"{_NAME}/events", h.purge_events, "Forget the dead letters", needs=Role.ADMIN),
)
