"""The access keys of the configuration, with their secrets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from templated.drivers.secretfile import read_secret
from templated.errors import ConfigError
from templated.model.access import Role
from templated.model.config import GatewayKey

_SHORTEST = 8


@dataclass(frozen=True)
class Key:
    """An access key; its secret is in no representation of it."""

    id: str
    role: Role
    secret: str = field(repr=False)


def read_keys(keys: Sequence[GatewayKey]) -> dict[str, Key]:
    """The keys by their ids. Raises ConfigError for a file that others can read or that holds no
    secret, and for two keys with one id. Reads files."""
    found: dict[str, Key] = {}
    for key in keys:
        if key.id in found:
            raise ConfigError(
                f"gateway.keys: {key.id} is there twice", hint="give each key an id of its own"
            )
        found[key.id] = Key(key.id, key.role, _secret(key))
    return found


def _secret(key: GatewayKey) -> str:
    if key.secret_file is not None:
        return read_secret(key.secret_file, "gateway.keys", shortest=_SHORTEST)
    assert key.secret is not None  # a key has one of both
    return key.secret
