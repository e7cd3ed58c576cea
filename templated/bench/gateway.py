"""boto3 as a client of the gateway, with the keys that it finds by itself."""

from __future__ import annotations

from typing import Any

from templated.errors import HostError


def lambdas(url: str, connections: int = 1, timeout: float = 60.0) -> Any:
    """A client of Lambda's API that tries nothing twice. HostError when boto3 is missing, or finds
    no keys or no region."""
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError as error:
        raise HostError("boto3 is not installed", hint="pip install boto3") from error
    config = Config(
        retries={"max_attempts": 0}, max_pool_connections=connections, read_timeout=timeout
    )
    hint = "set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_DEFAULT_REGION"
    try:
        session = boto3.Session()
        client = session.client("lambda", endpoint_url=url, config=config)
    except (BotoCoreError, ValueError) as error:
        raise HostError(f"boto3 cannot use {url}: {error}", hint=hint) from error
    if session.get_credentials() is None:
        raise HostError("boto3 finds no keys for the gateway", hint=hint)
    return client
