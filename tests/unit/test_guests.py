"""What the services do in a running clone: commands, and its console."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from templated.drivers.guest import Agent, ExecResult, Output
from templated.drivers.hypervisor.fake import FakeHypervisor
from templated.errors import Busy, Conflict, NotFound
from templated.model.api import CloneRequest, ExecFrame
from templated.services.clones import guest
from templated.services.daemon import Services
from tests.unit.fake_daemon import play, until


def test_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its output, then one frame with its end; or with why that is not known."""
    answers: list[Output | ExecResult | Busy] = []

    async def answer(
        agent: Agent, argv: list[str], **options: object
    ) -> AsyncGenerator[Output | ExecResult, None]:
        for one in answers:
            if isinstance(one, Busy):
                raise one
            yield one

    monkeypatch.setattr(Agent, "exec", answer)
    first = ExecFrame(stream="stdout", data=base64.b64encode(b"\xff").decode())

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await running.clones.create(CloneRequest(name="a"))
        for end, frame in (
            (ExecResult(exit_code=3), ExecFrame(exit_code=3, done=True)),
            (ExecResult(signal=9, timed_out=True), ExecFrame(signal=9, timed_out=True, done=True)),
            (Busy("nobody reads"), ExecFrame(error="nobody reads", done=True)),
        ):
            answers[:] = [Output("stdout", b"\xff"), end]
            frames = [frame async for frame in running.guests.exec("a", ["x"], timeout=5.0)]
            assert frames == [first, frame]

    play(tmp_path, scenario)


def test_a_command_whose_end_is_not_known(tmp_path: Path) -> None:
    """Its VM ends under it: the last frame says so."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await running.clones.create(CloneRequest(name="a"))
        (machine,) = fake.running()
        machine.fail = "silence"
        frames = running.guests.exec("a", ["x"], timeout=60.0)
        last = asyncio.ensure_future(anext(frames))
        await asyncio.sleep(0.01)
        machine.end("was killed")
        frame = await last
        assert frame.done and frame.error and frame.exit_code is None
        with pytest.raises(StopAsyncIteration):
            await anext(frames)

    play(tmp_path, scenario)


def test_a_clone_that_does_not_run(tmp_path: Path) -> None:
    """Is refused before anything is read; its console can still be shown."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await running.clones.create(CloneRequest(name="a"))
        (machine,) = fake.running()
        log = running.clones.running("a").places.serial_log
        log.write_text("one\ntwo\nthree\n")
        machine.end("was killed")
        await until(lambda: running.clones.view("a").state == "dead")
        for name, error in (("a", Conflict), ("none", NotFound)):
            with pytest.raises(error):
                running.guests.exec(name, ["x"], timeout=5.0)
            with pytest.raises(error):
                running.guests.follow_logs(name, 5)
            with pytest.raises(error):
                await running.guests.get(name, "/f")
            with pytest.raises(error):
                await running.guests.put(name, "/f", b"", 0o600)
        assert running.guests.logs("a", 2) == b"two\nthree\n"

    play(tmp_path, scenario)


def test_following_a_console(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of what is there, then what comes, until the clone is removed."""
    monkeypatch.setattr(guest, "_LOOK_INTERVAL", 0.005)

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await running.clones.create(CloneRequest(name="a"))
        log = running.clones.running("a").places.serial_log
        log.write_text("one\ntwo\n")
        chunks = running.guests.follow_logs("a", 1)
        assert await anext(chunks) == b"two\n"
        for text in ("three\n", "four\n"):
            with open(log, "a") as console:
                console.write(text)
            assert await anext(chunks) == text.encode()
        await running.clones.remove("a")
        with pytest.raises(StopAsyncIteration):
            await anext(chunks)

    play(tmp_path, scenario)
