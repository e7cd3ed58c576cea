"""The lab's disk, kernel and initial RAM disk: made once, and kept by the digest of the recipe.

It is a Debian 13 with all packages of scripts/setup, the project's dependencies, also as wheels,
and an archive for images of guests, so that the lab needs no network.
"""

from __future__ import annotations

import configparser
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.lab.archive import make_archive

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CHECKOUT = "/opt/templated"
"""Where the operator's guide has the project."""
SUITE = "trixie"
PYTHON = "3.13"
_SIZE = 10 << 30
# Seconds. Other branches of the project have other recipes.
_KEPT = 7 * 86400.0
# Beside those of scripts/setup. The kernel is the generic one: the cloud kernel has no kvm_amd.
_PACKAGES = [
    "linux-image-amd64",
    "initramfs-tools",
    "zstd",
    "systemd-sysv",
    "dbus",
    "udev",
    "kmod",
    "procps",
    "iproute2",
    "openssh-server",
    "apparmor",
    "less",
    "vim-tiny",
]
_EXCLUDED = ("doc/*", "man/*", "locale/*", "info/*")
# Unpacking an initial RAM disk with every driver takes long under emulation.
_INITRAMFS = {
    "conf.d/lab": "MODULES=list\nCOMPRESS=zstd\n",
    "hooks/lab": '#!/bin/sh\n[ "$1" = prereqs ] && exit 0\n'
    ". /usr/share/initramfs-tools/hook-functions\nmanual_add_modules virtio_pci virtio_blk ext4\n",
}
_NAMESPACE = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
# What pip takes on the lab's Debian.
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64", "any")


@dataclass(frozen=True)
class Image:
    """A directory with the files that a lab is started from. Nothing writes to them."""

    path: Path

    @property
    def disk(self) -> Path:
        """The root disk, raw."""
        return self.path / "disk.raw"

    @property
    def kernel(self) -> Path:
        """Debian's kernel."""
        return self.path / "vmlinuz"

    @property
    def initrd(self) -> Path:
        """Its initial RAM disk."""
        return self.path / "initrd"

    @property
    def key(self) -> Path:
        """The private SSH key that root of the lab takes."""
        return self.path / "key"


def cache() -> Path:
    """Where images are kept; TEMPLATED_TEST_CACHE names another place."""
    return Path(os.environ.get("TEMPLATED_TEST_CACHE", "/var/cache/templated-tests")) / "lab"


def recipe() -> str:
    """The digest of all that decides what is in the image."""
    parts = [(HERE / name).read_bytes() for name in ("image.py", "archive.py", "customize.sh")]
    parts += [" ".join((*setup_packages(), *requirements())).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def setup_packages() -> list[str]:
    """The packages that scripts/setup installs, those for tests too."""
    script = (ROOT / "scripts/setup").read_text()
    lists = re.findall(r"^(?:test_)?packages=\((.*?)^\)", script, re.MULTILINE | re.DOTALL)
    assert len(lists) == 2, "scripts/setup has two lists of packages"
    return re.sub("#.*", "", "".join(lists)).split()


def requirements() -> list[str]:
    """The Python packages of a host that serves, and what builds the project itself."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lines = [line.strip() for line in parser["options"]["install_requires"].splitlines()]
    named = [line for line in lines if line and not line.startswith("#")]
    return [*named, "setuptools>=68", "wheel>=0.40"]


def find() -> Image | None:
    """The image of today's recipe, when it has been made."""
    path = cache() / recipe()
    return Image(path) if path.exists() else None


def obtain(say: Callable[[str], None] = lambda _: None) -> Image:
    """The image of today's recipe; made when there is none, which takes a few minutes.

    Raises CalledProcessError when a step fails; its output is in `make.log` of the cache then. Only
    one process makes an image at a time; one that was interrupted leaves a directory that the
    next one removes.
    """
    with _locked():
        _remove_unused()
        image = find()
        if image is None:
            say("making the lab's image; this takes a few minutes")
            image = _make(cache() / recipe(), say)
        os.utime(image.path)
        return image


def clean() -> None:
    """Remove all images. A lab that runs has its files open, and goes on."""
    with _locked():
        for path in cache().iterdir():
            if path.is_dir():
                shutil.rmtree(path)


def _remove_unused() -> None:
    """Remove images of other recipes that nobody used for a while, and what interruptions left."""
    for path in cache().iterdir():
        unused = time.time() - path.stat().st_mtime > _KEPT
        if path.is_dir() and (unused or path.suffix == ".part"):
            shutil.rmtree(path)


@contextmanager
def _locked() -> Iterator[None]:
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(target: Path, say: Callable[[str], None]) -> Image:
    (cache() / "make.log").unlink(missing_ok=True)
    work = target.with_suffix(".part")
    (work / "out").mkdir(parents=True)
    image = Image(work / "out")
    _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", str(image.key))
    (work / "archive").mkdir()
    with ThreadPoolExecutor() as parts:
        # The three wait for downloads, mostly.
        started = [
            parts.submit(_make_root, work / "root"),
            parts.submit(make_archive, _do, work / "archive", work / "srv", work / "archive.asc"),
            parts.submit(_make_wheels, work),
        ]
        for part, name in zip(started, ("Debian 13", "archive for guests", "wheels"), strict=True):
            part.result()
            say(f"{name}: done")
    _furnish(work, image)
    _make_disk(work / "root", image.disk)
    image.path.rename(target)
    shutil.rmtree(work)
    return Image(target)


def _make_root(root: Path) -> None:
    initramfs = [
        f"--essential-hook=mkdir -p $1/etc/initramfs-tools/{name.split('/')[0]};"
        f" printf '%s' '{text}' >$1/etc/initramfs-tools/{name};"
        f" chmod 755 $1/etc/initramfs-tools/{name}"
        for name, text in _INITRAMFS.items()
    ]
    _do(
        *("mmdebstrap", "--mode=root", "--variant=apt", "--format=dir", "--quiet"),
        f"--include={','.join((*_PACKAGES, *setup_packages()))}",
        '--aptopt=Acquire::Languages "none"',
        "--dpkgopt=force-unsafe-io",
        *(f"--dpkgopt=path-exclude=/usr/share/{pattern}" for pattern in _EXCLUDED),
        *initramfs,
        f"--customize-hook={HERE}/customize.sh",
        *(SUITE, str(root)),
    )


def _make_wheels(work: Path) -> None:
    """The project's dependencies for the lab's Python, which need not be ours."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # What comes as source only becomes a wheel here, which the lab can use when it is pure Python.
    _do(*pip, "wheel", "--wheel-dir", str(work / "ours"), *requirements())
    for wheel in (work / "ours").glob("*-none-any.whl"):
        wheel.rename(work / "archive" / wheel.name)
    _do(
        *(*pip, "download", "--dest", str(work / "wheels"), "--find-links", str(work / "archive")),
        *("--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}"),
        *(f"--abi={abi}" for abi in (f"cp{PYTHON.replace('.', '')}", "abi3", "none")),
        *(f"--platform={platform}" for platform in _PLATFORMS),
        *requirements(),
    )
    for wheel in (work / "wheels").glob("*.whl"):
        _store(wheel)


def _store(wheel: Path) -> None:
    """Pack a wheel without compression, which makes its installation quicker under emulation."""
    stored = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as before, zipfile.ZipFile(stored, "w") as after:
        for entry in before.infolist():
            content = before.read(entry)
            entry.compress_type = zipfile.ZIP_STORED
            after.writestr(entry, content)
    stored.rename(wheel)


def _furnish(work: Path, image: Image) -> None:
    """Put the archive, its key, the wheels and the SSH key into the root; take the kernel out."""
    root = work / "root"
    for folder in (work / "srv").iterdir():
        folder.rename(root / "srv" / folder.name)
    (work / "wheels").rename(root / "srv/wheels")
    shutil.copy(work / "archive.asc", root / "etc/apt/trusted.gpg.d/lab.asc")
    keys = root / "root/.ssh"
    keys.mkdir(mode=0o700, exist_ok=True)
    shutil.copy(image.key.with_suffix(".pub"), keys / "authorized_keys")
    _install(root)
    shutil.copy(next((root / "boot").glob("vmlinuz-*")), image.kernel)
    shutil.copy(next((root / "boot").glob("initrd.img-*")), image.initrd)


def _install(root: Path) -> None:
    """Put the dependencies into the checkout's .venv; under emulation pip takes minutes for them.

    The guide's `scripts/setup` goes on from there. That it does all of it is seen in Debian 13.
    """
    venv = f"{CHECKOUT}/.venv"
    # With nothing of this host's environment, where pip may be told of other places.
    inside = ("chroot", str(root), "env", "-i", "PATH=/usr/sbin:/usr/bin", "HOME=/root")
    _do(*inside, "/usr/bin/python3", "-m", "venv", venv)
    pip = (f"{venv}/bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check")
    _do(*inside, *pip, "install", *requirements())


def _make_disk(root: Path, disk: Path) -> None:
    with disk.open("wb") as file:
        file.truncate(_SIZE)
    _do("mkfs.ext4", "-q", "-F", "-m", "0", "-N", "400000", "-d", str(root), str(disk))


def _do(*command: str) -> None:
    """Run a step. All of it ends with us, also when we are killed, and its mounts vanish."""
    with (cache() / "make.log").open("ab") as log:
        subprocess.run(
            [*("setpriv", "--pdeathsig=KILL"), *_NAMESPACE, *command],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            timeout=1800,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
