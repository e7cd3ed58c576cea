"""The users that VMs run as, and the memory that they cannot write."""

from __future__ import annotations

import fcntl
import grp
import mmap
import os
import pwd
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from templated.drivers import accounts
from templated.drivers.accounts import range_problem
from templated.drivers.hypervisor.process import Demotion
from templated.model.uids import UidRange, block_of
from templated.services.machines.generation import sealed_copy

FREE = block_of(b"a test")


def test_blocks() -> None:
    """Of each daemon another, always the same, and where nobody else has numbers."""
    blocks = {block_of(f"daemon {number}".encode()) for number in range(5)}
    assert len(blocks) == 5 and block_of(b"a test") == FREE
    for block in blocks:
        assert block.count == 65536 and 1879048192 <= block.first < 2**31 - block.count + 1
        assert block[0] == block.first and block[65535] in block
        assert block.first + block.count not in block


@pytest.mark.parametrize(
    "given",
    [
        {"first": 0, "count": 5},
        {"first": -1, "count": 5},
        {"first": 2**32 - 1, "count": 1},
        {"first": 2**32 - 3, "count": 5},
        {"first": 5000, "count": 0},
        {"first": 5000, "count": 65537},
        {"first": 5000},
        {"first": 5000, "count": 5, "last": 5004},
        {"first": "5000", "count": 5},
    ],
)
def test_refused(given: dict[str, object]) -> None:
    """Root, the number that stands for none, and what is no range."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(given, UidRange)


def test_a_free_range() -> None:
    """Numbers that nobody on this host has."""
    assert range_problem(FREE) == ""


def test_numbers_of_users_and_groups() -> None:
    """Those of this host's, wherever in the range."""
    user, group = pwd.getpwnam("nobody"), grp.getgrnam("nogroup")
    said = range_problem(UidRange(first=user.pw_uid - 5, count=10))
    assert said.startswith(f"user nobody has uid {user.pw_uid}")
    assert group.gr_gid != user.pw_uid or "nobody" in said


@pytest.mark.parametrize("row", ["x:{}:1", "x:{}:65536", "x:1:4294967290"])
def test_subordinate_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str) -> None:
    """A container manager may give them away; rows that say nothing are passed over."""
    file = tmp_path / "subuid"
    file.write_text("\nnonsense\nx:y:z\nx:5\n" + row.format(FREE[7]) + "\n")

    def path(name: str) -> Path:
        return file if name == "/etc/subuid" else Path(name)

    monkeypatch.setattr(accounts, "Path", path)
    assert range_problem(FREE) == f"/etc/subuid gives x ids that are among {FREE}"


def test_a_namespace_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container of a user."""
    file = tmp_path / "map"
    file.write_text("         0     100000      65536\n")
    monkeypatch.setattr(accounts, "Path", lambda _: file)
    assert "do not exist in this user namespace" in range_problem(FREE)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_demotion() -> None:
    """Another user and group for good, with no capability, and with the groups that are named."""
    for groups in ((), (12345,)):
        command = [*Demotion(FREE[3], groups).command(), "cat", "/proc/self/status"]
        said = subprocess.run(command, capture_output=True, check=True, text=True).stdout
        fields = dict(line.split(":\t", 1) for line in said.splitlines() if ":\t" in line)
        assert fields["Uid"].split() == fields["Gid"].split() == [str(FREE[3])] * 4
        assert fields["Groups"].split() == [str(group) for group in groups]
        for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(fields[kind], 16) == 0
        assert fields["NoNewPrivs"] == "1"


def _holes(size: int, *data: tuple[int, bytes]) -> Callable[[Path], bytes]:
    def write(path: Path) -> bytes:
        with open(path, "wb") as file:
            file.truncate(size)
            for offset, content in data:
                file.seek(offset)
                file.write(content)
        return path.read_bytes()

    return write


@pytest.mark.parametrize(
    "write",
    [
        _holes(0),
        _holes(5, (0, b"whole")),
        _holes(1 << 20),
        _holes(1 << 20, (0, b"begin"), (300_000, b"middle" * 5000), ((1 << 20) - 3, b"end")),
        _holes(3 << 20, (1 << 20, os.urandom(1 << 20))),
    ],
)
def test_a_sealed_copy(tmp_path: Path, write: Callable[[Path], bytes]) -> None:
    """The same content, holes as well; nobody can change it, not even who made it."""
    source = tmp_path / "memory"
    content = write(source)
    copy = sealed_copy(source)
    try:
        assert os.pread(copy, len(content) + 1, 0) == content
        blocks = os.stat(source).st_blocks
        assert os.fstat(copy).st_blocks <= max(blocks, 8)
        assert fcntl.fcntl(copy, fcntl.F_GET_SEALS) == 0xF
        with pytest.raises(PermissionError):
            os.pwrite(copy, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(copy, len(content) + 1)
        if content:
            with pytest.raises(PermissionError):
                mmap.mmap(copy, len(content), mmap.MAP_SHARED)
            with mmap.mmap(copy, len(content), mmap.MAP_PRIVATE) as mapped:
                mapped[0] = 1
            assert os.pread(copy, 1, 0) == content[:1]
    finally:
        os.close(copy)
