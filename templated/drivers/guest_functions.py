"""What the host and a function in a guest say to each other, through the agent.

`load` attaches the code and starts the handler, `invoke` gives it one request. Everything that
comes back was made by users' code: it is checked, and bounded, before anybody sees it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from templated.errors import GuestError, InvalidRequest
from templated.guest.agent.wire import PART, WHOLE
from templated.model.function import MAX_PAYLOAD, Runtime

T = TypeVar("T")
_Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
# A word or two: it reaches a terminal, and logs.
_Ended = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9 _-]{0,60}$(?!\n)")]
_LONGEST_CAUSE = 300


class InitFailed(GuestError):
    """A function did not come up: its code said why, or ended.

    `payload` is JSON as Lambda has it: {"errorMessage", "errorType", "stackTrace"}.
    """

    code = "init_failed"

    def __init__(self, message: str, *, payload: bytes, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.payload = payload


@dataclass(frozen=True, kw_only=True)
class LoadOrder:
    """Code to attach, and what to start from it. `init_timeout` is in seconds."""

    uuid: str
    """Of the code's file system, 32 hex digits: the guest proves that it has mounted that one."""
    runtime: Runtime
    handler: str
    env: Mapping[str, str] = field(default_factory=dict)
    """All of the function's variables. The agent adds those that it alone knows."""
    init_timeout: float

    def fields(self) -> dict[str, Any]:
        """The request's own fields."""
        return {
            "uuid": self.uuid.replace("-", ""),
            "runtime": self.runtime.value,
            "handler": self.handler,
            "env": dict(self.env),
            "timeout": self.init_timeout,
        }


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """How long the guest took, in milliseconds: to attach and prove the code, and to start it."""

    mount_ms: float
    init_ms: float

    @classmethod
    def of(cls, raw: msgspec.Raw, parts: bytearray) -> Loaded:
        """Read the agent's reply; InitFailed when the function did not come up."""
        reply = converted(raw, _Loaded)
        if not reply.failed:
            return cls(mount_ms=reply.mount_ms, init_ms=reply.init_ms)
        payload = _payload(reply, parts)
        raise InitFailed(
            f"the function did not start: {_cause(payload)}",
            payload=payload,
            hint="`templated function logs` shows what it printed",
        )


@dataclass(frozen=True, kw_only=True)
class InvokeOrder:
    """One request to a function.

    `time` is for a guest that was stopped: the wall clock now, less the seconds that the guest has
    run since its last mark (the end of its last answer). None leaves its clock alone.
    """

    request: str
    arn: str
    deadline_ms: int
    """When the request's time is over, in milliseconds since 1970."""
    trace: str = ""
    time: float | None = None
    payload: bytes

    def fields(self) -> dict[str, Any]:
        """The request's own fields; a large payload has been sent before, by `parts`."""
        fields: dict[str, Any] = {
            "request": self.request,
            "arn": self.arn,
            "deadline": self.deadline_ms,
            "trace": self.trace,
            "time": self.time,
        }
        if len(self.payload) > WHOLE:
            return {**fields, "size": len(self.payload)}
        try:
            return {**fields, "payload": self.payload.decode()}
        except UnicodeDecodeError as error:
            raise InvalidRequest("the payload is not UTF-8", hint="send JSON") from error

    def parts(self) -> Iterator[dict[str, Any]]:
        """What has to be sent before; nothing for a small payload. Raises InvalidRequest."""
        if len(self.payload) > MAX_PAYLOAD:
            raise InvalidRequest(f"the payload has more than {MAX_PAYLOAD >> 20} MiB")
        if len(self.payload) > WHOLE:
            for offset in range(0, len(self.payload), PART):
                data = base64.b64encode(self.payload[offset : offset + PART]).decode()
                yield {"offset": offset, "data": data}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a function answered."""

    payload: bytes
    error: Literal["Handled", "Unhandled"] | None = None
    """That it failed; the payload then says how."""
    ended: str = ""
    """How its runtime ended meanwhile, such as `exit status 1`: nothing can be sent to it again."""
    begun: bool = True
    """False: the runtime had ended before the request, of which it has seen nothing."""

    @classmethod
    def of(cls, raw: msgspec.Raw, parts: bytearray) -> Answer:
        """Read the agent's reply; GuestError when it is none."""
        reply = converted(raw, _Answered)
        payload = _payload(reply, parts)
        return cls(payload=payload, error=reply.error, ended=reply.ended, begun=reply.begun)


class _Carries(msgspec.Struct, frozen=True, kw_only=True):
    """A reply with a payload: in it, or as `size` bytes that came before it."""

    payload: str = ""
    base64: bool = False
    size: Annotated[int, msgspec.Meta(ge=0, le=MAX_PAYLOAD)] | None = None


class _Loaded(_Carries, frozen=True, kw_only=True):
    mount_ms: _Milliseconds = 0.0
    init_ms: _Milliseconds = 0.0
    failed: bool = False


class _Answered(_Carries, frozen=True, kw_only=True):
    error: Literal["Handled", "Unhandled"] | None = None
    ended: _Ended = ""
    begun: bool = True


class _Failure(msgspec.Struct, frozen=True):
    """What is read of a failure's payload, which anything may have made."""

    errorMessage: str = ""  # noqa: N815
    errorType: str = ""  # noqa: N815


def converted(raw: msgspec.Raw, kind: type[T]) -> T:
    """A reply of the agent as `kind`; GuestError when it is none."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise GuestError(f"the agent answered nonsense: {error}") from error


def keep_part(parts: bytearray, data: bytes) -> None:
    """Add a part of a payload that comes before its reply; GuestError when it becomes too large."""
    if len(parts) + len(data) > MAX_PAYLOAD:
        raise GuestError(f"the function's answer has more than {MAX_PAYLOAD >> 20} MiB")
    parts += data


def _payload(reply: _Carries, parts: bytearray) -> bytes:
    if reply.size is not None:
        if reply.size != len(parts):
            raise GuestError("the agent answered nonsense: a payload that is not whole")
        return bytes(parts)
    if not reply.base64:
        return reply.payload.encode(errors="replace")
    try:
        return base64.b64decode(reply.payload, validate=True)
    except ValueError as error:
        raise GuestError(f"the agent answered nonsense: {error}") from error


def _cause(payload: bytes) -> str:
    """One line of a failure."""
    try:
        failure = msgspec.json.decode(payload, type=_Failure)
    except (msgspec.DecodeError, RecursionError):
        return payload[:_LONGEST_CAUSE].decode(errors="replace") or "no reason given"
    words = [word for word in (failure.errorType, failure.errorMessage) if word]
    return ": ".join(words)[:_LONGEST_CAUSE] or "no reason given"
