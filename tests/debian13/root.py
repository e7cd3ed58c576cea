"""A Debian 13 to run the checkout in: made once, cached, entered in namespaces of its own.

The root is what a fresh Debian has after `scripts/setup` alone. It is made anew when something
that decides on it has changed. Whoever runs in it writes to memory: nothing is left of a run,
however it ends, as the kernel ends its processes and mounts with its namespaces.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

CHECKOUT = Path(__file__).parents[2]
SUITE = "trixie"
_RECIPE = ("scripts/setup", "setup.cfg", "pyproject.toml", "tests/debian13/enter")
# mknod is not needed: /dev is the host's.
_BOOTSTRAP = ["mmdebstrap", "--mode=root", "--variant=minbase", "--skip=output/mknod", SUITE]
_MADE_WITHIN = 1800.0
# Who waits for another process that makes it.
_PAUSE = 0.5
_ENDS_WITHIN = 40.0


def cache_directory() -> Path:
    """Where roots are kept between runs."""
    return Path(os.environ.get("TEMPLATED_TEST_CACHE", "/var/cache/templated-tests"))


def digest() -> str:
    """Names a root by all that decides on what is in it."""
    content = hashlib.sha256(" ".join(_BOOTSTRAP).encode())
    for name in _RECIPE:
        content.update((CHECKOUT / name).read_bytes())
    return content.hexdigest()[:16]


@contextmanager
def debian_root() -> Iterator[Path]:
    """The root, made when it is not there. It stays while it is in use here."""
    cache = cache_directory()
    cache.mkdir(mode=0o755, parents=True, exist_ok=True)
    root = cache / f"debian13-{digest()}"
    with _lock(root) as lock:
        _wait_for(lock, fcntl.LOCK_SH)
        if not root.exists():
            _wait_for(lock, fcntl.LOCK_EX)
            if not root.exists():  # another run may have made it meanwhile
                _remove_others(cache, root)
                _make(root)
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield root


def run(root: Path, *command: str, output: IO[bytes], timeout: float, keep: bool = False) -> int:
    """Run a command in the root, and return its exit code.

    Raises subprocess.TimeoutExpired; nothing of the command runs any more then.
    """
    changes = "keep" if keep else "discard"
    inside = [str(root), str(CHECKOUT), changes, *command]
    with subprocess.Popen(
        [*_namespaces(), "sh", str(Path(__file__).with_name("enter")), *inside],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=_environment(),
        process_group=0,
    ) as child:
        try:
            return child.wait(timeout)
        except BaseException:
            # So that it can clean up: control groups are the host's, and outlive its namespaces.
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(child.pid, signal.SIGINT)
                child.wait(_ENDS_WITHIN)
            child.kill()
            raise


def _namespaces() -> list[str]:
    # The first process of the namespace dies with unshare, and unshare with this process.
    unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation=private"]
    return ["setpriv", "--pdeathsig=KILL", "--", *unshare, "--"]


def _environment() -> dict[str, str]:
    """Ours, without what names places of this host."""
    dropped = ("TEMPLATED_", "VIRTUAL_ENV", "PYTEST_", "TMPDIR")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    # A mirror may have a certificate that only this host knows.
    certificates = "/etc/ssl/certs/ca-certificates.crt"
    if Path(certificates).exists():
        named = [name for name, value in kept.items() if value == certificates]
        kept |= dict.fromkeys(["PIP_CERT", *named], "/run/host-certificates.crt")
    return {
        **kept,
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
    }


def _make(root: Path) -> None:
    partial = root.with_suffix(".part")
    log = root.with_suffix(".log")
    _remove(partial)
    try:
        with log.open("wb") as output:
            made = subprocess.run(
                [*_namespaces(), *_BOOTSTRAP, str(partial)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=_MADE_WITHIN,
                check=False,
            )
            done = made.returncode == 0 and not run(
                partial, "scripts/setup", output=output, timeout=_MADE_WITHIN, keep=True
            )
        if not done:
            lines = log.read_text(errors="replace").splitlines()[-20:]
            raise RuntimeError("\n".join(["Debian 13 could not be made:", *lines]))
        partial.rename(root)
    finally:
        _remove(partial)
        log.unlink(missing_ok=True)


def _remove_others(cache: Path, root: Path) -> None:
    """Remove roots of other recipes that nobody uses."""
    for lock_file in cache.glob("debian13-*.lock"):
        other = lock_file.with_suffix("")
        if other == root:
            continue
        with _lock(other) as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(other)
            _remove(other.with_suffix(".part"))


def _remove(tree: Path) -> None:
    if tree.exists():
        shutil.rmtree(tree)


@contextmanager
def _lock(root: Path) -> Iterator[IO[bytes]]:
    with open(root.with_suffix(".lock"), "ab") as file:
        yield file


def _wait_for(lock: IO[bytes], kind: int) -> None:
    deadline = time.monotonic() + _MADE_WITHIN
    while True:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError("another run did not finish making Debian 13") from None
            time.sleep(_PAUSE)
