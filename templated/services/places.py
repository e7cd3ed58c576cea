"""Where everything of one daemon lies. The only module that joins paths of state."""

from __future__ import annotations

import os
from pathlib import Path

from templated.drivers.hypervisor.base import Places
from templated.drivers.image.store import image_disk
from templated.errors import ConfigError, HostError
from templated.model.config import Config

# sockaddr_un(7): sun_path holds 108 bytes with the final NUL.
SUN_PATH = 107
"""Bytes that the path of a socket may have."""
_SLOT_SOCKET = len("/vm/0123456789/agent")


class Layout:
    """Directories below state_dir, runtime_dir and shm_dir."""

    def __init__(self, config: Config) -> None:
        self.state = Path(config.state_dir)
        self.runtime = Path(config.runtime_dir)
        self.shm = Path(config.shm_dir)
        self.journal = self.state / "journal.sqlite"
        self.slots = self.state / "slots"
        self.generations = self.state / "generations"
        self.sockets = self.runtime / "vm"
        self.audit = self.state / "audit.jsonl"
        self.code = self.state / "code"
        self.function_logs = self.state / "functions"
        self.incoming = self.code / "incoming"
        self.scaling = self.state / "scaling.learned"
        self.egress = self.runtime / "egress"
        self.lock = self.state / "lock"
        # What libvirt's QEMU is lent. No template's name begins with a dot.
        self.lent = self.state / "libvirt"
        self.lent_memory = self.shm / ".libvirt"
        self.kvm_proof = self.state / "kvm-proof.json"

    def create(self) -> None:
        """Make the directories, for their owner only; ConfigError or HostError in one line."""
        if len(str(self.runtime)) + _SLOT_SOCKET > SUN_PATH:
            raise ConfigError(
                f"runtime_dir is too long for the sockets in it: {self.runtime}",
                hint=f"take a path of at most {SUN_PATH - _SLOT_SOCKET} characters",
            )
        for directory in (self.state, self.runtime, self.shm, *self._inner()):
            try:
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                owner = directory.stat().st_uid
            except OSError as error:
                raise HostError(
                    f"cannot use {directory}: {error.strerror}",
                    hint="run as root, or set state_dir, runtime_dir and shm_dir to places "
                    "that this user may write",
                ) from error
            if owner != os.geteuid():
                raise HostError(
                    f"{directory} belongs to another user (uid {owner})",
                    hint="remove it, or choose another place in the configuration",
                )

    def _inner(self) -> tuple[Path, ...]:
        return (
            self.slots,
            self.generations,
            self.sockets,
            self.code,
            self.function_logs,
            self.egress,
        )

    def vm(self, slot_id: str) -> Places:
        """Where one VM's logs, disk layer 3 and sockets are."""
        return Places(directory=self.slots / slot_id, sockets=self.sockets / slot_id)

    def overlay(self, slot_id: str) -> Path:
        """Disk layer 3."""
        return self.slots / slot_id / "disk.qcow2"

    @property
    def placeholder(self) -> Path:
        """The code image of a VM that has no function's code."""
        return self.code / "placeholder.img"

    def image_disk(self, digest: str) -> Path:
        """Disk layer 1."""
        return image_disk(self.state, digest)

    def imported(self, template: str) -> Path:
        """The copy of a domain's disk that `template import --copy` makes."""
        return self.state / "imported" / f"{template}.qcow2"

    def image_overlay(self, digest: str) -> Path:
        """An empty layer over an image, for cold boots."""
        return self.state / "overlays" / f"{digest}.qcow2"

    def remove_partial_overlays(self) -> None:
        """Remove the incomplete layers that a killed daemon left."""
        for partial in (self.state / "overlays").glob("*.part"):
            partial.unlink(missing_ok=True)

    def generation(self, template: str, generation: str) -> Path:
        """Disk layer 2 and the manifest."""
        return self.generations / template / generation

    def frozen(self, template: str, generation: str) -> Path:
        """Memory and device state."""
        return self.shm / template / generation
