"""Guests of another Debian than that of `python-fn`."""

from __future__ import annotations

import pytest

from tests.real.harness import Daemon
from tests.real.test_clones import clock_error, read

pytestmark = pytest.mark.real


def test_trixie(fresh: Daemon) -> None:
    """Debian 13 as the guest: an image, a template, and clones by every path."""
    fresh.variant("trixie-fn", "image:", "  suite: trixie", "  size: 1GiB")
    fresh.start()
    fresh.build("trixie-fn")
    clones = fresh.json("clone", "t", "--count", "2", "--template", "trixie-fn")
    guests = [read(fresh, clone["name"]) for clone in clones]
    for clone, guest in zip(clones, guests, strict=True):
        for key in ("mac", "ip", "hostname", "machine_id", "boot_id"):
            assert guest[key] == clone["identity"][key]
        assert clock_error(fresh, clone["name"]) <= 0.1
    assert guests[0]["random"] != guests[1]["random"]
    assert fresh.cli("exec", "t-1", "--", "cat", "/etc/debian_version").startswith("13.")
    fresh.cli("pool", "set", "trixie-fn", "--standby", "1", "--warm", "1", "--wait")
    for path in ("warm", "standby"):
        clone = fresh.json("clone", path, "--template", "trixie-fn", "--path", path)
        assert clone["path"] == path
        assert fresh.cli("exec", path, "--", "hostname") == f"{path}\n"
