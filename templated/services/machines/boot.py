"""What a VM boots when nothing is restored into it: the base VM of a template, and cold clones."""

from __future__ import annotations

import secrets
from pathlib import Path

from templated.drivers import disk
from templated.drivers.hypervisor.base import Kernel
from templated.drivers.hypervisor.qemu.tsc import tsc_khz
from templated.drivers.image.store import Image
from templated.model.spec import TemplateSpec
from templated.services.places import Layout

# tsc=reliable: with nothing to check the TSC against, the kernel would otherwise never leave the
# periodic tick (250 Hz), which is most of what an idle guest costs.
KERNEL_CMDLINE = "console=ttyS0 quiet loglevel=4 reboot=t panic=-1 ipv6.disable=1 tsc=reliable"


def boot_kernel(image: Image, spec: TemplateSpec, accel: str) -> Kernel:
    """What a full boot of this template starts."""
    frequency = tsc_khz() if accel == "tcg" else None
    known = f"tsc_early_khz={frequency}" if frequency else ""
    cmdline = " ".join(f"{KERNEL_CMDLINE} {known} {spec.machine.cmdline}".split())
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
        partial.rename(path)
    return path
