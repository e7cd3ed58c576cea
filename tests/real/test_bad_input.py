"""Bad input and broken hosts: one clear line with a hint, an exit code, and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.conftest import prepare
from tests.real.harness import PYTHON_FN, Daemon

pytestmark = pytest.mark.real


@pytest.fixture
def steady(host: Daemon) -> Iterator[Daemon]:
    """The shared daemon; after the test it must hold exactly what it held before."""
    host.cli("clone", "warm-up")
    host.cli("rm", "warm-up")
    before = host.at_rest()
    yield host
    for path in host.templates.glob("*.yaml"):
        if path.name != PYTHON_FN.name:
            path.unlink()
    assert host.settled(before) == before


def test_bad_names(steady: Daemon) -> None:
    """A name that cannot be a host name is refused, by the command and by the API alike."""
    curl = ["curl", "-s", "--unix-socket", str(steady.socket), "http://x/v1/clones", "-d"]
    for name in ("../x", "", "x" * 300, "a b", "Fn-1", "-a", "a_b", "ü", "a\nb"):
        assert "is not a clone name" in steady.fails("clone", "--", name)
        body = json.dumps({"name": name, "template": "python-fn"})
        answer = json.loads(subprocess.run([*curl, body], capture_output=True, check=True).stdout)
        assert answer["error"]["code"] == "invalid" and answer["error"]["hint"]


def test_unknown_template(steady: Daemon) -> None:
    """The error lists what there is."""
    error = steady.fails("clone", "x", "--template", "no-such")
    assert "no template no-such" in error
    assert "no template no-such" in steady.fails("template", "build", "no-such")


def test_name_taken(steady: Daemon) -> None:
    """The second clone of a name is refused; the first is untouched."""
    first = steady.json("clone", "taken")
    assert "exists already" in steady.fails("clone", "taken")
    assert steady.json("show", "taken")["pid"] == first["pid"]
    steady.cli("rm", "taken")


def test_some_of_many_taken(steady: Daemon) -> None:
    """`--count` makes all or none."""
    steady.cli("clone", "m-2")
    assert "m-2 exists already" in steady.fails("clone", "m", "--count", "3")
    assert [clone["name"] for clone in steady.json("ls")] == ["m-2"]
    steady.cli("rm", "m-2")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: [", "bad.yaml:1"),
        ("name: bad\nmachine:\n  memmory: 1GiB\n", "bad.yaml:3"),
        ("name: bad\nmachine: {memory: lots}\n", "$.machine.memory"),
        ("name: bad\nname: bad\n", "stands here twice"),
        ("name: other\n", "the name in it is other"),
        ("name: bad\nprobes: [{name: p, type: exec, command: []}]\n", "$.probes[0].command"),
        ("name: bad\nprobes: [{name: p, type: serial, pattern: '('}]\n", "regular expression"),
        ("- 1\n", "bad.yaml"),
        ("", "bad.yaml"),
    ],
)
def test_bad_template_files(steady: Daemon, text: str, expected: str) -> None:
    """The error names the file, and the line or the path of the field."""
    steady.template("bad", text)
    assert expected in steady.fails("template", "build", "bad")


def test_image_build_without_network(steady: Daemon) -> None:
    """The error says what apt said; no half image stays."""
    text = "name: offline\nimage: {mirror: 'http://127.0.0.1:9/', packages: [tree]}\n"
    steady.template("offline", text)
    images = sorted(p.name for p in (steady.state / "images").iterdir() if p.is_dir())
    error = steady.fails("template", "build", "offline")
    assert "127.0.0.1" in error or "onnect" in error
    assert sorted(p.name for p in (steady.state / "images").iterdir() if p.is_dir()) == images
    for log in (steady.state / "images").glob("build-*.log"):
        log.unlink()


def test_a_guest_that_never_boots(steady: Daemon) -> None:
    """The build ends within boot_timeout and shows the end of the console."""
    text = PYTHON_FN.read_text().replace("name: python-fn", "name: stuck\nboot_timeout: 6s", 1)
    steady.template("stuck", text.replace("vcpus: 1", "vcpus: 1\n  cmdline: init=/bin/false"))
    steady.template("stuck", text.replace("vcpus: 1", "vcpus: 1\n  cmdline: rdinit=/bin/sh"))
    error = steady.fails("template", "build", "stuck", timeout=120)
    assert "did not come up" in error and "stuck" in error


def test_a_probe_that_never_passes(steady: Daemon) -> None:
    """The build ends with the probe's name and what it saw; the generation before serves on."""
    active = steady.json("template", "show", "python-fn")["active"]
    good = PYTHON_FN.read_text()
    probe = "  - {name: never, type: exec, command: [echo, blue], pattern: red, timeout: 2s}\n"
    try:
        steady.template("python-fn", good + probe)
        error = steady.fails("template", "build", "python-fn")
        assert "probe never (exec)" in error and "blue" in error
    finally:
        steady.template("python-fn", good)
    assert steady.json("template", "show", "python-fn")["active"] == active
    steady.cli("clone", "after")
    steady.cli("rm", "after")


def test_an_agent_that_answers_nonsense(steady: Daemon) -> None:
    """The request fails at once with a clear line, not with a hang or a traceback."""
    steady.cli("clone", "liar")
    fake = "import glob,time\nf=open(glob.glob('/dev/vport*')[0],'wb',0)\n"
    fake += "while True:\n f.write(b'{nonsense\\n'); time.sleep(0.2)\n"
    swap = f"""
import os, pathlib, shutil, signal
agent = pathlib.Path("/usr/lib/templated/agent")
shutil.rmtree(agent)
agent.write_text({fake!r})
for entry in pathlib.Path("/proc").iterdir():
    if entry.name.isdigit() and int(entry.name) != os.getpid():
        if b"templated/agent" in (entry / "cmdline").read_bytes():
            os.kill(int(entry.name), signal.SIGKILL)
"""
    steady.run("exec", "--timeout", "3", "liar", "--", "python3", "-c", swap, timeout=60)
    done = steady.run("exec", "--timeout", "3", "liar", "--", "true", timeout=60)
    assert done.returncode not in (0, 124) and "Traceback" not in done.stderr
    assert "nonsense" in done.stderr
    steady.cli("rm", "liar")


def test_a_state_file_cut_short(copied: Daemon) -> None:
    """It is noticed before QEMU is started; a rebuild mends it."""
    copied.start()
    copied.cli("clone", "a")
    copied.cli("rm", "a")
    state = next(copied.shm.glob("python-fn/*/state"))
    os.truncate(state, state.stat().st_size // 2)
    assert "bytes, frozen were" in copied.fails("clone", "b")
    assert copied.qemus() == [] and copied.rows()["clones"] == 0
    memory = next(copied.shm.glob("python-fn/*/memory"))
    with open(memory, "r+b") as damaged:
        damaged.write(b"x")
    assert "cannot be used" in copied.fails("clone", "c")
    assert copied.json("template", "show", "python-fn")["problem"]
    copied.build()
    copied.cli("clone", "d")


def test_a_state_of_another_qemu(copied: Daemon) -> None:
    """A generation that another version froze is refused, and says which."""
    manifest = next(copied.state.glob("generations/python-fn/*/manifest.json"))
    text = json.loads(manifest.read_text())
    text["qemu"]["version"] = "6.0.0"
    manifest.chmod(0o600)
    manifest.write_text(json.dumps(text))
    copied.start()
    assert "was frozen by QEMU 6.0.0" in copied.fails("clone", "x")


def test_missing_qemu(image_store: Path) -> None:
    """A build without QEMU says what to install."""
    daemon = prepare(Daemon(qemu="/nonexistent/qemu-system-x86_64"), image_store)
    try:
        daemon.start()
        assert "is not installed" in daemon.fails("template", "build", "python-fn")
        assert list(daemon.shm.rglob("*")) == []
    finally:
        daemon.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_full_shm(fresh: Daemon) -> None:
    """A template that does not fit is refused with the arithmetic, before anything is started."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", fresh.shm], check=True)
    try:
        fresh.start()
        error = fresh.fails("template", "build", "python-fn")
        assert "needs 144 MiB" in error and "are free" in error
        assert list(fresh.shm.rglob("*")) == [] and fresh.qemus() == []
        fresh.stop()
    finally:
        subprocess.run(["umount", fresh.shm], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_full_disk(copied: Daemon) -> None:
    """A clone whose disk layer cannot be written fails with one line and leaves nothing."""
    slots = copied.state / "slots"
    slots.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", slots], check=True)
    try:
        copied.config["slots"] = {"ready": 0}
        copied.start()
        assert "No space left" in copied.fails("clone", "x")
        assert copied.rows()["slots"] == 0 and list(slots.iterdir()) == []
        copied.stop()
    finally:
        subprocess.run(["umount", slots], check=True)


def test_daemon_not_running(fresh: Daemon) -> None:
    """Every command says so, and how to start it."""
    assert "not running" in fresh.fails("ls")
    assert "not running" in fresh.fails("clone", "x")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"acell": "tcg"}, "acell"),
        ({"accel": "magic"}, "$.accel"),
        ({"network": {"mode": "user", "subnet": "10.0.0.0/33"}}, "subnet"),
        ({"socket_access": {"group": "no-such-group"}}, "no group no-such-group"),
        ({"runtime_dir": "/tmp/" + "x" * 120}, "too long"),
    ],
)
def test_bad_configuration(fresh: Daemon, config: dict[str, object], expected: str) -> None:
    """`serve` ends with one line that names the file and the key."""
    fresh.config.update(config)
    fresh.start(wait=False)
    assert fresh.process is not None and fresh.process.wait(30) != 0
    assert expected in fresh.log and "Traceback" not in fresh.log, fresh.log
    fresh.process = None


def test_a_second_daemon_is_refused(built: Daemon) -> None:
    """Two daemons never share places."""
    import sys

    config = built.places / "templated.yaml"
    command = [sys.executable, "-m", "templated", "serve", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.returncode != 0 and b"another daemon uses" in done.stderr
