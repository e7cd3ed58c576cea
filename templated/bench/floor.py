"""The floor: the cost of one start with nothing of this project around it.

A bare loop with blocking sockets: spawn QEMU with a clone's command line, restore the same state
over QMP, ask the same agent to identify, plug the link. No journal, no API, no overlay to make
(one is made before the clock starts), no event loop. What the daemon needs beyond this is ours.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from templated.bench.bare import Bare, Stage
from templated.drivers.disk import copy_overlay
from templated.drivers.hypervisor.process import use_small_pages
from templated.model.api import Info
from templated.services.machines.generation import STATE, Generation


@dataclass(frozen=True)
class Floor:
    """A loop over one generation."""

    stage: Stage

    def once(self, after: Callable[[Bare], None] | None = None) -> dict[str, float]:
        """One start; milliseconds per phase, and `total`. `after` takes over at the restore."""
        generation = self.stage.generation
        copy_overlay(generation.layer.empty, self.stage.overlay)
        with self.stage.spawned(generation.memory) as vm:
            vm.connect()
            vm.watch.mark("spawn")
            vm.restore(generation.frozen / STATE)
            vm.watch.mark("restore")
            if after is None:
                wake(vm)
            else:
                vm.qmp.command("cont")
                after(vm)
        return vm.watch.row()


def wake(vm: Bare) -> None:
    """The phases that follow the restore: resume, identify, link."""
    vm.qmp.command("cont")
    vm.watch.mark("resume")
    vm.identify()
    vm.watch.mark("identify")
    vm.link()
    vm.watch.mark("link")


@contextmanager
def stage(
    generation: Generation, transport: str = "exec", *, confined: bool = True
) -> Iterator[Stage]:
    """A stage on temporary places, which are removed at the end."""
    use_small_pages()  # as the daemon's QEMUs do
    directory = Path(tempfile.mkdtemp(prefix="templated-bench-"))
    try:
        yield Stage(generation, generation.manifest.qemu.path, directory, transport, confined)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def floor(generation: Generation, daemon: Info) -> Iterator[Floor]:
    """A floor that starts QEMU as the daemon does, on places that are removed at the end."""
    with stage(generation, daemon.transport, confined=daemon.confine) as places:
        yield Floor(places)
