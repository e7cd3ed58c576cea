"""Disk layer 1: Debian images, built once and kept by the digest of their spec; and copied files.

STATE/images/<digest>/disk.qcow2   read-only base of every overlay
                      vmlinuz, initrd    of one that is started by its kernel
                      seed.img           of one with a seed for cloud-init
                      image.json
STATE/images/.lock-<digest>        flock: one build of an image at a time
STATE/images/.build-<digest>-XXXX  a build under way, renamed when it is complete
STATE/images/build-<digest>.log    kept when the build failed
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from templated.drivers.host.capabilities import CAP_SYS_ADMIN, CAP_SYS_CHROOT, has_capabilities
from templated.drivers.host.files import fsync
from templated.drivers.image.build import GUEST_FILES, ImageBuild
from templated.drivers.image.copied import ImageCopy
from templated.drivers.image.namespaces import Progress, remove_tree
from templated.drivers.image.qcow2 import refused
from templated.drivers.image.stock import StockBuild
from templated.errors import BuildError, HostError
from templated.model.spec import ImageSpec, stored

BUILDER_VERSION = 4
_LOCK_INTERVAL = 0.2

_IMAGES, _DISK, _KERNEL, _INITRD, _SEED = "images", "disk.qcow2", "vmlinuz", "initrd", "seed.img"


@dataclass(frozen=True)
class Image:
    """A complete image. Its files are never written again; `built_at` is seconds since 1970."""

    digest: str
    disk: Path
    kernel: Path | None
    """None, as `initrd`: it boots itself."""
    initrd: Path | None
    built_at: float
    spec: ImageSpec


class _Record(msgspec.Struct, frozen=True):
    """image.json."""

    digest: str
    built_at: float
    spec: ImageSpec


def image_digest(spec: ImageSpec) -> str:
    """16 hex digits over the spec, the guest's files and the builder's version. Blocks.

    A new agent is a new image. A newer package in the archive is not: remove the image for that.
    Of a copied one, over the file's size and time of change in place of our files. Raises
    BuildError when there is no such file.
    """
    canonical = {**stored(spec), "packages": sorted(set(spec.packages))}
    if spec.boots_itself:
        canonical["file"] = _state(Path(spec.path)) if spec.path else ()
        whole = msgspec.json.encode([canonical, BUILDER_VERSION], order="deterministic")
        return hashlib.sha256(whole).hexdigest()[:16]
    content = hashlib.sha256(msgspec.json.encode(canonical, order="deterministic"))
    content.update(f"\0{BUILDER_VERSION}\0".encode())
    for path in sorted(GUEST_FILES.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            name = str(path.relative_to(GUEST_FILES))
            content.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return content.hexdigest()[:16]


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise refused(path, error.strerror or str(error)) from error
    return status.st_size, status.st_mtime_ns


def image_seed(disk: Path) -> Path:
    """What cloud-init reads, of the image whose disk is given, and which has a seed."""
    return disk.with_name(_SEED)


def image_disk(root: Path, digest: str) -> Path:
    """Disk layer 1 of the image in the state directory `root`, whether it is there or not."""
    return root / _IMAGES / digest / _DISK


def lacks_rights() -> bool:
    """Whether this is root without the capabilities that mmdebstrap needs, as under systemd.

    Any other user builds in a user namespace, and needs none of them. capabilities(7).
    """
    if os.geteuid() != 0:
        return False
    return not has_capabilities(CAP_SYS_CHROOT, CAP_SYS_ADMIN)


class ImageStore:
    """The images under `root/images`. Several processes may use one store."""

    def __init__(self, root: Path) -> None:
        self._folder = root / _IMAGES

    def get(self, digest: str) -> Image | None:
        """The image, or None when it is not there or not complete."""
        folder = self._folder / digest
        try:
            record = msgspec.json.decode((folder / "image.json").read_bytes(), type=_Record)
        except (OSError, msgspec.DecodeError, msgspec.ValidationError):
            return None
        spec = record.spec
        parts = () if spec.boots_itself else (_KERNEL, _INITRD)
        names = (_DISK, *parts, *((_SEED,) if spec.seed else ()))
        if record.digest != digest or not all((folder / name).is_file() for name in names):
            return None
        kernel, initrd = (folder / name for name in parts) if parts else (None, None)
        return Image(digest, folder / _DISK, kernel, initrd, record.built_at, spec)

    def list(self) -> list[Image]:
        """The complete images, oldest first."""
        if not self._folder.is_dir():
            return []
        names = [path.name for path in self._folder.iterdir() if not path.name.startswith(".")]
        images = [image for name in names if (image := self.get(name)) is not None]
        return sorted(images, key=lambda image: image.built_at)

    def any_kernel(self) -> tuple[Path, Path] | None:
        """Kernel and initrd of the newest image that has them; None when none has."""
        for image in reversed(self.list()):
            if image.kernel is not None and image.initrd is not None:
                return image.kernel, image.initrd
        return None

    async def kernel_for(self, image: Image) -> tuple[Path, Path]:
        """Kernel and initrd that can be started by themselves: of this image, or of another.

        Raises as `ensure` does, and HostError when one is missing and this process cannot make it.
        """
        if image.kernel is not None and image.initrd is not None:
            return image.kernel, image.initrd
        found = await asyncio.to_thread(self.any_kernel)
        if found is None and lacks_rights():
            raise HostError(
                "an image of ours is needed to find out whether guests run under KVM, there is "
                "none, and this daemon has not the rights to make one",
                hint="run: systemctl start templated-image@python-fn; or set accel: kvm or tcg",
            )
        if found is None:
            await self.ensure(ImageSpec(), on_progress=lambda _: None)
            found = self.any_kernel()
        assert found is not None
        return found

    async def ensure(
        self, spec: ImageSpec, *, on_progress: Progress, timeout: float = 900.0
    ) -> Image:
        """The image of `spec`, built when it is not there; `timeout` in seconds for all of it.

        Raises HostError when the host lacks a program or refuses a directory, BuildError when a
        step fails or the time is over. A failure leaves the log, and nothing else of the build.
        """
        digest = await asyncio.to_thread(image_digest, spec)
        if image := self.get(digest):
            return image
        try:
            async with (
                asyncio.timeout(timeout),
                self._locked(digest, on_progress) as lock,
            ):
                await self._sweep(digest)
                return self.get(digest) or await self._build(spec, digest, lock, on_progress)
        except TimeoutError:
            raise BuildError(
                f"the image was not built within {timeout:g} s",
                hint=f"check the network and {self._log(digest)}, then try again",
            ) from None
        except OSError as error:
            raise HostError(
                f"the image cannot be stored: {error}",
                hint=f"check {self._folder} and its space",
            ) from error

    def _log(self, digest: str) -> Path:
        return self._folder / f"build-{digest}.log"

    @contextlib.asynccontextmanager
    async def _locked(self, digest: str, on_progress: Progress) -> AsyncIterator[int]:
        """Hold the image's lock. The build's programs inherit it: those that a killed builder left
        keep other builds away until they have ended too."""
        self._folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        lock = os.open(
            self._folder / f".lock-{digest}",
            os.O_RDWR | os.O_CREAT | os.O_CLOEXEC,
            0o600,
        )
        try:
            waiting = False
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not waiting:
                        on_progress("waiting for another build of this image")
                    waiting = True
                    await asyncio.sleep(_LOCK_INTERVAL)
            yield lock
        finally:
            os.close(lock)

    async def _sweep(self, digest: str) -> None:
        """Remove the files that killed builds of this image have left; the lock is held."""
        for path in self._folder.glob(f".build-{digest}-*"):
            await remove_tree(path)

    async def _build(self, spec: ImageSpec, digest: str, lock: int, on_progress: Progress) -> Image:
        work = Path(tempfile.mkdtemp(prefix=f".build-{digest}-", dir=self._folder))
        log = self._log(digest)
        try:
            build: ImageBuild | ImageCopy
            if spec.path is not None:
                build = ImageCopy(spec, work, on_progress)
            else:
                kind = StockBuild if spec.boot == "disk" else ImageBuild
                build = kind(spec, digest, work, log, lock, on_progress)
            await build.run()
            # Its digest holds the file's size and time of change: who writes meanwhile is noticed.
            if spec.path and await asyncio.to_thread(image_digest, spec) != digest:
                problem = "it was changed while it was copied"
                raise refused(Path(spec.path), problem, "shut down who uses it, and try again")
            on_progress("finish")
            record = _Record(digest, time.time(), spec)
            await asyncio.to_thread(self._publish, build.out, record)
            log.unlink(missing_ok=True)
        finally:
            await remove_tree(work)
        image = self.get(digest)
        if image is None:
            raise BuildError("the finished image is not readable", hint=f"check {self._folder}")
        return image

    def _publish(self, out: Path, record: _Record) -> None:
        """Make the files read-only and durable, then give the directory its name."""
        fields = {**msgspec.to_builtins(record), "spec": stored(record.spec)}
        (out / "image.json").write_bytes(msgspec.json.encode(fields) + b"\n")
        for path in (*out.iterdir(), out):
            path.chmod(0o755 if path == out else 0o444)
            fsync(path)
        target = self._folder / record.digest
        if target.exists():
            shutil.rmtree(target)  # incomplete, or `get` had found it
        out.rename(target)
        fsync(self._folder)
