"""Archives become images: the same for the same files, and bad ones are refused in one line."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from zipfile import ZIP_BZIP2, ZIP_DEFLATED, ZipFile, ZipInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from templated.drivers.code import VIRTUAL_SIZE, entries, image, pack
from templated.drivers.code.image import Record, is_whole, make_image, placeholder
from templated.errors import HostError, InvalidRequest
from tests.unit.zips import FILE, FOLDER, LINK, Item, files, zipped

pytestmark = pytest.mark.usefixtures("no_blocking_calls")


def _make(folder: Path, archive: bytes) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.zip").write_bytes(archive)
    (folder / "made").mkdir()
    return pack.make(folder / "a.zip", folder / "made")


async def _image(folder: Path, archive: bytes) -> tuple[Record, Path]:
    def prepare() -> None:
        (folder / "a.zip").write_bytes(archive)
        (folder / "made").mkdir()

    await asyncio.to_thread(prepare)
    return await make_image(folder / "a.zip", folder / "made")


def test_an_image_in_a_process_of_its_own(tmp_path: Path) -> None:
    archive = files({"app.py": b"x = 1\n", "lib/deep/m.py": b""})
    record, path = asyncio.run(_image(tmp_path, archive))
    assert record.bytes == 6
    assert is_whole(path, record)
    assert path.stat().st_size == VIRTUAL_SIZE
    assert path.stat().st_blocks * 512 < 1 << 20
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    with open(path, "rb") as content:
        assert image.uuid_of(content.fileno()) == record.uuid
    assert (tmp_path / "made/tree/lib/deep").is_dir()


def test_a_change_of_the_image_is_seen(tmp_path: Path) -> None:
    record, path = asyncio.run(_image(tmp_path, files({"app.py": b"x = 1\n"})))
    path.chmod(0o644)
    for place in (1100, record.size - 1, record.size + 4096, VIRTUAL_SIZE - 1):
        with open(path, "r+b") as content:
            content.seek(place)
            before = content.read(1)
            content.seek(place)
            content.write(bytes([before[0] ^ 1]))
            content.flush()
            assert not is_whole(path, record), place
            content.seek(place)
            content.write(before)
    assert is_whole(path, record)
    os.truncate(path, VIRTUAL_SIZE - 1)
    assert not is_whole(path, record)


_names = st.text(st.sampled_from("abcé"), min_size=1, max_size=3)
_paths = st.lists(_names, min_size=1, max_size=3).map("/".join)
_trees = st.dictionaries(_paths, st.tuples(st.binary(max_size=5000), st.booleans()), max_size=6)


def _without_conflicts(tree: dict[str, Any]) -> dict[str, Any]:
    return {p: c for p, c in tree.items() if not any(o.startswith(f"{p}/") for o in tree)}


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(_trees.map(_without_conflicts), st.randoms(use_true_random=False))
def test_order_times_and_owners_do_not_count(
    tmp_path: Path, tree: dict[str, tuple[bytes, bool]], order: Any
) -> None:
    items: list[Item] = [
        (name, content, stat.S_IFREG | (0o4711 if run else 0o600))
        for name, (content, run) in tree.items()
    ]
    others = [(name, content, mode | 0o44) for name, content, mode in items]
    others += [
        (f"{folder}/", b"", FOLDER) for folder in {n.rpartition("/")[0] for n in tree} - {""}
    ]
    order.shuffle(others)
    with tempfile.TemporaryDirectory(dir=tmp_path) as work:
        first = _make(Path(work, "1"), zipped(items))
        second = _make(Path(work, "2"), zipped(others, date=(2020, 1, 1, 0, 0, 0)))
    assert first == second


def test_whatever_else_differs_counts(tmp_path: Path) -> None:
    trees: list[list[Item]] = [
        [("a", b"1", FILE)],
        [("a", b"2", FILE)],
        [("b", b"1", FILE)],
        [("a", b"1", FILE | 0o100)],
        [("a", b"1", LINK)],
        [("a", b"1", FILE), ("empty/", b"", FOLDER)],
        [],
    ]
    made = [_make(tmp_path / str(n), zipped(tree)) for n, tree in enumerate(trees)]
    assert len({record["digest"] for record in made}) == len(trees)
    assert len({record["uuid"] for record in made}) == len(trees)


def test_names_as_archivers_write_them(tmp_path: Path) -> None:
    dotted = _make(tmp_path / "1", zipped([("./", b"", FOLDER), ("./a//b", b"x", FILE)]))
    assert dotted == _make(tmp_path / "2", files({"a/b": b"x"}))
    # UTF-8 without the flag that says so, as Info-ZIP writes it.
    raw = bytearray(files({"é": b"x"}))
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = raw.index(signature) + offset
        raw[at : at + 2] = struct.pack("<H", 0)
    assert _make(tmp_path / "3", bytes(raw)) == _make(tmp_path / "4", files({"é": b"x"}))


@pytest.mark.parametrize(
    ("items", "why"),
    [
        ([("../x", b"", FILE)], "leads out"),
        ([("a/../../x", b"", FILE)], "leads out"),
        ([("a/../x", b"", FILE)], "leads out"),
        ([("/etc/x", b"", FILE)], "absolute"),
        ([("a\\b", b"", FILE)], "backslash"),
        ([("a\0b", b"", FILE)], "NUL"),
        ([("a" * 256, b"", FILE)], "too long"),
        ([("/".join(["abc"] * 300), b"", FILE)], "too long"),
        ([("a", b"1", FILE), ("a", b"2", FILE)], "twice"),
        ([("a", b"1", FILE), ("./a", b"2", FILE)], "twice"),
        ([("a/", b"", FOLDER), ("a", b"2", FILE)], "twice"),
        ([("a", b"1", FILE), ("a/b/c", b"2", FILE)], "folder too"),
        ([("a/b", b"1", FILE), ("a", b"..", LINK)], "folder too"),
        ([("a", b"/etc/passwd", LINK)], "absolute"),
        ([("a", b"../x", LINK)], "out of the code"),
        ([("top", b".", LINK), ("a", b"top/../x", LINK)], "out of the code"),
        ([("a", b"a", LINK)], "circle"),
        ([("a", b"", LINK)], "target"),
        ([("a", b"x" * 2000, LINK)], "target"),
        ([("a", b"\xff", LINK)], "UTF-8"),
        ([("dev", b"", stat.S_IFCHR | 0o666)], "neither"),
        ([("fifo", b"", stat.S_IFIFO | 0o666)], "neither"),
        ([("socket", b"", stat.S_IFSOCK | 0o666)], "neither"),
        ([("a/", b"", LINK)], "folder by its name"),
        ([("a/", b"content", FOLDER)], "content"),
    ],
)
def test_what_code_cannot_hold(tmp_path: Path, items: list[Item], why: str) -> None:
    with pytest.raises(InvalidRequest, match=why) as caught:
        _make(tmp_path / "x", zipped(items))
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]


@pytest.mark.parametrize("broken", ["", "no zip at all", "cut", "flipped", "encrypted", "lying"])
def test_broken_archives(tmp_path: Path, broken: str) -> None:
    archive = bytearray(files({"app.py": os.urandom(5000), "b.py": b"x"}))
    if broken in ("", "no zip at all"):
        archive = bytearray(broken.encode())
    elif broken == "cut":
        del archive[len(archive) // 2 :]
    elif broken == "flipped":
        archive[200] ^= 0xFF
    elif broken == "encrypted":
        archive[archive.index(b"PK\1\2") + 8] |= 1
    else:  # the directory says that the file is shorter than it is
        at = archive.index(b"PK\1\2") + 24
        archive[at : at + 4] = struct.pack("<I", 10)
    with pytest.raises(InvalidRequest, match=r"broken|encrypted") as caught:
        _make(tmp_path / "x", bytes(archive))
    assert caught.value.hint


def test_unusual_compression(tmp_path: Path) -> None:
    path = tmp_path / "b.zip"
    with ZipFile(path, "w", ZIP_BZIP2) as archive:
        archive.writestr("a", b"x")
    with pytest.raises(InvalidRequest, match="method 12"):
        _make(tmp_path / "x", path.read_bytes())


def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = files({"zeros": bytes(20 << 20)})
    with pytest.raises(InvalidRequest, match="250 times as many"):
        _make(tmp_path / "1", zeros)
    monkeypatch.setattr(entries, "MAX_CODE", 1 << 20)
    with pytest.raises(InvalidRequest, match="more than 1 MiB"):
        _make(tmp_path / "2", zeros)
    assert not list((tmp_path / "2/made/tree").iterdir())
    monkeypatch.setattr(entries, "MOST_ENTRIES", 3)
    with pytest.raises(InvalidRequest, match="more than 3 entries"):
        _make(tmp_path / "3", files({str(n): b"" for n in range(4)}))


def test_entries_that_share_their_bytes_are_counted(tmp_path: Path) -> None:
    """A bomb that is small by its own words: each entry is read, and what comes is counted."""
    out = tmp_path / "b.zip"
    with ZipFile(out, "w", ZIP_DEFLATED) as archive:
        archive.writestr("0", bytes(9 << 20))
        first = archive.filelist[0]
        for n in range(1, 5):
            other = ZipInfo("0")
            for name in first.__slots__:
                if hasattr(first, name):
                    setattr(other, name, getattr(first, name))
            other.orig_filename, other.filename = "0", f"{n}"
            archive.filelist.append(other)
    with pytest.raises(InvalidRequest):
        _make(tmp_path / "x", out.read_bytes())


def test_an_archive_that_is_too_big(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "MAX_CODE", 10)
    with pytest.raises(InvalidRequest, match="archive has"):
        _make(tmp_path / "x", files({"a": b"x"}))


def test_a_refusal_comes_out_of_the_process(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="leads out") as caught:
        asyncio.run(_image(tmp_path, files({"../x": b""})))
    assert caught.value.hint
    assert not (tmp_path / "x").exists()


def test_without_erofs_utils(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match=r"mkfs.erofs is not installed") as caught:
        asyncio.run(_image(tmp_path, files({"a": b"x"})))
    assert "erofs-utils" in caught.value.hint


def _program(folder: Path, text: str) -> None:
    path = folder / "mkfs.erofs"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("text", "kind", "why"),
    [
        ("echo '<E> erofs: No space left on device' >&2; exit 1", HostError, "no space"),
        ("echo '<E> erofs: File too large' >&2; exit 1", InvalidRequest, "as an image"),
        ("kill -XFSZ $$", InvalidRequest, "as an image"),
        ("echo oops >&2; exit 3", HostError, "oops"),
        ("exit 3", HostError, "exit code 3"),
    ],
)
def test_what_mkfs_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, kind: type[Exception], why: str
) -> None:
    _program(tmp_path, text)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(kind, match=why):
        asyncio.run(_image(tmp_path, files({"a": b"x"})))


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pack, "_mkfs", full)
    with pytest.raises(HostError, match="no space"):
        _make(tmp_path / "x", files({"a": b"x"}))


def test_it_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _program(tmp_path, "exec sleep 60")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(image, "PACK_SECONDS", 0.5)
    with pytest.raises(HostError, match=r"within 0.5 s"):
        asyncio.run(_image(tmp_path, files({"a": b"x"})))


def test_it_ends_with_its_caller(tmp_path: Path) -> None:
    """And so does mkfs.erofs."""
    started = tmp_path / "started"
    _program(tmp_path, f"echo $$ > {started}.part; mv {started}.part {started}; exec sleep 60")
    (tmp_path / "a.zip").write_bytes(files({"a": b"x"}))
    (tmp_path / "made").mkdir()
    caller = (
        "import os, subprocess, sys, time; "
        "subprocess.Popen([*sys.argv[1:], str(os.getpid())]); time.sleep(60)"
    )
    command = [sys.executable, "-c", caller, sys.executable]
    command += ["-m", "templated.drivers.code.pack", "a.zip", "made"]
    root = Path(pack.__file__).parents[3]
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(root)}
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while not started.exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
        assert process.stdout.read() == b""  # ends when the last holder has ended
    mkfs = Path("/proc", started.read_text().strip())
    end = time.monotonic() + 20
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while " Z " not in (mkfs / "stat").read_text():
            assert time.monotonic() < end
            time.sleep(0.02)


def test_the_placeholder_is_made_once(tmp_path: Path) -> None:
    first = asyncio.run(placeholder(tmp_path / "code"))
    made = first.path.stat()
    assert asyncio.run(placeholder(tmp_path / "code")) == first
    assert first.path.stat().st_ino == made.st_ino
    assert made.st_size == VIRTUAL_SIZE
    assert b"def handler(event, context)" in first.path.read_bytes()[: 1 << 16]
    assert sorted(path.name for path in (tmp_path / "code").iterdir()) == [
        "placeholder.img",
        "placeholder.json",
    ]
    (tmp_path / "code/placeholder.img").unlink()
    assert asyncio.run(placeholder(tmp_path / "code")) == first
