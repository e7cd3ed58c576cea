"""VMs of libvirt under KVM: AppArmor around each QEMU, and the daemon in its unit's sandbox."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.lab.image import ROOT
from tests.lab.product import TEMPLATES, Product
from tests.lab.test_kvm import check

pytestmark = pytest.mark.lab
SPEC = {
    "name": "shown",
    "hypervisor": "libvirt",
    "machine": {"type": "q35", "memory": "128MiB"},
    # An AppArmor profile is compiled for each domain, which is slow under emulation.
    "start_timeout": "300s",
    "identity": {"timeout": "60s"},
    "probes": [{"type": "agent", "name": "agent"}],
}
DROP_IN = "/etc/systemd/system/templated.service.d/libvirt.conf"
PROFILES = "/etc/apparmor.d/usr.sbin.libvirtd /etc/apparmor.d/usr.lib.libvirt.virt-aa-helper"
RULES = "/etc/apparmor.d/local/abstractions/libvirt-qemu"


def documented_rules() -> str:
    """What docs/libvirt.md has an administrator add to libvirt's profile of a QEMU."""
    text = (ROOT / "docs/libvirt.md").read_text()
    rules = re.findall(r"^ +(/\S+ rw?k,)$", text, re.MULTILINE)
    assert len(rules) == 2
    return "\n".join([*rules, ""])


@pytest.fixture
def beside_libvirt(host: Product) -> Iterator[Product]:
    """The product, and libvirtd with AppArmor, prepared as docs/libvirt.md says."""
    lab = host.lab
    lab.do(f"apparmor_parser -r {PROFILES}; mkdir -p {RULES.rpartition('/')[0]}")
    lab.put(RULES, documented_rules())
    lab.do(f"mkdir -p {DROP_IN.rpartition('/')[0]}")
    lab.put(DROP_IN, "[Service]\nCapabilityBoundingSet=CAP_CHOWN\n")
    lab.put(f"{TEMPLATES}/shown.yaml", json.dumps(SPEC))
    try:
        lab.do("systemctl start libvirtd; timeout 600 virsh capabilities >/run/capabilities")
        lab.do("systemctl daemon-reload; systemctl restart templated")
        yield host
    finally:
        host.cli("rm", "--all", "--yes")
        host.cli("template", "rm", "shown")
        lab.do(f"rm {TEMPLATES}/shown.yaml {DROP_IN}; systemctl daemon-reload")
        lab.do("systemctl restart templated; systemctl stop libvirtd 'libvirtd*.socket'")


def test_confined_domains(beside_libvirt: Product) -> None:
    """Clones of two paths, each in a profile of its own; virsh shows one, and ends it."""
    host = beside_libvirt
    assert host.build("shown")["accel"] == "kvm"
    host.cli("pool", "set", "shown", "--warm", "1", "--wait")
    clones = {
        path: host.clone(path, "--path", path, template="shown") for path in ("warm", "direct")
    }
    check(host, clones)
    for name, clone in clones.items():
        process = f"/proc/{host.pid(name)}"
        profile = host.lab.do(f"cat {process}/attr/current").strip()
        assert profile == f"libvirt-{clone['uuid']} (enforce)"
        assert host.lab.do(f"stat -c %U {process}").strip() == "libvirt-qemu"
        assert "Seccomp:\t2" in host.lab.do(f"cat {process}/status")
        assert f"{name}\n" in host.lab.do(f"virsh list --title | grep -o '{name}$'")
    host.lab.do(f"virsh destroy {clones['direct']['uuid']}")
    host.wait('templated -o json show direct | grep -q \'"state": "dead"\'')
    assert host.json("show", "warm")["state"] == "running"
