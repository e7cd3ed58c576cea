"""The gateway's listener: when there is one, and where."""

from __future__ import annotations

import asyncio
import re
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest

from templated.api import server
from templated.api.gateway.server import gateway
from templated.drivers.hypervisor.fake import FakeHypervisor
from templated.errors import HostError
from templated.model.config import GatewayConfig
from templated.services.daemon import Services
from tests.unit.fake_daemon import configured, play, run
from tests.unit.fake_functions import with_functions
from tests.unit.lambda_client import KEYS, Gate, create


def test_without_a_key_nothing_listens(tmp_path: Path) -> None:
    """Nor without a section."""

    async def work() -> None:
        config = await asyncio.to_thread(configured, tmp_path)
        nothing: Any = None
        for settings in (None, GatewayConfig()):
            changed = msgspec.structs.replace(config, gateway=settings)
            async with gateway(changed, nothing, nothing) as address:
                assert address is None

    run(work())


@pytest.mark.parametrize(
    "listen", ["127.0.0.1:{}", "192.0.2.1:0", "127.0.0.1:99999", "x.invalid:1"]
)
def test_an_address_that_cannot_be_had(tmp_path: Path, listen: str) -> None:
    """One line that names it and the key to set."""

    async def work() -> None:
        nothing: Any = None
        config = await asyncio.to_thread(configured, tmp_path)
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            address = listen.format(taken.getsockname()[1])
            settings = GatewayConfig(listen=address, keys=KEYS)
            changed = msgspec.structs.replace(config, gateway=settings)
            with pytest.raises(HostError, match=re.escape(address)) as caught:
                async with gateway(changed, nothing, nothing):
                    pass
            assert "gateway.listen" in caught.value.hint

    run(work())


def test_it_is_one_of_the_daemons_listeners(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It ends with the others. One that other hosts reach is told of."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = GatewayConfig(listen=f"0.0.0.0:{port}", keys=KEYS)
        config = msgspec.structs.replace(running.context.config, gateway=settings)
        services = await with_functions(running)
        async with server.listeners(config, services):
            loop = asyncio.get_running_loop()
            gate = Gate(("127.0.0.1", port), services.functions, services, loop)
            made = await asyncio.to_thread(lambda: create(gate.client()))
            assert made["MemorySize"] == 128
        with pytest.raises(ConnectionError):
            await asyncio.to_thread(socket.create_connection, ("127.0.0.1", port))

    play(tmp_path, scenario)
    assert "not encrypted" in caplog.text
