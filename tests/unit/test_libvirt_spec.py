"""What a template and a configuration say of libvirt."""

from __future__ import annotations

import msgspec
import pytest

from templated.drivers.configfile import parse_template
from templated.errors import ConfigError
from templated.model.config import LibvirtConfig


def test_a_template_of_libvirt() -> None:
    """The convention that `template import` writes."""
    spec = parse_template(
        "name: web\nhypervisor: libvirt\nmachine: {type: q35, firmware: uefi}\n"
        "image: {path: /disks/web.qcow2}\nidentity: {agent: qemu-ga}\n"
        "network: {mode: libvirt, name: default}\n",
        "here",
    )
    assert (spec.hypervisor, spec.network.mode, spec.network.name) == (
        *("libvirt", "libvirt"),
        "default",
    )
    assert parse_template("name: t\n", "here").hypervisor == "qemu"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hypervisor: xen", "hypervisor"),
        ("network: {mode: libvirt}", "go together"),
        ("network: {name: default}", "go together"),
        ("network: {mode: libvirt, name: default}", "needs hypervisor: libvirt"),
        ("network: {mode: libvirt, name: ' '}\nhypervisor: libvirt", "network.name"),
    ],
)
def test_a_template_that_is_wrong(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_template(f"name: t\n{text}\n", "here")


@pytest.mark.parametrize(
    "uri",
    ["qemu:///system", "qemu:///session", "qemu+unix:///system?socket=/run/libvirt/libvirt-sock"],
)
def test_uris_of_this_host(uri: str) -> None:
    assert msgspec.convert({"uri": uri}, LibvirtConfig).uri == uri


@pytest.mark.parametrize(
    "uri", ["qemu+ssh://host/system", "qemu://host/system", "xen:///", "qemu:///embed", "", "a b"]
)
def test_other_uris(uri: str) -> None:
    """VMs are handed descriptors, which reach no other host."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"uri": uri}, LibvirtConfig)
