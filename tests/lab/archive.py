"""A small Debian archive with what the images of guests are made of, signed by a key of its own.

In the lab it stands in for Debian's archive: its apt trusts the key, and finds the archive under
Debian's name. So images are made there over HTTP, without a network.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path

SUITE = "bookworm"
# What is beside the essential packages in an image; see templated/drivers/image/build.py.
PACKAGES = ("busybox-static", "python3")
KERNEL = "linux-image-cloud-amd64"
# mmdebstrap takes all of these when it is given no mirror. All packages are in the first.
_PLACES = {
    f"debian/dists/{SUITE}": SUITE,
    f"debian/dists/{SUITE}-updates": f"{SUITE}-updates",
    f"debian-security/dists/{SUITE}-security": f"{SUITE}-security",
}

Do = Callable[..., None]


def make_archive(do: Do, work: Path, target: Path, key: Path) -> None:
    """Fill `target` with debian and debian-security; write the public key to `key`.

    `do` runs a command and raises when it fails.
    """
    pool = target / "debian/pool"
    pool.mkdir(parents=True)
    _download(do, work, pool)
    index = "\n".join(_stanza(deb, target / "debian") for deb in sorted(pool.glob("*.deb")))
    home = work / "gnupg"
    home.mkdir(mode=0o700)
    gpg = ["gpg", "--homedir", str(home), "--batch", "--quiet", "--yes"]
    do(*gpg, "--passphrase", "", "--quick-gen-key", "templated lab", "ed25519", "sign", "0")
    do(*gpg, "--armor", "--output", str(key), "--export")
    for place, suite in _PLACES.items():
        release = _write_suite(target / place, suite, index if suite == SUITE else "")
        do(*gpg, "--output", str(release.parent / "InRelease"), "--clearsign", str(release))


def _download(do: Do, work: Path, pool: Path) -> None:
    """Let mmdebstrap choose, as it does for an image, and keep what it downloads."""
    kernel = (
        f"name=$(apt-cache depends --important {KERNEL} |"
        " sed -n 's/^ *Depends: *\\(linux-image-[^ ]*\\)$/\\1/p' | head -n1); "
        f'cd {pool} && apt-get -qq download {KERNEL} "$name"'
    )
    do(
        *("mmdebstrap", "--mode=root", "--variant=essential", "--format=dir", "--quiet"),
        "--skip=output/mknod,essential/unlink,cleanup/apt",
        f"--include={','.join(PACKAGES)}",
        '--aptopt=APT::Sandbox::User "root"',
        '--aptopt=APT::Keep-Downloaded-Packages "true"',
        f'--customize-hook=cp "$1"/var/cache/apt/archives/*.deb {pool}',
        f'--customize-hook=export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"; {kernel}',
        *(SUITE, str(work / "guest")),
    )
    shutil.rmtree(work / "guest")
    for deb in pool.glob("*.deb"):
        _store(do, deb, work / "package")


def _store(do: Do, deb: Path, unpacked: Path) -> None:
    """Pack a package without compression: under emulation, to unpack xz takes most of the time."""
    do("dpkg-deb", "-R", str(deb), str(unpacked))
    do("dpkg-deb", "-Znone", "-b", str(unpacked), str(deb))
    shutil.rmtree(unpacked)


def _stanza(deb: Path, base: Path) -> str:
    """A package's entry in the index."""
    fields = subprocess.run(
        ["dpkg-deb", "-f", str(deb)], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    content = deb.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    name = deb.relative_to(base)
    return f"{fields.rstrip()}\nFilename: {name}\nSize: {len(content)}\nSHA256: {digest}\n"


def _write_suite(folder: Path, suite: str, index: str) -> Path:
    """Write the index, and the release that names it; return the latter."""
    packages = folder / "main/binary-amd64/Packages"
    packages.parent.mkdir(parents=True)
    packages.write_text(index)
    content = packages.read_bytes()
    release = folder / "Release"
    release.write_text(
        f"Origin: Debian\nLabel: Debian\nSuite: {suite}\nCodename: {suite}\n"
        f"Date: {format_datetime(datetime.now(UTC), usegmt=True)}\n"
        "Architectures: amd64\nComponents: main\nSHA256:\n"
        f" {hashlib.sha256(content).hexdigest()} {len(content)} main/binary-amd64/Packages\n"
    )
    return release
