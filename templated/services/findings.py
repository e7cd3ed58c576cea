"""What `doctor` finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["PASS", "WARN", "FAIL"]


@dataclass(frozen=True)
class Check:
    """One finding; `fix` says what to do where it is not good."""

    name: str
    status: Status
    detail: str
    fix: str = ""
