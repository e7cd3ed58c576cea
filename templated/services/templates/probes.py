"""QA probes: what a VM must show before it is frozen, and what its canary must show again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import aiohttp
import msgspec
import regex

from templated.drivers.guest import ExecResult
from templated.errors import InvalidRequest, ProbeError, TemplatedError, Timeout
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
from templated.model.units import seconds
from templated.services.machines.vm import Vm

_SAW = 200
_ATTEMPT = 5.0
_OUTPUT = 65536
_MATCHING = 2.0
ProbeReport = Callable[[str, str, float | None, str], None]
"""Called with a probe's name, "start", "passed" or "failed", its seconds, and what it saw."""


@dataclass(frozen=True)
class Target:
    """A VM to be probed, and where its forwarded ports are on the host."""

    vm: Vm
    forwards: dict[int, tuple[str, int]]
    """Guest port to host address and port."""


class _NotYet(Exception):
    """The probe did not pass this time; the text says what it saw."""


async def run_probes(
    target: Target, probes: Iterable[Probe], report: ProbeReport
) -> tuple[ProbeResult, ...]:
    """Run probes in order. Raises ProbeError, which names the first that does not pass."""
    return tuple([await _run_probe(target, probe, report) for probe in probes])


async def _run_probe(target: Target, probe: Probe, report: ProbeReport) -> ProbeResult:
    begin = time.monotonic()
    timeout = seconds(probe.timeout)
    kind = type_of(probe)
    saw, attempts = "nothing", 0
    report(probe.name, "start", None, "")
    while True:
        attempts += 1
        left = begin + timeout - time.monotonic()
        try:
            async with asyncio.timeout(max(left, 0.001)):
                saw = await _attempt(target, probe)
        except _NotYet as error:
            saw = str(error)
        except TemplatedError as error:
            saw = error.message
        except TimeoutError:
            pass
        else:
            passed = time.monotonic() - begin
            report(probe.name, "passed", passed, saw)
            return ProbeResult(
                name=probe.name,
                type=kind,
                seconds=round(passed, 3),
                attempts=attempts,
                saw=saw,
            )
        if target.vm.machine.exited.done():
            saw = f"the VM {target.vm.machine.exited.result()}"
        elif time.monotonic() + seconds(probe.interval) < begin + timeout:
            await asyncio.sleep(seconds(probe.interval))
            continue
        report(probe.name, "failed", time.monotonic() - begin, saw)
        raise ProbeError(
            f"probe {probe.name} ({kind}) did not pass within {timeout:g} s: it saw {saw}",
            probe=probe.name,
            hint="the serial log above shows what the guest did; see `probes` in the template",
        )


def type_of(probe: Probe) -> str:
    """A probe's type as the YAML names it."""
    return str(msgspec.to_builtins(probe)["type"])


def forwarded_ports(probes: Iterable[Probe]) -> list[int]:
    """Guest ports that probes reach from the host."""
    kinds = (TcpProbe, HttpProbe)
    return sorted({p.port for p in probes if isinstance(p, kinds) and p.via == "forward"})


def check_patterns(probes: Iterable[Probe]) -> None:
    """InvalidRequest when a probe's pattern is not a regular expression."""
    for number, probe in enumerate(probes):
        pattern = getattr(probe, "pattern", "")
        try:
            regex.compile(pattern)
        except regex.error as error:
            raise InvalidRequest(
                f"not a regular expression: {pattern!r}: {error} - at `$.probes[{number}].pattern`",
                hint="escape ( [ { . * + ? with a backslash to mean the character itself",
            ) from None


async def _attempt(target: Target, probe: Probe) -> str:
    """Return what was seen; raise _NotYet or a TemplatedError when it is not enough."""
    match probe:
        case SerialProbe():
            return await _serial(target.vm, probe)
        case AgentProbe():
            return await _ping(target.vm)
        case ExecProbe():
            return await _exec(target.vm, probe)
        case TcpProbe():
            return await _tcp(target, probe)
        case HttpProbe():
            return await _http(target, probe)
        case SettleProbe():
            return await _settle(target.vm, probe)


async def _ping(vm: Vm) -> str:
    try:
        await vm.agent.ping(_ATTEMPT)
    except Timeout as error:
        raise _NotYet(vm.agent.absence or error.message) from error
    return "pong"


async def _serial(vm: Vm, probe: SerialProbe) -> str:
    with contextlib.suppress(OSError):
        text = await asyncio.to_thread(vm.places.serial_log.read_text, errors="replace")
        if (found := await _found(probe.pattern, text)) is not None:
            return _short(found)
        lines = text.strip().splitlines()
        raise _NotYet(f"no match, last line {_short(lines[-1])!r}" if lines else "an empty console")
    raise _NotYet("no console log")


async def _exec(vm: Vm, probe: ExecProbe) -> str:
    code, output = await _guest_output(vm, list(probe.command), seconds(probe.timeout))
    if code != probe.exit_code:
        raise _NotYet(f"exit code {code}, output {_short(output)!r}")
    return await _matching(probe.pattern, output)


async def _guest_output(vm: Vm, argv: list[str], timeout: float) -> tuple[int | None, str]:
    output, result = bytearray(), ExecResult()
    async with contextlib.aclosing(vm.agent.exec(argv, timeout=timeout)) as answer:
        async for part in answer:
            if isinstance(part, ExecResult):
                result = part
            else:
                # Only so much is kept: a probe is about a pattern, not about a stream.
                output += part.data[: max(0, _OUTPUT - len(output))]
    text = output.decode(errors="replace")
    if result.timed_out:
        raise _NotYet(f"the command ran into its timeout, output {_short(text)!r}")
    return result.exit_code, text


async def _tcp(target: Target, probe: TcpProbe) -> str:
    if probe.via == "guest":
        script = f"import socket; socket.create_connection(('127.0.0.1', {probe.port}), 3)"
        code, output = await _guest_output(target.vm, ["python3", "-c", script], _ATTEMPT)
        if code != 0:
            raise _NotYet(_last_line(output))
        return "connected"
    host, port = target.forwards[probe.port]
    try:
        _, writer = await asyncio.open_connection(host, port)
    except OSError as error:
        raise _NotYet(str(error)) from error
    writer.close()
    return "connected"


async def _http(target: Target, probe: HttpProbe) -> str:
    if probe.via == "guest":
        status, body = await _http_in_guest(target.vm, probe)
    else:
        host, port = target.forwards[probe.port]
        status, body = await _http_from_host(f"http://{host}:{port}{probe.path}")
    if status != probe.status:
        raise _NotYet(f"status {status}")
    return f"status {status}, " + await _matching(probe.pattern, body)


_HTTP_SCRIPT = """
import http.client, sys
c = http.client.HTTPConnection('127.0.0.1', int(sys.argv[1]), timeout=3)
c.request('GET', sys.argv[2])
r = c.getresponse()
sys.stdout.buffer.write(b'%d\\n' % r.status + r.read(65536))
"""


async def _http_in_guest(vm: Vm, probe: HttpProbe) -> tuple[int, str]:
    argv = ["python3", "-c", _HTTP_SCRIPT, str(probe.port), probe.path]
    code, output = await _guest_output(vm, argv, _ATTEMPT)
    status, _, body = output.partition("\n")
    if code != 0 or not status.isdigit():
        raise _NotYet(_last_line(output))
    return int(status), body


async def _http_from_host(url: str) -> tuple[int, str]:
    timeout = aiohttp.ClientTimeout(total=_ATTEMPT)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(url) as answer,
        ):
            body = bytearray()
            async for part in answer.content.iter_any():
                body += part
                if len(body) >= _OUTPUT:
                    break
            return answer.status, body.decode(errors="replace")
    except (aiohttp.ClientError, OSError) as error:
        raise _NotYet(str(error)) from error


async def _settle(vm: Vm, probe: SettleProbe) -> str:
    quiet = seconds(probe.quiet)
    before = vm.machine.cpu_seconds()
    await asyncio.sleep(quiet)
    percent = (vm.machine.cpu_seconds() - before) / quiet * 100
    if percent >= probe.cpu_percent:
        raise _NotYet(f"{percent:.0f} % of a core")
    return f"{percent:.0f} % of a core"


async def _found(pattern: str, text: str) -> str | None:
    """The text that a pattern matches. Some patterns take for ever on some texts, so this runs in a
    thread, without the interpreter's lock and with a bound.
    """
    compiled = regex.compile(pattern)
    try:
        match = await asyncio.to_thread(
            lambda: compiled.search(text, timeout=_MATCHING, concurrent=True)
        )
    except TimeoutError:
        raise _NotYet(f"matching {pattern!r} takes more than {_MATCHING:g} s") from None
    return str(match[0]) if match else None


async def _matching(pattern: str, text: str) -> str:
    if await _found(pattern, text) is not None:
        return _short(text)
    raise _NotYet(f"no match for {pattern!r} in {_short(text)!r}")


def _short(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _SAW else text[:_SAW] + "..."


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return _short(lines[-1]) if lines else "no output"
