"""The types of answers: an answer is read as the type that its function in `requests` returns.

Imports msgspec and the model, and so only for who wants types.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, get_args, get_type_hints

import msgspec

from templated.client.failures import nonsense
from templated.client.requests import Request
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
_MODEL = {
    kind.__name__: kind
    for kind in (
        Accepted,
        AliasView,
        AuditEntry,
        CloneView,
        CodeCheck,
        CodeFreed,
        CodeRow,
        EgressView,
        Event,
        EventView,
        ExecFrame,
        FunctionView,
        ImageView,
        Info,
        InvokeView,
        Operation,
        OperationEvent,
        PolicyView,
        PoolView,
        ScaleDetail,
        ScaleView,
        TemplateView,
        TraceView,
        VersionView,
    )
}


@functools.cache
def answer_type(make: Callable[..., Request[Any]]) -> Any:
    """The T of the Request[T] or Stream[T] that `make` returns."""
    (kind,) = get_args(get_type_hints(make, localns=_MODEL)["return"])
    return kind


def reader(make: Callable[..., Request[T]]) -> Callable[[bytes], T]:
    """A function that turns the body of an answer, or one line of it, into its type.

    Raises RemoteError with the code `internal` for a body that is none of that type.
    """
    return _reader(answer_type(make))


@functools.cache
def _reader(kind: Any) -> Callable[[bytes], Any]:
    if kind is type(None):
        return lambda body: None
    if kind is bytes:
        return bytes
    if kind is str:
        return lambda body: body.decode(errors="replace")
    decoder = msgspec.json.Decoder(kind)

    def decode(body: bytes) -> Any:
        try:
            return decoder.decode(body)
        except msgspec.ValidationError as error:
            raise nonsense(f"of another version: {error}") from None
        except msgspec.DecodeError as error:
            raise nonsense(f"not JSON: {error}") from None

    return decode
