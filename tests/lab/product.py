"""The installed product in the lab, as its operators have it: a unit, a command, a file in /etc."""

from __future__ import annotations

import json
import shlex
import time
from typing import Any

from tests.lab.commands import Commands
from tests.lab.guide import install_commands
from tests.lab.image import HERE
from tests.lab.machine import Lab

CONFIG = "/etc/templated/templated.yaml"
TEMPLATES = "/etc/templated/templates"
_SETTLED = 120.0


class Product:
    """Drives `templated` and its unit."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.commands = Commands(lab)
        self._config: dict[str, Any] = {}

    def install(self) -> None:
        """Run what the guide says, in one shell."""
        # One shell, as an administrator has it: a command changes directory for the next.
        script = "".join(f"{line}\necho @ $? $SECONDS\n" for line in install_commands())
        done = self.lab.run(f"exec 2>&1; set -e; {script}", timeout=1700)
        print(done.stdout)
        if done.returncode != 0:
            kernel = self.lab.run("dmesg | tail -15").stdout
            raise AssertionError(f"{done.stdout[-3000:]}\n{self.log()[-3000:]}\n{kernel}")

    def cli(self, *arguments: str, timeout: float = 600) -> str:
        """Run `templated`, which must succeed, and return its stdout."""
        done = self.commands.run(*arguments, timeout=timeout)
        said = f"{done.stdout[-3000:]}\n{done.stderr}"
        assert done.returncode == 0, f"{arguments}: {said}\n{self.log()[-3000:]}"
        return done.stdout

    def json(self, *arguments: str) -> Any:
        """Run `templated -o json`."""
        return json.loads(self.cli("-o", "json", *arguments))

    def fails(self, *arguments: str) -> str:
        """Run `templated`, which must fail as a user can read it; return the line of the error."""
        done = self.commands.run(*arguments, timeout=600)
        assert done.returncode != 0, done.stdout
        lines = done.stderr.splitlines()
        errors = [line for line in lines if line.startswith("templated: error: ")]
        assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
        assert any(line.startswith("hint: ") for line in lines), done.stderr
        return errors[0]

    def settle(self) -> None:
        """Have the default configuration, no clones, and a build of python-fn that serves.

        The daemon may be starting, or not there, after a test that failed.
        """
        self.lab.do("systemctl reset-failed templated; systemctl start templated")
        if self._config:
            self.configure()
        self.cli("rm", "--all", "--yes")
        for template in self.json("template", "ls"):
            if template["name"] != "python-fn":
                if template["generations"]:
                    self.cli("template", "rm", template["name"])
            elif template["active"] is None or template["problem"]:
                self.build()
        self.cli("pool", "set", "python-fn", "--reset")

    def configure(self, **changes: Any) -> None:
        """Restart the daemon with the default configuration and these changes."""
        self._config = changes
        # JSON is YAML.
        self.lab.put(CONFIG, json.dumps(changes))
        self.lab.do("systemctl reset-failed templated; systemctl restart templated")

    def template(self, name: str, *, type: str = "microvm", vcpus: int = 1) -> None:  # noqa: A002
        """Write a template of python-fn's image with another machine."""
        machine = {"type": type, "vcpus": vcpus, "memory": "128MiB"}
        probes = [{"type": "agent", "name": "agent"}]
        spec = {"name": name, "machine": machine, "probes": probes}
        self.lab.put(f"{TEMPLATES}/{name}.yaml", json.dumps(spec))

    def build(self, name: str = "python-fn") -> Any:
        """Build a template and return its active generation's manifest."""
        self.cli("template", "build", name)
        return self.json("template", "show", name)["manifest"]

    def active(self) -> str:
        """The generation of python-fn that serves, or would if it could."""
        return str(self.json("template", "show", "python-fn")["active"])

    def clone(self, name: str, *arguments: str, template: str = "python-fn") -> Any:
        """Start a clone and return what the daemon says of it."""
        return self.json("clone", name, "--template", template, *arguments)

    def guest(self, name: str, command: str) -> str:
        """Run a shell command in a clone."""
        return self.cli("exec", name, "--", "sh", "-c", command)

    def look(self, *names: str) -> dict[str, Any]:
        """What each clone says of itself, and how far its clock is off; see look.py."""
        script = (HERE / "look.py").read_bytes()
        self.lab.put("/run/look.py", script)
        found: dict[str, Any] = self.lab.json(f"python3 /run/look.py {shlex.join(names)}")
        return found

    def unit(self, key: str) -> str:
        """A property of the daemon's unit."""
        return self.lab.do(f"systemctl show --value -p {key} templated").strip()

    def pid(self, name: str) -> int:
        """The process of a clone."""
        return int(self.json("show", name)["pid"])

    def log(self) -> str:
        """The unit's journal since the boot."""
        return self.lab.do("journalctl -b -u templated --no-pager -o cat")

    def wait(self, script: str) -> None:
        """Wait until a shell script succeeds in the lab."""
        deadline = time.monotonic() + _SETTLED
        while (done := self.lab.run(script)).returncode != 0:
            assert time.monotonic() < deadline, f"{script}: {done.stderr}\n{self.log()[-2000:]}"
            time.sleep(1)
