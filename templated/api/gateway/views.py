"""Functions, versions and aliases as Lambda describes them."""

from __future__ import annotations

import base64
import hashlib
import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from templated.api.gateway.names import Place
from templated.api.gateway.shapes import runtime_of
from templated.model.function import Alias, Runtime, Settings, Version
from templated.model.units import seconds

_RUNTIMES = {Runtime.PYTHON: "python3.11", Runtime.PROVIDED: "provided.al2023"}
_NOT_SHOWN = {
    "ErrorCode": "AccessDeniedException",
    "Message": "The values of the environment are shown to admins alone.",
}
Memory = Callable[[str], int | None]


@dataclass(frozen=True)
class Views:
    """Describes what there is; `memory` tells the MiB of a template's guests."""

    place: Place
    memory: Memory

    def configuration(
        self, version: Version, qualifier: str | None, *, values: bool
    ) -> dict[str, Any]:
        """One version. `qualifier` is what its ARN ends in; without `values` the environment's are
        left out."""
        settings = version.settings
        shown: dict[str, Any] = {
            "FunctionName": version.function,
            "FunctionArn": self.place.arn(version.function, qualifier),
            "Runtime": _runtime(settings),
            "Role": settings.told.role or self.place.role(),
            "Handler": settings.handler,
            "CodeSize": version.code.bytes,
            "Description": settings.description,
            "Timeout": max(1, math.ceil(seconds(settings.timeout))),
            "LastModified": f"{version.created.removesuffix('Z')}+0000",
            "CodeSha256": code_sha256(version.code.digest),
            "Version": version.label,
            "RevisionId": revision(version),
            "State": "Active",
            "LastUpdateStatus": "Successful",
            "PackageType": "Zip",
            "Architectures": ["x86_64"],
            "TracingConfig": {"Mode": "PassThrough"},
            "SnapStart": {"ApplyOn": "None", "OptimizationStatus": "Off"},
        }
        if settings.env:
            shown["Environment"] = {"Variables": settings.env} if values else {"Error": _NOT_SHOWN}
        memory = self.memory(settings.template)
        if memory is not None:
            shown["MemorySize"] = memory
        return shown

    def alias(self, alias: Alias) -> dict[str, Any]:
        """One alias."""
        first, *others = alias.versions
        shown: dict[str, Any] = {
            "AliasArn": self.place.arn(alias.function, alias.name),
            "Name": alias.name,
            "FunctionVersion": first,
            "Description": alias.description,
            "RevisionId": revision(alias),
        }
        if others:
            weights = {label: alias.versions[label] for label in others}
            shown["RoutingConfig"] = {"AdditionalVersionWeights": weights}
        return shown


def _runtime(settings: Settings) -> str:
    """What a client said, unless it was made another one by another way."""
    said = settings.told.runtime
    return said if said and runtime_of(said) is settings.runtime else _RUNTIMES[settings.runtime]


def code_sha256(digest: str) -> str:
    """The digest of a code image, as Lambda writes digests."""
    return base64.b64encode(bytes.fromhex(digest)).decode()


def revision(entity: Version | Alias) -> str:
    """Another one whenever anything of it is another."""
    digest = hashlib.sha256(msgspec.json.encode(entity)).digest()
    return str(uuid.UUID(bytes=digest[:16], version=5))
