"""New keys for the SSH server of a guest, by ssh-keygen(1) of this host.

Made with a VM's slot, ahead of its start. RSA is left out: a key of it takes a core for a second.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from templated.drivers.guest import HostKey
from templated.drivers.host.programs import run
from templated.errors import HostError

KINDS = ("ed25519", "ecdsa")
_TIMEOUT = 10.0


async def make_host_keys(folder: Path) -> tuple[HostKey, ...]:
    """A key of each kind. `folder` is a private one in memory: nothing of them stays in it.

    Raises HostError when ssh-keygen is missing or fails.
    """
    return tuple(await asyncio.gather(*(_make(folder / f"key-{kind}", kind) for kind in KINDS)))


async def _make(file: Path, kind: str) -> HostKey:
    public = file.with_name(f"{file.name}.pub")
    command = ("ssh-keygen", "-q", "-t", kind, "-N", "", "-C", "root@templated", "-f", str(file))
    try:
        await run(*command, timeout=_TIMEOUT)
        return HostKey(kind, file.read_text(), public.read_text())
    except OSError as error:
        raise HostError(f"cannot read the new key {file}: {error.strerror}") from error
    finally:
        for path in (file, public):
            path.unlink(missing_ok=True)
