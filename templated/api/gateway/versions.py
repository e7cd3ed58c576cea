"""Operations on versions and aliases, and on how many requests may run at once."""

from __future__ import annotations

import base64
import binascii

from aiohttp import web

from templated.api.gateway.call import Call, json_answer, page, paged
from templated.api.gateway.errors import Refused, wrong
from templated.api.gateway.functions import (
    all_versions,
    expected,
    latest_or_number,
    revised,
    shown,
)
from templated.api.gateway.shapes import (
    Concurrency,
    CreateAlias,
    PublishVersion,
    Routing,
    UpdateAlias,
    refuse,
)
from templated.api.gateway.views import code_sha256
from templated.model.function import Alias


async def publish_version(call: Call) -> web.Response:
    """Make a numbered copy of `$LATEST`."""
    name, registry = call.alone, call.desk.functions.registry
    wanted = await call.decode(PublishVersion)
    refuse(wanted, ("publish_to",))
    latest = registry.latest(name)
    known = expected(latest, wanted.revision_id)
    digest = _digest(wanted.code_sha256) if wanted.code_sha256 else None
    if digest is not None and digest != latest.code.digest:
        raise wrong(f"CodeSha256: that of $LATEST is {code_sha256(latest.code.digest)}")
    with revised(wanted.revision_id):
        version = await registry.publish(
            name, description=wanted.description, digest=digest, expected=known
        )
    call.detail = f"version {version.label}"
    return json_answer(shown(call, version, version.label), 201)


async def list_versions(call: Call) -> web.Response:
    """`$LATEST` and all numbers."""
    versions = all_versions(call, call.alone)
    chosen, mark = page(call, versions, lambda version: f"{version.number:09}")
    return paged("Versions", [shown(call, v, v.label) for v in chosen], mark)


async def create_alias(call: Call) -> web.Response:
    """Make an alias."""
    name = call.alone
    wanted = await call.decode(CreateAlias)
    versions = _weights(latest_or_number(wanted.function_version), wanted.routing_config)
    call.detail = _told(wanted.name, versions)
    alias = await call.desk.functions.registry.set_alias(
        name, wanted.name, versions, description=wanted.description, new=True
    )
    return json_answer(call.desk.views.alias(alias), 201)


async def update_alias(call: Call) -> web.Response:
    """Point an alias at other versions, or describe it in other words."""
    name, old = call.alone, _alias(call)
    wanted = await call.decode(UpdateAlias)
    expected(old, wanted.revision_id)
    first, *others = old.versions
    if wanted.function_version is not None:
        first = latest_or_number(wanted.function_version)
    routing = wanted.routing_config
    if routing is None:
        routing = Routing({label: old.versions[label] for label in others})
    versions = _weights(first, routing)
    call.detail = _told(old.name, versions)
    with revised(wanted.revision_id):
        # What it leaves out was taken from `old`: that has to be what is there still.
        alias = await call.desk.functions.registry.set_alias(
            name,
            old.name,
            versions,
            description=wanted.description,
            new=False,
            expected=old,
            hold=True,
        )
    call.desk.functions.shifts.follow(alias)
    return json_answer(call.desk.views.alias(alias))


async def get_alias(call: Call) -> web.Response:
    """One alias."""
    return json_answer(call.desk.views.alias(_alias(call)))


async def list_aliases(call: Call) -> web.Response:
    """All aliases of a function, or those that point at a version."""
    aliases = call.desk.functions.registry.aliases(call.alone)
    version = call.query.get("FunctionVersion")
    if version:
        aliases = [alias for alias in aliases if version in alias.versions]
    chosen, mark = page(call, aliases, lambda alias: alias.name)
    return paged("Aliases", [call.desk.views.alias(alias) for alias in chosen], mark)


async def delete_alias(call: Call) -> web.Response:
    """Remove an alias."""
    call.detail = call.names[1]
    await call.desk.functions.registry.remove_alias(call.alone, call.names[1])
    return web.Response(status=204)


async def put_concurrency(call: Call) -> web.Response:
    """Bound how many requests of a function may run at once."""
    wanted = await call.decode(Concurrency)
    count = wanted.reserved_concurrent_executions
    call.detail = f"reserved {count}"
    await call.desk.functions.registry.reserve(call.alone, count)
    return json_answer({"ReservedConcurrentExecutions": count})


async def get_concurrency(call: Call) -> web.Response:
    """The bound; nothing where there is none."""
    count = call.desk.functions.registry.reserved(call.alone)
    return json_answer({} if count is None else {"ReservedConcurrentExecutions": count})


async def delete_concurrency(call: Call) -> web.Response:
    """Take the bound away."""
    call.detail = "reserved none"
    await call.desk.functions.registry.reserve(call.alone, None)
    return web.Response(status=204)


def _alias(call: Call) -> Alias:
    name, wanted = call.alone, call.names[1]
    for alias in call.desk.functions.registry.aliases(name):
        if alias.name == wanted:
            return alias
    raise Refused(
        "ResourceNotFoundException",
        f"Cannot find alias arn: {call.desk.place.arn(name, wanted[:140])}",
        status=404,
    )


def _weights(first: str, routing: Routing | None) -> dict[str, float]:
    """By version, the first is the one that the alias names. Raises Refused."""
    others = (routing.additional_version_weights if routing else None) or {}
    if len(others) > 1:
        raise wrong("AdditionalVersionWeights: one version beside FunctionVersion at most")
    for label, weight in others.items():
        if not 0 <= weight <= 1:
            raise wrong("AdditionalVersionWeights: a weight is between 0 and 1")
        if label == first:
            raise wrong("AdditionalVersionWeights: it names FunctionVersion again")
    return {first: 1 - sum(others.values()), **others}


def _told(name: str, versions: dict[str, float]) -> str:
    return f"{name} {' '.join(f'{label}={weight:g}' for label, weight in versions.items())}"


def _digest(text: str) -> str:
    """In hex. What is no digest is one that no code has."""
    try:
        return base64.b64decode(text, validate=True).hex()
    except (binascii.Error, ValueError):
        return "-"
