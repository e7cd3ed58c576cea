"""The guest's agent, driven over a socketpair and over FIFOs, without a guest."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import struct
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from templated.drivers.guest import Confirmation, IdentityOrder, Step
from templated.drivers.hypervisor.fake_guest import FakeSystem
from templated.guest.agent.commands import Agent
from templated.guest.agent.kernel import System
from templated.guest.agent.port import QUEUE_LIMIT
from templated.guest.agent.wire import PAGE, QUICK, QUICK_DATA, QUICK_HEAD

ROOT = Path(__file__).parents[2]
HOOK_VALUES = {"hostname", "machine_id", "boot_id", "uuid", "mac", "ip"}


class Recorder(FakeSystem):
    """Also keeps its files in a directory, as a kernel does, and notes what it is told."""

    write, read, forget, hooks = System.write, System.read, System.forget, System.hooks

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.run = self.etc = str(folder)
        self.calls: list[tuple[str, Any]] = []
        self.open_files()

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def add_entropy(self, request: bytes) -> None:
        self.calls.append(("entropy", request))

    def set_clock(self, seconds: float) -> None:
        self.calls.append(("clock", seconds))

    def set_address(self, ip: bytes, prefix: bytes, gateway: bytes) -> None:
        super().set_address(ip, prefix, gateway)
        self.calls.append(("address", (ip, prefix, gateway)))

    def sync(self) -> None:
        self.calls.append(("sync", None))


class Host:
    """The host's end: an agent in a thread and a socket to it."""

    def __init__(self, folder: Path, *, parks: bool = False) -> None:
        self.system = Recorder(folder)
        self._parks = parks
        self.socket, other = socket.socketpair()
        other.setblocking(False)
        self.socket.settimeout(20)
        self.lines = self.socket.makefile("rb")
        self.agent = Agent(other.fileno(), other.fileno(), self.system)
        self._other = other
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        if self._parks:
            self.agent.serve()
        while not self.agent.stop:
            self.agent.turn(0.05)

    def write(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self) -> dict[str, Any]:
        message = json.loads(self.lines.readline())
        assert isinstance(message, dict)
        return message

    def request(self, command: str, **arguments: Any) -> dict[str, Any]:
        self.write(json.dumps({"id": 7, "cmd": command, **arguments}).encode() + b"\n")
        return self.read()

    def collect(self, *numbers: int) -> tuple[dict[int, Any], dict[tuple[int, str], bytes]]:
        """The replies to `numbers`, and what was streamed before them."""
        replies: dict[int, Any] = {}
        output: dict[tuple[int, str], bytes] = {}
        while set(replies) != set(numbers):
            message = self.read()
            if "stream" in message:
                key = (message["id"], message["stream"])
                output[key] = output.get(key, b"") + base64.b64decode(message["data"])
            else:
                replies[message["id"]] = message
        return replies, output

    def run(self, *argv: str, **arguments: Any) -> tuple[dict[str, Any], bytes]:
        body = {"id": 7, "cmd": "exec", "argv": argv, **arguments}
        self.write(json.dumps(body).encode() + b"\n")
        replies, output = self.collect(7)
        return replies[7]["result"], output.get((7, "stdout"), b"")

    def close(self) -> None:
        self.agent.stop = True
        if self._parks:
            self.write(b"\n")
        self._thread.join()
        self.agent.close()
        self.lines.close()
        self.socket.close()
        self._other.close()
        self.system.close()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    host.close()


def test_ping(host: Host) -> None:
    reply = host.request("ping")
    assert reply["ok"] and reply["id"] == 7
    assert reply["result"]["version"] == 1 and not reply["result"]["identified"]


@pytest.mark.parametrize(
    ("line", "number", "code"),
    [
        (b"{nonsense", None, "invalid"),
        (b"\xff\xfe", None, "invalid"),
        (b"[1]", None, "invalid"),
        (b"[" * 100000, None, "invalid"),
        (b'{"id": 3, "cmd": "fly"}', 3, "unknown_command"),
        (b'{"id": 3, "cmd": ["ping"]}', 3, "invalid"),
        (b'{"id": 3, "cmd": "put"}', 3, "invalid"),
        (b'{"id": 3, "cmd": "exec", "argv": "ls"}', 3, "invalid"),
        (b'{"id": 3, "cmd": "get", "path": "/not/there"}', 3, "enoent"),
        (b"x" * (3 << 20), None, "too_long"),
        # Found by tests/fuzz/test_guest_side.py: each of these ended the agent.
        (b'{"id": 3, "cmd": "get", "path": "/etc", "offset": Infinity}', 3, "invalid"),
        (b'{"id": 3, "cmd": "get", "path": "/etc/passwd", "offset": 1e30}', 3, "invalid"),
        # An id that does not go into a reply.
        (b'{"id": [[1]], "cmd": "ping"}', None, "invalid"),
    ],
)
def test_bad_request_is_refused_and_the_agent_goes_on(
    host: Host, line: bytes, number: int | None, code: str
) -> None:
    host.write(b"\n\n" + line + b"\n")
    reply = host.read()
    assert (reply["id"], reply["ok"], reply["error"]["code"]) == (number, False, code)
    assert host.request("ping")["ok"]


def test_exec_gives_stdin_and_both_outputs(host: Host) -> None:
    script = "read -r line; echo out $line $VALUE $PWD; echo err >&2; exit 3"
    body = {
        "id": 1,
        "cmd": "exec",
        "argv": ["sh", "-c", script],
        "stdin": base64.b64encode(b"in\n").decode(),
        "env": {"VALUE": "v"},
        "cwd": "/tmp",
    }
    host.write(json.dumps(body).encode() + b"\n")
    replies, output = host.collect(1)
    assert replies[1]["result"] == {"exit_code": 3, "signal": None, "timed_out": False}
    assert output == {(1, "stdout"): b"out in v /tmp\n", (1, "stderr"): b"err\n"}


def test_exec_timeout_kills_the_group(host: Host, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "held")
    held = os.open(tmp_path / "held", os.O_RDONLY | os.O_NONBLOCK)
    script = f"exec 3>{tmp_path}/held; echo >&3; sleep 600 & sleep 600"
    result, _ = host.run("sh", "-c", script, timeout=0.3)
    assert result == {"exit_code": None, "signal": 9, "timed_out": True}
    os.set_blocking(held, True)
    with open(held, "rb") as pipe:  # it ends when nobody of the group has it open any more
        assert pipe.read() == b"\n"


def test_exec_of_what_is_missing(host: Host) -> None:
    result, _ = host.run("no-such-program")
    assert (result["exit_code"], result["error"]) == (127, "not_found")
    reply = host.request("exec", argv=["true"], cwd="/no/such/folder")
    assert reply["error"]["code"] == "bad_cwd"


def test_exec_large_output_is_complete_though_the_host_is_slow(host: Host) -> None:
    body = {"id": 7, "cmd": "exec", "argv": ["head", "-c", "20000000", "/dev/zero"]}
    host.write(json.dumps(body).encode() + b"\n")
    while host.agent.queued < QUEUE_LIMIT:
        time.sleep(0.01)
    time.sleep(0.1)
    assert host.agent.queued < 3 * QUEUE_LIMIT
    _, output = host.collect(7)
    assert len(output[7, "stdout"]) == 20000000


def test_exec_ends_though_a_grandchild_keeps_the_pipe(host: Host) -> None:
    result, output = host.run("sh", "-c", "sleep 600 & echo $!")
    assert result["exit_code"] == 0
    os.kill(int(output), signal.SIGKILL)  # it still runs


def test_two_execs_at_a_time_and_a_ping_between(host: Host) -> None:
    for number, argv in ((1, ["sh", "-c", "sleep 0.5; echo a"]), (2, ["echo", "b"])):
        host.write(json.dumps({"id": number, "cmd": "exec", "argv": argv}).encode() + b"\n")
    host.write(b'{"id": 3, "cmd": "ping"}\n')
    order: list[int] = []
    while len(order) < 3:
        message = host.read()
        if "ok" in message:
            order.append(message["id"])
    assert sorted(order) == [1, 2, 3] and order[-1] == 1


def test_put_and_get(host: Host, tmp_path: Path) -> None:
    content, path = os.urandom(150000), str(tmp_path / "file")
    for offset in range(0, len(content), 60000):
        data = base64.b64encode(content[offset : offset + 60000]).decode()
        eof = offset + 60000 >= len(content)
        assert not os.path.exists(path)
        assert host.request("put", path=path, mode=0o750, data=data, offset=offset, eof=eof)["ok"]
    back = b""
    while True:
        chunk = host.request("get", path=path, offset=len(back), length=65536)["result"]
        back += base64.b64decode(chunk["data"])
        if chunk["eof"]:
            break
    assert back == content
    assert (chunk["size"], chunk["mode"]) == (150000, 0o750)


def identity(**changes: Any) -> IdentityOrder:
    values: dict[str, Any] = {
        "hostname": "clone-1",
        "machine_id": "ab" * 16,
        "boot_id": str(uuid.uuid4()),
        "uuid": str(uuid.uuid4()),
        "mac": "52:54:00:12:34:56",
        "ip": "10.1.2.3",
        "prefix": 16,
        "gateway": None,
        "dns": ["10.1.0.1", "10.1.0.2"],
        "time": 1000.0,
        "entropy": bytes(range(64)),
    }
    return IdentityOrder(**{**values, **changes})


def confirmed(reply: dict[str, Any]) -> Confirmation:
    return Confirmation.of(msgspec.Raw(json.dumps(reply["result"]).encode()))


def test_identify_reports_what_it_reads_back(host: Host, tmp_path: Path) -> None:
    wanted = identity()
    begin = time.monotonic()
    assert host.request("quiesce")["ok"]
    time.sleep(0.2)
    seen = confirmed(host.request("identify", **wanted.fields()))
    passed = time.monotonic() - begin
    for name in ("hostname", "machine_id", "boot_id", "uuid", "mac", "ip", "prefix"):
        assert getattr(seen, name) == getattr(wanted, name)
    names = [name for name, _ in host.system.calls]
    assert names == ["sync", "entropy", "clock", "address"]
    # The mark is set after the reply: how much of the pause it saw, depends on the host's load.
    assert 1000 < dict(host.system.calls)["clock"] <= 1000 + passed
    assert dict(host.system.calls)["entropy"] == struct.pack("ii", 512, 64) + bytes(range(64))
    texts = {
        "hostname": "clone-1\n",
        "hosts": "127.0.0.1 localhost\n10.1.2.3 clone-1\n",
        "machine-id": wanted.machine_id + "\n",
        "boot_id": wanted.boot_id + "\n",
        "uuid": wanted.uuid + "\n",
        "resolv.conf": "nameserver 10.1.0.1\nnameserver 10.1.0.2\n",
    }
    assert {name: (tmp_path / name).read_text() for name in texts} == texts
    told = json.loads((tmp_path / "identity.json").read_text())
    assert told.items() <= vars(wanted).items() and set(told) == HOOK_VALUES
    assert host.request("ping")["result"]["identified"]


def test_identify_again_leaves_nothing_of_the_longer_name(host: Host, tmp_path: Path) -> None:
    """And the clock that it is given counts from the end of the first."""
    host.request("quiesce")
    begin = time.monotonic()
    host.request("identify", **identity(hostname="a-much-longer-name", gateway="10.1.0.9").fields())
    seen = confirmed(host.request("identify", **identity(hostname="b", dns=[]).fields()))
    passed = time.monotonic() - begin
    assert seen.hostname == "b" and (tmp_path / "hostname").read_text() == "b\n"
    assert (tmp_path / "hosts").read_text() == "127.0.0.1 localhost\n10.1.2.3 b\n"
    name, clock = host.system.calls[-2]
    assert name == "clock" and 1000.0 < clock <= 1000 + passed


@pytest.mark.parametrize("parks", [False, True])
def test_a_claim_gives_a_name_to_who_has_the_rest(tmp_path: Path, parks: bool) -> None:
    """Everything is read back all the same; the clock counts from the end of the rehearsal."""
    host = Host(tmp_path, parks=parks)
    first = identity(hostname="waiting")
    host.request("identify", **first.fields())
    begin = time.monotonic()
    host.request("identify", **replace(first, step=Step.REHEARSAL, hostname="r").fields())
    host.system.calls.clear()
    time.sleep(0.1)
    claim = replace(
        first, step=Step.CLAIM, hostname="clone-7", time=2000.0, mac="02:00:00:00:00:09"
    )
    seen = confirmed(host.request("identify", **claim.fields()))
    passed = time.monotonic() - begin
    assert seen.hostname == "clone-7" and seen.mac == first.mac, "the MAC is not the claim's"
    for key in ("machine_id", "boot_id", "uuid", "ip", "prefix"):
        assert getattr(seen, key) == getattr(first, key)
    assert [name for name, _ in host.system.calls] == ["entropy", "clock"]
    assert 2000.1 <= dict(host.system.calls)["clock"] <= 2000 + passed
    assert (tmp_path / "hostname").read_text() == "clone-7\n"
    assert (tmp_path / "hosts").read_text() == "127.0.0.1 localhost\n10.1.2.3 clone-7\n"
    assert json.loads((tmp_path / "identity.json").read_text())["hostname"] == "clone-7"
    assert host.run("echo", "a")[1] == b"a\n"
    host.close()


def test_a_frozen_agent_answers_as_any_other(tmp_path: Path) -> None:
    """It waits in a plain read; whatever ends that is answered, and the rest in epoll."""
    for first in ("identify", "ping", "broken"):
        host = Host(tmp_path, parks=True)
        host.request("identify", **identity().fields())
        assert host.request("quiesce")["ok"]
        assert (tmp_path / "hosts").stat().st_size == 1
        time.sleep(0.05)
        host.write(b"\n\n")
        time.sleep(0.05)
        if first == "identify":
            assert confirmed(host.request("identify", **identity().fields())).hostname == "clone-1"
        elif first == "broken":
            host.write(b'{"id":9,"cmd":"identify","packed":"00"}\n')
            reply = host.read()
            assert (reply["id"], reply["error"]["code"]) == (9, "invalid")
        assert host.request("ping")["result"]["identified"]
        assert host.run("echo", "a")[1] == b"a\n"
        host.close()


def test_a_command_right_behind_a_quiesce(tmp_path: Path) -> None:
    """An agent that is told to wait in a plain read does not leave a command alone."""
    host = Host(tmp_path, parks=True)
    lines = [{"id": 1, "cmd": "quiesce"}, {"id": 2, "cmd": "exec", "argv": ["echo", "a"]}]
    host.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    replies, output = host.collect(1, 2)
    assert replies[2]["result"]["exit_code"] == 0 and output[2, "stdout"] == b"a\n"
    host.close()


@pytest.mark.parametrize("packed", [None, 1, "zz", "00", "é"])
def test_a_broken_identity_is_refused(host: Host, packed: Any) -> None:
    assert host.request("identify", packed=packed)["error"]["code"] == "invalid"
    assert not host.request("ping")["result"]["identified"]


def test_the_host_and_the_agent_agree_on_the_quick_shape() -> None:
    """Else every clone would decode JSON, unnoticed."""
    line = msgspec.json.encode({"id": 1 << 30, "cmd": "identify", **identity().fields()})
    assert line[QUICK_HEAD:QUICK_DATA] == QUICK and len(line[:QUICK_HEAD]) <= 20
    assert len(line) < PAGE


def test_failing_hook_fails_identify(host: Host, tmp_path: Path) -> None:
    hooks = tmp_path / "templated" / "identity.d"
    hooks.mkdir(parents=True)
    (hooks / "10-bad").write_text("#!/bin/sh\necho no $TEMPLATED_HOSTNAME\nexit 4\n")
    (hooks / "10-bad").chmod(0o755)
    host.request("quiesce")
    reply = host.request("identify", **identity().fields())
    assert (
        reply["error"]["code"] == "hook" and "exit code 4: no clone-1" in reply["error"]["message"]
    )
    assert not host.request("ping")["result"]["identified"]


def test_reconnection_drops_the_old_connection(tmp_path: Path) -> None:
    """FIFOs report a hang-up without a peer and come back with one, as a virtio port does."""
    for name in ("in", "out"):
        os.mkfifo(tmp_path / name)
    fd_in = os.open(tmp_path / "in", os.O_RDONLY | os.O_NONBLOCK)
    fd_out = os.open(tmp_path / "out", os.O_RDWR | os.O_NONBLOCK)
    system = Recorder(tmp_path)
    agent = Agent(fd_in, fd_out, system)
    first = os.open(tmp_path / "in", os.O_WRONLY)
    os.write(first, b'{"id": 1, "cmd": "exec", "argv": ["sh", "-c", "sleep 0.3; echo late"]}\n')
    agent.turn(1)
    os.write(first, b'{"id": 2, "cmd": "pi')
    agent.turn(1)
    os.close(first)
    end, turns = time.monotonic() + 1, 0
    while time.monotonic() < end or agent.sources:
        agent.turn(0.2)
        turns += 1
    assert turns < 20, "a hang-up that lasts is no busy loop"
    second = os.open(tmp_path / "in", os.O_WRONLY)
    os.write(second, b'\n{"id": 3, "cmd": "ping"}\n')
    agent.turn(1)
    agent.turn(0.1)
    lines = os.read(fd_out, 65536).splitlines()
    assert [json.loads(line)["id"] for line in lines] == [3]
    agent.close()
    system.close()
    for descriptor in (second, fd_in, fd_out):
        os.close(descriptor)


def test_starts_as_a_directory_and_imports_little() -> None:
    """As in a guest, where this package is not; every module is memory of each clone."""
    folder = ROOT / "templated/guest/agent"
    code = (folder / "__main__.py").read_text()
    trial = f"import sys; sys.path.insert(0, {str(folder)!r}); "
    trial += f"exec({code!r}, {{'__name__': 'trial', '__package__': ''}}); print(*sys.modules)"
    command = ["/usr/bin/python3", "-ISBc", trial]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    modules = set(done.stdout.split())
    assert {"agent.commands", "agent.kernel"} <= modules
    assert not modules & {"agent.functions", "agent.http", "agent.code", "agent.runtimes"}
    assert not modules & {"templated", "typing", "shutil", "asyncio", "logging", "inspect"}


def test_a_timeout_that_is_no_number(host: Host) -> None:
    """The command has a deadline all the same, and waiting for it is no busy loop."""
    host.write(b'{"id": 7, "cmd": "exec", "argv": ["cat"], "timeout": NaN, "stdin": "YQ=="}\n')
    host.write(b'{"id": 8, "cmd": "exec", "argv": ["sleep", "600"], "timeout": NaN}\n')
    host.collect(7)
    (source,) = host.agent.sources
    assert source.deadline is not None and source.deadline < time.monotonic() + 90_000
    source.deadline = 0.0
    replies, _ = host.collect(8)
    assert replies[8]["result"]["timed_out"]
