"""The API, called as its own OpenAPI document says and as it does not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import schemathesis
from aiohttp import web
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from templated.api.routes import ROUTES
from templated.api.server import make_app
from templated.drivers.hypervisor.fake import FakeHypervisor
from templated.errors import HostError
from templated.model.api import CloneRequest, ErrorBody
from templated.services.daemon import Services
from templated.services.templates.catalog import Templates
from tests.fuzz import SECONDS
from tests.fuzz.cases import fuzz
from tests.unit.fake_daemon import play

_TIMEOUT = 30.0
_CHECKS = [content_type_conformance, response_schema_conformance, status_code_conformance]
_STREAMS = {route.handler.__name__: route.answer for route in ROUTES if "ndjson" in route.stream}
# The fake guest runs no commands, and has no files.
_INSIDE = ("exec_in_clone", "get_file", "put_file")


@contextmanager
def _served(tmp_path: Path) -> Iterator[str]:
    """A daemon with one clone, in a thread, on a loopback port; gives its address."""
    ready, ended = threading.Event(), threading.Event()
    address: list[str] = []

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await running.clones.create(CloneRequest(name="c"))
        runner = web.AppRunner(make_app(running), access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            address.append("http://127.0.0.1:{1}".format(*runner.addresses[0]))
            ready.set()
            while not ended.is_set():
                await asyncio.sleep(0.02)
        finally:
            await runner.cleanup()

    thread = threading.Thread(
        target=play, args=(tmp_path, scenario), kwargs={"within": SECONDS + 80}
    )
    thread.start()
    try:
        assert ready.wait(_TIMEOUT)
        yield address[0]
    finally:
        ended.set()
        thread.join()


def _lines(operation: str, content: bytes) -> None:
    """Each line of a stream is what the document says of it."""
    for line in content.splitlines():
        msgspec.json.decode(line, type=_STREAMS[operation])


def _check(case: schemathesis.Case[Any]) -> None:
    operation = case.operation.definition.raw["operationId"]
    if isinstance(case.query, dict):
        case.query.pop("follow", None)  # it would not end
    response = case.call(timeout=_TIMEOUT)
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
    for name in case.path_parameters or {}:
        if not inside and draw(st.booleans()):
            case.path_parameters[name] = draw(st.sampled_from(["c", "t", "d"]))
    return case


def test_every_answer_is_as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def build(*_: object) -> dict[str, Any]:
        raise HostError("nothing is built here", hint="")

    monkeypatch.setattr(Templates, "build", build)
    with _served(tmp_path) as address:
        schema = schemathesis.openapi.from_url(f"{address}/v1/openapi.json")
        fuzz("API", _cases(schema), _check)
