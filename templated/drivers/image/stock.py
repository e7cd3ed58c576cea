"""A stock Debian on a disk that boots by itself: systemd, OpenSSH, qemu-ga, and nothing of ours.

What is set up in it is what an installer sets up: its disk, its network, its boot loader. Timers
for daily work are off, since they would be overdue in every clone.
"""

from __future__ import annotations

import asyncio
import shlex
from typing import IO

from templated.drivers.image import fat
from templated.drivers.image.build import ImageBuild, install
from templated.drivers.image.loader import (
    EFI_NAME,
    ESP_KIB,
    FORMATS,
    MODULES,
    SECTOR,
    START,
    boot_script,
    find_script,
    first_sectors,
    newest,
    root_sectors,
)
from templated.drivers.image.namespaces import check_programs, check_tools
from templated.model.units import size_bytes

PACKAGES = (
    *("systemd-sysv", "udev", "dbus", "libpam-systemd", "kmod", "iproute2", "login", "apt"),
    *("openssh-server", "qemu-guest-agent", "grub-common", "grub-pc-bin", "grub-efi-amd64-bin"),
)
_NETWORK = "[Match]\nName=en* eth*\n[Network]\nDHCP=yes\n"
_KEYS = "[Unit]\nConditionPathExistsGlob=/etc/ssh/ssh_host_*_key\n"
"""sshd waits for an identity: it would be started, and fail, again and again."""
_ENABLED = ("systemd-networkd.service",)
_TIMERS = (
    *("apt-daily", "apt-daily-upgrade", "dpkg-db-backup", "e2scrub_all", "fstrim", "logrotate"),
    *("man-db", "exim4-base"),
)


class StockBuild(ImageBuild):
    """One build; see `ImageBuild`. `run` leaves disk.qcow2 in `work/out`."""

    async def run(self) -> None:
        """Make disk.qcow2. Raises as `ImageBuild.run` does."""
        check_tools()
        check_programs(*fat.PROGRAMS)
        self.out.mkdir(mode=0o755)
        with self._log.open("wb") as log:
            self._progress("packages")
            await self._bootstrap(log, "minbase", (*PACKAGES, self._spec.kernel))
            self._progress("boot loader")
            await asyncio.to_thread(self._set_up)
            await self._enable(log)
            await self._make_loaders(log)
            self._progress("root disk")
            await self._write_disk(log)

    def _set_up(self) -> None:
        etc = self._root / "etc"
        install(etc / "hostname", b"debian\n", 0o644)
        install(etc / "hosts", b"127.0.0.1 localhost\n::1 localhost ip6-localhost\n", 0o644)
        install(etc / "fstab", f"UUID={self._root_id} / ext4 defaults 0 0\n".encode(), 0o644)
        install(etc / "systemd/network/80-dhcp.network", _NETWORK.encode(), 0o644)
        drop_in = etc / "systemd/system/ssh.service.d"
        drop_in.mkdir(mode=0o755, parents=True)
        drop_in.chmod(0o755)
        install(drop_in / "host-keys.conf", _KEYS.encode(), 0o644)
        for name in ("machine-id", "resolv.conf"):
            install(etc / name, b"", 0o644)
        self._remove_unique()
        units = self._root / "usr/lib/systemd/system"
        for timer in _TIMERS:
            if (units / f"{timer}.timer").exists():
                link = etc / f"systemd/system/{timer}.timer"
                link.unlink(missing_ok=True)
                link.symlink_to("/dev/null")

    async def _enable(self, log: IO[bytes]) -> None:
        command = ["chroot", str(self._root), "systemctl", "--quiet", "enable", *_ENABLED]
        await self._do(command, log, namespace=True)

    async def _make_loaders(self, log: IO[bytes]) -> None:
        boot = self._root / "boot"
        folder = boot / "grub"
        folder.mkdir(exist_ok=True)
        kernel, initrd = newest(boot, "vmlinuz-*"), newest(boot, "initrd.img-*")
        script = boot_script(kernel, initrd, self._root_id)
        install(folder / "grub.cfg", script.encode(), 0o644)
        install(folder / "find.cfg", find_script(self._root_id).encode(), 0o644)
        for platform, modules in FORMATS.items():
            options = f"-O {platform} -c /boot/grub/find.cfg -p /boot/grub"
            command = f"grub-mkimage {options} -o /boot/grub/{platform}.img"
            argv = [*shlex.split(command), *modules, *MODULES]
            await self._do(["chroot", str(self._root), *argv], log, namespace=True)

    async def _write_disk(self, log: IO[bytes]) -> None:
        root, esp, disk = (self._work / name for name in ("root.raw", "esp.raw", "disk.raw"))
        size = root_sectors(size_bytes(self._spec.size))
        await self._write_root(root, size * SECTOR, "^has_journal,^metadata_csum_seed", log)
        grub = self._root / "boot/grub"
        tree = self._work / "esp"
        efi = tree / EFI_NAME
        await asyncio.to_thread(efi.parent.mkdir, parents=True)
        await asyncio.to_thread(efi.write_bytes, (grub / "x86_64-efi.img").read_bytes())
        await fat.make_fat(esp, "ESP", ESP_KIB, tree)
        boot = (self._root / "usr/lib/grub/i386-pc/boot.img").read_bytes()
        core = (grub / "i386-pc.img").read_bytes()
        head = first_sectors(boot, core, size, ESP_KIB * 1024 // SECTOR)
        await asyncio.to_thread(disk.write_bytes, head)
        for part, start in ((root, START), (esp, START + size)):
            place = [f"seek={start * SECTOR}", "oflag=seek_bytes", "bs=1M"]
            command = ["dd", f"if={part}", f"of={disk}", *place, "conv=sparse,notrunc"]
            await self._do([*command, "status=none"], log)
        await self._convert(disk, log)
