"""Code in an object store: chunks are sent once, and nothing of it is believed unchecked."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zstandard
from obstore.store import MemoryStore

from templated.drivers.code.image import Record, is_whole
from templated.drivers.objectstore import ObjectStore, connect
from templated.errors import ConfigError, HostError, NotFound
from templated.model.config import StoreConfig
from templated.services.functions.zone import CHUNK, Manifest, Zone
from tests.unit.code_images import image_of

pytestmark = pytest.mark.usefixtures("no_blocking_calls")


class Recording(ObjectStore):
    """Counts what is sent, and gives wrong answers when it is told to."""

    def __init__(self) -> None:
        self.memory = MemoryStore()
        super().__init__(self.memory, "s3://bucket", 5.0)
        self.sent: list[str] = []
        self.asked: list[str] = []
        self.wrong: dict[str, list[bytes]] = {}
        self.failing = False

    async def get(self, key: str, most: int) -> memoryview:
        self.asked.append(key)
        if self.failing:
            raise HostError("the store is down")
        if self.wrong.get(key):
            return memoryview(self.wrong[key].pop(0))
        return await super().get(key, most)

    async def put(self, key: str, content: bytes) -> None:
        if self.failing and key.startswith("code/"):
            raise HostError("the store is down")
        self.sent.append(key)
        await super().put(key, content)

    def below(self, prefix: str) -> list[str]:
        """The keys that begin so."""
        return sorted(meta["path"] for batch in self.memory.list(prefix) for meta in batch)


@pytest.fixture
def store() -> Recording:
    """A store in memory."""
    return Recording()


@pytest.fixture
def zone(store: Recording) -> Iterator[Zone]:
    """A zone in that store."""
    made = Zone(store, 3)
    yield made
    made.close()


def _content(*chunks: bytes) -> bytes:
    return b"".join(chunk.ljust(CHUNK, b"\0") for chunk in chunks)


def _pushed(zone: Zone, folder: Path, content: bytes) -> Record:
    folder.mkdir(exist_ok=True)
    record = image_of(content, folder / "image")
    asyncio.run(zone.push(record, folder / "image"))
    return record


def _fetched(zone: Zone, digest: str, target: Path) -> Record:
    target.unlink(missing_ok=True)
    return asyncio.run(zone.fetch(digest, target))


def test_there_and_back(zone: Zone, store: Recording, tmp_path: Path) -> None:
    content = _content(os.urandom(CHUNK), b"text" * 1000, b"", b"text" * 1000) + b"the end"
    record = _pushed(zone, tmp_path / "a", content + bytes(4096))
    assert _fetched(zone, record.digest, tmp_path / "b") == record
    assert is_whole(tmp_path / "b", record)
    assert (tmp_path / "b").stat().st_blocks * 512 < 4 * CHUNK
    # Three chunks: one is a hole, and one is there twice.
    assert len(store.below("chunks/")) == 3
    assert len([key for key in store.asked if key.startswith("chunks/")]) == 3
    assert store.sent[-1] == f"code/{record.digest}"


def test_chunks_that_are_there_are_not_sent_again(
    zone: Zone, store: Recording, tmp_path: Path
) -> None:
    first, second = os.urandom(CHUNK), os.urandom(CHUNK)
    _pushed(zone, tmp_path / "a", first)
    store.sent.clear()
    record = _pushed(zone, tmp_path / "b", first + second)
    assert len(store.sent) == 2  # the other chunk, and the manifest
    store.sent.clear()
    _pushed(zone, tmp_path / "c", first + second)
    assert store.sent == [f"code/{record.digest}"]


def test_a_chunk_that_was_cut_short_is_sent_again(
    zone: Zone, store: Recording, tmp_path: Path
) -> None:
    record = _pushed(zone, tmp_path / "a", b"x")
    (key,) = store.below("chunks/")
    store.memory.put(key, b"")
    with pytest.raises(HostError, match="chunk"):
        _fetched(zone, record.digest, tmp_path / "x")
    _pushed(zone, tmp_path / "a2", b"x")
    assert _fetched(zone, record.digest, tmp_path / "x") == record


def test_what_is_not_there(zone: Zone, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        _fetched(zone, "0" * 64, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_no_manifest_without_all_chunks(zone: Zone, store: Recording, tmp_path: Path) -> None:
    store.failing = True
    with pytest.raises(HostError, match="down"):
        _pushed(zone, tmp_path / "a", b"x")
    assert not store.below("code/")


def _stored(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(raw)


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"no zstd",
        _stored(b"y".ljust(4096, b"\0")),
        _stored(b"x"),
        _stored(bytes(200 << 20)),
        _stored(b"x".ljust(4096, b"\0"))[:-3],
    ],
    ids=["empty", "nonsense", "other", "short", "bomb", "cut"],
)
def test_a_wrong_chunk_is_asked_for_once_more_and_then_refused(
    zone: Zone, store: Recording, tmp_path: Path, wrong: bytes
) -> None:
    record = _pushed(zone, tmp_path / "a", b"x")
    (key,) = store.below("chunks/")
    store.wrong[key] = [wrong]
    assert _fetched(zone, record.digest, tmp_path / "x") == record
    assert store.asked.count(key) == 2
    store.wrong[key] = [wrong, wrong]
    with pytest.raises(
        HostError, match=rf"chunk {key[-64:]} .* is not what its name says"
    ) as caught:
        _fetched(zone, record.digest, tmp_path / "x")
    assert key in caught.value.hint
    assert store.asked.count(key) == 4


def test_a_chunk_that_is_missing(zone: Zone, store: Recording, tmp_path: Path) -> None:
    record = _pushed(zone, tmp_path / "a", b"x")
    (key,) = store.below("chunks/")
    store.memory.delete(key)
    with pytest.raises(HostError, match="is missing"):
        _fetched(zone, record.digest, tmp_path / "x")


def test_an_object_that_is_too_big(zone: Zone, store: Recording, tmp_path: Path) -> None:
    record = _pushed(zone, tmp_path / "a", b"x")
    (key,) = store.below("chunks/")
    store.memory.put(key, bytes(1 << 20))
    with pytest.raises(HostError, match="1048576 bytes"):
        _fetched(zone, record.digest, tmp_path / "x")


def _changed(manifest: Manifest, name: str) -> bytes:
    other = "1" * 64
    code = manifest.code
    changes = {
        "another": msgspec.structs.replace(
            manifest, code=msgspec.structs.replace(code, digest=other)
        ),
        "longer": msgspec.structs.replace(manifest, chunks=(*manifest.chunks, None)),
        "empty": msgspec.structs.replace(manifest, chunks=()),
        "uuid": msgspec.structs.replace(
            manifest, code=msgspec.structs.replace(code, uuid="0" * 32)
        ),
        "hole": msgspec.structs.replace(manifest, chunks=(None,)),
    }
    if name in changes:
        return msgspec.json.encode(changes[name])
    return {
        "json": b"{",
        "version": msgspec.json.encode(manifest).replace(b'"format":1', b'"format":2'),
    }[name]


@pytest.mark.parametrize("how", ["another", "longer", "empty", "uuid", "hole", "json", "version"])
def test_a_manifest_that_is_wrong(zone: Zone, store: Recording, tmp_path: Path, how: str) -> None:
    record = _pushed(zone, tmp_path / "a", b"x" * 3000)
    key = f"code/{record.digest}"
    manifest = msgspec.json.decode(store.memory.get(key).bytes().to_bytes(), type=Manifest)
    store.memory.put(key, _changed(manifest, how))
    with pytest.raises(HostError, match=rf"{record.digest} in s3://bucket is") as caught:
        _fetched(zone, record.digest, tmp_path / "x")
    assert caught.value.hint


def test_the_first_error_ends_the_others(zone: Zone, store: Recording, tmp_path: Path) -> None:
    record = _pushed(zone, tmp_path / "a", b"".join(os.urandom(CHUNK) for _ in range(12)))
    keys = store.below("chunks/")
    for key in keys:
        store.wrong[key] = [b"", b""]
    with pytest.raises(HostError, match="chunk"):
        _fetched(zone, record.digest, tmp_path / "x")
    assert len(store.asked) < 1 + 2 * len(keys)


def test_a_disk_that_is_full(zone: Zone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = _pushed(zone, tmp_path / "a", b"x")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(HostError, match="No space left"):
        _fetched(zone, record.digest, tmp_path / "x")


def test_a_store_of_the_configuration(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("0123456789\n")
    config = StoreConfig(url="s3://bucket/some/prefix", access_key="me", secret_file=str(secret))
    with pytest.raises(ConfigError, match="others can read"):
        connect(config)
    secret.chmod(0o600)
    assert connect(config).name == "s3://bucket/some/prefix"
    secret.write_text("\n")
    with pytest.raises(ConfigError, match="does not hold a secret"):
        connect(config)
    with pytest.raises(ConfigError, match="nowhere"):
        connect(msgspec.structs.replace(config, secret_file=f"{tmp_path}/nowhere"))
    with pytest.raises(ConfigError, match="no secret_file"):
        connect(msgspec.structs.replace(config, secret_file=None))
