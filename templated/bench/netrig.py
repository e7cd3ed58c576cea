"""A host, a clone and a VPC, each a network namespace, for `bench egress` and tests of egresses."""

from __future__ import annotations

import itertools
import json
import os
import select
import subprocess
import sys
from types import TracebackType
from typing import IO, Any, Self

from templated.bench.flows import EVERY
from templated.errors import HostError, Timeout

FIXED = "172.20.0.100"
SERVER = "172.20.0.1"
"""The VPC's gateway and its one server."""
LENGTH = 16
NETWORK = f"172.20.0.0/{LENGTH}"
"""The VPC's."""
_CLONE = "10.78.200.3"
_HOST = "10.78.0.1"
_WITHIN = 60.0
_BULK = 9200
_numbers = itertools.count()


def run(*command: str, check: bool = True) -> str:
    """A program's output. Raises HostError with the first line that it complains with."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_WITHIN, check=False)
    except OSError as error:
        raise HostError(f"cannot start {command[0]}: {error.strerror}") from error
    except subprocess.TimeoutExpired:
        raise Timeout(f"{command[0]} did not end within {_WITHIN:g} s") from None
    if check and done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise HostError(f"{' '.join(command[:6])}: {said[0]}", hint="run as root")
    return done.stdout


class Net:
    """A named network namespace without IPv6, whose addresses come and go by themselves."""

    def __init__(self, name: str) -> None:
        self.name = name
        run("ip", "netns", "add", name)
        for which in ("all", "default"):
            self.sysctl(f"ipv6/conf/{which}/disable_ipv6", "1")
        self.ip("link", "set", "lo", "up")

    def run(self, *command: str, check: bool = True) -> str:
        """As `run`, inside."""
        return run("ip", "netns", "exec", self.name, *command, check=check)

    def ip(self, *arguments: str, check: bool = True) -> str:
        """Run `ip`, inside."""
        return run("ip", "-n", self.name, *arguments, check=check)

    def sysctl(self, name: str, value: str) -> None:
        """Set a switch of the namespace, below /proc/sys/net."""
        self.run("sh", "-c", f"echo {value} >/proc/sys/net/{name}")

    def start(self, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start a program inside."""
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], **options)

    def close(self) -> None:
        """Remove it."""
        run("ip", "netns", "del", self.name, check=False)


class Rig:
    """`host` forwards and has the interface `vpc0`; `vpc`, at its other end, has SERVER.

    `clone` is nowhere until `add_clone`. Raises HostError; nothing of it stays then.
    """

    def __init__(self) -> None:
        self.tag = f"templated-{os.getpid()}-{next(_numbers)}"
        self._nets: list[Net] = []
        try:
            self.host, self.vpc, self.clone = map(self.net, ("host", "vpc", "clone"))
            self.host.sysctl("ipv4/ip_forward", "1")
            self.join(self.vpc, "vpc0", "eth0", f"{SERVER}/{LENGTH}")
        except BaseException:
            self.close()
            raise

    def net(self, name: str) -> Net:
        """One more namespace, which goes with the others."""
        made = Net(f"{self.tag}-{name}")
        self._nets.append(made)
        return made

    def join(self, other: Net, here: str, there: str, address: str) -> None:
        """Connect `here` of the host with `there` of another one."""
        self.host.ip("link", "add", here, "type", "veth", "peer", there, "netns", other.name)
        other.ip("addr", "add", address, "dev", there)
        other.ip("link", "set", there, "up")
        self.host.ip("link", "set", here, "up")

    def add_clone(self, bridge: str = "templated0") -> None:
        """Have `clone` on the host's bridge, as a guest would be."""
        self.join(self.clone, "tpclone", "eth0", f"{_CLONE}/16")
        self.host.ip("link", "set", "tpclone", "master", bridge)
        self.clone.ip("route", "replace", "default", "via", _HOST)

    def mark(self, mark: int | None, bridge: str = "templated0") -> None:
        """What a policy does: packets of clones get the mark of their egress, and no other.

        None: nothing marks them but policies.
        """
        script = "add table ip marks; delete table ip marks;"
        if mark is not None:
            script += (
                "add table ip marks;"
                "add chain ip marks in { type filter hook prerouting priority -150; };"
                f'add rule ip marks in iifname "{bridge}" meta mark set {mark}'
            )
        self.host.run("nft", script)

    def watch(self, *allowed: str) -> None:
        """Count what reaches the VPC that is of no allowed source; see `wrong`."""
        addresses = ", ".join((FIXED, *allowed))
        self.vpc.run(
            "nft",
            "add table netdev seen; delete table netdev seen; add table netdev seen;"
            "add counter netdev seen wrong; add counter netdev seen right;"
            'add chain netdev seen in { type filter hook ingress device "eth0" priority 0; };'
            f"add rule netdev seen in ip saddr {{ {addresses} }} counter name right accept;"
            f"add rule netdev seen in arp saddr ip {{ 0.0.0.0, {addresses} }} accept;"
            "add rule netdev seen in counter name wrong",
        )

    def wrong(self) -> int:
        """The frames that `watch` has counted."""
        return self._counted("wrong")

    def right(self) -> int:
        """Packets of allowed sources."""
        return self._counted("right")

    def _counted(self, name: str) -> int:
        told = json.loads(self.vpc.run("nft", "-j", "list", "counter", "netdev", "seen", name))
        return int(told["nftables"][-1]["counter"]["packets"])

    def close(self) -> None:
        """Remove all namespaces. Raises nothing."""
        while self._nets:
            self._nets.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def program(*arguments: str) -> tuple[str, ...]:
    """The command that does a part of `templated.bench.flows`."""
    return sys.executable, "-m", "templated.bench.flows", *arguments


def line(process: subprocess.Popen[bytes]) -> bytes:
    """The next line that a process says. Raises Timeout."""
    stream: IO[bytes] | None = process.stdout
    assert stream is not None
    ready, _, _ = select.select([stream], [], [], _WITHIN)
    if not ready:
        raise Timeout(f"{process.args!r} said nothing within {_WITHIN:g} s")
    return stream.readline()


class Sink:
    """A server of the VPC that counts what flows bring; see `templated.bench.flows`."""

    def __init__(self, rig: Rig, port: int = 9000) -> None:
        self._process = rig.vpc.start(
            *program("sink", SERVER, str(port)), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        line(self._process)

    def result(self, sent: list[int]) -> tuple[int, list[float], set[str]]:
        """How many flows were lost, the longest silence of each, sorted, and all source addresses.

        A flow is lost when one of its messages is: `sent` says how many each one has. Seconds.
        """
        out, _ = self._process.communicate(timeout=_WITHIN)
        arrived = {flow["flow"]: flow for flow in json.loads(out)}
        lost = sum(arrived.get(i, {}).get("messages") != count for i, count in enumerate(sent))
        silences = sorted(flow["silent"] for flow in arrived.values())
        return lost, silences, {flow["peer"] for flow in arrived.values()}

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


class Flows:
    """TCP flows from the clone to the VPC, which send from now on for so many seconds."""

    def __init__(
        self, rig: Rig, number: int, seconds: float, port: int = 9000, every: float = EVERY
    ) -> None:
        self._sink = Sink(rig, port)
        send = program("send", SERVER, str(port), str(number), str(seconds), str(every))
        self._send = rig.clone.start(*send, stdout=subprocess.PIPE)
        line(self._send)

    def result(self) -> tuple[int, list[float], set[str]]:
        """As `Sink.result`, once all is sent."""
        told = json.loads(line(self._send) or b'{"sent": []}')
        self._send.communicate(timeout=_WITHIN)
        return self._sink.result(told["sent"])

    def close(self) -> None:
        """End them."""
        self._send.kill()
        self._send.communicate()
        self._sink.close()


def spec(name: str) -> dict[str, object]:
    """An egress of this name on the rig's host, as the API takes it."""
    return {
        "name": name,
        "interface": "vpc0",
        "address": f"{FIXED}/{LENGTH}",
        "gateway": SERVER,
        "to": [NETWORK],
    }


def poured(rig: Rig, seconds: float, flows: int) -> float:
    """Bytes per second of bulk flows together, each with a process of its own at both ends."""
    drains, pours = list[subprocess.Popen[bytes]](), list[subprocess.Popen[bytes]]()
    ports = [str(_BULK + number) for number in range(flows)]
    try:
        for port in ports:
            drains.append(rig.vpc.start(*program("drain", SERVER, port), stdout=subprocess.PIPE))
            line(drains[-1])
        for port in ports:
            pours.append(rig.clone.start(*program("pour", SERVER, port, str(seconds))))
        told = [json.loads(line(drain) or b"null") for drain in drains]
    finally:
        for process in (*drains, *pours):
            process.kill()
            process.communicate()
    if None in told:
        raise HostError("a bulk flow failed")
    return sum(float(one["bytes"] / one["seconds"]) for one in told)
