"""Connection URIs of libvirt: which ones mean a daemon on this host.

Source: https://libvirt.org/uri.html
"""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit

from templated.errors import InvalidRequest

SYSTEM = "qemu:///system"
"""The system's libvirtd, which runs VMs as a user of its own."""
_LONGEST = 1000
# `test` is libvirt's own fake, which needs no daemon.
_DRIVERS = ("qemu", "test")


def check_local(uri: str) -> str:
    """`uri`, when it names QEMU's driver behind a unix socket of this host; else InvalidRequest.

    Looks at the text only: whether anything answers there is another question.
    """
    if not uri.isascii() or not uri.isprintable() or len(uri) > _LONGEST:
        raise _refused(uri, "is no connection URI")
    try:
        parts = urlsplit(uri)
    except ValueError:
        raise _refused(uri, "is no connection URI") from None
    driver, _, transport = parts.scheme.partition("+")
    if not driver or not parts.path:
        raise _refused(uri, "is no connection URI")
    if parts.netloc or transport not in ("", "unix"):
        raise _refused(uri, "leads to another host; only libvirt on this one can be used")
    if driver not in _DRIVERS:
        raise _refused(uri, f"is of libvirt's driver {driver}; only QEMU's can be used")
    _check_path(uri, parts)
    return uri


def _check_path(uri: str, parts: SplitResult) -> None:
    """`/embed` would run libvirt's driver in our own process."""
    if parts.scheme != "test" and parts.path not in ("/system", "/session"):
        raise _refused(uri, "names neither /system nor /session")


def _refused(uri: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"{uri[:200]!r} {why}", hint=f"such as {SYSTEM}, the default")
