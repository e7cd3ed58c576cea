"""The requests of the API: one function for each route, named as its operation in OpenAPI.

`Request[T]` is a request whose answer is a T, `Stream[T]` one whose answer is many T, each as
soon as it is there. How they are sent is the clients' business. Nothing heavy is imported: the
command line makes its requests by these, and prints the answers as the JSON that they are.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar
from urllib.parse import quote, urlencode

from templated.errors import DaemonUnavailable

if TYPE_CHECKING:
    from templated.model.api import (
        AuditEntry,
        Event,
        ExecFrame,
        ImageView,
        Info,
        Operation,
        OperationEvent,
        PoolView,
    )
    from templated.model.clone import CloneView
    from templated.model.code import CodeCheck, CodeFreed, CodeRow
    from templated.model.egress import EgressView
    from templated.model.function import (
        Accepted,
        AliasView,
        EventView,
        FunctionView,
        InvokeView,
        VersionView,
    )
    from templated.model.generation import TemplateView
    from templated.model.policy import PolicyView, TraceView
    from templated.model.scaling import ScaleDetail, ScaleView

T = TypeVar("T")
Content = bytes | IO[bytes] | None
SOON = 30.0
"""Seconds, for requests that the daemon answers at once."""
LONG = 3600.0
"""Seconds, for requests that the daemon itself bounds. A shorter bound here would only hide which
step was slow; this one ends the wait for a daemon that hangs."""


class End(NamedTuple):
    """The last item of a stream: a key and its value that only this one has.

    Without it the answer was cut off: `message` and `hint` are the error for that.
    """

    key: str
    value: object
    message: str
    hint: str

    def check(self, line: bytes) -> None:
        """DaemonUnavailable when `line`, with which the answer ended, is not the last item."""
        item = json.loads(line) if line else {}
        if not isinstance(item, dict) or item.get(self.key) != self.value:
            raise DaemonUnavailable(self.message, hint=self.hint)


class Request(Generic[T]):
    """One request; T is the type of its answer. `timeout` is for each part of that, in seconds."""

    def __init__(
        self,
        method: str,
        *parts: str,
        base: str = "/v1/",
        query: Mapping[str, object | None] | None = None,
        body: Mapping[str, object | None] | None = None,
        content: Content = None,
        size: int | None = None,
        timeout: float | None = SOON,
        end: End | None = None,
    ) -> None:
        self.method = method
        self.target = base + "/".join(quote(part, safe="") for part in parts)
        if chosen := _given(query):
            self.target += "?" + urlencode(chosen)
        self.content = content if body is None else json.dumps(_given(body)).encode()
        self.headers: dict[str, str] = {}
        if content is not None:
            self.headers["Content-Type"] = "application/octet-stream"
        if size is not None:
            self.headers["Content-Length"] = str(size)
        self.timeout = timeout
        self.end = end


class Stream(Request[T]):
    """A request that is answered bit by bit; T is the type of one item.

    `timeout` is for each bit, and None for a stream that may be silent for any time.
    """


def _given(values: Mapping[str, object | None] | None) -> dict[str, object]:
    return {key: value for key, value in (values or {}).items() if value is not None}


# The daemon


def info() -> Request[Info]:
    """The daemon: version, accelerator, QEMU, places."""
    return Request("GET", "info")


def openapi() -> Request[dict[str, Any]]:
    """The OpenAPI document of the daemon."""
    return Request("GET", "openapi.json")


def metrics() -> Request[str]:
    """The metrics as Prometheus scrapes them."""
    return Request("GET", "metrics", base="/")


def events(follow: bool = False) -> Stream[Event]:
    """The last events, oldest first; with `follow` then each new one, until the daemon ends."""
    timeout = None if follow else SOON
    return Stream("GET", "events", query={"follow": _flag(follow)}, timeout=timeout)


def audit(
    lines: int | None = None, *, since: int | None = None, user: str | None = None
) -> Stream[AuditEntry]:
    """Who changed what: the last entries (1000 by default), oldest first.

    `since`: only of the last so many seconds. `user`: only of this user name or uid.
    """
    query = {"lines": lines, "since": since, "user": user}
    return Stream("GET", "audit", query=query)


# Clones


def list_clones() -> Request[list[CloneView]]:
    """All clones, oldest first."""
    return Request("GET", "clones")


def create_clone(
    name: str, *, template: str | None = None, path: str | None = None
) -> Request[CloneView]:
    """Start a clone, and wait until it has confirmed its identity.

    `template`: by default the only one that is built. `path`: by default the fastest that is
    ready. A start that fails leaves nothing.
    """
    body = {"name": name, "template": template, "path": path}
    return Request("POST", "clones", body=body, timeout=LONG)


def create_clones(
    name: str, count: int, *, template: str | None = None, path: str | None = None
) -> Request[list[CloneView]]:
    """Start NAME-1 to NAME-count side by side; when one of them fails, none is left."""
    body = {"name": name, "template": template, "count": count, "path": path}
    return Request("POST", "clones", body=body, timeout=LONG)


def show_clone(name: str) -> Request[CloneView]:
    """One clone."""
    return Request("GET", "clones", name)


def remove_clone(name: str) -> Request[None]:
    """End a clone and give back all that it had; when that fails it can be tried again."""
    return Request("DELETE", "clones", name, timeout=LONG)


def exec_in_clone(
    name: str,
    argv: Sequence[str],
    *,
    stdin: bytes = b"",
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
) -> Stream[ExecFrame]:
    """Run a command in a clone: its output as it comes, then one frame with its end.

    The command is killed after `timeout` seconds; it isn't when the caller goes away earlier.
    """
    body = {
        "argv": list(argv),
        "timeout": timeout,
        "env": dict(env or {}),
        "stdin": base64.b64encode(stdin).decode() if stdin else None,
    }
    end = End(
        key="done",
        value=True,
        message="the daemon ended the connection before the command's end was known",
        hint=f"the command may still run in {name}",
    )
    return Stream("POST", "clones", name, "exec", body=body, timeout=timeout + SOON, end=end)


def logs(name: str, lines: int | None = None, follow: bool = False) -> Stream[bytes]:
    """The end of a clone's serial console; with `follow` then new output as it comes."""
    query = {"lines": lines, "follow": "true" if follow else None}
    return Stream("GET", "clones", name, "logs", query=query, timeout=None if follow else SOON)


def get_file(name: str, path: str) -> Request[bytes]:
    """Read a file of a clone; `path` is absolute."""
    return Request("GET", "clones", name, "files", query={"path": path}, timeout=LONG)


def put_file(
    name: str, path: str, content: bytes | IO[bytes], *, mode: int = 0o644, size: int | None = None
) -> Request[None]:
    """Write a file of a clone; it is there under its name only when it is complete.

    `content` may be an open file, of `size` bytes if that is known.
    """
    query = {"path": path, "mode": f"{mode:o}"}
    return Request(
        "PUT", "clones", name, "files", query=query, content=content, size=size, timeout=LONG
    )


# Templates


def list_templates() -> Request[list[TemplateView]]:
    """All templates, without their specs and manifests."""
    return Request("GET", "templates")


def show_template(name: str) -> Request[TemplateView]:
    """One template, with its spec and the manifest of its active generation."""
    return Request("GET", "templates", name)


def remove_template(name: str) -> Request[None]:
    """Remove a template's generations."""
    return Request("DELETE", "templates", name, timeout=LONG)


def build_template(
    name: str, *, spec: str | None = None, source: str | None = None
) -> Request[Operation]:
    """Begin to build a template; follow it by `operation_events`.

    `spec` is YAML, by default the template's file on the daemon's host; `source` is what errors
    call it.
    """
    return Request("POST", "templates", name, "build", body={"spec": spec, "source": source})


def rollback(name: str) -> Request[TemplateView]:
    """Make the generation before the active one the active one."""
    return Request("POST", "templates", name, "rollback", timeout=LONG)


def list_images() -> Request[list[ImageView]]:
    """The images that templates boot from, oldest first."""
    return Request("GET", "images")


# Pools


def list_pools() -> Request[list[PoolView]]:
    """The pools of all templates."""
    return Request("GET", "pools")


def show_pool(template: str) -> Request[PoolView]:
    """The pools of one template."""
    return Request("GET", "pools", template)


def set_pool(
    template: str,
    *,
    standby: int | None = None,
    warm: int | None = None,
    reset: bool = False,
) -> Request[PoolView]:
    """Set the sizes of a template's pools; None leaves a tier as it is.

    `reset` goes back to the sizes in the template's spec.
    """
    body = {"standby": standby, "warm": warm, "reset": reset or None}
    return Request("PUT", "pools", template, body=body, timeout=LONG)


# Scaling


def list_scaling() -> Request[list[ScaleView]]:
    """How many instances of each version there should be, and why."""
    return Request("GET", "scaling")


def show_scaling(name: str, *, qualifier: str | None = None) -> Request[ScaleDetail]:
    """All that scaling knows of a version; by default of the one that was asked for last."""
    return Request("GET", "scaling", name, query={"qualifier": qualifier})


# Network policies


def list_policies() -> Request[list[PolicyView]]:
    """The network policies in force, with their counters."""
    return Request("GET", "policies")


def show_policy(name: str) -> Request[PolicyView]:
    """The policy of a template, a function, or a clone."""
    return Request("GET", "policies", name)


def apply_policy(name: str) -> Request[None]:
    """Put the policy of a template's file in force."""
    return Request("POST", "policies", name)


def trace_packet(name: str, target: str) -> Request[TraceView]:
    """What would happen to a packet that a clone sends to ADDRESS[:PORT[/PROTO]]."""
    return Request("GET", "clones", name, "trace", query={"target": target})


# Egresses


def list_egresses() -> Request[list[EgressView]]:
    """All egresses, with their forwarders."""
    return Request("GET", "egresses")


def show_egress(name: str) -> Request[EgressView]:
    """One egress."""
    return Request("GET", "egresses", name)


def create_egress(egress: Mapping[str, object | None]) -> Request[EgressView]:
    """Make an egress, by the keys of `EgressSpec`; the answer comes once it can be used."""
    return Request("POST", "egresses", body=egress, timeout=LONG)


def switch_egress(name: str) -> Request[EgressView]:
    """Have the standby take over."""
    return Request("POST", "egresses", name, "switch", timeout=LONG)


def remove_egress(name: str) -> Request[None]:
    """Take an egress away that no policy names."""
    return Request("DELETE", "egresses", name, timeout=LONG)


# Functions


def list_functions() -> Request[list[FunctionView]]:
    """All functions, by name."""
    return Request("GET", "functions")


def show_function(name: str) -> Request[FunctionView]:
    """One function, with its versions and aliases."""
    return Request("GET", "functions", name)


def deploy_function(
    name: str,
    code: bytes | IO[bytes] = b"",
    *,
    size: int | None = None,
    handler: str | None = None,
    template: str | None = None,
    runtime: str | None = None,
    env: Mapping[str, str] | None = None,
    timeout: str | None = None,
    description: str | None = None,
    network: Mapping[str, object] | None = None,
    ready: int | None = None,
    background: bool = False,
) -> Request[FunctionView]:
    """Make a function, or change its `$LATEST`; running requests end on the code they began with.

    Where the code before has instances, they serve until as many of the new one are ready, for
    `ready` seconds at most (60; 0: not at all). `background`: the answer does not wait for that.
    `code` is a zip, or an open file with one, of `size` bytes if that is known; without it the
    code stays as it is, and so does every setting that is None. `env` replaces all variables;
    `network` are keys of the policy of all versions, as for `set_function_network`.
    """
    settings = {
        "handler": handler,
        "template": template,
        "runtime": runtime,
        "env": None if env is None else dict(env),
        "timeout": timeout,
        "description": description,
        "network": None if network is None else dict(network),
    }
    query = {
        "settings": json.dumps(_given(settings), separators=(",", ":")),
        "ready": ready,
        "background": "true" if background else None,
    }
    return Request("PUT", "functions", name, query=query, content=code, size=size, timeout=LONG)


def remove_function(name: str, version: str | None = None) -> Request[None]:
    """Remove a function, or one numbered version of it that no alias points at."""
    query = {"version": version}
    return Request("DELETE", "functions", name, query=query, timeout=LONG)


def publish_function(
    name: str, *, description: str | None = None, digest: str | None = None
) -> Request[VersionView]:
    """Make a numbered version of `$LATEST`; the newest one when nothing has changed since.

    `digest`: the code that `$LATEST` must have.
    """
    body = {"description": description, "digest": digest}
    return Request("POST", "functions", name, "versions", body=body, timeout=LONG)


def set_alias(
    name: str,
    alias: str,
    versions: Mapping[str, float],
    *,
    description: str | None = None,
    ready: int | None = None,
) -> Request[AliasView]:
    """Point an alias at one version, or at two by weights that add up to 1.

    A version that gets more requests has its instances ready before, within `ready` seconds (60;
    0: it is not waited for); otherwise the alias stays as it was.
    """
    body, query = {"versions": dict(versions), "description": description}, {"ready": ready}
    parts = "functions", name, "aliases", alias
    return Request("PUT", *parts, query=query, body=body, timeout=LONG)


def remove_alias(name: str, alias: str) -> Request[None]:
    """Remove an alias."""
    return Request("DELETE", "functions", name, "aliases", alias, timeout=LONG)


def set_concurrency(name: str, reserved: int | None) -> Request[FunctionView]:
    """Set how many requests of a function may run at once; None: as many as there may be in all."""
    content = json.dumps({"reserved": reserved}).encode()
    return Request("PUT", "functions", name, "concurrency", content=content, timeout=LONG)


def scale_function(
    name: str, *, least: int | None = None, most: int | None = None
) -> Request[FunctionView]:
    """Set how many instances of `$LATEST` are kept ready (0: none), and how many there may be of
    all versions (0: no bound of its own); None leaves a number as it is."""
    body = {"min": least, "max": most}
    return Request("PUT", "functions", name, "scale", body=body, timeout=LONG)


def set_function_network(
    name: str, keys: Mapping[str, object], *, reset: bool = False
) -> Request[FunctionView]:
    """Set keys of a function's network policy: egress, allow, peers, limits.

    All its instances are held to it from one packet to the next. The others stay as they are;
    `reset` forgets them first.
    """
    body = {**keys, "reset": reset}
    return Request("PUT", "functions", name, "network", body=body, timeout=LONG)


def provision_function(name: str, qualifier: str, count: int) -> Request[FunctionView]:
    """Keep so many instances ready for a numbered version, or for an alias."""
    body = {"count": count}
    return Request("PUT", "functions", name, "provisioned", qualifier, body=body, timeout=LONG)


def unprovision_function(name: str, qualifier: str) -> Request[None]:
    """Keep none ready for a version or an alias any more."""
    return Request("DELETE", "functions", name, "provisioned", qualifier, timeout=LONG)


def invoke_function(
    name: str, payload: bytes = b"{}", *, qualifier: str | None = None, tail: bool = False
) -> Request[InvokeView]:
    """Run one request of a function, of JSON, and wait for its answer.

    `qualifier`: a version or an alias, by default `$LATEST`. `tail` asks for the end of the
    function's log in a header, `model.socket.LOG_HEADER`. A function that fails is no error of the
    request: the answer's `error` says so.
    """
    query = {"qualifier": qualifier, "tail": "true" if tail else None}
    return Request("POST", "functions", name, "invoke", query=query, content=payload, timeout=LONG)


def queue_event(
    name: str, payload: bytes = b"{}", *, qualifier: str | None = None
) -> Request[Accepted]:
    """Have a request of a function run later, at least once; it is not lost once this answers."""
    query = {"qualifier": qualifier, "event": "true"}
    return Request("POST", "functions", name, "invoke", query=query, content=payload)


def function_logs(name: str, lines: int | None = None, follow: bool = False) -> Stream[bytes]:
    """The end of what a function printed; with `follow` then new output as it comes."""
    query = {"lines": lines, "follow": "true" if follow else None}
    timeout = None if follow else SOON
    return Stream("GET", "functions", name, "logs", query=query, timeout=timeout)


def function_events(name: str) -> Request[list[EventView]]:
    """Asynchronous events of a function that are not done, oldest first."""
    return Request("GET", "functions", name, "events")


def retry_event(name: str, event: str) -> Request[Accepted]:
    """Have the event of a dead letter run once more, under the id that is returned."""
    return Request("POST", "functions", name, "events", event, "retry")


def purge_events(name: str) -> Request[None]:
    """Forget the dead letters of a function; what waits or runs stays."""
    return Request("DELETE", "functions", name, "events")


# Code


def list_code() -> Request[list[CodeRow]]:
    """The code on this node, used last first."""
    return Request("GET", "code")


def prefetch_code(digest: str) -> Request[CodeRow]:
    """Have code on this node, verified, ahead of a request."""
    return Request("POST", "code", digest, "prefetch", timeout=LONG)


def verify_code() -> Request[list[CodeCheck]]:
    """Read all code on this node again; what is damaged is fetched again, or is gone."""
    return Request("POST", "code", "verify", timeout=LONG)


def collect_code() -> Request[CodeFreed]:
    """Remove the code on this node that no version of a function needs."""
    return Request("POST", "code", "gc", timeout=LONG)


# Operations


def show_operation(operation: str) -> Request[Operation]:
    """Long work, such as a build, by its id."""
    return Request("GET", "operations", operation)


def operation_events(operation: str) -> Stream[OperationEvent]:
    """All events of long work, from its beginning to its end."""
    end = End(
        key="type",
        value="end",
        message="the daemon ended before the work did",
        hint="journalctl -u templated may say why",
    )
    return Stream("GET", "operations", operation, "events", timeout=None, end=end)


def _flag(value: bool) -> str:
    return "true" if value else "false"
