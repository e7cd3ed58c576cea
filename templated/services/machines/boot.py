"""Full boots, in which nothing is restored: the base VM of a template, and cold clones."""

from __future__ import annotations

import secrets
from pathlib import Path

from templated import failpoints
from templated.drivers import disk
from templated.drivers.hypervisor.base import Hypervisor, Kernel
from templated.drivers.image.store import Image
from templated.errors import HostError
from templated.model.spec import TemplateSpec
from templated.services.places import Layout

KERNEL_CMDLINE = "console=ttyS0 quiet loglevel=4 reboot=t panic=-1 ipv6.disable=1"


def boot_kernel(hypervisor: Hypervisor, image: Image, spec: TemplateSpec, accel: str) -> Kernel:
    """The kernel that a full boot of this template starts."""
    parts = KERNEL_CMDLINE, hypervisor.kernel_arguments(accel), spec.machine.cmdline
    cmdline = " ".join(part for part in parts if part)
    return Kernel(image.kernel, image.initrd, cmdline)


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
