"""The template recipe of Kata Containers' runtime, without the rest of Kata.

From `bootFromTemplate` and `waitMigration` in src/runtime/virtcontainers/qemu.go: QMP is
connected to twice, once to see that QEMU is up and once to work; x-ignore-shared is set;
`migrate-incoming` with `exec:cat`; then query-migrate, every 100 ms until it is completed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from templated.bench.bare import BOUND, Bare
from templated.bench.contenders.base import Once, fresh_overlay
from templated.bench.floor import stage, wake
from templated.bench.session import Session
from templated.errors import Timeout
from templated.services.machines.generation import STATE

_PAUSE = 0.1


@dataclass(frozen=True)
class Kata:
    """The same QEMU, state and agent as the floor; only the steps are Kata's."""

    session: Session
    name: str = "kata-recipe"
    about: str = "Kata's steps to a VM from a template, polling query-migrate; no daemon"

    @contextmanager
    def opened(self) -> Iterator[Once]:
        with stage(self.session.generation()) as places:
            state = places.generation.frozen / STATE

            def once() -> dict[str, float]:
                fresh_overlay(places)
                with places.spawned(places.generation.memory) as vm:
                    vm.connect()
                    vm.watch.mark("spawn")
                    vm.reconnect()
                    vm.ignore_shared()
                    vm.qmp.command("migrate-incoming", {"uri": f"exec:cat {state}"})
                    _poll(vm)
                    vm.watch.mark("restore")
                    wake(vm)
                return vm.watch.row()

            yield once


def _poll(vm: Bare) -> None:
    deadline = time.monotonic() + BOUND
    while vm.qmp.command("query-migrate").get("status") != "completed":
        if time.monotonic() > deadline:
            raise Timeout(f"the state was not loaded within {BOUND:g} s")
        time.sleep(_PAUSE)
