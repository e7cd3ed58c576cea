"""Rules of docker, firewalld and ufw that drop what clones or forwarders send: `doctor`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec
import pytest

from templated.drivers.network.foreign import Blocker, blockers
from templated.drivers.network.worker import in_namespace
from templated.services import doctor
from tests.real.test_network import BRIDGE, Namespace
from tests.real.test_network import ns as ns
from tests.unit.fake_daemon import configured

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces"),
    pytest.mark.skipif(shutil.which("nft") is None, reason="needs nft"),
]
DOCKER = (
    ("-N", "DOCKER-USER"),
    ("-P", "FORWARD", "DROP"),
    ("-A", "FORWARD", "-j", "DOCKER-USER"),
    ("-A", "FORWARD", "-o", "docker0", "-j", "ACCEPT"),
)
FIREWALLD = """
table inet firewalld {
    chain filter_FORWARD {
        type filter hook forward priority filter + 10; policy accept;
        ct state established,related accept
        iifname "lo" accept
        reject with icmpx admin-prohibited
    }
}
table inet harmless {
    chain forward { type filter hook forward priority 0; policy drop; iifname "templated*" accept; }
    chain input { type filter hook input priority 0; policy drop; }
}
"""


@pytest.mark.parametrize("program", ["iptables-nft", "iptables-legacy"])
def test_rules_of_others_that_block_are_named(ns: Namespace, program: str) -> None:
    """docker's, by both kinds of iptables, and firewalld's, until they let the bridge in."""
    if shutil.which(program) is None:
        pytest.skip(f"needs {program}")

    def found() -> list[tuple[str, str]]:
        return [(b.owner, b.fix) for b in in_namespace(ns.name, lambda: blockers(BRIDGE))]

    assert found() == []
    try:
        for words in DOCKER:
            ns.run(program, *words)
    except AssertionError as error:
        pytest.skip(f"this kernel has no {program}: {error}")
    ((owner, fix),) = found()
    assert owner == "docker"
    for command in fix.replace("iptables", program).split("; "):
        ns.run(*command.split())
    assert found() == []
    ns.run("nft", FIREWALLD)
    ((owner, fix),) = found()
    assert owner == "firewalld" and f"--add-interface={BRIDGE}" in fix


UFW = """
table ip filter {
    chain ufw-user-forward { }
    chain ufw-before-forward {
        ct state established,related accept
        jump ufw-user-forward
    }
    chain FORWARD {
        type filter hook forward priority filter; policy drop;
        jump ufw-before-forward
    }
}
"""


def test_ufw(ns: Namespace) -> None:
    """Its chain is named until a route is allowed, as its command for that writes it."""

    def found() -> list[Blocker]:
        return in_namespace(ns.name, lambda: blockers(BRIDGE))

    ns.run("nft", UFW)
    ((chain, owner, fix),) = found()
    assert (chain, owner) == ("ip filter FORWARD", "ufw")
    assert fix == f"ufw route allow in on {BRIDGE}; ufw route allow out on {BRIDGE}"
    for way in ("iifname", "oifname"):
        ns.run("nft", f"add rule ip filter ufw-user-forward {way} {BRIDGE} accept")
    assert found() == []


def test_frames_of_a_bridge(ns: Namespace, tmp_path: Path) -> None:
    """With br_netfilter, what drops frames between forwarders is named, until they are let in."""
    switch = "/proc/sys/net/bridge/bridge-nf-call-iptables"
    if not Path(switch).exists():
        pytest.skip("this host has no br_netfilter")
    config = msgspec.structs.replace(configured(tmp_path), network=ns.config())

    def checked() -> tuple[str, str]:
        (check,) = doctor._bridged_frames(config)
        return check.status, check.detail

    def switched(value: int) -> None:
        ns.run("sh", "-c", f"echo {value} >{switch}")

    switched(1)
    assert checked()[0] == "PASS"
    ns.run("nft", UFW)
    status, detail = checked()
    assert status == "WARN" and "ip filter FORWARD drops" in detail
    switched(0)
    assert checked()[0] == "PASS"
    switched(1)
    for prefix in ("tl", "ts"):
        assert checked()[0] == "WARN"
        ns.run("nft", f'insert rule ip filter FORWARD iifname "{prefix}*" accept')
    assert checked()[0] == "PASS"
