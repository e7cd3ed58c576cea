"""Operations on functions: their code and settings."""

from __future__ import annotations

import asyncio
import io
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web

from templated.api.gateway.call import Call, json_answer, page, paged
from templated.api.gateway.errors import Refused, wrong
from templated.api.gateway.shapes import (
    NOT_OF_CODE,
    NOT_OF_FUNCTIONS,
    NOT_OF_UPDATES,
    TEMPLATE_TAG,
    CreateFunction,
    UpdateCode,
    UpdateConfiguration,
    refuse,
)
from templated.api.gateway.views import revision
from templated.errors import Changed
from templated.model.function import LATEST, Alias, DeployRequest, Version

Entity = TypeVar("Entity", Version, Alias)
MAX_ZIP = 50 << 20
_NO_ZIP = "ZipFile: it is no zip, or a broken one"


async def create_function(call: Call) -> web.Response:
    """Make a function of a zip."""
    wanted = await call.decode(CreateFunction)
    name = call.desk.place.target(wanted.function_name).name
    call.about, call.detail = name, "publish" if wanted.publish else ""
    refuse(wanted, NOT_OF_FUNCTIONS)
    refuse(wanted.code, NOT_OF_CODE)
    if wanted.code.zip_file is None:
        raise wrong("Code: ZipFile is missing")
    if not wanted.role:
        raise wrong("Role is missing; it means nothing here, and is told back")
    request = wanted.deploy(wanted.template())
    version = await _deploy(call, name, request, wanted.code.zip_file, new=True)
    return await _deployed(call, version, publish=wanted.publish, status=201)


async def update_code(call: Call) -> web.Response:
    """Give a function other code."""
    name = call.alone
    wanted = await call.decode(UpdateCode)
    call.detail = "code publish" if wanted.publish else "code"
    refuse(wanted, NOT_OF_UPDATES)
    latest = expected(call.desk.functions.registry.latest(name), wanted.revision_id)
    if wanted.zip_file is None:
        raise wrong("ZipFile is missing")
    if wanted.dry_run:
        call.detail = "dry run"
        await _check_zip(wanted.zip_file)
        return json_answer(shown(call, call.desk.functions.registry.latest(name), None))
    with revised(wanted.revision_id):
        version = await _deploy(call, name, DeployRequest(), wanted.zip_file, latest, new=False)
    return await _deployed(call, version, publish=wanted.publish)


async def update_configuration(call: Call) -> web.Response:
    """Give a function other settings."""
    name = call.alone
    wanted = await call.decode(UpdateConfiguration)
    given = zip(wanted.__struct_fields__, wanted.__struct_encode_fields__, strict=True)
    # Which settings, not what they are: values of the environment may be secrets.
    call.detail = " ".join(label for field, label in given if getattr(wanted, field) is not None)
    refuse(wanted, NOT_OF_FUNCTIONS)
    functions = call.desk.functions
    latest = expected(functions.registry.latest(name), wanted.revision_id)
    with revised(wanted.revision_id):
        version = await functions.networks.deploy(
            name, wanted.deploy(), None, new=False, expected=latest
        )
    return json_answer(shown(call, version, None))


async def get_function(call: Call) -> web.Response:
    """A version with what is beside its configuration."""
    version, registry = _version(call), call.desk.functions.registry
    answer: dict[str, Any] = {
        "Configuration": shown(call, version, call.target.qualifier),
        "Code": {"RepositoryType": "templated"},
        "Tags": {TEMPLATE_TAG: version.settings.template},
    }
    reserved = registry.reserved(version.function)
    if reserved is not None:
        answer["Concurrency"] = {"ReservedConcurrentExecutions": reserved}
    return json_answer(answer)


async def get_configuration(call: Call) -> web.Response:
    """The configuration of a version."""
    return json_answer(shown(call, _version(call), call.target.qualifier))


async def code_signing(call: Call) -> web.Response:
    """What Lambda answers for a function without: there is nothing else here."""
    return json_answer({"FunctionName": call.desk.functions.registry.latest(call.alone).function})


async def list_functions(call: Call) -> web.Response:
    """All functions, or all versions of all."""
    if call.query.get("MasterRegion"):
        raise wrong("MasterRegion is not supported here")
    registry, which = call.desk.functions.registry, call.query.get("FunctionVersion")
    if which not in (None, "ALL"):
        raise wrong("FunctionVersion has to be ALL, or to be left out")
    versions = [registry.latest(name) for name in registry.names()]
    if which:
        versions = [v for latest in versions for v in all_versions(call, latest.function)]
    chosen, mark = page(call, sorted(versions, key=_mark), _mark)
    return paged("Functions", [shown(call, v, v.label if which else None) for v in chosen], mark)


async def delete_function(call: Call) -> web.Response:
    """Remove a function, or one numbered version."""
    target = call.target
    call.detail = f"version {target.qualifier}" if target.qualifier else ""
    await call.desk.functions.registry.remove(target.name, target.qualifier)
    return web.Response(status=204)


def all_versions(call: Call, name: str) -> list[Version]:
    """`$LATEST`, then the numbers from the first."""
    registry = call.desk.functions.registry
    return [registry.latest(name), *reversed(registry.versions(name))]


def shown(call: Call, version: Version, qualifier: str | None) -> dict[str, Any]:
    """A version as whoever calls may see it."""
    told = call.desk.views.configuration(version, qualifier, values=call.admin)
    update = None if version.number else call.desk.functions.shifts.update(version.function)
    if update is not None and not update.done:
        told["LastUpdateStatus"] = "InProgress"
        told["LastUpdateStatusReason"] = (
            f"{update.ready} of {update.wanted} instances are ready; the code before serves"
        )
    return told


def expected(found: Entity, wanted: str | None) -> Entity | None:
    """What a change is meant for, if it says so: its revision. Raises Refused when it is another
    one already."""
    if wanted is None:
        return None
    if wanted != revision(found):
        raise _stale()
    return found


@contextmanager
def revised(wanted: str | None) -> Iterator[None]:
    """The error of a change that came too late as that of a revision, if it named one."""
    try:
        yield
    except Changed:
        if wanted is None:
            raise
        raise _stale() from None


def _stale() -> Refused:
    return Refused(
        "PreconditionFailedException",
        "The RevisionId provided does not match the latest one: it was changed meanwhile.",
        status=412,
    )


async def _deployed(
    call: Call, latest: Version, *, publish: bool, status: int = 200
) -> web.Response:
    if not publish:
        return json_answer(shown(call, latest, None), status)
    made = await call.desk.functions.registry.publish(latest.function)
    return json_answer(shown(call, made, made.label), status)


async def _deploy(
    call: Call,
    name: str,
    request: DeployRequest,
    content: bytes,
    latest: Version | None = None,
    *,
    new: bool,
) -> Version:
    if len(content) > MAX_ZIP:
        raise wrong(f"ZipFile: at most {MAX_ZIP} bytes")
    if not content:
        raise wrong(_NO_ZIP)
    async with _archive(call, content) as archive:
        return await call.desk.functions.networks.deploy(
            name, request, archive, new=new, expected=latest
        )


@asynccontextmanager
async def _archive(call: Call, content: bytes) -> AsyncIterator[Path | None]:
    async def chunks() -> AsyncIterator[bytes]:
        yield content

    async with call.desk.functions.uploads.receive(chunks()) as path:
        yield path


async def _check_zip(content: bytes) -> None:
    if not await asyncio.to_thread(zipfile.is_zipfile, io.BytesIO(content)):
        raise wrong(_NO_ZIP)


def _version(call: Call) -> Version:
    target = call.target
    return call.desk.functions.registry.version(target.name, target.qualifier)


def _mark(version: Version) -> str:
    """By name, then by number; `$LATEST` is the first."""
    return f"{version.function}:{version.number:09}"


def latest_or_number(label: str) -> str:
    """Return `label`. Raises Refused for what is no version of its own, an alias for instance."""
    if label == LATEST or (label.isdecimal() and label.isascii() and len(label) < 10):
        return label
    raise wrong(f"FunctionVersion: {label[:70]!r} is neither a number nor {LATEST}")
