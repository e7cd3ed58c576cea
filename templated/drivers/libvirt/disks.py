"""The image behind a domain's disk: whether it can be layer 1 as it is, and a copy of it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from templated.drivers.host.programs import run
from templated.errors import Conflict, HostError, InvalidRequest, TemplatedError, host_errors

_EXAMINED_WITHIN = 60.0
# A copy of a disk on slow storage, beside what every copy may take.
_COPIED_WITHIN = 600.0
_LEAST_RATE = 4 << 20


@dataclass(frozen=True)
class SourceImage:
    """An image of a known format that nobody writes to."""

    path: Path
    format: str
    size: int
    """Bytes that it takes on the host."""
    virtual_size: int
    """Bytes that a guest sees."""
    obstacle: str
    """Why clones cannot read it as it is, as `has a backing file`; empty when they can."""


async def examine(path: Path, image_format: str) -> SourceImage:
    """Look at an image, which is not changed; its format is taken as told, and never guessed.

    Raises Conflict when a process writes to it, InvalidRequest when it is encrypted or broken, and
    HostError when it cannot be read as that format.
    """
    command = ("qemu-img", "info", "--output=json", "-f", image_format, str(path))
    try:
        found = json.loads(await run(*command, timeout=_EXAMINED_WITHIN))
    except HostError as error:
        hint = "it must be there, readable, and of the format that its domain says"
        raise _in_use(path, error, hint) from error
    details = found.get("format-specific", {}).get("data", {})
    if found.get("encrypted"):
        raise InvalidRequest(f"{path} is encrypted", hint="a template has no key for it")
    if details.get("corrupt") or found.get("dirty-flag"):
        raise InvalidRequest(
            f"{path} is marked as broken", hint=f"qemu-img check -r all {path}, on a copy of it"
        )
    return SourceImage(
        path=path,
        format=image_format,
        size=int(found.get("actual-size", 0)),
        virtual_size=int(found.get("virtual-size", 0)),
        obstacle=_obstacle(image_format, found, details),
    )


def _obstacle(image_format: str, found: dict[str, Any], details: dict[str, Any]) -> str:
    if image_format != "qcow2":
        return f"is {image_format}, not qcow2"
    if found.get("backing-filename"):
        return "has a backing file"
    return "has its data in another file" if details.get("data-file") else ""


async def copy(image: SourceImage, target: Path) -> None:
    """Make `target`, a qcow2 without a backing file, out of an image, which is only read.

    QEMU's lock keeps others from writing to it meanwhile. The two directories above `target` are
    made for their owner only. Raises Conflict when `target` is there or the image is in use,
    HostError for all else; no file is left then.
    """
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    with host_errors(f"cannot write {target}", hint="state_dir must be writable"):
        for directory in (target.parent.parent, target.parent):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_parts(target)
    formats = ("-f", image.format, "-O", "qcow2")
    timeout = _COPIED_WITHIN + image.size / _LEAST_RATE
    try:
        await run("qemu-img", "convert", *formats, str(image.path), str(part), timeout=timeout)
        with host_errors(f"cannot write {target}", hint="state_dir must be writable"):
            part.chmod(0o600)
            os.link(part, target)
    except HostError as error:
        if target.exists():
            raise Conflict(
                f"{target} is there already", hint="rm it, if no template has it"
            ) from error
        raise _in_use(image.path, error, "free some space in state_dir") from error
    finally:
        part.unlink(missing_ok=True)


def _remove_parts(target: Path) -> None:
    """What a copy left that was killed."""
    for part in target.parent.glob(f".{target.name}.*.part"):
        if not Path("/proc", part.name.split(".")[-2]).exists():
            part.unlink(missing_ok=True)


def _in_use(path: Path, error: HostError, hint: str) -> TemplatedError:
    """`error` of qemu-img, or what it means when the image is locked."""
    if "another process using" not in error.message:
        return HostError(error.message, hint=error.hint or hint)
    return Conflict(f"{path} is in use", hint="end the VM that has it")
