"""The interface of a hypervisor: services use nothing else of one.

`Hypervisor` starts and finds VMs and knows what runs guests on this host; `Machine` is one VM.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from templated.drivers.hypervisor.states import MachineState
from templated.errors import HostError
from templated.model.generation import QemuVersion
from templated.model.network import Addresses, Attachment
from templated.model.spec import AgentKind


@dataclass(frozen=True)
class Hardware:
    """The virtual hardware of one generation; a clone must get exactly the template's."""

    type: str
    memory_bytes: int
    vcpus: int
    accel: str
    cpu: str
    version: str
    """The hypervisor's: its devices, and thus their saved state, are those of its version."""
    hypervisor: str = "qemu"
    """Who starts QEMU, which gives a VM its devices: we (`qemu`), or `libvirt`."""
    agent: AgentKind = "templated"
    """Whose port there is."""
    firmware: Literal["", "bios", "uefi"] = ""
    """What starts the boot loader on the disk; empty: there is none, and a kernel is given."""


@dataclass(frozen=True)
class Places:
    """Where one VM's files are: logs in `directory`, the control sockets in `sockets`."""

    directory: Path
    sockets: Path

    @property
    def control(self) -> Path:
        """The socket by which the hypervisor is controlled, in its own protocol."""
        return self.sockets / "qmp"

    @property
    def agent(self) -> Path:
        """The socket that leads to the agent in the guest."""
        return self.sockets / "agent"

    @property
    def serial_log(self) -> Path:
        """The output of the guest's console."""
        return self.directory / "serial.log"

    @property
    def variables(self) -> Path:
        """The VM's own store of UEFI's variables, where it has one."""
        return self.directory / "variables.fd"

    @property
    def log(self) -> Path:
        """The output of the hypervisor itself."""
        return self.directory / "qemu.log"


@dataclass(frozen=True)
class Kernel:
    """The kernel of a full boot, in which nothing is restored."""

    kernel: Path
    initrd: Path
    cmdline: str

    def files(self) -> tuple[Path, ...]:
        """What the VM reads of the host's for that."""
        return self.kernel, self.initrd


@dataclass(frozen=True)
class OwnLoader:
    """A full boot by the boot loader on the VM's disk."""

    def files(self) -> tuple[Path, ...]:
        """What the VM reads of the host's for that: nothing."""
        return ()


@dataclass(frozen=True)
class Launch:
    """Everything that starting one VM needs.

    The directories of `places` exist and its sockets listen already, so that no start waits for
    the hypervisor to make them.
    """

    slot: str
    uuid: str
    mac: str
    hardware: Hardware
    places: Places
    memory: Path | None
    """The memory file; None: memory of its own, which cannot be frozen."""
    memory_shared: bool
    disk: Path
    network: Attachment
    control_fd: int
    agent_fd: int
    """Of the listening sockets `places.control` and `places.agent`; the VM inherits them."""
    state_fd: int | None = None
    """The saved state, for the transport `fd`; the VM inherits it."""
    code: Path | None = None
    """A second, read-only disk: a raw image. It is part of the hardware: a clone has one if and
    only if its template had one; the content may differ."""
    seed: Path | None = None
    """A third, read-only disk: what cloud-init reads at the first boot. Hardware, as `code` is."""
    variables: Path | None = None
    """The VM's own store of UEFI's variables, for `hardware.firmware` uefi."""
    boot: Kernel | OwnLoader | None = None
    """None: start waiting for state."""
    opened: Mapping[Path, int] = field(default_factory=dict)
    """Of the files above and of `places.serial_log`: those that the VM inherits, by a descriptor,
    in place of opening them by their paths."""
    backing: tuple[Path, ...] = ()
    """The layers below an opened `disk`, the highest first: what its header names is not used."""
    uid: int | None = None
    """The user and the group that the hypervisor runs as, with no privileges; it must then
    inherit all its files. None: this process's own."""
    template: str = ""
    generation: str = ""
    """Both for people who look at the hypervisor."""
    confined: bool = True
    """The kernel refuses the hypervisor what no VM needs, above all to start programs. One that
    waits for state starts a program for it, unless it has `state_fd`."""


@dataclass(frozen=True)
class SavedState:
    """A saved device state, opened ahead of time."""

    path: Path
    transport: str = "exec"
    fd: int | None = field(default=None, compare=False)
    """A descriptor that the VM inherited at its start. The transport `fd` reads from it; `exec`
    has its program open it, for a VM whose user cannot open the path."""

    def check(self) -> None:
        """Raise HostError when the file is missing or empty: a restore may wait for ever for it."""
        try:
            size = os.stat(self.path).st_size
        except OSError as error:
            raise HostError(
                f"the saved state {self.path} cannot be read: {error.strerror}"
            ) from error
        if size == 0:
            raise HostError(f"the saved state {self.path} is empty")


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """Whether KVM runs a guest, and how that is known."""

    host: str
    """Where it was tested: a digest of host, kernel, CPU and hypervisor."""
    works: bool
    detail: str


class Machine(Protocol):
    """One running hypervisor process.

    A coroutine raises HypervisorError when the hypervisor refused or ended, and Timeout when it
    did not answer. The VM and its state are then as before, unless its docstring says otherwise.
    In a state that the docstring does not name it raises Defect and does nothing; once the
    process has ended, it raises HypervisorError.
    """

    placed: bool
    """The hypervisor keeps it in a control group of its own, which it must not be taken out of."""
    pid: int
    """0 before it is known, which it is once the machine is connected."""
    exited: asyncio.Future[str]
    """Done when the process has ended; its result says how, in one line."""

    @property
    def state(self) -> MachineState:
        """The VM's state as this side knows it; `status` asks the hypervisor."""

    @property
    def start_time(self) -> int:
        """The process's start in clock ticks since boot, so that a reused pid is recognised.

        Known once it is connected; asked for earlier, it may block for some milliseconds.
        """

    async def connect(self, timeout: float) -> None:
        """Wait until the control channel answers.

        From `spawned` to `waiting` or `running`, as it was launched. An adopted VM is asked for
        its state; raises HypervisorError when the VM cannot be used in it.
        """

    async def expect_state(self) -> None:
        """Agree ahead of time on how `restore` will load its state. `waiting` to `expecting`."""

    async def restore(self, state: SavedState, timeout: float) -> None:
        """Load a saved state; the vCPUs stay stopped. `waiting` or `expecting` to `paused`.

        Raises HostError for a file that is missing or empty, which changes nothing. Any other
        failure leaves the VM `loading`, and it can no longer be used.
        """

    async def resume(self) -> None:
        """Let the vCPUs run. `paused` to `running`."""

    async def pause(self) -> None:
        """Stop the vCPUs. `running` to `paused`."""

    async def status(self) -> MachineState | None:
        """The VM's state as the hypervisor reports it: waiting, paused, running or saved; None for
        any other. Allowed in these four states."""

    async def set_link(self, up: bool) -> None:
        """Plug or unplug the guest's network cable. Allowed while waiting, paused and running."""

    async def exchange_code(self, file: Path) -> None:
        """Put another image behind the second disk, read-only. While waiting, expecting, paused.

        Once at most, and only while the guest has nothing of it mounted, which nobody checks.
        Raises HostError when the file cannot be opened, Defect for a VM that has no such disk.
        """

    async def detach_network(self) -> None:
        """Remove the host's end of the NIC of a `paused` VM, so that it is not saved."""

    async def save(self, target: Path, timeout: float) -> None:
        """Write the device state of a VM, without its shared memory. `paused` to `saved`.

        The VM must never run again: its memory file is now part of the generation. A failure
        leaves it `saving`, and it can no longer be used; `target` may be there in part.
        """

    async def quit(self, timeout: float) -> None:
        """End the process in an orderly way, with all disk writes done.

        Allowed in every state in which it answers. After a Timeout it may still end.
        """

    def kill(self) -> None:
        """Tell the process to end at once; `destroy` waits for it. Idempotent."""

    async def destroy(self) -> None:
        """End the process at once and wait for its end. Idempotent; allowed until `release`.

        Timeout when the kernel does not end it: what the VM used must not be given to another.
        """

    async def release(self) -> None:
        """Release a process that must outlive the daemon. Idempotent, always allowed."""

    def announce(self, name: str) -> None:
        """Show the clone's name to people who look at the hypervisor, where that is possible.

        Returns at once. `running`, once.
        """

    def last_words(self) -> str:
        """The last line that the hypervisor wrote to its log; empty when there is none."""

    def cpu_seconds(self) -> float:
        """CPU time that the process has used, in seconds."""

    def private_bytes(self) -> int:
        """Memory that only this process holds, in bytes; 0 when it is gone."""

    def background(self, on: bool) -> None:
        """Give it the lowest priority for CPU and I/O, or the usual one again.

        Does nothing where the daemon could not undo it.
        """

    def limit_files(self, size: int) -> None:
        """Let no file that it writes become larger than so many bytes, for good.

        May do nothing where the hypervisor's `file_limit_problem` says so.
        """


@dataclass(frozen=True)
class Support:
    """What is known of one version of a hypervisor."""

    host: str
    """The host that this version is from and that all tests run on; empty: it is not proven."""
    proven: str
    """All proven versions, for people."""
    read_only_memory: bool
    """Clones open the template's memory for reading only."""


class Hypervisor(Protocol):
    """Starts and finds machines, and knows what runs guests on this host.

    `accelerator` is `kvm` or `tcg`. Nothing but `prepare` blocks for more than some microseconds.
    """

    def prepare(self) -> None:
        """Do the work that is needed once, before the event loop runs: it blocks for 0.2 s.

        It may also change settings of this process that VMs inherit.
        """

    async def version(self) -> QemuVersion:
        """The program and its version, asked again when the file has changed.

        Raises HostError when it is missing or answers nonsense.
        """

    def is_version(self, version: str) -> bool:
        """Whether the program is known to be of this version. Costs a stat."""

    def support(self, version: str) -> Support:
        """What is known of a version."""

    def kvm_problem(self) -> str:
        """Why KVM cannot be used; empty when its device opens, which proves nothing yet."""

    def remembered_proof(self) -> Proof | None:
        """The result of `prove_kvm` on this host; None when it, or the version, is not known."""

    async def prove_kvm(self, kernel: Path, initrd: Path) -> Proof:
        """Whether this kernel runs under KVM: as remembered, or by running it, two minutes at most.

        Callers at the same time share one run. Raises HostError when no guest can be started.
        """

    async def confinement_problem(self) -> str:
        """Why no VM can be confined on this host; empty when one can."""

    def user_problem(self) -> str:
        """Why no VM can run as a user of its own here; empty when one can."""

    def file_limit_problem(self) -> str:
        """Why files of VMs that have users of their own cannot be limited; empty when they can."""

    def landlock_problem(self) -> str:
        """Why a VM with a user of its own may still open what every user may; empty when Landlock
        holds it to what it needs. Blocks for 0.1 s, once, unless `prepare` was called."""

    def clock_problem(self, accelerator: str) -> str:
        """Why a guest's clock may drift; empty when it keeps time."""

    def uefi_variables(self) -> Path:
        """An empty store of UEFI's variables, to copy. Raises HostError when there is no UEFI."""

    def cpu(self, accelerator: str) -> str:
        """The CPU model that guests get."""

    def kernel_arguments(self, accelerator: str) -> str:
        """Arguments for a Linux guest's kernel that this hypervisor needs."""

    async def addresses(self, network: str) -> Addresses:
        """What VMs may have of a network of libvirt: what its DHCP does not hand out.

        Raises HostError when there is none of that name, or it has no address to give.
        """

    def describe(self, launch: Launch) -> tuple[str, ...]:
        """The command line of a launch, for people to read."""

    def spawn(self, launch: Launch) -> Machine:
        """Start a VM and return at once. Raises HostError when that fails; nothing runs then.

        A hypervisor that takes longer to know says so in `connect`: it raises HostError, and the
        machine has ended. The descriptors that the launch names may be closed afterwards.
        """

    def adopt(
        self, pid: int, start_time: int, places: Places, uuid: str, uid: int | None = None
    ) -> Machine | None:
        """The VM that an earlier daemon started; None unless it is still that one.

        `uid` is the user of its own that it may have.
        """

    async def find(self, places: Mapping[str, Places]) -> dict[str, list[Machine]]:
        """All VMs that run with one of these UUIDs, also those whose pid was not recorded."""
