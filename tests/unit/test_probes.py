"""QA probes, each against a guest that plays along and one that does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Self, cast

import pytest

from templated.drivers.guest import ExecResult, Output
from templated.drivers.hypervisor.base import Places
from templated.errors import GuestError, ProbeError, TemplatedError
from templated.model.generation import ProbeResult
from templated.model.spec import (
    AgentProbe,
    ExecProbe,
    HttpProbe,
    Probe,
    SerialProbe,
    SettleProbe,
    TcpProbe,
)
from templated.services.machines.vm import Vm
from templated.services.templates import probes
from templated.services.templates.probes import Target, run_probes
from tests.unit.fake_daemon import run

pytestmark = pytest.mark.usefixtures("no_blocking_calls")
Answer = tuple[ExecResult, bytes] | TemplatedError
BOUNDS: dict[str, Any] = {"timeout": "200ms", "interval": "10ms"}


class Guest:
    """A VM as probes see it. Its agent answers from a list, the last one for ever."""

    def __init__(self, tmp_path: Path, *answers: Answer) -> None:
        self.answers = list(answers)
        self.commands: list[list[str]] = []
        self.cpu = [0.0]
        self.places = Places(tmp_path, tmp_path)
        self.exited: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.agent = self
        self.machine = self

    def _next(self) -> tuple[ExecResult, bytes]:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, TemplatedError):
            raise answer
        return answer

    async def ping(self, timeout: float) -> None:
        self._next()

    async def exec(
        self, argv: list[str], *, timeout: float
    ) -> AsyncGenerator[Output | ExecResult, None]:
        self.commands.append(argv)
        result, output = self._next()
        yield Output("stdout", output)
        yield result

    def cpu_seconds(self) -> float:
        return self.cpu.pop(0) if len(self.cpu) > 1 else self.cpu[0]


Reports = list[tuple[str, str, str]]


async def probe(
    guest: Guest, *probes: Probe, ports: dict[int, tuple[str, int]] | None = None
) -> tuple[tuple[ProbeResult, ...], Reports]:
    """Run probes; what they returned, and what was reported on the way."""
    reports: Reports = []
    target = Target(cast(Vm, guest), ports or {})
    results = await run_probes(target, probes, lambda n, s, _, saw: reports.append((n, s, saw)))
    return results, reports


async def failing(guest: Guest, one: Probe, **options: Any) -> str:
    """The message of a probe that does not pass."""
    with pytest.raises(ProbeError) as caught:
        await probe(guest, one, **options)
    error = caught.value
    assert error.probe == one.name and error.hint and "\n" not in error.message
    assert f"probe {one.name} (" in error.message
    return error.message


def ended(code: int, output: bytes = b"") -> Answer:
    """A command that ended with a code."""
    return ExecResult(exit_code=code), output


def test_order_and_reports(tmp_path: Path) -> None:
    """One after the other; each start and end is reported; the first failure is the last probe."""

    async def main() -> None:
        guest = Guest(tmp_path, ended(0))
        agent = AgentProbe(name="up", **BOUNDS)
        results, reports = await probe(guest, agent, ExecProbe(name="run", command=("x",)))
        assert [(r.name, r.type, r.attempts, r.saw) for r in results] == [
            ("up", "agent", 1, "pong"),
            ("run", "exec", 1, ""),
        ]
        assert reports == [
            ("up", "start", ""),
            ("up", "passed", "pong"),
            ("run", "start", ""),
            ("run", "passed", ""),
        ]
        guest = Guest(tmp_path, GuestError("no"))
        with pytest.raises(ProbeError, match="it saw no"):
            await probe(guest, agent, ExecProbe(name="run", command=("x",)))
        assert guest.commands == []

    run(main())


def test_it_is_tried_until_it_passes(tmp_path: Path) -> None:
    """And the attempts are counted."""

    async def main() -> None:
        guest = Guest(tmp_path, GuestError("not yet"), ended(1), ended(0, b"ready\n"))
        one = ExecProbe(name="a", command=("x",), pattern="^ready$", timeout="15s", interval="1ms")
        ((result,), _) = await probe(guest, one)
        assert (result.attempts, result.saw) == (3, "ready")

    run(main())


def test_exec(tmp_path: Path) -> None:
    """Exit code and pattern; the message shows what came instead."""

    async def main() -> None:
        one = ExecProbe(name="a", command=("sh", "-c", "x"), exit_code=3, pattern="b+", **BOUNDS)
        guest = Guest(tmp_path, ended(3, b"abbc"))
        await probe(guest, one)
        assert guest.commands == [["sh", "-c", "x"]]
        said = await failing(Guest(tmp_path, ended(0, b"out\n")), one)
        assert "exit code 0, output 'out'" in said
        said = await failing(Guest(tmp_path, ended(3, b"aaa")), one)
        assert "no match for 'b+' in 'aaa'" in said
        said = await failing(Guest(tmp_path, (ExecResult(timed_out=True), b"slow")), one)
        assert "timeout" in said and "slow" in said
        said = await failing(Guest(tmp_path, ended(0, b"x" * 100_000)), one)
        assert len(said) < 500

    run(main())


def test_a_pattern_that_takes_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends at its bound, and the event loop turns all the while."""
    monkeypatch.setattr(probes, "_MATCHING", 0.05)

    async def main() -> None:
        one = ExecProbe(name="a", command=("x",), pattern="(a|aa)+$", timeout="2s", interval="10ms")
        said = await failing(Guest(tmp_path, ended(0, b"a" * 200 + b"b")), one)
        assert "takes more than 0.05 s" in said

    run(main())


def test_a_command_with_bytes_that_ran_out_of_time(tmp_path: Path) -> None:
    """Output that is no UTF-8 is shown as well as it can be."""

    async def main() -> None:
        one = ExecProbe(name="a", command=("x",), **BOUNDS)
        said = await failing(Guest(tmp_path, (ExecResult(timed_out=True), b"\xff")), one)
        assert "timeout" in said

    run(main())


def test_serial(tmp_path: Path) -> None:
    """The console's log, from its beginning; bytes that are no text do no harm."""

    async def main() -> None:
        one = SerialProbe(name="a", pattern="login:", **BOUNDS)
        guest = Guest(tmp_path, ended(0))
        assert "no console log" in await failing(guest, one)
        log = guest.places.serial_log
        await asyncio.to_thread(log.write_bytes, b"")
        assert "an empty console" in await failing(guest, one)
        await asyncio.to_thread(log.write_bytes, b"booting\r\npanic\xff\r\n")
        assert "no match, last line 'panic" in await failing(guest, one)
        await asyncio.to_thread(log.write_bytes, b"booting\nhost login: \n")
        ((result,), _) = await probe(guest, one)
        assert result.saw == "login:"

    run(main())


def test_a_vm_that_ends(tmp_path: Path) -> None:
    """Nobody waits for a guest that is gone."""

    async def main() -> None:
        guest = Guest(tmp_path, GuestError("no"))
        guest.exited.set_result("ended with 1")
        said = await failing(guest, AgentProbe(name="a", timeout="60m"))
        assert "it saw the VM ended with 1" in said

    run(main())


def test_silence(tmp_path: Path) -> None:
    """A guest that never answers runs into the probe's timeout."""

    async def main() -> None:
        guest = Guest(tmp_path, ended(0))

        async def never(timeout: float) -> None:
            await asyncio.Event().wait()

        guest.ping = never  # type: ignore[method-assign]
        said = await failing(guest, AgentProbe(name="a", timeout="50ms", interval="1ms"))
        assert "within 0.05 s: it saw nothing" in said

    run(main())


def test_settle(tmp_path: Path) -> None:
    """CPU time over the quiet time, against a limit in percent of a core."""

    async def main() -> None:
        one = SettleProbe(name="a", cpu_percent=50, quiet="10ms", timeout="5s", interval="1ms")
        guest = Guest(tmp_path, ended(0))
        guest.cpu = [0.0, 1.0, 1.0, 1.001]
        ((result,), _) = await probe(guest, one)
        assert (result.attempts, result.saw) == (2, "10 % of a core")
        guest.cpu = [float(n) for n in range(1000)]
        busy = SettleProbe(name="a", cpu_percent=50, quiet="10ms", timeout="60ms", interval="1ms")
        assert "10000 % of a core" in await failing(guest, busy)

    run(main())


def test_in_the_guest(tmp_path: Path) -> None:
    """`via: guest` asks the guest's own Python, with the port and path as arguments."""

    async def main() -> None:
        tcp = TcpProbe(name="a", port=8080, **BOUNDS)
        guest = Guest(tmp_path, ended(0))
        await probe(guest, tcp)
        assert guest.commands[0][:2] == ["python3", "-c"] and "8080" in guest.commands[0][2]
        refused = Guest(tmp_path, ended(1, b"Traceback\nConnectionRefusedError: refused\n"))
        assert "it saw ConnectionRefusedError: refused" in await failing(refused, tcp)
        assert "no output" in await failing(Guest(tmp_path, ended(127)), tcp)
        http = HttpProbe(name="a", port=80, path="/x'y", pattern="ok", **BOUNDS)
        guest = Guest(tmp_path, ended(0, b"200\nall ok\n"))
        ((result,), _) = await probe(guest, http)
        assert result.saw == "status 200, all ok" and guest.commands[0][-2:] == ["80", "/x'y"]
        assert "status 500" in await failing(Guest(tmp_path, ended(0, b"500\nok")), http)
        assert "no match for 'ok'" in await failing(Guest(tmp_path, ended(0, b"200\nno")), http)
        assert "it saw junk" in await failing(Guest(tmp_path, ended(0, b"junk")), http)

    run(main())


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]


class Listening(AbstractAsyncContextManager["Listening"]):
    """A TCP server on a port of its own, in the place of a forward into the guest."""

    def __init__(self, serve: Serve) -> None:
        self._serve = serve

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._serve(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.ports = {80: self._server.sockets[0].getsockname()[:2]}
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()


def sending(*parts: bytes) -> Serve:
    """Read a request's head, then send parts, with a pause between them."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.03)

    return serve


def test_from_the_host(tmp_path: Path) -> None:
    """`via: forward` connects to where the port is on the host."""

    async def main() -> None:
        guest = Guest(tmp_path, ended(0))
        tcp = TcpProbe(name="a", port=80, via="forward", **BOUNDS)
        http = HttpProbe(name="a", port=80, path="/x", pattern="ok", via="forward", **BOUNDS)
        good = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
        async with Listening(sending(good)) as server:
            await probe(guest, tcp, http, ports=server.ports)
        assert guest.commands == []
        assert "[Errno 111]" in await failing(guest, tcp, ports=server.ports)
        assert "Cannot connect" in await failing(guest, http, ports=server.ports)
        missing = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
        async with Listening(sending(missing)) as server:
            assert "status 404" in await failing(guest, http, ports=server.ports)
        async with Listening(sending(b"SSH-2.0-x\r\n\r\n")) as server:
            await failing(guest, http, ports=server.ports)

    run(main())


def test_a_body_in_two_parts(tmp_path: Path) -> None:
    """The pattern is looked for in the whole body, however it arrives."""

    async def main() -> None:
        http = HttpProbe(name="a", port=80, pattern="ok$", via="forward", **BOUNDS)
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nall "
        async with Listening(sending(head, b"ok")) as server:
            await probe(Guest(tmp_path, ended(0)), http, ports=server.ports)

    run(main())
