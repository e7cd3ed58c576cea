"""Hooks in the guest's identity.d, baked into the template by a probe."""

from __future__ import annotations

import pytest

from tests.real.harness import Daemon

pytestmark = pytest.mark.real
HOOK = "/etc/templated/identity.d/10-test"


def hooked(daemon: Daemon, name: str, script: str) -> None:
    """A template whose base VM gets a hook before it is frozen."""
    daemon.variant(
        name,
        "probes:",
        "  - name: hook",
        "    type: exec",
        f'    command: [sh, -c, \'mkdir -p $(dirname {HOOK}); printf "{script}" > {HOOK};'
        f" chmod +x {HOOK}']",
        without_probes=True,
    )


def test_a_hook_runs_with_the_new_identity(fresh: Daemon) -> None:
    """It sees the values of the clone, not of the template."""
    hooked(fresh, "hooked", "#!/bin/sh\\n env > /run/hook-env\\n")
    fresh.start()
    fresh.build("hooked")
    clone = fresh.json("clone", "with-hook")
    env = fresh.cli("exec", "with-hook", "--", "cat", "/run/hook-env")
    assert "TEMPLATED_HOSTNAME=with-hook\n" in env
    assert f"TEMPLATED_IP={clone['identity']['ip']}\n" in env
    assert f"TEMPLATED_MACHINE_ID={clone['identity']['machine_id']}\n" in env


def test_a_failing_hook_fails_closed(fresh: Daemon) -> None:
    """Nothing whose hook fails is ever running: here already the canary."""
    hooked(fresh, "broken", "#!/bin/sh\\n echo no key >&2; exit 3\\n")
    fresh.start()
    error = fresh.fails("template", "build", "broken")
    assert "canary" in error and "identify" in error
    assert fresh.json("template", "show", "broken")["active"] is None
    assert fresh.qemus() == [] and list(fresh.shm.rglob("*")) == []
