"""How a guest's clock is corrected, whichever agent the guest has."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any, cast

import pytest

from templated.drivers.guest import Agent
from templated.drivers.qga.agent import GaAgent
from templated.errors import IdentityError
from templated.model.spec import TemplateSpec
from templated.services.machines.generation import Terms
from templated.services.machines.identify import correct_clock
from templated.services.machines.vm import Vm

TERMS = Terms.of(TemplateSpec(name="t"))


class _Vm:
    def __init__(self, agent: object) -> None:
        self.agent = agent


def correct(agent: object) -> None:
    """Correct the clock of a guest with this agent."""
    asyncio.run(correct_clock(cast(Vm, _Vm(agent)), TERMS))


def test_our_own_agent_sets_and_tells_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests: what the clock shows, and the correction, whose answer confirms it."""
    asked: list[float] = []
    off = 100.0

    async def request(self: Agent, command: str, timeout: float, fields: Any) -> bytes:
        nonlocal off
        asked.append(fields["adjust"])
        off += fields["adjust"]
        return b'{"time": %.9f}' % (time.time() + off)

    monkeypatch.setattr(Agent, "request", request)
    correct(Agent(Path("agent")))
    assert len(asked) == 2 and asked[0] == 0.0 and asked[1] == pytest.approx(-100, abs=1)


def test_what_it_takes_to_set_a_clock_hides_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """qemu-ga is asked for the time after the script: that may take longer than the error is."""

    async def script(self: GaAgent, values: str, timeout: float) -> dict[str, str]:
        await asyncio.sleep(0.2)
        return {}

    async def late(self: GaAgent) -> int:
        return int((time.time() - 0.1) * 1e9)

    monkeypatch.setattr(GaAgent, "_script", script)
    monkeypatch.setattr(GaAgent, "_time", late)
    with pytest.raises(IdentityError, match="stays 100 ms off"):
        correct(GaAgent(Path("agent")))
