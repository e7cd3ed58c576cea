"""A real daemon on temporary places, driven by the real command line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from templated.client import Client
from templated.drivers.cgroups import ControlGroups
from templated.drivers.configfile import load_config
from templated.errors import TemplatedError
from templated.journal import Journal
from templated.services.daemon import find_groups

ROOT = Path(__file__).parents[2]
PYTHON_FN = ROOT / "templates/python-fn.yaml"
_BOUND = 300.0


class Daemon:
    """One `templated serve` with its own places. `close` leaves nothing of it on the host."""

    def __init__(self, **config: Any) -> None:
        # Short, since sockets lie below it.
        self.places = Path(tempfile.mkdtemp(prefix="tpt.", dir="/tmp"))
        self.shm = Path(tempfile.mkdtemp(prefix="templated-test.", dir="/dev/shm"))
        self.templates = self.places / "templates"
        self.templates.mkdir()
        self.state = self.places / "state"
        self.socket = self.places / "run/templated.sock"
        self.config = {
            "state_dir": str(self.state),
            "runtime_dir": str(self.places / "run"),
            "shm_dir": str(self.shm),
            "template_dirs": [str(self.templates)],
            "accel": "tcg",
            "metrics": None,
            # Pools are filled whatever else this host does.
            "pools": {"pressure": {"cpu": 100, "memory": 100, "io": 100}},
            # A test that wants members says so.
            "scaling": {"pools": False},
            **config,
        }
        self.environment: dict[str, str] = {}
        self.process: subprocess.Popen[bytes] | None = None
        shutil.copy(PYTHON_FN, self.templates)

    @property
    def log(self) -> str:
        """What the daemon has written so far."""
        return (self.places / "log").read_text()

    def start(self, *, wait: bool = True) -> None:
        """Start the daemon and wait until it serves."""
        # JSON is YAML.
        (self.places / "templated.yaml").write_text(json.dumps(self.config))
        command = [sys.executable, "-m", "templated", "serve", "--config"]
        with open(self.places / "log", "ab") as log:
            self.process = subprocess.Popen(
                [*command, str(self.places / "templated.yaml")],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
        if wait:
            self.await_socket()

    def await_socket(self) -> None:
        """Wait until the daemon that was started serves."""
        assert self.process is not None
        deadline = time.monotonic() + 60
        while not self._listens():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)

    def _listens(self) -> bool:
        """A socket's file is there a moment before anyone listens on it."""
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.connect(str(self.socket))
            return True
        return False

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End the daemon; its VMs go on."""
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(60)
            self.process = None
            if number is signal.SIGKILL:
                self.socket.unlink(missing_ok=True)

    def close(self) -> None:
        """End the daemon and every VM of it, and remove its places."""
        try:
            self.stop()
        finally:
            for pid in self.qemus():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + 10
            while self.qemus() and time.monotonic() < deadline:
                time.sleep(0.05)
            self.end_forwarders()
            self.control_groups().sweep(())
            shutil.rmtree(self.places, ignore_errors=True)
            shutil.rmtree(self.shm, ignore_errors=True)

    def end_forwarders(self) -> None:
        """End the processes of egresses, which outlive the daemon."""
        for pid, arguments in processes():
            if f"forwarder run {self.places}/" in arguments:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def run(
        self, *arguments: str, timeout: float = _BOUND, stdin: bytes = b""
    ) -> subprocess.CompletedProcess[str]:
        """Run a command and return how it ended."""
        done = subprocess.run(
            [sys.executable, "-m", "templated", "--socket", str(self.socket), *arguments],
            input=stdin,
            capture_output=True,
            timeout=timeout,
            check=False,
            cwd=ROOT,
        )
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
        )

    def cli(self, *arguments: str, timeout: float = _BOUND, stdin: bytes = b"") -> str:
        """Run a command that must succeed and return its stdout."""
        done = self.run(*arguments, timeout=timeout, stdin=stdin)
        assert done.returncode == 0, f"{arguments}: {done.stderr}\n{self.log[-2000:]}"
        return done.stdout

    def json(self, *arguments: str, timeout: float = _BOUND) -> Any:
        """Run a command with `-o json` and return what it printed."""
        return json.loads(self.cli("-o", "json", *arguments, timeout=timeout))

    def fails(self, *arguments: str, timeout: float = _BOUND) -> str:
        """Run a command that must fail in the way a user can read; return its error line."""
        done = self.run(*arguments, timeout=timeout)
        lines = done.stderr.strip().splitlines()
        assert done.returncode not in (0, None), f"{arguments} succeeded: {done.stdout}"
        assert "Traceback" not in done.stderr, done.stderr
        errors = [line for line in lines if line.startswith("templated: error: ")]
        assert len(errors) == 1, done.stderr
        assert any(line.startswith("hint: ") for line in lines), done.stderr
        return errors[0]

    def guest(self, name: str, code: str) -> str:
        """Run Python in a clone and return its stdout."""
        return self.cli("exec", name, "--", "python3", "-c", code)

    @property
    def client(self) -> Client:
        """The daemon's API without a process of the command line; for any number of threads."""
        return Client(str(self.socket))

    def output(self, name: str, *argv: str) -> str:
        """Run a command that must succeed in a clone and return its stdout."""
        *output, end = self.client.exec_in_clone(name, argv)
        assert end.exit_code == 0, (end, output)
        return b"".join(frame.content() for frame in output if frame.stream == "stdout").decode()

    def build(self, name: str = "python-fn") -> str:
        """Build a template and return the id of the generation that serves."""
        self.cli("-q", "template", "build", name)
        return str(self.json("template", "show", name)["active"])

    def copy_build(self, other: Daemon) -> None:
        """Before the first start: serve a copy of what another daemon built.

        For tests that need a generation and not its build, which takes ten times as long.
        """
        generation = str(other.json("template", "show", "python-fn")["active"])
        place = f"python-fn/{generation}"
        for source, target in (
            (other.state / "generations", self.state / "generations"),
            (other.shm, self.shm),
        ):
            (target / "python-fn").mkdir(parents=True)
            subprocess.run(["cp", "-a", source / place, target / place], check=True)
        layers = self.state / "generations" / place
        rebase = ["qemu-img", "rebase", "-u", "-F", "qcow2", "-b", str(layers / "disk.qcow2")]
        subprocess.run([*rebase, str(layers / "empty.qcow2")], check=True)
        asyncio.run(self._activate(generation))

    async def _activate(self, generation: str) -> None:
        journal = Journal(self.state / "journal.sqlite")
        await journal.open()
        await journal.new_generation(generation, "python-fn")
        await journal.activate(generation, "python-fn")
        await journal.close()

    def template(self, name: str, text: str) -> None:
        """Write a template file."""
        (self.templates / f"{name}.yaml").write_text(text)

    def variant(self, name: str, *extra: str, without_probes: bool = False) -> None:
        """Write a template that is python-fn with another name and further lines."""
        text = PYTHON_FN.read_text().replace("name: python-fn", f"name: {name}", 1)
        if without_probes:
            text = text[: text.index("\nprobes:")] + "\n"
        for line in extra:
            if not line.startswith(" "):  # in place of what the template has under this key
                block = rf"^{line.partition(':')[0]}:.*\n(?: .*\n)*"
                text = re.sub(block, "", text, flags=re.MULTILINE)
            text += line + "\n"
        self.template(name, text)

    def qemus(self) -> list[int]:
        """Processes that have our places on their command line, but for the daemon."""
        return [
            pid
            for pid, arguments in processes()
            if f"{self.places}/" in arguments and "qemu-system" in arguments
        ]

    def control_groups(self) -> ControlGroups:
        """Where the groups of this daemon's VMs are."""
        with contextlib.suppress(TemplatedError):  # a test may be of a wrong configuration
            return find_groups(load_config(self.places / "templated.yaml"), make=False)
        return ControlGroups()

    def groups(self) -> list[str]:
        """The directories of this daemon's control groups."""
        found = self.control_groups()
        bases = set(found.bases.values())
        return sorted(str(path) for base in bases for path in base.glob(f"{found.prefix}*"))

    def held(self) -> dict[str, Any]:
        """All that a clone takes from the host, counted. Ready slots are none of it."""
        assert self.process is not None
        return {
            "processes": len(self.qemus()),
            "descriptors": len(os.listdir(f"/proc/{self.process.pid}/fd")),
            "slots": len(os.listdir(self.state / "slots")),
            "sockets": len(os.listdir(self.places / "run/vm")),
            "groups": len(self.groups()),
            "shm": sorted(str(p.relative_to(self.shm)) for p in self.shm.rglob("*")),
            "rows": self.rows(),
        }

    def clone_pids(self) -> list[tuple[int]]:
        """The processes of clones, as the journal has them."""
        import sqlite3

        with contextlib.closing(sqlite3.connect(self.state / "journal.sqlite")) as db:
            return db.execute("SELECT pid FROM clones").fetchall()

    def rows(self) -> dict[str, int]:
        """Rows per table of the journal."""
        import sqlite3

        with contextlib.closing(sqlite3.connect(self.state / "journal.sqlite")) as db:
            tables = ("clones", "slots", "generations", "templates")
            return {t: db.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in tables}

    def at_rest(self) -> dict[str, Any]:
        """`held()`, once it has not changed for a second: slots are being made in between."""
        held, since = self.held(), time.monotonic()
        while time.monotonic() - since < 1:
            time.sleep(0.1)
            if (now := self.held()) != held:
                held, since = now, time.monotonic()
        return held

    def settled(self, expected: dict[str, Any]) -> dict[str, Any]:
        """`held()`, once it equals `expected` or does not come to it within 10 s."""
        deadline = time.monotonic() + 10
        while (held := self.held()) != expected and time.monotonic() < deadline:
            time.sleep(0.1)
        return held


def processes() -> Iterator[tuple[int, str]]:
    """Processes and their command lines, words separated by spaces."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                arguments = (entry / "cmdline").read_bytes().decode(errors="replace")
                yield int(entry.name), arguments.replace("\0", " ")
