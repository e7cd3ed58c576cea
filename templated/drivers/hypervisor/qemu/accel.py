"""Which accelerator really runs a guest.

/dev/kvm may open, create VMs and run firmware, and a kernel may hang on it all the same, as in
nested virtualisation of some clouds. So the only proof is a guest that runs: the image's own
kernel and initrd print a marker and power off. The answer is remembered for this host, kernel,
CPU and QEMU version.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import platform
import re
from pathlib import Path

import msgspec

from templated.drivers.host.programs import run, started
from templated.drivers.hypervisor.base import Proof
from templated.drivers.hypervisor.qemu.command import MACHINES
from templated.errors import HostError
from templated.model.generation import QemuVersion

PROOF_MARKER = b"templated: guest runs"
PROOF_TRIES = 2
PROOF_TIMEOUT = 60.0
PROOF_SILENCE = 15.0
"""A guest that prints nothing for so long hangs; a slow host may need more for the whole boot."""
# TCG translates what the guest uses: a plain CPU keeps glibc and the kernel on plain code paths.
# arat ("always running APIC timer"): without it the kernel wants a second timer to fall back on,
# which microvm does not have, and stays with a periodic tick of 250 Hz.
CPUS = {"kvm": "host,migratable=on", "tcg": "qemu64,+arat"}


async def qemu_version(binary: str) -> QemuVersion:
    """Path and version of QEMU; HostError when it is missing or answers nonsense."""
    text = await run(binary, "--version", timeout=10.0)
    found = re.search(r"version (\S+)", text)
    if not found:
        raise HostError(f"{binary} --version gives no version: {text[:80]!r}")
    return QemuVersion(path=binary, version=found[1])


def host_key(version: str) -> str:
    """What the answer depends on: this machine, its kernel, CPU and QEMU."""
    parts = [platform.node(), platform.release(), version]
    with contextlib.suppress(OSError):
        parts.append(Path("/etc/machine-id").read_text())
    with contextlib.suppress(OSError):
        cpu = re.search(r"model name.*", Path("/proc/cpuinfo").read_text())
        parts.append(cpu[0] if cpu else "")
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def kvm_opens() -> str:
    """Empty when /dev/kvm opens for this user, otherwise why not."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/kvm: {error.strerror}"
    return ""


def recall(cache: Path, version: str) -> Proof | None:
    """The remembered answer for this host; None when there is none."""
    try:
        proof = msgspec.json.decode(cache.read_bytes(), type=Proof)
    except (OSError, msgspec.DecodeError, msgspec.ValidationError):
        return None
    return proof if proof.host == host_key(version) else None


async def prove_kvm(binary: str, version: str, kernel: Path, initrd: Path, cache: Path) -> Proof:
    """Run a guest under KVM and remember the result: PROOF_TRIES times PROOF_TIMEOUT s at most.

    A guest that hangs is ended after PROOF_SILENCE seconds. One that had printed something before
    is tried once more: a wrong "no" would make all guests of this host slow for good, in silence.
    """
    reason = kvm_opens()
    for _ in range(0 if reason else PROOF_TRIES):
        reason, again = await _run_proof(binary, kernel, initrd)
        if not again:
            break
    proof = Proof(
        host=host_key(version),
        works=not reason,
        detail=reason or "a guest booted under KVM",
    )
    partial = cache.with_suffix(".part")
    partial.write_bytes(msgspec.json.encode(proof))
    partial.rename(cache)
    return proof


async def _run_proof(binary: str, kernel: Path, initrd: Path) -> tuple[str, bool]:
    """What happened in place of the marker, empty when a guest printed it; whether to try again."""
    command = (
        # A daemon that is killed meanwhile leaves nothing that ends it.
        *("timeout", "--signal=KILL", f"{PROOF_TIMEOUT + 2:g}"),
        *proof_arguments(binary, kernel, initrd),
    )
    seen = bytearray()
    async with started(*command) as child:
        try:
            async with asyncio.timeout(PROOF_TIMEOUT):
                assert child.stdout is not None
                while chunk := await _next(child.stdout):
                    seen += chunk
                    if PROOF_MARKER in seen:
                        return "", False
            return f"QEMU ended with {await child.wait()}: {_last_line(seen)}", False
        except TimeoutError:
            return f"a guest hangs; it got to: {_last_line(seen)}", bool(seen)


async def _next(output: asyncio.StreamReader) -> bytes:
    # Not wait_for: before Python 3.12 it can lose a cancellation (bpo-37658).
    async with asyncio.timeout(PROOF_SILENCE):
        return await output.read(4096)


def proof_arguments(
    binary: str, kernel: Path, initrd: Path, accel: str = "kvm", append: str = ""
) -> list[str]:
    """A QEMU that boots a microvm as guests get it, as far as the marker on its stdout."""
    # earlyprintk: a kernel that gets on shows it from its first moment.
    cmdline = "console=ttyS0 earlyprintk=ttyS0 reboot=t panic=-1 templated.proof"
    cmdline = f"{cmdline} {append}".strip()
    return [
        binary,
        *("-machine", MACHINES["microvm"], "-accel", accel, "-cpu", CPUS[accel], "-m", "128"),
        *("-no-user-config", "-nodefaults", "-no-reboot", "-display", "none"),
        *("-serial", "stdio", "-kernel", str(kernel), "-initrd", str(initrd)),
        *("-append", cmdline),
    ]


def _last_line(seen: bytearray) -> str:
    lines = seen[-4000:].decode(errors="replace").strip().splitlines()
    return lines[-1].strip()[:200] if lines else "nothing on the console"
