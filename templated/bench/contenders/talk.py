"""The talk's literal form: the whole memory through `-incoming "exec:cat FILE"`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from templated.bench.bare import Bare
from templated.bench.contenders.base import (
    Once,
    fresh_overlay,
    load_frozen,
    shared_memory,
    without_defer,
)
from templated.bench.floor import stage, wake
from templated.bench.session import Session


@dataclass(frozen=True)
class FullStream:
    """Memory and device state in one file in shared memory, read by `cat`."""

    session: Session
    name: str = "incoming-cat"
    about: str = 'QEMU with -incoming "exec:cat FILE", all memory in FILE; no daemon'

    @contextmanager
    def opened(self) -> Iterator[Once]:
        with (
            stage(self.session.generation()) as places,
            shared_memory(places.generation) as shm,
        ):
            saved = Path(shm) / "vm_template"
            fresh_overlay(places)
            with places.spawned(places.generation.memory) as vm:
                load_frozen(places, vm)
                vm.qmp.command("migrate", {"uri": f"exec:exec cat > {saved}"})
                vm.migrated()
            edit = partial(without_defer, instead=("-incoming", f"exec:cat {saved}"))

            def once() -> dict[str, float]:
                fresh_overlay(places)
                with places.spawned(None, edit) as vm:
                    vm.connect()
                    vm.watch.mark("spawn")
                    _loaded(vm)
                    vm.watch.mark("restore")
                    wake(vm)
                return vm.watch.row()

            yield once


def _loaded(vm: Bare) -> None:
    """Wait for the end of the stream, which may have come before QMP could report it."""
    if vm.qmp.command("query-migrate").get("status") != "completed":
        vm.migrated()
