"""A store that speaks S3: objects by key, each call bounded in time. obstore is the client."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from templated.drivers.secretfile import read_secret
from templated.errors import ConfigError, HostError, NotFound
from templated.model.config import StoreConfig
from templated.model.units import seconds

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig, S3Config
    from obstore.store import ObjectStore as AnyStore

log = logging.getLogger(__name__)
_RETRIES = 2
_CONNECT_SECONDS = 5.0
_LONGEST = 200
_SYSTEM = re.compile(r'message: "([^"]{1,100})"')
_LOST = "see that it runs, and code.store in the configuration"


class ObjectStore:
    """Objects in one bucket, below one prefix. `name` is its URL, for messages."""

    def __init__(self, store: AnyStore, name: str, timeout: float) -> None:
        self.name = name
        self._store = store
        self._timeout = timeout

    async def get(self, key: str, most: int) -> memoryview:
        """The content of an object, of at most so many bytes.

        Raises NotFound when there is none, HostError when the store does not give it.
        """
        try:
            async with self._bounded():
                found = await obstore.get_async(self._store, key)
                if found.meta["size"] > most:
                    raise HostError(
                        f"{self.name} has {found.meta['size']} bytes under {key}",
                        hint=f"at most {most} are right; remove that object",
                    )
                return memoryview(await found.bytes_async())
        except FileNotFoundError:
            raise NotFound(f"{self.name} has no {key}") from None

    async def size(self, key: str) -> int | None:
        """Bytes of an object; None when there is none. Raises HostError."""
        try:
            async with self._bounded():
                return (await obstore.head_async(self._store, key))["size"]
        except FileNotFoundError:
            return None

    async def put(self, key: str, content: bytes) -> None:
        """Write an object, whole or not at all. Raises HostError."""
        try:
            async with self._bounded():
                await obstore.put_async(self._store, key, content, use_multipart=False)
        except FileNotFoundError:
            raise HostError(
                f"{self.name} has no such bucket", hint="make it, then try again"
            ) from None

    @contextlib.asynccontextmanager
    async def _bounded(self) -> AsyncIterator[None]:
        """One call: within its time, and its errors as those of people."""
        try:
            async with asyncio.timeout(self._timeout):
                yield
        except TimeoutError:
            raise HostError(
                f"{self.name} did not answer within {self._timeout:g} s", hint=_LOST
            ) from None
        except (PermissionDeniedError, UnauthenticatedError) as error:
            log.debug("%s: %s", self.name, error)
            raise HostError(
                f"{self.name} does not let this daemon in",
                hint="see access_key and secret_file of code.store in the configuration",
            ) from error
        except BaseError as error:
            raise HostError(f"{self.name} failed: {_cause(error)}", hint=_LOST) from error


def connect(config: StoreConfig) -> ObjectStore:
    """The store of the configuration; nothing is sent yet. Blocks; raises ConfigError."""
    bucket, _, prefix = config.url.removeprefix("s3://").partition("/")
    timeout = seconds(config.timeout)
    client: ClientConfig = {
        "allow_http": (config.endpoint or "").startswith("http:"),
        "connect_timeout": timedelta(seconds=min(timeout, _CONNECT_SECONDS)),
        "timeout": timedelta(seconds=timeout),
    }
    retry: RetryConfig = {"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=timeout)}
    try:
        store = S3Store(
            bucket,
            prefix=prefix.strip("/") or None,
            config=_settings(config),
            client_options=client,
            retry_config=retry,
        )
    except (BaseError, ValueError) as error:
        raise ConfigError(f"code.store cannot be used: {_cause(error)}") from error
    return ObjectStore(store, config.url, timeout)


def _settings(config: StoreConfig) -> S3Config:
    settings: S3Config = {"region": config.region}
    if config.endpoint is not None:
        settings["endpoint"] = config.endpoint
    if config.access_key is not None:
        settings["access_key_id"] = config.access_key
        settings["secret_access_key"] = _secret(config)
    elif "AWS_ACCESS_KEY_ID" not in os.environ:
        settings["skip_signature"] = True
    return settings


def _secret(config: StoreConfig) -> str:
    """The secret key; ConfigError when it is not there, or not a secret."""
    if config.secret_file is None:
        raise ConfigError(
            "code.store has an access_key and no secret_file", hint="set `secret_file:` in it"
        )
    return read_secret(config.secret_file, "code.store")


def _cause(error: BaseException) -> str:
    """What obstore says at length, as one short line."""
    text = str(error)
    said, _, details = text.partition("\n\n")
    # Behind the request, its retries and their bounds.
    said = " ".join(said.split()).rpartition(" - ")[2].removeprefix("Generic S3 error: ")
    if (system := _SYSTEM.search(details)) is not None:
        said = system[1]
    elif "kind: Timeout" in details:
        said = "it did not answer in time"
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]}..."
