"""How an image is made: mmdebstrap, an initial RAM disk, mkfs.ext4, qemu-img.

Programs that must see the owners of files run in the namespaces of `namespaces.py`. The rest
writes into the root directly, since root's files in the image belong to the user outside.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import IO

from templated.drivers.image.initramfs import build_initramfs, driver_order
from templated.drivers.image.namespaces import Progress, check_tools, start
from templated.errors import BuildError
from templated.model.spec import ImageSpec
from templated.model.units import size_bytes

GUEST_FILES = Path(__file__).parents[2] / "guest"
PROGRAMS = ("agent", "runtime")
PACKAGES = ("busybox-static", "python3")
# Commands that people use and a small Debian root lacks: links to busybox, unless a package has
# the name.
APPLETS = (
    "clear free fuser hexdump httpd ifconfig ip killall less lsof mount nc netstat nslookup pgrep "
    "ping pkill pmap ps route sysctl telnet top traceroute tree udhcpc umount unzip uptime vi "
    "watch wget xxd"
)

# Fetches the kernel without installing it: that would pull initramfs-tools into the guest. Runs
# outside the new root, with its apt configuration (mmdebstrap(1), HOOKS).
_KERNEL_HOOK = (
    'export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"; '
    "name=$(apt-cache depends --important {package} |"
    " sed -n 's/^ *Depends: *\\(linux-image-[^ ]*\\)$/\\1/p' | head -n1); "
    'cd {folder} && apt-get -qq download "${{name:-{package}}}"'
)
_EXCLUDED = ("doc/*", "man/*", "locale/*", "info/*", "lintian/*", "bash-completion/*")
_GENERIC = re.compile(
    r"E: (run_|setup |Some index files |mmdebstrap |.* failed(: |$)|.*Sub-process .* returned)"
)


class ImageBuild:
    """One build in `work`, a directory of its own. `run` leaves the files in `work/out`.

    Nothing outside `work` and `log` is written; removing `work` is the caller's part.
    """

    def __init__(
        self,
        spec: ImageSpec,
        digest: str,
        work: Path,
        log: Path,
        lock: int,
        progress: Progress,
    ) -> None:
        self._spec, self._digest, self._work, self._log = spec, digest, work, log
        self._lock = lock
        self._progress = progress
        self.out = work / "out"
        self._root = work / "root"
        self._kernel = work / "kernel"

    async def run(self) -> None:
        """Make disk.qcow2, vmlinuz and initrd.

        Raises HostError when a tool is missing and BuildError, with the log named in its hint,
        when a step fails. When cancelled, every process of the build is killed first.
        """
        check_tools()
        for folder in (self.out, self._kernel):
            folder.mkdir(mode=0o755)
        with self._log.open("wb") as log:
            self._progress("packages")
            package, target = shlex.quote(self._spec.kernel), shlex.quote(str(self._kernel))
            hook = _KERNEL_HOOK.format(package=package, folder=target)
            small = [f"--dpkgopt=path-exclude=/usr/share/{pattern}" for pattern in _EXCLUDED]
            small.append("--dpkgopt=path-include=/usr/share/doc/*/copyright")
            await self._bootstrap(log, "essential", PACKAGES, *small, f"--customize-hook={hook}")
            self._progress("kernel")
            await self._unpack_kernel(log)
            await asyncio.to_thread(self._customize)
            await self._compile_programs(log)
            self._progress("initrd")
            await asyncio.to_thread(self._write_initrd)
            self._progress("root disk")
            await self._write_disk(log)

    async def _bootstrap(
        self, log: IO[bytes], variant: str, packages: Sequence[str], *options: str
    ) -> None:
        """Make the root of a Debian with these packages and the spec's."""
        command = [
            "mmdebstrap",
            "--mode=root",  # of the namespace
            f"--variant={variant}",
            "--format=dir",
            "--skip=output/mknod",  # not allowed in a user namespace; the guest has a devtmpfs
            f"--include={','.join((*packages, *self._spec.packages))}",
            # The user _apt cannot reach into a private directory.
            '--aptopt=APT::Sandbox::User "root"',
            '--aptopt=Acquire::Languages "none"',
            '--aptopt=Acquire::Retries "2"',
            '--aptopt=Acquire::http::Timeout "30"',
            *options,
            self._spec.suite,
            str(self._root),
            *([self._spec.mirror] if self._spec.mirror else []),
        ]
        async for line in self._lines(command, log, namespace=True):
            if line.startswith("I: ") and "hook" not in line:
                self._progress(f"packages: {line[3:]}")

    async def _unpack_kernel(self, log: IO[bytes]) -> None:
        packages = sorted(self._kernel.glob("*.deb"))
        if len(packages) != 1:
            raise BuildError(
                f"{self._spec.kernel} is not a kernel package",
                hint="set image.kernel to a package such as linux-image-cloud-amd64",
            )
        await self._do(["dpkg-deb", "-x", str(packages[0]), str(self._kernel)], log)
        for image in self._kernel.glob("boot/vmlinuz-*"):
            shutil.copyfile(image, self.out / "vmlinuz")
        if not (self.out / "vmlinuz").exists():
            raise BuildError(
                f"{packages[0].name} holds no /boot/vmlinuz",
                hint="set image.kernel to a package such as linux-image-cloud-amd64",
            )

    def _write_initrd(self) -> None:
        script = (GUEST_FILES / "initrd.sh").read_bytes()
        busybox = _in_root(self._root, "bin/busybox").read_bytes()
        content = build_initramfs(script, busybox, driver_order(self._kernel))
        (self.out / "initrd").write_bytes(content)

    def _customize(self) -> None:
        """Put init, our programs and neutral files into the root; nothing unique stays in it."""
        root = self._root
        folder = root / "usr/lib/templated"
        etc = root / "etc/templated"
        programs = [folder / name for name in PROGRAMS]
        for path in (folder, *programs, etc, etc / "identity.d", root / "var/task"):
            path.mkdir()
            path.chmod(0o755)
        for program in programs:
            for path in (GUEST_FILES / program.name).glob("*.py"):
                install(program / path.name, path.read_bytes(), 0o644)
        install(folder / "rcS", (GUEST_FILES / "rcS").read_bytes(), 0o755)
        install(root / "etc/inittab", (GUEST_FILES / "inittab").read_bytes(), 0o644)
        install(root / "etc/hosts", b"127.0.0.1 localhost\n", 0o644)
        install(root / "etc/hostname", b"templated\n", 0o644)
        for name in ("etc/machine-id", "etc/resolv.conf"):
            install(root / name, b"", 0o644)
        self._remove_unique()
        self._link_applets()

    def _remove_unique(self) -> None:
        """Remove what packages made for this root alone, and what they left behind."""
        for pattern in (
            "etc/ssh/ssh_host_*",
            "var/lib/dbus/machine-id",
            "var/lib/systemd/random-seed",
            "var/cache/apt/*.bin",
            "var/cache/debconf/*-old",
            "var/log/*.log",
        ):
            for path in self._root.glob(pattern):
                path.unlink()

    async def _compile_programs(self, log: IO[bytes]) -> None:
        """Compile our programs by the guest's Python, which would else do so at each slow boot."""
        folders = [f"/usr/lib/templated/{name}" for name in PROGRAMS]
        compile_all = ["python3", "-ISm", "compileall", "-q", *folders]
        await self._do(["chroot", str(self._root), *compile_all], log, namespace=True)

    def _link_applets(self) -> None:
        root = self._root
        init = root / "usr/sbin/init"
        init.unlink(missing_ok=True)
        init.symlink_to("/bin/busybox")
        known = _in_root(root, "bin/busybox").read_bytes()
        links = [("reboot", "sbin"), *((name, "local/bin") for name in APPLETS.split())]
        for name, folder in links:
            # Its table of names shows which commands this busybox has.
            missing = b"\0" + name.encode() + b"\0" not in known
            taken = any(os.path.lexists(root / "usr" / part / name) for part in ("bin", "sbin"))
            if not missing and not taken:
                (root / "usr" / folder / name).symlink_to("/bin/busybox")

    async def _write_disk(self, log: IO[bytes]) -> None:
        raw = self._work / "disk.raw"
        await self._write_root(raw, size_bytes(self._spec.size), "^has_journal", log)
        await self._convert(raw, log)

    async def _write_root(self, raw: Path, size: int, features: str, log: IO[bytes]) -> None:
        """Make an ext4 of `size` bytes with the root in it."""
        with raw.open("wb") as file:
            file.truncate(size)
        # No journal: an overlay never outlives the memory of its machine, and the journal's
        # thread would wake an idle guest. No lazy tables, as the guest would write them later.
        options = ["-q", "-F", "-m", "0", "-O", features, "-L", "templated"]
        options += [
            "-E",
            "lazy_itable_init=0",
            "-U",
            self._root_id,
        ]
        await self._do(
            ["mkfs.ext4", *options, "-d", str(self._root), str(raw)],
            log,
            namespace=True,
        )

    async def _convert(self, raw: Path, log: IO[bytes]) -> None:
        target = str(self.out / "disk.qcow2")
        await self._do(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), target], log)

    @property
    def _root_id(self) -> str:
        """The UUID of the root's file system."""
        return str(uuid.uuid5(uuid.NAMESPACE_OID, self._digest))

    async def _do(self, command: list[str], log: IO[bytes], *, namespace: bool = False) -> None:
        async for _ in self._lines(command, log, namespace=namespace):
            pass

    async def _lines(
        self, command: list[str], log: IO[bytes], *, namespace: bool = False
    ) -> AsyncIterator[str]:
        """Run a command and yield its output by lines; BuildError when it fails."""
        tail: list[str] = []
        keep = (self._lock,)
        async with start(command, namespace=namespace, folder=self._work, keep=keep) as process:
            assert process.stdout is not None
            async for raw in process.stdout:
                log.write(raw)
                line = raw.decode(errors="replace").strip()
                tail = [*tail[-200:], line]
                yield line
            code = await process.wait()
        log.flush()
        if code != 0:
            raise self._failure(command[0], code, tail)

    def _failure(self, program: str, code: int, tail: Sequence[str]) -> BuildError:
        reason = last_error(tail).removeprefix(f"{program}: ") or f"exit code {code}"
        hint = f"the full log is {self._log}"
        text = "\n".join(tail)
        if "No space left on device" in text:
            hint = f"free space on the file system of {self._work.parent}; {hint}"
        elif program == "mkfs.ext4" and "allocate" in text:
            hint = f"the packages do not fit: raise image.size ({self._spec.size}); {hint}"
        elif "Unable to locate package" in text or "no installation candidate" in text:
            hint = f"correct image.packages, image.kernel or image.suite; {hint}"
        elif "does not have a Release file" in text:
            hint = f"correct image.suite or image.mirror; {hint}"
        elif re.search(r"Failed to fetch|Could not (connect|resolve)|Temporary failure", text):
            hint = f"check the network, the proxy and image.mirror; {hint}"
        return BuildError(f"{program} failed: {reason}", hint=hint)


def last_error(lines: Sequence[str]) -> str:
    """The last line that names a cause, without apt's `E: `; empty when there is none."""
    errors = [line for line in lines if line.startswith("E: ")]
    telling = [line for line in errors if not _GENERIC.match(line)] or errors
    if telling:
        return telling[-1][3:].strip()
    plain = [line for line in lines if line]
    return plain[-1] if plain else ""


def _in_root(root: Path, name: str) -> Path:
    """A file of the root, through relative links such as /bin; BuildError when it leads out."""
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise BuildError(f"/{name} of the image leads out of it", hint="check image.packages")
    return path


def install(path: Path, content: bytes, mode: int) -> None:
    """Write a file of a root, in place of whatever has its name."""
    path.unlink(missing_ok=True)  # it may be a link that leads out of the root
    path.write_bytes(content)
    path.chmod(mode)
