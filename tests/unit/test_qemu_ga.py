"""The host's end of qemu-ga against the real one: identity, commands, files, and bad answers."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from templated.drivers.guest import Step
from templated.drivers.qga.agent import GaAgent
from templated.errors import Conflict, GuestError, Timeout, UnfitAgent
from tests.unit.qemu_ga import connected, needs_qemu_ga, order, play, qemu_ga, run

pytestmark = needs_qemu_ga
_READ_BACK = ("hostname", "machine_id", "boot_id", "uuid", "mac", "ip", "prefix")


async def text(agent: GaAgent, path: str) -> str:
    """A file of the guest."""
    return (await agent.get(path, 5.0)).decode()


def test_identity(tmp_path: Path) -> None:
    """All of it is set, in files and in the kernel, and is read back; nothing of before is left."""

    async def body(agent: GaAgent) -> None:
        await agent.ping(5.0)
        wanted, begin = order(7), time.time()
        seen = await agent.identify(30.0, wanted)
        for name in _READ_BACK:
            assert getattr(seen, name) == getattr(wanted, name)
        assert begin <= seen.asked <= seen.time <= time.time()
        assert time.monotonic() - 90 < agent.marked <= time.monotonic()
        assert await text(agent, "/etc/hostname") == "clone-7\n"
        hosts = "127.0.0.1 localhost\n10.0.0.9 other\n10.77.0.7 clone-7 # templated\n"
        assert await text(agent, "/etc/hosts") == hosts
        assert await text(agent, "/etc/machine-id") == wanted.machine_id + "\n"
        servers = "nameserver 10.77.255.2\nnameserver 10.77.255.3\n"
        assert await text(agent, "/etc/resolv.conf") == servers
        assert await text(agent, "/run/kernel") == "07" * 64 + " 1700000000250000000 \n"
        key = wanted.host_keys[0]
        assert await text(agent, "/etc/ssh/ssh_host_ed25519_key") == key.private
        assert await text(agent, "/etc/ssh/ssh_host_ed25519_key.pub") == key.public
        for command, expected in {
            "stat -c %a /etc/ssh/ssh_host_ed25519_key": "600\n",
            "ls /etc/ssh": "ssh_host_ed25519_key\nssh_host_ed25519_key.pub\n",
            "ls /var/lib/dhcp": "",
            "ls /run/log/journal": wanted.machine_id + "\n",
            "stat -c %s /var/lib/systemd/random-seed": "512\n",
            "stat -c %a /run/templated/uuid": "600\n",
            "hostname": "clone-7\n",
        }.items():
            assert (await run(agent, "sh", "-c", command))[0] == expected, command
        network = await text(agent, "/etc/systemd/network/00-templated.network")
        for line in ("Name=eth0", "MACAddress=02:00:00:00:00:07", "Address=10.77.0.7/16"):
            assert line in network.splitlines()
        shown = (await run(agent, "ip", "-4", "addr", "show", "dev", "eth0"))[0]
        assert "10.77.0.7/16" in shown and "10.9.9.9" not in shown

    play(tmp_path, body)


def test_frozen_and_woken(tmp_path: Path) -> None:
    """What is frozen has nothing unique; a clone then takes another identity, and another name."""

    async def body(agent: GaAgent) -> None:
        await agent.identify(30.0, order(7))
        await agent.quiesce(30.0)
        left = (await run(agent, "sh", "-c", "ls /etc/ssh; ip -4 addr show dev eth0"))[0]
        assert left == ""
        for number in (8, 9):
            seen = await agent.identify(30.0, order(number, gateway=None, dns=()))
            assert (seen.hostname, seen.ip) == (f"clone-{number}", f"10.77.0.{number}")
            assert seen.boot_id == order(number).boot_id
        given = order(9, Step.CLAIM, hostname="named", machine_id="unused", time=1_700_000_100.0)
        seen = await agent.identify(30.0, given)
        assert (seen.hostname, seen.machine_id) == ("named", order(9).machine_id)
        assert (seen.ip, seen.mac) == ("10.77.0.9", "02:00:00:00:00:09")
        assert await agent.adjust_clock(-0.5, 5.0) == pytest.approx(time.time(), abs=5)
        lines = (await text(agent, "/run/kernel")).splitlines()
        times = ["1700000000250000000 "] * 3 + ["1700000100000000000 ", " -500000000"]
        assert [line.partition(" ")[2] for line in lines] == times
        assert [line[:2] for line in lines] == ["07", "08", "09", "09", "  "]
        hosts = await text(agent, "/etc/hosts")
        assert hosts.endswith("10.77.0.9 named # templated\n") and hosts.count("10.77.0.") == 1

    play(tmp_path, body)


UNIQUE = (
    *("/etc/ssh/ssh_host_rsa_key", "/etc/ssh/ssh_host_rsa_key-cert.pub"),
    *("/etc/dropbear/dropbear_rsa_host_key", "/etc/dhcpcd.duid", "/etc/dhcpcd.secret"),
    *("/var/lib/dhclient/dhclient.leases", "/var/lib/dhcp/dhclient.eth0.leases"),
    *("/var/lib/wicked/lease-eth0-dhcp-ipv4.xml", "/var/lib/dhcpcd/duid"),
    *("/var/lib/systemd/credential.secret", "/var/lib/systemd/random-seed"),
    *("/var/lib/NetworkManager/secret_key", "/var/lib/systemd/network/lease"),
)


def test_nothing_unique_is_frozen(tmp_path: Path) -> None:
    """Keys, leases and ids of whichever programs there are."""

    async def body(agent: GaAgent) -> None:
        make = 'for f; do mkdir -p "${f%/*}"; echo before >"$f"; done'
        await run(agent, "sh", "-c", make, "sh", *UNIQUE)
        await agent.quiesce(30.0)
        left = await run(
            agent, "sh", "-c", 'for f; do ! [ -e "$f" ] || echo "$f"; done', "", *UNIQUE
        )
        assert left[0] == ""

    play(tmp_path, body)


def test_cloud_init(tmp_path: Path) -> None:
    """It is waited for after a boot; what it has not finished is neither identified nor frozen."""

    async def body(agent: GaAgent) -> None:
        await agent.settle(10.0)
        await run(agent, "sh", "-c", "mkdir /run/cloud-init; echo >/run/cloud-init/enabled")
        with pytest.raises(Timeout, match="cloud-init in the guest took longer than"):
            await agent.settle(0.5)
        for work in (agent.identify(30.0, order(7)), agent.quiesce(30.0)):
            with pytest.raises(GuestError, match="cloud-init still runs in it"):
                await work
        waiting = asyncio.create_task(agent.settle(30.0))
        await run(agent, "sh", "-c", "echo >/run/cloud-init/result.json")
        await waiting
        await agent.identify(30.0, order(7))
        await agent.quiesce(30.0)

    play(tmp_path, body)


def test_refused_identity(tmp_path: Path) -> None:
    """What fails in the guest fails the identity, and is said in one line."""

    async def body(agent: GaAgent) -> None:
        with pytest.raises(GuestError, match=r"did not take its identity: .*nonsense"):
            await agent.identify(30.0, order(7, ip="nonsense"))
        await run(agent, "rm", "-r", "/sys/class/net/eth0/device")
        with pytest.raises(GuestError, match="it has no network interface"):
            await agent.identify(30.0, order(7))

    play(tmp_path, body)


def test_hooks(tmp_path: Path) -> None:
    """They run as those of our own agent: what they leave behind keeps nobody waiting."""
    hook = b"#!/bin/sh\nsleep 1000 &\necho $TEMPLATED_STEP $TEMPLATED_IP >>/run/hooked\n"

    async def body(agent: GaAgent) -> None:
        await run(agent, "mkdir", "-p", "/etc/templated/identity.d")
        await agent.put("/etc/templated/identity.d/10-a", hook, 0o755, 5.0)
        await agent.put("/etc/templated/identity.d/note", b"exit 1", 0o644, 5.0)
        await agent.identify(30.0, order(7))
        await agent.identify(30.0, order(7, Step.REHEARSAL))
        await agent.identify(30.0, order(7, Step.CLAIM))
        assert await text(agent, "/run/hooked") == "identify 10.77.0.7\nclaim 10.77.0.7\n"
        bad = b"#!/bin/sh\necho this is wrong\nexit 1\n"
        await agent.put("/etc/templated/identity.d/20-b", bad, 0o755, 5.0)
        with pytest.raises(GuestError, match="identity: hook 20-b: this is wrong"):
            await agent.identify(30.0, order(8))

    play(tmp_path, body)


def test_commands(tmp_path: Path) -> None:
    """Output, input, environment, and each way to end."""

    async def body(agent: GaAgent) -> None:
        out, err, ended = await run(
            agent, "sh", "-c", "cat; echo no >&2; exit 3", stdin=b"in\xc3\xa9"
        )
        assert (out, err, ended.exit_code) == ("in\u00e9", "no\n", 3)
        out, _, ended = await run(agent, "sh", "-c", 'echo "$A-$PATH"', env={"A": "b c"})
        assert out.startswith("b c-") and "/bin" in out and ended.exit_code == 0
        assert (await run(agent, "sh", "-c", "kill -9 $$"))[2].signal == 9
        assert (await run(agent, "no-such-program"))[2].error == "not_found"
        assert (await run(agent, "/etc/passwd"))[2].error == "not_executable"
        assert (await run(agent, "no-such-program", env={"A": "b"}))[2].error == "not_found"
        assert (await run(agent, "sh", "-c", "exit 127"))[2].error is None

    play(tmp_path, body)


def test_a_command_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it ends, its children too; and the agent keeps nothing of it."""
    pids = []

    async def body(agent: GaAgent) -> None:
        command = agent._port.command

        async def watched(name: str, kind: Any, timeout: float, **arguments: Any) -> Any:
            answer = await command(name, kind, timeout, **arguments)
            if name == "guest-exec":
                pids.append(answer.pid)
            return answer

        monkeypatch.setattr(agent._port, "command", watched)
        script = "sleep 1000 & sleep 1000; exit 1"
        ended = (await run(agent, "sh", "-c", script, timeout=0.5))[2]
        assert ended.timed_out and ended.signal == 9
        assert len(pids) == 2
        for pid in pids:
            with pytest.raises(GuestError, match=r"(?i)PID"):  # in the words of 7.2 and 10.0
                await command("guest-exec-status", dict, 5.0, pid=pid)
        assert (await run(agent, "pidof", "sleep"))[0] == ""
        # What leads no group, as the steps of a file do.
        assert await agent._run(["sleep", "1000"], 0.3) is None
        assert (await run(agent, "pidof", "sleep"))[0] == ""

    play(tmp_path, body)


def test_files(tmp_path: Path) -> None:
    """They come and go whole, with their modes."""
    content = bytes(range(256)) * 4000

    async def body(agent: GaAgent) -> None:
        await agent.put("/run/file", content, 0o640, 10.0)
        assert await agent.get("/run/file", 10.0) == content
        assert (await run(agent, "stat", "-c", "%a", "/run/file"))[0] == "640\n"
        await agent.put("/run/file", b"", 0o600, 10.0)
        assert await agent.get("/run/file", 10.0) == b""
        assert "Linux" in await text(agent, "/proc/version")
        with pytest.raises(GuestError, match="No such file"):
            await agent.get("/run/nothing", 10.0)
        with pytest.raises(GuestError, match="cannot write /no/such/directory/file"):
            await agent.put("/no/such/directory/file", b"x", 0o600, 10.0)

    play(tmp_path, body)


def test_a_file_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else reads it, nobody guesses its name, and nothing stays of one that failed."""
    seen = []

    async def body(agent: GaAgent) -> None:
        write = agent._write

        async def looked_at(handle: int, chunk: bytes, timeout: float) -> None:
            seen.append((await run(agent, "sh", "-c", "stat -c '%a %n' /run/d/*"))[0])
            await write(handle, chunk, timeout)

        async def full(handle: int, chunk: bytes, timeout: float) -> None:
            raise GuestError("the guest has no room for the whole file")

        await run(agent, "mkdir", "/run/d")
        monkeypatch.setattr(agent, "_write", looked_at)
        for _ in range(2):
            await agent.put("/run/d/key", b"secret", 0o644, 10.0)
            await run(agent, "rm", "/run/d/key")
        monkeypatch.setattr(agent, "_write", full)
        with pytest.raises(GuestError, match="no room"):
            await agent.put("/run/d/key", b"secret", 0o644, 10.0)
        assert (await run(agent, "ls", "-A", "/run/d"))[0] == ""

    play(tmp_path, body)
    assert len(set(seen)) == 2 and all(line.startswith("600 /run/d/key.") for line in seen)


@pytest.mark.parametrize("name", ["guest-exec", "guest-network-get-interfaces"])
def test_forbidden_commands(tmp_path: Path, name: str) -> None:
    """The command is named, and how to allow it."""

    async def body(agent: GaAgent) -> None:
        with pytest.raises(UnfitAgent, match=f"does not allow {name}$") as caught:
            await agent.ping(5.0)
        assert "block-rpcs" in caught.value.hint
        with pytest.raises(UnfitAgent, match="does not allow guest-"):
            await agent.identify(5.0, order(7))

    play(tmp_path, body, "-b", name)


def test_connections(tmp_path: Path) -> None:
    """A new one does not see what an earlier one has left half-written, nor its late answers."""

    async def main(path: Path) -> None:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b'{"execute": "guest-get-time"}\n{"execute": "guest-ge')
        assert b"return" in await reader.readline()
        writer.close()
        await writer.wait_closed()
        async with connected(path) as agent:
            assert await agent.adjust_clock(0.0, 5.0) == pytest.approx(time.time(), abs=5)
            # Given up in the middle: the answer comes, and is not taken for the next one.
            with pytest.raises(Timeout):
                await agent._port.command("guest-info", dict, 0.0)
            for _ in range(3):
                asking = asyncio.create_task(agent.ping(5.0))
                await asyncio.sleep(0)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
                assert await agent.adjust_clock(0.0, 5.0) == pytest.approx(time.time(), abs=5)
            several = await asyncio.gather(*(run(agent, "echo", str(i)) for i in range(5)))
            assert [out for out, _, _ in several] == [f"{i}\n" for i in range(5)]

    with qemu_ga(tmp_path) as path:
        asyncio.run(main(path))


def test_no_functions(tmp_path: Path) -> None:
    """They need our own agent, and the error says so."""

    async def main() -> None:
        with pytest.raises(Conflict, match="functions need the agent of templated"):
            await GaAgent(tmp_path / "agent").rehearse_code(1.0)

    asyncio.run(main())
