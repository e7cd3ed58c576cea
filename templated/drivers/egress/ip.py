"""iproute2's `ip`, in the network namespace of the calling thread."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from templated.drivers.host.programs import run_here
from templated.errors import HostError

_TIMEOUT = 20.0


def apply(*lines: str) -> None:
    """Run commands of `ip`, in order; HostError at the first that fails, the others are not run."""
    script = "".join(f"{line}\n" for line in lines)
    run_here("ip", "-batch", "-", stdin=script, timeout=_TIMEOUT)


def make(line: str, name: str, owner: str) -> None:
    """Make an interface that is the owner's from the beginning. HostError: it is not there then."""
    try:
        apply(line, f"link set dev {name} alias {owner}")
    except HostError:
        discard(f"link del {name}")
        raise


def discard(*lines: str) -> None:
    """Run commands that take away what may have gone already: none of them raises."""
    for line in lines:
        with suppress(HostError):
            run_here("ip", *line.split(), stdin="", timeout=_TIMEOUT)


def shown(*arguments: str) -> list[dict[str, Any]]:
    """What `ip -j` lists. Raises HostError."""
    text = run_here("ip", "-j", *arguments, stdin="", timeout=_TIMEOUT)
    found: list[dict[str, Any]] = json.loads(text or "[]")
    return found
