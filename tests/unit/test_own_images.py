"""Images that boot themselves: files that people bring, seeds, and the disks that are built."""

from __future__ import annotations

import asyncio
import json
import os
import struct
import subprocess
from pathlib import Path

import msgspec
import pytest

from templated.drivers.hostkeys import KINDS, make_host_keys
from templated.drivers.image import copied
from templated.drivers.image import store as module
from templated.drivers.image.loader import (
    ESP_KIB,
    SECTOR,
    START,
    boot_script,
    first_sectors,
    newest,
    root_sectors,
)
from templated.drivers.image.namespaces import ended
from templated.drivers.image.qcow2 import header_problem
from templated.drivers.image.store import ImageStore, _Record, image_digest, image_seed
from templated.errors import BuildError, HostError
from templated.model.spec import AgentProbe, ImageSpec, SeedSpec, TemplateSpec, stored
from tests.unit.fake_daemon import SPEC, configured, freeze
from tests.unit.qcow2_files import encrypted, qemu_img
from tests.unit.test_guest_parts import STOCK

SIZE = "4M"


def qemu_io(path: Path, command: str) -> None:
    """Do as a VM does with its disk."""
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, path], check=True, capture_output=True)


def created(path: Path, *options: str) -> Path:
    """A new, empty qcow2."""
    qemu_img("create", "-q", "-f", "qcow2", *options, path, SIZE)
    return path


def ensure(root: Path, path: Path, seed: SeedSpec | None = None) -> ImageStore:
    """A store that has copied the file."""
    store, spec = ImageStore(root / "store"), ImageSpec(path=str(path), seed=seed)
    asyncio.run(store.ensure(spec, on_progress=lambda _: None))
    return store


def refusal(root: Path, path: Path) -> BuildError:
    """The error for a file, of which nothing is left in the store."""
    with pytest.raises(BuildError) as caught:
        ensure(root, path)
    assert "\n" not in caught.value.message and str(path) in caught.value.message
    assert caught.value.hint
    left = [entry.name for entry in (root / "store/images").glob("*")]
    assert all(name.startswith(".lock-") for name in left)
    return caught.value


def test_a_copy(tmp_path: Path) -> None:
    """It is whole, read-only, and stays when the file changes, which is another image then."""
    path = created(tmp_path / "a b.qcow2")
    content = path.read_bytes()
    store = ensure(tmp_path, path)
    (image,) = store.list()
    assert image.disk.read_bytes() == content and image.disk.stat().st_mode & 0o777 == 0o444
    assert (image.kernel, image.initrd) == (None, None)
    assert not image_seed(image.disk).exists()
    before = image_digest(ImageSpec(path=str(path)))
    assert before == image.digest
    created(path, "-o", "cluster_size=4096")
    assert image_digest(ImageSpec(path=str(path))) != before
    ensure(tmp_path, path)
    assert len(store.list()) == 2 and image.disk.read_bytes() == content


def test_a_seed(tmp_path: Path) -> None:
    """cloud-init finds a FAT file system by its label, and its files by their names."""
    seed = SeedSpec(user_data="#cloud-config\nhostname: x\n", meta_data="instance-id: i\n")
    store = ensure(tmp_path, created(tmp_path / "disk.qcow2"), seed)
    (image,) = store.list()
    disk = image_seed(image.disk)
    listing = subprocess.check_output(["mdir", "-b", "-i", disk, "::"], text=True).split()
    assert listing == ["::/meta-data", "::/user-data"]
    shown = subprocess.check_output(["mtype", "-i", disk, "::/user-data"], text=True)
    assert shown == seed.user_data
    assert b"CIDATA" in disk.read_bytes()[:512]
    other = ImageSpec(path=image.spec.path, seed=SeedSpec(user_data="other"))
    assert image_digest(other) != image.digest


def test_kernels_for_a_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that boots itself has none to give; who cannot make another says what to do."""
    store = ensure(tmp_path, created(tmp_path / "disk.qcow2"))
    assert store.any_kernel() is None
    monkeypatch.setattr(module, "lacks_rights", lambda: True)
    (image,) = store.list()
    with pytest.raises(HostError, match="find out whether guests run under KVM") as caught:
        asyncio.run(store.kernel_for(image))
    assert "systemctl start templated-image@python-fn" in caught.value.hint


def test_missing_and_strange_files(tmp_path: Path) -> None:
    """Each with its own reason, and at once."""
    assert "No such file" in refusal(tmp_path, tmp_path / "nothing").message
    before = sorted(os.listdir("/dev/fd"))
    for path in (tmp_path, Path("/dev/null")):
        assert "no file" in refusal(tmp_path, path).message
    assert sorted(os.listdir("/dev/fd")) == before
    empty = tmp_path / "empty"
    empty.touch()
    assert "no qcow2" in refusal(tmp_path, empty).message


def test_a_raw_file(tmp_path: Path) -> None:
    """Whatever its name says."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "raw", path, SIZE)
    error = refusal(tmp_path, path)
    assert "it is no qcow2 file" in error.message and "qemu-img convert" in error.hint


def test_a_backing_file(tmp_path: Path) -> None:
    """Nobody opens what it names."""
    below = created(tmp_path / "below.qcow2")
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", path)
    below.unlink()
    assert "has a backing file" in refusal(tmp_path, path).message


def test_an_encrypted_file(tmp_path: Path) -> None:
    """LUKS, as qemu-img makes it."""
    path = tmp_path / "disk.qcow2"
    encrypted(path, SIZE)
    assert "encrypted" in refusal(tmp_path, path).message


def test_content_elsewhere(tmp_path: Path) -> None:
    """A data file could be any file of the host."""
    path = created(tmp_path / "disk.qcow2", "-o", f"data_file={tmp_path}/data")
    assert "content is in another file" in refusal(tmp_path, path).message


def test_a_broken_file(tmp_path: Path) -> None:
    """Marked as corrupt, cut off, or with a table that leads nowhere."""
    path = created(tmp_path / "disk.qcow2")
    content = bytearray(path.read_bytes())
    content[79] |= 2
    path.write_bytes(content)
    assert "marked as corrupt" in refusal(tmp_path, path).message
    content[79] &= ~2
    path.write_bytes(content[:70000])
    assert "broken" in refusal(tmp_path, path).message
    struct.pack_into(">Q", content, 40, 1 << 40)  # l1_table_offset
    path.write_bytes(content)
    assert "broken" in refusal(tmp_path, path).message


def test_a_disk_that_is_larger_than_the_spec_says(tmp_path: Path) -> None:
    """What a clone may write goes by image.size."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "3000M")
    error = refusal(tmp_path, path)
    assert "3000 MiB, more than image.size, 1GiB" in error.message
    assert "image.size: 3000MiB" in error.hint


def test_a_file_in_use(tmp_path: Path) -> None:
    """A VM that writes it holds its lock."""
    path = created(tmp_path / "disk.qcow2")
    command = ["qemu-io", "-f", "qcow2", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdin is not None and user.stdout is not None
        try:
            user.stdout.read(8)  # its prompt
            error = refusal(tmp_path, path)
        finally:
            user.stdin.close()
    assert "a VM uses it" in error.message and "shut" in error.hint
    ensure(tmp_path, path)


def test_a_file_that_is_written_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A VM that starts between the check and the end of the copy."""
    path = created(tmp_path / "disk.qcow2")

    async def used(command: list[str], folder: Path) -> tuple[int | None, str]:
        if command[0] == "cp":
            await asyncio.to_thread(qemu_io, path, "write 0 64k")
        return await ended(command, folder)

    monkeypatch.setattr(copied, "ended", used)
    error = refusal(tmp_path, path)
    assert "it was changed while it was copied" in error.message and "try again" in error.hint
    monkeypatch.undo()
    ensure(tmp_path, path)


def test_headers() -> None:
    """What no qemu-img of here makes."""
    head = bytearray(104)
    struct.pack_into(">4sI", head, 0, b"QFI\xfb", 3)
    assert header_problem(bytes(head)) is None
    struct.pack_into(">I", head, 4, 1)
    assert "version 1" in str(header_problem(bytes(head)))
    struct.pack_into(">I", head, 4, 3)
    struct.pack_into(">Q", head, 72, 1 << 20)
    assert "not known" in str(header_problem(bytes(head)))
    assert "cut off" in str(header_problem(bytes(head[:100])))
    assert "no qcow2" in str(header_problem(b"QFI\xfb"))


def as_json(fields: object) -> object:
    return json.loads(msgspec.json.encode(fields))


def test_files_of_before_have_no_later_keys(tmp_path: Path) -> None:
    """The version before refuses keys that it does not know: it takes images and generations."""
    plain = stored(TemplateSpec(name="t"))
    assert "hypervisor" not in plain and plain["image"] == stored(ImageSpec())
    assert set(plain["image"]) == {"suite", "packages", "kernel", "size", "mirror"}
    assert "firmware" not in plain["machine"] and "agent" not in plain["identity"]
    assert set(plain["network"]) == {"dns"}
    probed = TemplateSpec(name="t", hypervisor="libvirt", probes=(AgentProbe(name="a"),))
    for spec in (TemplateSpec(name="t"), STOCK, probed):
        assert msgspec.convert(stored(spec), TemplateSpec) == spec
    freeze(configured(tmp_path))
    manifest = json.loads(next(tmp_path.rglob("manifest.json")).read_text())
    assert manifest["spec"] == as_json(stored(SPEC)) and "addresses" not in manifest
    out, folder = tmp_path / "out", tmp_path / "images"
    out.mkdir()
    folder.mkdir()
    ImageStore(tmp_path)._publish(out, _Record("d", 0.0, ImageSpec()))
    assert json.loads((folder / "d/image.json").read_text())["spec"] == as_json(stored(ImageSpec()))


def test_specs_of_before_have_their_digests() -> None:
    """An image that is there is not built again for keys that came later."""
    plain = image_digest(ImageSpec())
    assert image_digest(ImageSpec(boot="disk")) != plain
    assert {"path", "seed", "boot"} <= set(msgspec.to_builtins(ImageSpec()))


def test_the_first_sectors() -> None:
    """Boot code, two partitions behind each other, and the second stage right behind."""
    boot, core = b"B" * 512, b"C" * 1000
    head = first_sectors(boot, core, 4096, 100)
    assert head[:440] == b"B" * 440 and head[510:512] == b"\x55\xaa" and head[512:] == core
    entries = [struct.unpack_from("<B3xB3xII", head, 446 + 16 * n) for n in range(4)]
    assert entries[:2] == [(0x80, 0x83, START, 4096), (0, 0xEF, START + 4096, 100)]
    assert entries[2:] == [(0, 0, 0, 0)] * 2
    with pytest.raises(BuildError, match="larger than the room"):
        first_sectors(boot, b"C" * START * SECTOR, 4096, 100)


def test_a_disk_is_as_large_as_the_spec_says() -> None:
    """The partitions and what is before them fill it, and no more: it can be copied by its spec."""
    size = 2 << 30
    head = first_sectors(b"", b"", root_sectors(size), ESP_KIB * 1024 // SECTOR)
    ends = [sum(struct.unpack_from("<II", head, 446 + 16 * n + 8)) for n in range(2)]
    assert max(ends) * SECTOR == size
    with pytest.raises(BuildError, match="16 MiB, has no room"):
        root_sectors(16 << 20)


def test_boot_scripts(tmp_path: Path) -> None:
    """The newest kernel, and an error when there is none."""
    with pytest.raises(BuildError, match="vmlinuz") as caught:
        newest(tmp_path, "vmlinuz-*")
    assert "image.kernel" in caught.value.hint
    (tmp_path / "vmlinuz-6.1").touch()
    assert newest(tmp_path, "vmlinuz-*") == "vmlinuz-6.1"
    assert "root=UUID=u ro" in boot_script("k", "i", "u")


def test_host_keys(tmp_path: Path) -> None:
    """New ones each time, of each kind, and nothing of them stays."""

    async def main() -> None:
        first, second = await make_host_keys(tmp_path), await make_host_keys(tmp_path)
        assert tuple(key.kind for key in first) == KINDS
        for key in (*first, *second):
            assert key.private.startswith("-----BEGIN OPENSSH PRIVATE KEY-----\n")
            assert key.private not in repr(key)
        assert len({key.public for key in (*first, *second)}) == 4
        with pytest.raises(HostError):
            await make_host_keys(tmp_path / "nothing")

    asyncio.run(main())
    assert not list(tmp_path.iterdir())


def test_a_check_has_a_bound(tmp_path: Path) -> None:
    """The store's own: whoever waits for a disk does not wait for ever."""
    path = created(tmp_path / "disk.qcow2")
    store, spec = ImageStore(tmp_path / "store"), ImageSpec(path=str(path))
    work = store.ensure(spec, on_progress=lambda _: None, timeout=0.0)
    with pytest.raises(BuildError, match="within 0 s"):
        asyncio.run(work)
