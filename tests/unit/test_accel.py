"""The proof that a guest runs under KVM: what counts as one, and for whom it is remembered."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from templated.drivers.hypervisor.base import Proof
from templated.drivers.hypervisor.qemu import accel
from templated.drivers.hypervisor.qemu.accel import prove_kvm, qemu_version, recall
from templated.drivers.hypervisor.qemu.driver import Qemu
from templated.drivers.image.store import Image
from templated.errors import HostError
from templated.model.spec import ImageSpec
from templated.services.host import Host
from tests.unit.fake_daemon import configured, run

MARKER = accel.PROOF_MARKER.decode()


def program(tmp_path: Path, script: str, name: str = "qemu") -> str:
    """A program in the place of QEMU."""
    path = tmp_path / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


async def prove(tmp_path: Path, script: str) -> Proof:
    """The outcome of a proof run by a script in the place of QEMU."""
    binary = await asyncio.to_thread(program, tmp_path, script)
    return await prove_kvm(binary, "7.2", Path("/k"), Path("/i"), tmp_path / "proof.json")


def image_in(folder: Path) -> Image:
    """An image of which nothing is ever booted."""
    kernel, initrd = folder / "vmlinuz", folder / "initrd"
    return Image("0" * 16, folder / "disk.qcow2", kernel, initrd, 0.0, ImageSpec())


@pytest.fixture
def kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose /dev/kvm opens."""
    monkeypatch.setattr(accel, "kvm_opens", lambda: "")


@pytest.mark.usefixtures("kvm")
@pytest.mark.parametrize(
    ("script", "works", "detail"),
    [
        (f"echo noise; echo '{MARKER}'; sleep 600", True, "booted under KVM"),
        (f"printf '{MARKER[:9]}'; sleep 0.05; printf '{MARKER[9:]}'", True, "booted under KVM"),
        ("echo booting; exit 1", False, "QEMU ended with 1: booting"),
        ("kill -ABRT $$", False, "QEMU ended with -6: nothing on the console"),
        ("echo SeaBIOS; sleep 600", False, "a guest hangs; it got to: SeaBIOS"),
        ("while echo stall; do sleep 0.1; done", False, "a guest hangs; it got to: stall"),
        ("sleep 600", False, "a guest hangs; it got to: nothing on the console"),
    ],
    ids=["runs", "in two parts", "ends", "aborts", "hangs", "gets nowhere", "is silent"],
)
def test_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, works: bool, detail: str
) -> None:
    """Only a guest that says so counts; the answer is bounded and remembered either way.

    A guest that hangs after it printed something is tried twice, all others once.
    """
    if not works:
        monkeypatch.setattr(accel, "PROOF_TIMEOUT", 1.0)
        monkeypatch.setattr(accel, "PROOF_SILENCE", 0.5)
    cache = tmp_path / "proof.json"
    twice = "it got to" in detail and "nothing" not in detail

    async def main() -> None:
        proof = await prove(tmp_path, f'echo x >>"$0.started"\n{script}')
        assert proof.works is works and detail in proof.detail
        assert recall(cache, "7.2") == proof and recall(cache, "8.0") is None

    run(main())
    assert (tmp_path / "qemu.started").read_text() == ("x\nx\n" if twice else "x\n")


@pytest.mark.usefixtures("kvm")
def test_a_guest_that_hangs_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not make all guests of the host slow for good."""
    monkeypatch.setattr(accel, "PROOF_SILENCE", 0.5)
    script = f'echo boots; mkdir "$0.tried" && exec sleep 600; echo "{MARKER}"'

    async def main() -> None:
        assert (await prove(tmp_path, script)).works

    run(main())


def test_no_kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the device nothing is started."""
    monkeypatch.setattr(accel, "kvm_opens", lambda: "/dev/kvm: No such file or directory")

    async def main() -> None:
        proof = await prove(tmp_path, "touch $0.started")
        assert not proof.works and "No such file" in proof.detail
        assert not (tmp_path / "qemu.started").exists()

    run(main())


@pytest.mark.parametrize(
    "content", [b"", b"nonsense", b"[]", b"\xff\xfe", b'{"host": 1}', b'{"host": "x"}']
)
def test_nonsense_is_no_answer(tmp_path: Path, content: bytes) -> None:
    """A damaged cache only means that it is proven again."""
    (tmp_path / "cache").write_bytes(content)
    assert recall(tmp_path / "cache", "7.2") is None
    assert recall(tmp_path, "7.2") is None


def test_of_another_host(tmp_path: Path) -> None:
    """A state_dir that was copied does not carry the answer with it."""
    proof = Proof(host=accel.host_key("7.2"), works=True, detail="")
    cache = tmp_path / "cache"
    cache.write_bytes(msgspec.json.encode(proof))
    assert recall(cache, "7.2") == proof
    cache.write_bytes(msgspec.json.encode(msgspec.structs.replace(proof, host="other")))
    assert recall(cache, "7.2") is None


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo hello", "--version gives no version: 'hello"),
        ("echo cannot >&2; exit 2", "failed: cannot"),
    ],
)
def test_a_qemu_that_is_none(tmp_path: Path, script: str, message: str) -> None:
    """One line that says what it answered."""
    binary = program(tmp_path, script)

    async def main() -> None:
        with pytest.raises(HostError, match=message):
            await qemu_version(binary)
        with pytest.raises(HostError, match="is not installed"):
            await qemu_version(str(tmp_path / "none"))

    run(main())


def test_the_version_follows_the_binary(tmp_path: Path) -> None:
    """It is asked once, and again when the file has changed."""
    count = 'echo x >> "$0.asked"; echo QEMU emulator version'
    binary = program(tmp_path, f"{count} 7.2.0")

    async def main() -> None:
        qemu = Qemu(binary, tmp_path / "proof")
        assert not qemu.is_version("7.2.0"), "nobody has asked it"
        assert [(await qemu.version()).version for _ in range(3)] == ["7.2.0"] * 3
        assert qemu.is_version("7.2.0") and not qemu.is_version("10.0.0")
        await asyncio.to_thread(program, tmp_path, f"{count} 10.0.0")
        assert not qemu.is_version("7.2.0"), "the file has changed"
        assert (await qemu.version()).version == "10.0.0" and qemu.is_version("10.0.0")
        asked = await asyncio.to_thread((tmp_path / "qemu.asked").read_text)
        assert asked == "x\nx\n"

    run(main())


@pytest.mark.usefixtures("kvm")
def test_auto(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """KVM when a guest ran under it, once for all who ask; TCG when told or when it did not.

    A KVM that goes away is not passed over in silence.
    """
    config = configured(tmp_path)
    answers = 'case "$*" in *--version*) echo QEMU emulator version 7.2.0; exit;; esac'
    binary = program(tmp_path, f'{answers}\necho x >> "$0.proved"; echo "{MARKER}"')
    image = image_in(tmp_path)

    def qemu() -> Qemu:
        return Qemu(binary, tmp_path / "proof")

    async def main() -> None:
        for wanted, expected in (("tcg", "tcg"), ("kvm", "kvm")):
            changed = msgspec.structs.replace(config, accel=wanted)
            assert await Host(changed, qemu()).accelerator(image) == expected
        auto = msgspec.structs.replace(config, accel="auto")
        host = Host(auto, qemu())
        assert host.known_accelerator() == "auto (not proven yet)"
        asked = await asyncio.gather(*(host.accelerator(image) for _ in range(3)))
        assert asked == ["kvm"] * 3 and host.known_accelerator() == "kvm"
        assert await Host(auto, qemu()).accelerator(image) == "kvm", "it is remembered"
        proved = await asyncio.to_thread((tmp_path / "qemu.proved").read_text)
        assert proved == "x\n" and not caplog.records
        monkeypatch.setattr(accel, "kvm_opens", lambda: "/dev/kvm: gone")
        assert await host.accelerator(image) == "tcg"
        assert "now /dev/kvm: gone: VMs get TCG" in caplog.text

    run(main())


def test_demanded_and_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accel: kvm` never falls back in silence; `auto` does."""
    monkeypatch.setattr(accel, "kvm_opens", lambda: "/dev/kvm: Permission denied")
    config = configured(tmp_path)
    image = image_in(tmp_path)
    qemu = Qemu("never-started", tmp_path / "proof")

    async def main() -> None:
        demanded = msgspec.structs.replace(config, accel="kvm")
        with pytest.raises(HostError, match="Permission denied") as caught:
            await Host(demanded, qemu).accelerator(image)
        assert "accel: auto" in caught.value.hint
        auto = msgspec.structs.replace(config, accel="auto")
        assert await Host(auto, qemu).accelerator(image) == "tcg"

    run(main())
