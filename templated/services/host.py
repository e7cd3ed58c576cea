"""Which accelerator the VMs of this daemon get."""

from __future__ import annotations

import logging
from pathlib import Path

from templated.drivers.hypervisor.base import Hypervisor
from templated.drivers.image.store import Image, ImageStore
from templated.errors import HostError
from templated.model.config import Config
from templated.model.generation import Manifest

log = logging.getLogger(__name__)


class Host:
    """The configuration's wish for an accelerator, and what the host really has."""

    def __init__(self, config: Config, hypervisor: Hypervisor) -> None:
        self._wanted = config.accel
        self._hypervisor = hypervisor
        self._images = ImageStore(Path(config.state_dir))

    async def accelerator(self, image: Image) -> str:
        """`kvm` or `tcg`, as configured; `auto` takes KVM only when a guest runs under it.

        The proof runs once and is remembered. An image that boots itself cannot give it: then
        another one does, which is made for it when there is none. Raises HostError when KVM is
        demanded and not there, BuildError when that image cannot be made.
        """
        if self._wanted == "tcg":
            return "tcg"
        problem = self._hypervisor.kvm_problem()
        if self._wanted == "kvm":
            if problem:
                raise HostError(
                    f"accel is kvm, but {problem}",
                    hint="load the module, or set accel: auto",
                )
            return "kvm"
        if problem:
            proven = self._hypervisor.remembered_proof()
            if proven is not None and proven.works:
                log.warning("guests ran under KVM here, but now %s: VMs get TCG", problem)
            return "tcg"
        kernel, initrd = await self._images.kernel_for(image)
        proof = await self._hypervisor.prove_kvm(kernel, initrd)
        return "kvm" if proof.works else "tcg"

    async def check(self, generation: str, manifest: Manifest) -> None:
        """Raises HostError unless VMs of a generation run here as they were frozen."""
        present = await self._hypervisor.version()
        problem = ""
        if present.version != manifest.qemu.version:
            problem = f"by QEMU {manifest.qemu.version}, this host has {present.version}"
        elif self._wanted not in ("auto", manifest.accel):
            problem = f"under {manifest.accel}, and accel is {self._wanted}"
        elif manifest.accel == "kvm" and (missing := self._hypervisor.kvm_problem()):
            problem = f"under kvm, and {missing}"
        if problem:
            raise HostError(
                f"generation {generation} of {manifest.template} was frozen {problem}",
                hint=f"run: templated template build {manifest.template}",
            )

    def known_accelerator(self) -> str:
        """What is known without running anything, for display."""
        if self._wanted != "auto":
            return self._wanted
        proof = self._hypervisor.remembered_proof()
        if self._hypervisor.kvm_problem() or (proof is not None and not proof.works):
            return "tcg"
        return "kvm" if proof is not None else "auto (not proven yet)"
