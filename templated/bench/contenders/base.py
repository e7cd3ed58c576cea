"""The interface of a contender in `bench compare`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from templated.bench.bare import Bare, Stage
from templated.drivers.disk import copy_overlay
from templated.services.machines.generation import STATE, Generation

Once = Callable[[], dict[str, float]]
"""One start: milliseconds of each phase, and `total`. The VM is gone when it returns."""


class Contender(Protocol):
    """One way to bring up the template's guest until its agent has confirmed a new identity."""

    @property
    def name(self) -> str:
        """Short, for the table."""

    @property
    def about(self) -> str:
        """One line that says what is done in the measured time."""

    def opened(self) -> AbstractContextManager[Once]:
        """Set up all that is not measured; leaving removes it again, also after a failure.

        Raises TemplatedError, with the reason, on a host where it cannot be set up.
        """


def shared_memory(generation: Generation) -> TemporaryDirectory[str]:
    """A directory in shm_dir: every contender restores from there, as the template does."""
    return TemporaryDirectory(prefix="templated-bench-", dir=generation.frozen.parent.parent)


def without_defer(arguments: list[str], instead: tuple[str, ...]) -> list[str]:
    """A clone's command line with `-incoming defer` replaced."""
    at = arguments.index("-incoming")
    return [*arguments[:at], *instead, *arguments[at + 2 :]]


def load_frozen(stage: Stage, vm: Bare) -> None:
    """Put the template's frozen state into a VM that never runs, in order to save it otherwise.

    So each contender on QEMU starts from the same guest at the same instant of its life. The
    host's end of the NIC is taken away, as it is when a template is frozen.
    """
    vm.connect()
    vm.restore(stage.generation.frozen / STATE)
    vm.ignore_shared(False)
    vm.qmp.command("netdev_del", {"id": "net0"})


def fresh_overlay(stage: Stage) -> Path:
    """An empty disk layer 3, as a slot has it before a clone is requested."""
    copy_overlay(stage.generation.layer.empty, stage.overlay)
    return stage.overlay
