"""The host's end of functions, against guests that misbehave."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from templated.drivers.guest import Agent, ExecResult, Output
from templated.drivers.guest_functions import Answer, InitFailed, InvokeOrder, LoadOrder
from templated.errors import GuestError, TemplatedError
from templated.model.function import MAX_PAYLOAD, Runtime
from tests.unit.test_guest import Peer, scenario

ORDER = LoadOrder(uuid="0" * 32, runtime=Runtime.PYTHON, handler="a.b", init_timeout=1.0)
INVOKE = InvokeOrder(request="r", arn="a", deadline_ms=1, payload=b"{}")


def saying(messages: Sequence[dict[str, Any]]) -> Peer:
    """A peer that answers every request with these, under the request's id."""

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            number = json.loads(line)["id"]
            for message in messages:
                writer.write(json.dumps({"id": number, **message}).encode() + b"\n")

    return peer


def part(data: bytes) -> dict[str, Any]:
    """A part of a payload."""
    return {"stream": "payload", "data": base64.b64encode(data).decode()}


def good(**result: Any) -> dict[str, Any]:
    """A good reply."""
    return {"ok": True, "result": result}


def invoked(path: Path, *messages: dict[str, Any]) -> Answer | TemplatedError:
    """What becomes of an invoke that is answered like this."""
    answers: list[Answer | TemplatedError] = []

    async def body(agent: Agent) -> None:
        try:
            answers.append(await agent.invoke(INVOKE, 5.0))
        except TemplatedError as error:
            answers.append(error)

    scenario(path, saying(messages), body)
    return answers[0]


@pytest.mark.parametrize(
    "result",
    [
        {"payload": 1},
        {"payload": "x", "error": "Other"},
        {"payload": "x", "ended": "\x1b[2J"},
        {"payload": "x", "ended": "x" * 61},
        {"payload": "x", "ended": None},
        {"payload": "x", "begun": "no"},
        {"payload": "*", "base64": True},
        {"size": 5},
        {"size": -1},
        {"size": MAX_PAYLOAD + 1},
    ],
)
def test_an_answer_that_is_none_is_refused(tmp_path: Path, result: dict[str, Any]) -> None:
    error = invoked(tmp_path, good(**result))
    assert isinstance(error, GuestError) and "nonsense" in error.message


def test_an_answer_in_parts(tmp_path: Path) -> None:
    answer = invoked(tmp_path, part(b"ab"), part(b"\xffc"), good(size=4, error="Unhandled"))
    assert answer == Answer(payload=b"ab\xffc", error="Unhandled")


def test_an_answer_of_too_many_parts_is_refused(tmp_path: Path) -> None:
    error = invoked(tmp_path, *[part(b"x" * (1 << 19))] * 13, good(size=13 << 19))
    assert isinstance(error, GuestError) and "more than 6 MiB" in error.message


def test_parts_that_nobody_asked_for_are_refused(tmp_path: Path) -> None:
    """They must not reach a client of exec, either."""

    async def body(agent: Agent) -> None:
        got: list[Output | ExecResult] = []

        async def collect() -> None:
            async for output in agent.exec(["true"], timeout=1.0):
                got.append(output)

        with pytest.raises(GuestError, match="nobody asked for"):
            await collect()
        assert not got

    scenario(tmp_path, saying([part(b"x"), good(exit_code=0)]), body)


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        ('{"errorType": "A", "errorMessage": "b\\u001b"}', "did not start: A: b "),
        ("no json", "did not start: no json"),
        ('{"errorType": 3}', 'did not start: {"errorType": 3}'),
        ("[" * 9999, "did not start: [[["),
        ("", "no reason given"),
    ],
)
def test_an_init_that_failed_has_one_line_for_people(
    tmp_path: Path, payload: str, words: str
) -> None:
    async def body(agent: Agent) -> None:
        with pytest.raises(InitFailed) as caught:
            await agent.load(ORDER, 5.0)
        assert words in caught.value.message and len(caught.value.message) < 400
        assert caught.value.payload == payload.encode()

    scenario(tmp_path, saying([good(failed=True, payload=payload)]), body)


@pytest.mark.parametrize("result", [{"mount_ms": "1"}, {"init_ms": -1}, {"mount_ms": 1e300}])
def test_a_load_with_nonsense_is_refused(tmp_path: Path, result: dict[str, Any]) -> None:
    async def body(agent: Agent) -> None:
        with pytest.raises(GuestError, match="nonsense"):
            await agent.load(ORDER, 5.0)

    scenario(tmp_path, saying([good(**result)]), body)
