"""A generation serves only where it runs as it was frozen."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from templated.drivers.hypervisor.fake import FakeHypervisor
from templated.errors import HostError
from templated.services.daemon import Services
from templated.services.host import Host
from tests.unit.fake_daemon import configured, play


@pytest.mark.parametrize(
    ("wanted", "frozen", "kvm_problem", "refusal"),
    [
        ("kvm", "tcg", "", "was frozen under tcg, and accel is kvm"),
        ("tcg", "kvm", "", "was frozen under kvm, and accel is tcg"),
        ("auto", "kvm", "/dev/kvm: gone", "was frozen under kvm, and /dev/kvm: gone"),
        ("kvm", "kvm", "/dev/kvm: gone", "was frozen under kvm, and /dev/kvm: gone"),
        ("auto", "kvm", "", ""),
        ("auto", "tcg", "", ""),
        ("kvm", "kvm", "", ""),
        ("tcg", "tcg", "/dev/kvm: gone", ""),
    ],
)
def test_accelerator(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wanted: str,
    frozen: str,
    kvm_problem: str,
    refusal: str,
) -> None:
    """A state saved under one accelerator is not loaded under the other."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        monkeypatch.setattr(fake, "kvm_problem", lambda: kvm_problem)
        host = Host(msgspec.structs.replace(configured(tmp_path), accel=wanted), fake)
        manifest = running.templates.serving("t").manifest
        manifest = msgspec.structs.replace(manifest, accel=frozen)
        if not refusal:
            await host.check("g", manifest)
            return
        with pytest.raises(HostError, match=refusal) as caught:
            await host.check("g", manifest)
        assert caught.value.hint == "run: templated template build t"

    play(tmp_path, scenario)
