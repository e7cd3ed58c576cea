"""Everything at once: requests, deaths, pauses, deploys, aims, callers that leave; nothing is
lost."""

from __future__ import annotations

import asyncio
import gc
import logging
import random

import pytest

from templated.drivers.guest_functions import Answer, InitFailed, InvokeOrder, LoadOrder
from templated.errors import GuestError, HypervisorError, StartError, TemplatedError, Throttled
from templated.services.functions.crew import DRIVEN, KEPT
from tests.unit.fake_daemon import until
from tests.unit.fake_instances import FakeGuest, World, play, version

pytestmark = pytest.mark.usefixtures("no_blocking_calls")
NAMES = ("f0", "f1", "f2")
_EXPECTED = (GuestError, HypervisorError, StartError, Throttled)


class Chaos:
    """What goes wrong, by a seed."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.random = random.Random(seed)  # noqa: S311 - it only has to repeat
        world.handler = self.handle
        world.load = self.load
        world.start = self.start

    def happens(self, chance: float) -> bool:
        return self.random.random() < chance

    async def rest(self) -> None:
        await asyncio.sleep(self.random.choice((0, 0, 0.0005, 0.002)))

    async def start(self, _: str) -> None:
        await self.rest()
        if self.happens(0.1):
            raise StartError("no", phase="spawn", reason="host")

    async def load(self, guest: FakeGuest, _: LoadOrder) -> None:
        await self.rest()
        if self.happens(0.05):
            raise InitFailed("no", payload=b'{"errorType": "E"}')
        if self.happens(0.05):
            guest.machine.end()

    async def handle(self, guest: FakeGuest, order: InvokeOrder) -> Answer:
        await self.rest()
        if self.happens(0.05):
            guest.machine.end()
        if self.happens(0.03):
            return Answer(payload=b"", ended="exit status 1")
        if self.happens(0.03):
            return Answer(payload=b"", ended="exit status 1", begun=False)
        await self.rest()
        return Answer(payload=order.payload)

    async def disturb(self) -> None:
        """Deaths of those that rest, refused pauses, deploys."""
        while True:
            await self.rest()
            await asyncio.sleep(0)
            for clone in list(self.world.clones.values()):
                if self.happens(0.02):
                    clone.vm.machine.end()
                if self.happens(0.02):
                    clone.vm.machine.fail["pause"] = HypervisorError("QEMU refuses")
            if self.happens(0.1):
                self.deploy()
            if self.happens(0.1):
                self.scale()

    def deploy(self) -> None:
        """Other code, at once or while the code before serves; and the end of that."""
        world, name = self.world, self.random.choice(NAMES)
        new = version(name, code=self.random.choice("abcdef"))
        world.versions.found[name, "$LATEST"] = new
        if self.happens(0.5):
            world.router.changed(new)
        elif not world.crews.hold(new):
            world.crews.changed(new)
        for found in world.versions.found.values():
            if self.happens(0.5):
                world.crews.switch(found)

    def scale(self) -> None:
        """More or fewer instances ahead of requests."""
        found = self.world.versions.found[self.random.choice(NAMES), "$LATEST"]
        crews, source = self.world.crews, self.random.choice((DRIVEN, KEPT))
        if self.happens(0.3):
            crews.release(found, source)
        else:
            crews.aim(found, self.random.randrange(4), source)
        crews.trim(found, self.random.randrange(3))

    async def ask(self, number: int) -> str:
        await asyncio.sleep(self.random.random() * 0.05)
        task = self.world.asking(number, self.random.choice(NAMES), request=f"r{number}")
        if self.happens(0.1):
            await self.rest()
            task.cancel()
        (result,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(result, asyncio.CancelledError):
            return "cancelled"
        if isinstance(result, TemplatedError):
            assert isinstance(result, _EXPECTED), result
            return "failed"
        assert not isinstance(result, BaseException), result
        if result.view.error is None:
            assert bytes(result.view.payload) == str(number).encode()
            return "answered"
        return "unhandled"


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_lost_and_nothing_is_left(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(world: World) -> None:
        chaos = Chaos(world, seed)
        disturbing = asyncio.create_task(chaos.disturb())
        results = await asyncio.gather(*(chaos.ask(number) for number in range(150)))
        disturbing.cancel()
        await asyncio.wait({disturbing})
        assert results.count("answered") > 50
        # Tried again only when the guest has seen nothing of it.
        assert max(world.served.values()) <= 3
        for supply in world.crews.supplies():
            for source in (DRIVEN, KEPT):
                world.crews.release(supply.version, source)
        await until(lambda: not world.router._requests and not world.router._crews._starts)
        states = world.states()
        assert set(states) <= {"idle", "paused", "ending"}
        assert not any(
            crew.waiting or crew.starting or crew.running for crew in world.router._crews
        )

    play(
        scenario,
        *(version(name) for name in NAMES),
        concurrency=6,
        freeze_after=0.001,
        keep_alive=0.01,
        reserved={"f2": 2},
        most={"f1": 3},
        pace=0.0005,
    )
    gc.collect()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
