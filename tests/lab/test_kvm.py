"""Templates and clones under KVM: every path, every machine, pools, and the other accelerator."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from tests.lab.product import Product

pytestmark = pytest.mark.lab
CLOCK = 0.1
DISTINCT = ("hostname", "machine_id", "boot_id", "mac", "ip", "uuid", "random")


def check(product: Product, clones: dict[str, Any]) -> dict[str, Any]:
    """Each guest is what the daemon says, has KVM's clock, and no two are alike."""
    seen = product.look(*clones)
    for name, known in seen.items():
        assert known["hostname"] == name
        told = {**clones[name]["identity"], "uuid": clones[name]["uuid"]}
        assert {key: known[key] for key in told} == told
        assert known["clocksource"] == "kvm-clock"
        assert known["clock"] <= CLOCK, known
    for one, other in combinations(seen.values(), 2):
        for key in DISTINCT:
            assert one[key] != other[key], key
    return seen


def test_accelerator(host: Product) -> None:
    """`auto` found KVM by a guest that ran; the template's build says so, and so does QEMU."""
    assert host.json("info")["accel"] == "kvm"
    assert host.json("template", "show", "python-fn")["manifest"]["accel"] == "kvm"
    assert host.lab.json("cat /var/lib/templated/kvm-proof.json")["works"] is True
    host.clone("proven")
    command = host.lab.do(f"tr '\\0' ' ' </proc/{host.pid('proven')}/cmdline")
    assert " -accel kvm " in command
    assert host.lab.do(f"ls -l /proc/{host.pid('proven')}/fd").count("anon_inode:kvm-vcpu:0") == 1


def test_every_path(host: Product) -> None:
    """A clone by each of the four ways, all there at once."""
    host.cli("pool", "set", "python-fn", "--warm", "1", "--standby", "1", "--wait")
    paths = ("warm", "standby", "direct", "cold")
    clones = {path: host.clone(path, "--path", path) for path in paths}
    assert {name: clone["path"] for name, clone in clones.items()} == {path: path for path in paths}
    check(host, clones)


@pytest.mark.long  # tests/real has pools; test_every_path takes of them here
def test_pool(host: Product) -> None:
    """A pool is refilled when members are taken, and when one is killed."""
    host.cli("pool", "set", "python-fn", "--warm", "2", "--wait")
    clones = {name: host.clone(name) for name in ("first", "second")}
    assert [clone["path"] for clone in clones.values()] == ["warm", "warm"]
    ready = "templated -o json pool ls | grep -q '\"ready\": 2'"
    host.wait(ready)
    taken = {host.pid(name) for name in clones}
    members = host.lab.do("pgrep -f 'qemu-system.*-incoming'").split()
    victim = next(pid for pid in members if int(pid) not in taken)
    host.lab.do(f"kill -9 {victim}")
    host.wait(f"! kill -0 {victim} 2>/dev/null && {ready}")
    clones["third"] = host.clone("third", "--path", "warm")
    check(host, clones)


@pytest.mark.long
def test_q35_with_two_vcpus(host: Product) -> None:
    """The other machine: PCI, firmware, two virtual CPUs that both go on after a restore."""
    host.template("big", type="q35", vcpus=2)
    manifest = host.build("big")
    assert manifest["accel"] == "kvm"
    host.cli("pool", "set", "big", "--warm", "1", "--wait")
    clones = {path: host.clone(path, "--path", path, template="big") for path in ("direct", "warm")}
    for known in check(host, clones).values():
        assert known["cpus"] == 2
    product_uuid = host.guest("direct", "cat /sys/class/dmi/id/product_uuid").strip()
    assert product_uuid == clones["direct"]["uuid"]


@pytest.mark.long
def test_other_accelerator(host: Product) -> None:
    """What was frozen under one accelerator is refused under the other, in one clear line.

    In the lab no guest boots under TCG, so for the way back a manifest is made to say that one did.
    """
    host.configure(accel="tcg")
    line = "was frozen under kvm, and accel is tcg"
    assert line in host.fails("clone", "wrong")
    assert line in host.json("template", "show", "python-fn")["problem"]
    manifest = f"/var/lib/templated/generations/python-fn/{host.active()}/manifest.json"
    edit = 'sed -i \'s/"accel": "{}"/"accel": "{}"/\' ' + manifest
    host.lab.do(edit.format("kvm", "tcg"))
    host.configure(accel="kvm")
    assert "was frozen under tcg, and accel is kvm" in host.fails("clone", "wrong")
    host.lab.do(edit.format("tcg", "kvm"))
    host.configure(accel="kvm")
    assert host.clone("right")["path"] == "direct"
