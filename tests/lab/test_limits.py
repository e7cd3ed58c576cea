"""Limits under systemd, on control groups of version 2, in the subtree that the unit is given."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.lab.product import TEMPLATES, Product

pytestmark = pytest.mark.lab
RESTART, KILL = "restart", "kill --signal=KILL --kill-whom=main"
UNIT = "/system.slice/templated.service"
DROP_IN = "/etc/systemd/system/templated.service.d/subgroup.conf"
LIMITS = {"memory": "64MiB", "pids": 90, "cpus": 0.5, "cpu_weight": 50, "disk_write": "50MiB"}
WRITTEN = {
    "memory.max": str(64 << 20),
    "memory.swap.max": "0",
    "pids.max": "90",
    "cpu.max": "50000 100000",
    "cpu.weight": "50",
}


def group(host: Product, pid: object) -> str:
    """The group of a process."""
    return host.lab.do(f"sed -n 's/^0:://p' /proc/{pid}/cgroup").strip()


def limits(host: Product, path: str) -> dict[str, str]:
    """What a group's files say."""
    files = " ".join(WRITTEN)
    lines = host.lab.do(f"cd /sys/fs/cgroup{path} && cat {files} io.max").splitlines()
    assert lines[-1].endswith(f"wbps={50 << 20} riops=max wiops=max")
    return dict(zip(WRITTEN, lines[:-1], strict=True))


@pytest.fixture
def limited(built: Product) -> Product:
    """The product with that template, and no clones."""
    built.cli("rm", "--all", "--yes")
    return built


@pytest.fixture(scope="module")
def built(product: Product) -> Iterator[Product]:
    """The product with a template that has limits."""
    product.settle()
    probes = [{"type": "agent", "name": "agent"}]
    spec = {"name": "lim", "limits": LIMITS, "probes": probes}
    product.lab.put(f"{TEMPLATES}/lim.yaml", json.dumps(spec))
    product.build("lim")
    yield product
    product.cli("rm", "--all", "--yes")
    product.lab.do(f"rm -rf $(dirname {DROP_IN}) {TEMPLATES}/lim.yaml; systemctl daemon-reload")
    product.cli("template", "rm", "lim")


def test_groups_and_limits(limited: Product) -> None:
    """systemd-cgls shows each VM, with its limits; one that wants more dies and says of what."""
    pid = limited.clone("fn-1", template="lim")["pid"]
    path = group(limited, pid)
    assert path.startswith(f"{UNIT}/templated-")
    assert group(limited, limited.unit("MainPID")) == f"{UNIT}/daemon"
    assert limits(limited, path) == WRITTEN
    shown = limited.lab.do("systemd-cgls --no-pager -u templated.service")
    assert path.rpartition("/")[2] in shown and f"{pid} qemu-system" in shown
    greedy = "exec fn-1 -- python3 -c 'bytes(range(256)) * (60 << 12)'"
    assert limited.lab.run(f"templated {greedy}").returncode != 0
    limited.wait("templated -o json show fn-1 | grep -q limits.memory")
    reason = limited.json("show", "fn-1")["reason"]
    assert "was killed by SIGKILL: it wanted more than its limits.memory, 64 MiB" in reason
    limited.cli("rm", "fn-1")
    assert limited.lab.run(f"test -e /sys/fs/cgroup{path}").returncode != 0


@pytest.mark.long
@pytest.mark.parametrize(
    ("subgroup", "how"),
    [
        pytest.param("daemon", RESTART, id="subgroup-restart"),
        pytest.param("daemon", KILL, id="subgroup-kill"),
        pytest.param("", RESTART, id="as-before-systemd-254-restart"),
        pytest.param("", KILL, id="as-before-systemd-254-kill"),
    ],
)
def test_restart(limited: Product, subgroup: str, how: str) -> None:
    """Limits hold after a restart, also where systemd cannot start the daemon in `daemon`."""
    limited.lab.do(
        f"mkdir -p $(dirname {DROP_IN}); printf '[Service]\\nDelegateSubgroup={subgroup}\\n' "
        f">{DROP_IN}; systemctl daemon-reload; systemctl restart templated"
    )
    clone = limited.clone("lasting", template="lim")
    path, daemon = group(limited, clone["pid"]), limited.unit("MainPID")
    limited.lab.do(f"systemctl {how} templated")
    limited.wait(f"test $(systemctl show --value -p MainPID templated) -gt 0 -a "
                 f"$(systemctl show --value -p MainPID templated) != {daemon}")  # fmt: skip
    limited.wait("systemctl -q is-active templated")
    assert limited.json("show", "lasting")["state"] == "running"
    assert group(limited, clone["pid"]) == path
    assert group(limited, limited.unit("MainPID")) == f"{UNIT}/daemon"
    limited.wait(f"grep -q '^50000 ' /sys/fs/cgroup{path}/cpu.max")
    assert limits(limited, path) == WRITTEN
    assert limited.clone("next", template="lim")["state"] == "running"
    limited.cli("rm", "--all", "--yes")
