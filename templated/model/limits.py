"""What one VM may take of its host, in the units of the kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace

from templated.model.spec import TemplateSpec
from templated.model.units import optional_bytes, size_bytes


@dataclass(frozen=True)
class Limits:
    """The limits of one VM; None: no limit."""

    memory: int | None = None
    """Bytes of the host, for the guest's pages that are not the template's, QEMU and its cache."""
    pids: int | None = None
    """Threads and processes."""
    cpus: float | None = None
    """Seconds of CPU time in each second, once it is up."""
    cpu_weight: int | None = None
    """Its share where VMs compete, once it is up; 100 is everybody's."""
    disk_read: int | None = None
    """Bytes a second, as is `disk_write`."""
    disk_write: int | None = None
    disk: int | None = None
    """The most bytes of its disk layer 3, and of each of its logs."""

    @classmethod
    def of(cls, spec: TemplateSpec) -> Limits:
        """Those of a template."""
        given = spec.limits
        return cls(
            memory=optional_bytes(given.memory),
            pids=given.pids,
            cpus=given.cpus,
            cpu_weight=given.cpu_weight,
            disk_read=optional_bytes(given.disk_read),
            disk_write=optional_bytes(given.disk_write),
            disk=optional_bytes(given.disk) or _whole_disk(size_bytes(spec.image.size)),
        )

    @property
    def controlled(self) -> bool:
        """Whether a control group holds some of them: all but `disk`."""
        return replace(self, disk=None) != UNLIMITED


UNLIMITED = Limits()


def _whole_disk(size: int) -> int:
    """What a layer takes that holds all of a disk: qcow2's tables come on top.

    They need 10 bytes for each cluster of 64 KiB (QEMU, docs/interop/qcow2.txt).
    """
    return size + size // 1024 + (16 << 20)
