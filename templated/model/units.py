"""Sizes and durations as people write them in YAML: `128MiB`, `250ms`."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

Size = Annotated[str, Meta(pattern=r"^[1-9][0-9]{0,9}(KiB|MiB|GiB)$(?!\n)", examples=["128MiB"])]
Duration = Annotated[
    str, Meta(pattern=r"^[0-9]{1,9}(\.[0-9]{1,6})?(ms|s|m)$(?!\n)", examples=["30s"])
]

_SIZES = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_DURATIONS = {"ms": 0.001, "s": 1.0, "m": 60.0}


def size_bytes(text: str) -> int:
    """Bytes of a `Size`."""
    return int(text[:-3]) * _SIZES[text[-3:]]


def optional_bytes(text: str | None) -> int | None:
    """Bytes of a `Size` that may be left out."""
    return None if text is None else size_bytes(text)


def seconds(text: str) -> float:
    """Seconds of a `Duration`."""
    unit = "ms" if text.endswith("ms") else text[-1]
    return float(text[: -len(unit)]) * _DURATIONS[unit]
