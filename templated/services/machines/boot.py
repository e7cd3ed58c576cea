"""Full boots, in which nothing is restored: the base VM of a template, and cold clones."""

from __future__ import annotations

import secrets
from pathlib import Path

from templated import failpoints
from templated.drivers import disk
from templated.drivers.hypervisor.base import Hypervisor, Kernel, OwnLoader
from templated.drivers.image.store import Image
from templated.errors import HostError
from templated.model.spec import TemplateSpec
from templated.services.machines.generation import guest_parts
from templated.services.machines.slots import GuestParts
from templated.services.places import Layout

KERNEL_CMDLINE = "console=ttyS0 quiet loglevel=4 reboot=t panic=-1 ipv6.disable=1"


def full_boot(
    hypervisor: Hypervisor, image: Image, spec: TemplateSpec, accel: str
) -> Kernel | OwnLoader:
    """What a full boot of this template starts."""
    if image.kernel is None or image.initrd is None:
        return OwnLoader()
    parts = KERNEL_CMDLINE, hypervisor.kernel_arguments(accel), spec.machine.cmdline
    cmdline = " ".join(part for part in parts if part)
    return Kernel(image.kernel, image.initrd, cmdline)


def image_parts(hypervisor: Hypervisor, image: Image, spec: TemplateSpec) -> GuestParts:
    """What a VM that boots from the image has beside its disk.

    Raises HostError when this host has no UEFI.
    """
    uefi = spec.machine.firmware == "uefi"
    return guest_parts(spec, image.disk, hypervisor.uefi_variables() if uefi else Path())


async def image_overlay(layout: Layout, image: Image) -> Path:
    """An empty layer over the image, made once per image.

    Raises HostError; leaves no layer then.
    """
    path = layout.image_overlay(image.digest)
    if not path.exists():
        path.parent.mkdir(mode=0o700, exist_ok=True)
        partial = path.with_suffix(f".{secrets.token_hex(4)}.part")
        await disk.create_overlay(partial, image.disk)
        try:
            if failpoints.armed:
                failpoints.hit("cold.rename")
            partial.rename(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise HostError(f"cannot write {path}: {error.strerror or error}") from error
    return path
