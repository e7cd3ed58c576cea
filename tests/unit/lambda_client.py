"""A gateway over fake functions, and unmodified clients of AWS's that talk to it."""

from __future__ import annotations

import asyncio
import io
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import msgspec
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config as ClientConfig
from botocore.credentials import Credentials
from botocore.exceptions import ClientError

from templated.api.gateway.server import gateway
from templated.drivers.hypervisor.fake import FakeHypervisor
from templated.model.access import Role
from templated.model.api import AuditEntry
from templated.model.config import GatewayConfig, GatewayKey
from templated.services.daemon import Services
from templated.services.functions.functions import Functions
from tests.unit.fake_daemon import play
from tests.unit.fake_functions import with_functions

CONFIDENTIAL = "hunter2-hunter2"
REGION = "us-east-1"
ROLE = "arn:aws:iam::000000000000:role/mine"
KEYS = tuple(GatewayKey(id=role.upper(), secret=CONFIDENTIAL, role=role) for role in Role)


@dataclass
class Gate:
    """A gateway that listens. Used from a thread, as its clients wait."""

    address: tuple[str, int]
    functions: Functions
    services: Services
    loop: asyncio.AbstractEventLoop

    def client(
        self,
        key: str = "ADMIN",
        signing: str = CONFIDENTIAL,
        region: str = REGION,
        retries: int = 0,
    ) -> Any:
        """boto3's client."""
        return boto3.client(
            "lambda",
            endpoint_url=f"http://{self.address[0]}:{self.address[1]}",
            region_name=region,
            aws_access_key_id=key,
            aws_secret_access_key=signing,
            config=ClientConfig(retries={"max_attempts": retries}, proxies={}, read_timeout=20),
        )

    def signed(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        headers: Mapping[str, str] = {},
        key: str = "ADMIN",
    ) -> dict[str, str]:
        """The headers of a request that botocore has signed."""
        url = f"http://{self.address[0]}:{self.address[1]}{path}"
        request = AWSRequest(method=method, url=url, data=body, headers=dict(headers))
        SigV4Auth(Credentials(key, CONFIDENTIAL), "lambda", REGION).add_auth(request)
        return {"Host": f"{self.address[0]}:{self.address[1]}", **dict(request.headers.items())}

    def audited(self) -> list[AuditEntry]:
        """The audit log."""
        reading = self.services.audit.read(100)
        return asyncio.run_coroutine_threadsafe(reading, self.loop).result(10)


def talk(
    tmp_path: Path,
    work: Callable[[Gate], None],
    *,
    memory: Callable[[str], int | None] = lambda template: 256,
    within: float = 60,
    **changes: Any,
) -> None:
    """Serve functions through a gateway, and work with it from a thread."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        settings = GatewayConfig(listen="127.0.0.1:0", keys=KEYS)
        config = msgspec.structs.replace(
            running.context.config, gateway=msgspec.structs.replace(settings, **changes)
        )
        services = await with_functions(running)
        async with gateway(config, services.functions, running.audit, memory) as address:
            assert address is not None
            loop = asyncio.get_running_loop()
            await asyncio.to_thread(work, Gate(address, services.functions, services, loop))

    play(tmp_path, scenario, within=within)


def zipped(text: str = "def handler(event, context): return event") -> bytes:
    """A zip with one module."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("app.py", text)
    return content.getvalue()


def create(client: Any, name: str = "hello", **changes: Any) -> dict[str, Any]:
    """A function."""
    fields = {
        "FunctionName": name,
        "Runtime": "python3.12",
        "Role": ROLE,
        "Handler": "app.handler",
        "Code": {"ZipFile": zipped(changes.pop("text", "x"))},
        **changes,
    }
    made: dict[str, Any] = client.create_function(**fields)
    return made


def refusal(call: Callable[..., Any], **arguments: Any) -> tuple[int, str, str]:
    """How a call is refused: status, code, message."""
    try:
        answer = call(**arguments)
    except ClientError as error:
        told = error.response
        return (
            told["ResponseMetadata"]["HTTPStatusCode"],
            told["Error"]["Code"],
            told["Error"]["Message"],
        )
    raise AssertionError(f"it was not refused: {answer}")
