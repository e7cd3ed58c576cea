"""The operator's guide's install section, and the unit in its sandbox under the real systemd."""

from __future__ import annotations

import json

import pytest

from tests.lab.product import TEMPLATES, Product

pytestmark = pytest.mark.lab


def test_guide(product: Product) -> None:
    """Every command of the guide ran as it is written, and the last one built a template."""
    assert product.json("template", "show", "python-fn")["active"]
    assert product.unit("ActiveState") == "active"
    assert product.unit("UnitFileState") == "enabled"
    assert product.unit("NRestarts") == "0"
    assert product.lab.do("systemctl --failed --plain --no-legend") == ""
    assert product.lab.do("man -w templated 2>&1 || ls /usr/local/share/man/man1/templated.1")


def test_the_image_unit_refuses(product: Product) -> None:
    """The unit asks the archive in its sandbox, and says what is wrong."""
    spec = {"name": "odd", "image": {"suite": "nosuchsuite"}}
    product.lab.put(f"{TEMPLATES}/odd.yaml", json.dumps(spec))
    done = product.lab.run("systemctl start templated-image@odd")
    said = product.lab.do("journalctl -b -u templated-image@odd --no-pager -o cat")
    assert done.returncode != 0 and "image.suite" in said, said
    product.lab.do(f"systemctl reset-failed; rm {TEMPLATES}/odd.yaml")


@pytest.mark.long
def test_the_image_unit(product: Product) -> None:
    """An image is made by the unit in its sandbox; it takes five minutes and more."""
    spec = {"name": "other", "image": {"size": "2GiB"}}
    product.lab.put(f"{TEMPLATES}/other.yaml", json.dumps(spec))
    product.lab.do("systemctl start templated-image@other", timeout=1700)
    assert len(product.json("image", "ls")) == 2
    product.lab.do(f"rm {TEMPLATES}/other.yaml")


def test_doctor(host: Product) -> None:
    """After a build doctor finds nothing wrong, and says that a guest ran under KVM."""
    said = host.cli("doctor")
    assert "FAIL" not in said.replace("0 FAIL", "")
    assert "kvm: a guest booted under KVM" in said


def test_systemd_knows_the_units(product: Product) -> None:
    """systemd takes every line of them: it warns about what it does not know."""
    warned = "journalctl -b -o cat --no-pager _PID=1 | grep -E '/templated[@.a-z-]*service:[0-9]+:'"
    done = product.lab.run(warned)
    assert done.returncode == 1, done.stdout
    assert product.unit("NeedDaemonReload") == "no"


def test_sandbox(host: Product) -> None:
    """The daemon has the unit's six capabilities, a VM none; neither has a way to write."""
    host.clone("boxed")
    filters, users, effective = {}, {}, {}
    for pid in (int(host.unit("MainPID")), host.pid("boxed")):
        status = host.lab.do(f"cat /proc/{pid}/status")
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        # KILL, SETGID, SETUID, NET_ADMIN, SYS_NICE, SYS_RESOURCE
        given = sum(1 << number for number in (5, 6, 7, 12, 23, 24))
        assert int(fields["CapBnd"], 16) == given
        users[pid], effective[pid] = fields["Uid"].split(), int(fields["CapEff"], 16)
        if effective[pid]:
            assert effective[pid] == int(fields["CapBnd"], 16)
        assert fields["NoNewPrivs"].strip() == "1"
        assert fields["Seccomp"].strip() == "2"
        filters[pid] = int(fields["Seccomp_filters"])
        for path in ("/usr/x", "/etc/x", "/var/x", "/root/x", "/sys/fs/cgroup/x"):
            done = host.lab.run(f"nsenter --mount --target {pid} touch {path}")
            assert done.returncode != 0, path
        devices = host.lab.do(f"nsenter --mount --target {pid} ls /root /home")
        assert "templated" not in devices
    daemon, vm = users.values()
    assert daemon == ["0"] * 4 and len(set(vm)) == 1 and int(vm[0]) > 1 << 30
    assert [bool(mask) for mask in effective.values()] == [True, False]
    # QEMU has one of its own beside the unit's.
    ours, its = filters.values()
    assert its == ours + 1
    assert host.lab.do("stat -c %a /var/lib/templated /run/templated").split() == ["700", "755"]


def test_metrics(host: Product) -> None:
    """Prometheus is answered over TCP by the unit."""
    host.clone("counted")
    text = host.lab.do("curl -sf http://127.0.0.1:9177/metrics")
    assert 'templated_template_serving{template="python-fn"} 1.0' in text
    assert 'accel="kvm"' in text
    assert "templated_clone_seconds_count" in text


def test_group_uses_the_socket(host: Product) -> None:
    """`socket_access` and `access`, as the guide has them: a member may look, others may not."""
    lab = host.lab
    lab.do("useradd -m -G templated member && useradd -m other")
    roles = [{"role": "viewer", "group": "templated"}]
    host.configure(socket_access={"group": "templated"}, access={"roles": roles})
    list_templates = "TEMPLATED_SOCKET=/run/templated/templated.sock templated template ls"
    assert "python-fn" in lab.do(f"runuser -u member -- env {list_templates}")
    start = "TEMPLATED_SOCKET=/run/templated/templated.sock templated clone mine"
    refused = lab.run(f"runuser -u member -- env {start}")
    assert refused.returncode == 9, refused
    assert "needs the role operator" in refused.stderr
    assert json.loads(host.cli("-o", "json", "audit", "--user", "member"))["action"]
    refused = lab.run(f"runuser -u other -- env {list_templates}")
    assert refused.returncode == 5, refused
    assert "permission denied on the daemon's socket" in refused.stderr
