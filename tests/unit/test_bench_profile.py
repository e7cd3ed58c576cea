"""`bench profile` without a VM: what is asked for, and what is made of QEMU's text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self, cast

import pytest

from templated.bench import profile
from templated.drivers.guest import Step
from templated.errors import HypervisorError

JIT = """Translation buffer state:
gen code size       {size}/1073736704
TB count            {count}
TB avg target size  17 max=1164 bytes
"""


class Peer:
    """Both ends: QMP that has translated more at each question, and an agent that says yes."""

    def __init__(self, text: str = JIT) -> None:
        self.asked: list[dict[str, Any]] = []
        self._text, self._count = text, 0

    def command(self, name: str) -> Any:
        if name != "x-query-jit":
            self.asked.append({"qmp": name})
            return {}
        self._count += 100
        text = self._text.format(size=self._count * 1000, count=self._count)
        return {"human-readable-text": text}

    def ask(self, message: dict[str, Any]) -> None:
        self.asked.append(message)

    def identify(self, step: Step = Step.IDENTIFY, hostname: str = "") -> None:
        self.ask({"cmd": step.name})

    def exchange_code(self, image: Path) -> None:
        self.asked.append({"exchange": str(image)})

    @property
    def agent(self) -> Self:
        return self

    qmp = agent


def test_each_step_counts_what_it_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "_IDLE_SECONDS", 0.01)
    monkeypatch.setattr(profile, "_PAUSE_SECONDS", 0.01)
    rows: dict[str, profile.Row] = {}
    peer = Peer()
    for kind in (profile._direct, profile._claim, profile._claim_unrehearsed):
        kind(cast(Any, peer), profile._Meter(cast(Any, peer), rows.__setitem__))
    first = ["identify", "identify again", "ping", "idle 0.01 s"]
    assert list(rows) == [*first, "rehearsal", "rest 0.1 s", "claim", "claim, not rehearsed"]
    assert all((row["blocks"], round(row["mb"], 3)) == (100, 0.1) for row in rows.values())
    asked = [next(iter(message.values())) for message in peer.asked]
    rehearsed = ["IDENTIFY", *["REHEARSAL"] * 4, "stop", "cont", "CLAIM"]
    alone = ["IDENTIFY", "stop", "cont", "CLAIM"]
    assert asked == ["IDENTIFY", "IDENTIFY", "ping", *rehearsed, *alone]


def test_the_steps_of_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(profile, "load", lambda *_: {"mount_ms": 2.0, "init_ms": 8.0})
    monkeypatch.setattr(profile, "invoke", lambda vm, payload: vm.ask({"cmd": "invoke"}))
    rows: dict[str, profile.Row] = {}
    peer = Peer()
    for kind in (profile._function, profile._warm_function):
        kind(cast(Any, peer), Path("code"), profile._Meter(cast(Any, peer), rows.__setitem__))
    cold = ["function: load", *(f"{number} request" for number in ("first", "second", "third"))]
    warm = ["rehearsal", "exchange", "claim", "load", "its mount", "its init"]
    warm += ["first request", "second request"]
    assert list(rows) == [*cold, *(f"warm: {name}" for name in warm)]
    assert rows["warm: its init"] == {"blocks": 0, "mb": 0, "ms": 8.0}
    asked = [next(iter(message.values())) for message in peer.asked]
    rehearsed = ["IDENTIFY", "rehearse", *["REHEARSAL"] * 4, "stop", "code", "cont", "CLAIM"]
    assert asked == ["IDENTIFY", *["invoke"] * 3, *rehearsed, *["invoke"] * 2]


def test_a_qemu_that_does_not_tell() -> None:
    with pytest.raises(HypervisorError, match="tells no counts"):
        profile._counters(cast(Any, Peer("nothing")))
