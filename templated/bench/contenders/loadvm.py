"""`qemu -loadvm`: an internal snapshot in the qcow2 file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from templated.bench.contenders.base import Once, load_frozen, shared_memory, without_defer
from templated.bench.floor import stage
from templated.bench.session import Session
from templated.drivers.disk import copy_overlay
from templated.drivers.hypervisor.qemu.features import features
from templated.errors import HypervisorError

_NAME = "frozen"


@dataclass(frozen=True)
class LoadVm:
    """Disk and memory in one qcow2 file; each start has a copy of it, made beforehand."""

    session: Session
    name: str = "loadvm"
    about: str = "QEMU with -loadvm of an internal snapshot; no daemon"

    @contextmanager
    def opened(self) -> Iterator[Once]:
        with (
            stage(self.session.generation()) as places,
            shared_memory(places.generation) as shm,
        ):
            disk, snapshot = Path(shm) / "disk.qcow2", Path(shm) / "snapshot.qcow2"
            places.overlay.symlink_to(disk)
            copy_overlay(places.generation.layer.empty, disk)
            with places.spawned(places.generation.memory) as vm:
                load_frozen(places, vm)
                if features(places.generation.manifest.qemu.version).set_active:
                    vm.qmp.command("blockdev-set-active", {"active": True})
                said = vm.qmp.command("human-monitor-command", {"command-line": f"savevm {_NAME}"})
                if said.strip():
                    raise HypervisorError(f"savevm: {said.strip()}")
                vm.quit()
            disk.rename(snapshot)
            edit = partial(without_defer, instead=("-loadvm", _NAME))

            def once() -> dict[str, float]:
                shutil.copyfile(snapshot, disk)
                with places.spawned(None, edit) as vm:
                    # It runs as soon as it is loaded, so there is nothing to resume.
                    vm.connect()
                    vm.watch.mark("restore")
                    vm.identify()
                    vm.watch.mark("identify")
                    vm.link()
                    vm.watch.mark("link")
                return vm.watch.row()

            yield once
