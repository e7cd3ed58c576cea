"""Payloads of requests and answers: JSON of a bounded size; failures as Lambda words them."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import msgspec

from templated.errors import InvalidRequest
from templated.model.function import MAX_PAYLOAD

_RAW = msgspec.json.Decoder(msgspec.Raw)
# Bytes that are looked through in less than a millisecond.
_SMALL = 256 << 10


async def checked(payload: bytes) -> bytes:
    """A request's payload; an empty one is `{}`. Raises InvalidRequest."""
    if len(payload) > MAX_PAYLOAD:
        raise InvalidRequest(
            f"the payload has {len(payload)} bytes, at most {MAX_PAYLOAD} are allowed",
            hint="hand over large data by a place where the function finds it",
        )
    problem = await _problem(payload) if payload else ""
    if problem:
        raise InvalidRequest(
            f"the payload is not JSON: {problem}", hint="""as in: --payload '{"key": "value"}'"""
        )
    return payload or b"{}"


async def answered(payload: bytes) -> tuple[bytes, bytes | None]:
    """An answer's payload, and None; or a failure's payload, when the answer cannot be one."""
    if len(payload) > MAX_PAYLOAD:
        failed = failure(
            "Function.ResponseSizeTooLarge",
            f"Response payload size exceeded maximum allowed payload size ({MAX_PAYLOAD} bytes).",
        )
        return b"null", failed
    problem = await _problem(payload) if payload else ""
    if problem:
        return b"null", failure("Runtime.MarshalError", f"The answer is not JSON: {problem}")
    return payload or b"null", None


async def _problem(payload: bytes) -> str:
    """Why this is not JSON; empty when it is."""
    if len(payload) <= _SMALL:
        return _problem_of(payload)
    return await asyncio.to_thread(_problem_of, payload)


def _problem_of(payload: bytes) -> str:
    try:
        _RAW.decode(payload)
        if not payload.isascii():
            payload.decode()
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return str(error)
    except RecursionError:
        return "it is nested too deeply"
    return ""


def failure(kind: str, message: str) -> bytes:
    """The payload of a failure."""
    return msgspec.json.encode({"errorType": kind, "errorMessage": message})


def timed_out(request: str, timeout: float) -> bytes:
    """The payload of a request whose handler took too long."""
    return failure("Sandbox.Timedout", timeout_line(request, timeout))


def timeout_line(request: str, timeout: float) -> str:
    """What the log and the caller are told of it."""
    present = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return f"{present} {request} Task timed out after {timeout:.2f} seconds"


def exited(request: str, how: str) -> bytes:
    """The payload of a request whose runtime ended in the middle: `exit status 1`."""
    if how in ("", "exit status 0"):
        what = "Runtime exited without providing a reason"
    else:
        what = f"Runtime exited with error: {how}"
    return failure("Runtime.ExitError", f"RequestId: {request} Error: {what}")
