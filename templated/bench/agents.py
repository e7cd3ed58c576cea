"""Functions without the daemon: VMs with the code of one, whose agents are asked in a loop.

What a router, a journal, an event loop and HTTP add to that is ours.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from templated.bench.bare import Bare
from templated.bench.floor import stage, wake
from templated.drivers.code.image import uuid_of
from templated.drivers.disk import copy_overlay
from templated.drivers.guest_functions import InvokeOrder, LoadOrder
from templated.errors import GuestError
from templated.model.api import Info
from templated.model.function import Runtime
from templated.services.machines.generation import STATE, Generation

_INIT = 60.0


@contextmanager
def agent(
    generation: Generation, daemon: Info, code: Path, handler: str, payload: bytes
) -> Iterator[Callable[[], None]]:
    """A VM that has loaded a function; the callable gives it one request, and checks the answer.

    Raises GuestError, HypervisorError or Timeout.
    """
    generation = replace(generation, placeholder=code)
    with contextlib.ExitStack() as stack:
        places = stack.enter_context(stage(generation, daemon.transport, confined=daemon.confine))
        copy_overlay(generation.layer.empty, places.overlay)
        vm = stack.enter_context(places.spawned(generation.memory))
        vm.connect()
        vm.restore(generation.frozen / STATE)
        wake(vm)
        load(vm, code, handler)
        yield lambda: invoke(vm, payload)


def load(vm: Bare, code: Path, handler: str) -> dict[str, float]:
    """Have the agent of a VM with that code mount it and start its handler; returns `mount_ms` and
    `init_ms`. Raises GuestError."""
    order = LoadOrder(uuid=_uuid(code), runtime=Runtime.PYTHON, handler=handler, init_timeout=_INIT)
    loaded: dict[str, float] = vm.agent.ask({"cmd": "load", **order.fields()})
    return loaded


def _uuid(code: Path) -> str:
    with code.open("rb") as image:
        return uuid_of(image.fileno())


def invoke(vm: Bare, payload: bytes) -> None:
    """One request, of a handler that returns what it is given. Raises GuestError."""
    order = InvokeOrder(
        request=str(uuid.uuid4()),
        arn="arn:aws:lambda:us-east-1:000000000000:function:bench",
        deadline_ms=int((time.time() + _INIT) * 1000),
        payload=payload,
    )
    answer = vm.agent.ask({"cmd": "invoke", **order.fields()})
    if answer.get("payload", "").encode() != payload:
        raise GuestError(f"the bench's guest answered {answer!r:.200}")
