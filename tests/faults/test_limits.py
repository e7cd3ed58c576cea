"""A host that has run out: of disk, of memory files, of descriptors, of processes."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from templated.errors import TemplatedError
from tests.faults.rig import TEMPLATE, VICTIM, Rig, error_line, no_defect

pytestmark = pytest.mark.real
PATHS = ("direct", "standby", "warm", "cold")


@contextmanager
def descriptors(rig: Rig, more: int) -> Iterator[None]:
    """In the block the daemon can open so many more files."""
    process = rig.daemon.process
    assert process is not None
    before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    # The limit is on numbers, and a closed file's number is used again: fill up no gaps.
    highest = max(int(name) for name in os.listdir(f"/proc/{process.pid}/fd"))
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (highest + 1 + more, before[1]))
    try:
        yield
    finally:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)


@pytest.mark.sampled(0.2)
@pytest.mark.parametrize("more", range(1, 18))
def test_no_descriptor(rig: Rig, more: int, count: Callable[[], None]) -> None:
    """A start that runs out of descriptors anywhere gives all of them back."""
    rig.clone()
    rig.remove()
    rig.nothing_left()
    before = rig.descriptors()
    with descriptors(rig, more):
        assert no_defect(rig.clone)
    rig.remove()
    rig.nothing_left()
    rig.clone()
    rig.remove()
    rig.nothing_left()
    rig.no_more_descriptors(before)
    count()
    rig.clean = True


@pytest.mark.parametrize("path", ["direct", "cold"])
@pytest.mark.parametrize("kind", ["error:EAGAIN", "error:ENOMEM", "error:EMFILE"])
def test_no_process(rig: Rig, path: str, kind: str, count: Callable[[], None]) -> None:
    """A fork that fails is one line."""
    rig.ready_for(path)
    place = "process.spawn" if path == "direct" else "program.start"
    with rig.failing(place, kind=kind):
        line = error_line(lambda: rig.clone(path))
    assert "cannot start" in line
    rig.nothing_left()
    count()
    rig.clean = True


@contextmanager
def full(directory: Path, left: int) -> Iterator[None]:
    """In the block the file system has no more than `left` bytes free."""
    ballast = directory / "ballast"
    try:
        with open(ballast, "wb") as file, contextlib.suppress(OSError):
            # In small steps, as the daemon may write meanwhile: what is there no more is no matter.
            while (free := _free(directory)) > left:
                size = file.seek(0, os.SEEK_END)
                os.posix_fallocate(file.fileno(), size, min(free - left, 1 << 20))
        yield
    finally:
        ballast.unlink()


def _free(directory: Path) -> int:
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


@pytest.mark.sampled
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("left", [0, 64 << 10, 512 << 10])
def test_full_state_dir(small: Rig, path: str, left: int, count: Callable[[], None]) -> None:
    """No row, no layer and no log can be written: one line, and all works when there is space."""
    small.ready_for(path)
    with full(small.daemon.state, left):
        # A paused VM is claimed without a byte, but for its row.
        assert no_defect(lambda: small.clone(path))
        with contextlib.suppress(TemplatedError):
            small.remove()
    small.remove()
    small.pools()
    small.nothing_left()
    small.clone()
    small.remove()
    count()
    small.clean = True


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_removal_on_a_full_state_dir(small: Rig, count: Callable[[], None]) -> None:
    """A removal that cannot be written is one line, and can be repeated."""
    small.clone()
    with full(small.daemon.state, 0):
        assert no_defect(small.remove)
    small.remove()
    small.nothing_left()
    count()
    small.clean = True


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
@pytest.mark.parametrize("path", PATHS)
def test_full_shm_dir(small: Rig, path: str, count: Callable[[], None]) -> None:
    """Clones write nothing there: they start. A build is refused before anything is made."""
    with full(small.daemon.shm, 0):
        small.ready_for(path)
        small.clone(path)
        operation = small.client.build_template(TEMPLATE)
        *_, end = small.client.operation_events(operation.id)
        assert "are free" in str(end), end
    small.remove(VICTIM)
    small.pools()
    small.nothing_left()
    count()
    small.clean = True
