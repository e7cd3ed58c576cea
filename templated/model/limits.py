"""What one VM may take of its host, in the units of the kernel."""

from __future__ import annotations

from dataclasses import dataclass

from templated.model.spec import TemplateSpec
from templated.model.units import size_bytes


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

    @classmethod
    def of(cls, spec: TemplateSpec) -> Limits:
        """Those of a template."""
        given = spec.limits
        return cls(
            memory=_bytes(given.memory),
            pids=given.pids,
            cpus=given.cpus,
            cpu_weight=given.cpu_weight,
            disk_read=_bytes(given.disk_read),
            disk_write=_bytes(given.disk_write),
        )

    def __bool__(self) -> bool:
        return self != UNLIMITED


UNLIMITED = Limits()


def _bytes(size: str | None) -> int | None:
    return None if size is None else size_bytes(size)
