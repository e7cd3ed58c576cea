"""The API, called as its own OpenAPI document says and as it does not."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import requests
import schemathesis
from hypothesis import strategies as st
from requests.adapters import HTTPAdapter
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool

from templated.api import server
from templated.api.routes import ROUTES
from templated.drivers.hypervisor.fake import FakeHypervisor
from templated.errors import HostError, InvalidRequest
from templated.model.api import CloneRequest, ErrorBody
from templated.model.names import check_clone_name
from templated.services.daemon import Services
from templated.services.templates.catalog import Templates
from tests.fuzz import SECONDS
from tests.fuzz.cases import fuzz
from tests.unit.fake_daemon import play
from tests.unit.fake_functions import with_functions

_TIMEOUT = 30.0
_CHECKS = [content_type_conformance, response_schema_conformance, status_code_conformance]
_STREAMS = {route.handler.__name__: route.answer for route in ROUTES if "ndjson" in route.stream}
# The fake guest runs no commands and has no files, and would be waited for. A name of a case may be
# drawn again, and be a clone's by then: these have none that a clone can have but this one.
_INSIDE = ("exec_in_clone", "get_file", "put_file")
_ABSENT = "no-case-creates-this"
_SETTINGS = ['{"handler":"a.b"}', '{"handler":"a.b","env":{"A":"x"},"timeout":"1m"}', "{}"]


@contextmanager
def _served(tmp_path: Path) -> Iterator[str]:
    """A daemon with one clone, in a thread; gives its socket."""
    ready, ended = threading.Event(), threading.Event()
    place: list[str] = []

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await running.clones.create(CloneRequest(name="c"))
        running = await with_functions(running)
        config = running.context.config
        async with server.listeners(config, running):
            place.append(config.socket)
            ready.set()
            while not ended.is_set():
                await asyncio.sleep(0.02)

    thread = threading.Thread(
        target=play, args=(tmp_path, scenario), kwargs={"within": SECONDS + 80}
    )
    thread.start()
    try:
        assert ready.wait(_TIMEOUT)
        yield place[0]
    finally:
        ended.set()
        thread.join()


class _Socket(HTTPAdapter):
    """Sends all requests to a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__()

        class Connection(HTTPConnection):
            def _new_conn(self) -> socket.socket:
                one = socket.socket(socket.AF_UNIX)
                one.settimeout(_TIMEOUT)
                one.connect(path)
                return one

        self._pool = HTTPConnectionPool("templated", maxsize=1)
        self._pool.ConnectionCls = Connection

    def get_connection_with_tls_context(self, *_: object, **__: object) -> HTTPConnectionPool:
        return self._pool

    def close(self) -> None:
        self._pool.close()
        super().close()


def _lines(operation: str, content: bytes) -> None:
    """Each line of a stream is what the document says of it."""
    for line in content.splitlines():
        msgspec.json.decode(line, type=_STREAMS[operation])


def _check(session: requests.Session, case: schemathesis.Case[Any]) -> None:
    operation = case.operation.definition.raw["operationId"]
    if isinstance(case.query, dict):
        case.query.pop("follow", None)  # it would not end
    response = case.call(base_url="http://templated", session=session, timeout=_TIMEOUT)
    if response.status_code >= 400:
        error = msgspec.json.decode(response.content, type=ErrorBody).error
        assert error.code != "internal", error
        assert (
            error.message
            and error.message.isprintable()
            and error.hint.isprintable() | (not error.hint)
        )
    elif operation in _STREAMS:
        _lines(operation, response.content)
        return
    case.validate_response(response, checks=_CHECKS)


def _is_clone_name(text: str) -> bool:
    try:
        return bool(check_clone_name(text))
    except InvalidRequest:
        return False


@st.composite
def _cases(draw: st.DrawFn, schema: Any) -> schemathesis.Case[Any]:
    operations = [result.ok() for result in schema.get_all_operations()]
    operation = draw(st.sampled_from(operations))
    mode = draw(
        st.sampled_from(
            [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
        )
    )
    case: schemathesis.Case[Any] = draw(operation.as_strategy(generation_mode=mode))
    inside = operation.definition.raw["operationId"] in _INSIDE
    for name, value in (case.path_parameters or {}).items():
        if inside and _is_clone_name(str(value)):
            case.path_parameters[name] = _ABSENT
        elif not inside and draw(st.booleans()):
            case.path_parameters[name] = draw(st.sampled_from(["c", "t", "d"]))
    if operation.definition.raw["operationId"] == "deploy_function" and draw(st.booleans()):
        case.query = {"settings": draw(st.sampled_from(_SETTINGS))}
    return case


def test_every_answer_is_as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def build(*_: object) -> dict[str, Any]:
        raise HostError("nothing is built here", hint="")

    monkeypatch.setattr(Templates, "build", build)
    with _served(tmp_path) as path, requests.Session() as session:
        session.mount("http://", _Socket(path))
        served = session.get("http://templated/v1/openapi.json", timeout=_TIMEOUT).json()
        schema = schemathesis.openapi.from_dict(served)
        fuzz("API", _cases(schema), lambda case: _check(session, case))
