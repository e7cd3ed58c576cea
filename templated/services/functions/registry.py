"""Functions, their versions and aliases: written to the journal first, then known here."""

from __future__ import annotations

import asyncio
import contextlib
import random as randomness
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from msgspec.structs import replace

from templated.errors import Changed, Conflict, InvalidRequest, NotFound
from templated.journal import FunctionRow, FunctionRows, now
from templated.model.function import (
    LATEST,
    Alias,
    CodeView,
    DeployRequest,
    Provisioned,
    Version,
    check_function_name,
    check_qualifier,
)
from templated.services.functions.allotment import Capacity, require_room, require_sense
from templated.services.functions.record import (
    Record,
    check_fit,
    details,
    latest_of,
    owner,
    same,
    shared,
)
from templated.services.functions.settings import listed, merged, pointed, strict
from templated.services.reports.events import EventBus

T = TypeVar("T")
_UNBOUNDED = Capacity()
_SHOWN = 70


class Admits(Protocol):
    """Takes code in: the code cache."""

    async def admit(self, archive: Path) -> CodeView:
        """Make an image of a zip. Raises InvalidRequest or HostError; leaves nothing then."""
        ...


class Registry:
    """All functions. Changes of one happen one after the other, those of others beside them.

    What a change has begun to write is written and known, also when its caller is cancelled.
    """

    def __init__(
        self,
        rows: FunctionRows,
        events: EventBus,
        code: Admits,
        takers: Callable[[], list[str]],
        *,
        capacity: Capacity = _UNBOUNDED,
        random: Callable[[], float] = randomness.random,
    ) -> None:
        """`capacity` bounds what may be kept ready of all functions."""
        self._rows = rows
        self._events = events
        self._code = code
        self._takers = takers
        self._capacity = capacity
        self._random = random
        self._functions: dict[str, Record] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._users: Counter[str] = Counter()
        # Code that was admitted and is in no version yet.
        self._admitted: Counter[str] = Counter()
        self.on_changed: list[Callable[[Version], object]] = []
        """Told of a version that is new, or of `$LATEST` when it is another."""
        self.on_removed: list[Callable[[str, int | None], Awaitable[None]]] = []
        """Told of a function and the number that went, None for all of it; awaited."""
        self.on_kept: list[Callable[[str], None]] = []
        """Told of a function whose instances have other bounds, or that is gone."""

    async def open(self) -> None:
        """Read all from the journal. Raises HostError for rows that do not fit together; leaves
        nothing known then."""
        found = {row.name: Record(row) for row in await self._rows.functions()}
        for version in await self._rows.versions():
            owner(found, version.function).versions[version.number] = version
        for alias in await self._rows.aliases():
            owner(found, alias.function).aliases[alias.name] = alias
        for provisioned in await self._rows.provisioned():
            kept = owner(found, provisioned.function).provisioned
            kept[provisioned.qualifier] = provisioned
        for name, function in found.items():
            check_fit(name, function)
        self._functions = found

    # --- changes --------------------------------------------------------------------------------

    async def deploy(
        self,
        name: str,
        wanted: DeployRequest,
        archive: Path | None,
        *,
        new: bool | None = None,
        expected: Version | None = None,
    ) -> Version:
        """Change `$LATEST`, or make the function. Without an archive its code stays.

        `new`: True for one that must not exist, False for one that must; `expected`: what
        `$LATEST` must be still. Raises InvalidRequest, Conflict, NotFound, HostError; leaves the
        function as it was.
        """
        check_function_name(name)
        async with self._alone(name):
            old = self._functions.get(name)
            if old is not None and new:
                raise Conflict(f"function {name} exists already", hint="deploy it without `new`")
            if old is None and new is False:
                raise self._unknown(name)
            latest = old.latest if old else None
            _still(latest, expected)
            settings = merged(wanted, latest.settings if latest else None, self._takers())
            if latest is None and archive is None:
                raise InvalidRequest("a new function needs code", hint="send its files as a zip")
            if archive is None:
                assert latest is not None
                return await self._change(latest_of(name, settings, latest.code))
            code = await self._code.admit(archive)
            with self._kept(code.digest):
                return await self._change(latest_of(name, settings, code))

    async def _change(self, latest: Version) -> Version:
        async def write() -> Version:
            await self._rows.deploy(latest)
            row = FunctionRow(name=latest.function, reserved=None, created=latest.created)
            function = self._functions.setdefault(latest.function, Record(row))
            function.versions[0] = latest
            self._events.emit("function.deployed", latest.function, **details(latest))
            self._tell(latest)
            self._tell_kept(latest.function)
            return latest

        return await _whole(write())

    async def publish(
        self,
        name: str,
        *,
        description: str | None = None,
        digest: str | None = None,
        expected: Version | None = None,
    ) -> Version:
        """Make a numbered copy of `$LATEST`; without a change since the newest number, that one.

        `digest`: the code that it must have; `expected`: what it must be still. Raises NotFound,
        Conflict for other code, InvalidRequest; leaves no number then.
        """
        async with self._alone(name):
            function = self._function(name)
            latest = function.latest
            _still(latest, expected)
            if digest is not None and digest != latest.code.digest:
                raise Conflict(
                    f"the code of {name} is {latest.code.digest[:12]}, not {digest[:12]}",
                    hint="it was deployed again meanwhile",
                )
            newest = next(iter(function.numbered()), None)
            if newest is not None and same(newest, latest):
                return newest
            settings = latest.settings
            if description is not None:
                settings = strict(replace(settings, description=description), type(settings))
            return await _whole(self._number(replace(latest, settings=settings, created=now())))

    async def _number(self, copy: Version) -> Version:
        made = await self._rows.publish(copy)
        self._functions[made.function].versions[made.number] = made
        self._events.emit("function.published", made.function, **details(made))
        self._tell(made)
        return made

    async def set_alias(
        self,
        name: str,
        alias: str,
        versions: Mapping[str, float],
        *,
        description: str | None = None,
        new: bool | None = None,
        expected: Alias | None = None,
        hold: bool = False,
    ) -> Alias:
        """Point an alias at one version, or at two by weight; the first is the one it names.

        `new` and `expected` as for a deploy; `hold`: requests go where they went until `release`,
        or the end of the daemon. Raises InvalidRequest, NotFound, Conflict; leaves it
        as it was.
        """
        async with self._alone(name):
            function = self._function(name)
            old = function.aliases.get(alias)
            if old is not None and new:
                raise Conflict(f"function {name} has an alias {alias} already")
            if old is None and new is False:
                raise self._no_alias(function, alias)
            _still(old, expected)
            if description is None:
                description = old.description if old else ""
            wanted = pointed(name, alias, versions, description, function.labels())

            async def write() -> None:
                await self._rows.set_alias(wanted)
                routed = function.held.pop(alias, old)
                if hold and routed is not None:
                    function.held[alias] = routed
                function.aliases[alias] = wanted
                self._events.emit("function.alias", name, alias=alias, versions=wanted.versions)
                self._tell_kept(name)

            await _whole(write())
            return wanted

    def release(self, wanted: Alias) -> None:
        """Let requests go where an alias points, if it does still."""
        function = self._functions.get(wanted.function)
        if function is not None and function.aliases.get(wanted.name) == wanted:
            function.held.pop(wanted.name, None)

    async def remove_alias(self, name: str, alias: str) -> None:
        """Remove an alias. Raises NotFound; leaves it when the journal cannot be written."""
        async with self._alone(name):
            function = self._function(name)
            if alias not in function.aliases:
                raise self._no_alias(function, alias)

            async def write() -> None:
                await self._rows.drop_alias(name, alias)
                del function.aliases[alias]
                function.provisioned.pop(alias, None)
                function.held.pop(alias, None)
                self._events.emit("function.removed", name, alias=alias)
                self._tell_kept(name)

            await _whole(write())

    async def remove(self, name: str, version: str | None = None) -> None:
        """Remove a numbered version, or all of a function, and end the instances of it.

        Raises NotFound, InvalidRequest for `$LATEST`, Conflict for a version that an alias names;
        leaves it then. Raises what those raise who are told; leaves it removed then.
        """
        async with self._alone(name):
            function = self._function(name)
            number = None if version is None else self._removable(function, version)
            await _whole(self._remove(name, number))

    async def _remove(self, name: str, number: int | None) -> None:
        if number is None:
            await self._rows.drop_function(name)
            del self._functions[name]
            self._events.emit("function.removed", name)
        else:
            await self._rows.drop_version(name, number)
            del self._functions[name].versions[number]
            self._functions[name].provisioned.pop(str(number), None)
            self._events.emit("function.removed", name, version=str(number))
        self._tell_kept(name)
        # Each of them is told, whatever the others raise.
        results = await asyncio.gather(
            *(told(name, number) for told in self.on_removed), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def reserve(self, name: str, count: int | None) -> None:
        """Set how many requests may run at once; None: no bound of its own. Raises NotFound or
        InvalidRequest; leaves the count as it was."""
        async with self._alone(name):
            function = self._function(name)
            row = strict(replace(function.row, reserved=count), FunctionRow)
            require_sense(name, row, function.provisioned.values())

            async def write() -> None:
                await self._rows.reserve(name, count)
                function.row = row
                self._events.emit("function.reserved", name, concurrency=count)
                self._tell_kept(name)

            await _whole(write())

    async def scale(self, name: str, *, least: int | None = None, most: int | None = None) -> None:
        """Set how many instances of `$LATEST` are kept ready, and how many there may be of all
        versions (0: no bound); None leaves a number as it is.

        Raises NotFound, or InvalidRequest for numbers that cannot be; leaves both as they were.
        """
        async with self._alone(name):
            function = self._function(name)
            row = function.row
            if least is not None:
                row = replace(row, least=least)
            if most is not None:
                row = replace(row, most=most or None)
            row = strict(row, FunctionRow)
            require_sense(name, row, function.provisioned.values())
            self._require_room(name, row.least - function.row.least)

            async def write() -> None:
                await self._rows.scale(name, row.least, row.most)
                function.row = row
                self._events.emit("function.scaled", name, min=row.least, max=row.most)
                self._tell_kept(name)

            await _whole(write())

    async def provision(self, name: str, qualifier: str, count: int | None) -> None:
        """Set how many instances are kept ready for a numbered version or an alias; None: none.

        Raises NotFound, also when there is nothing to take away, InvalidRequest for `$LATEST` and
        for numbers that cannot be; leaves what was.
        """
        async with self._alone(name):
            function = self._function(name)
            old = function.provisioned.get(qualifier)
            if count is None:
                if old is None:
                    raise NotFound(
                        f"nothing is provisioned for {name}:{qualifier[:_SHOWN]}",
                        hint="see: templated function show",
                    )
                await _whole(self._unprovision(function, qualifier))
                return
            self._provisionable(function, qualifier)
            wanted = strict(
                {"function": name, "qualifier": qualifier, "count": count, "changed": now()},
                Provisioned,
            )
            others = [p for p in function.provisioned.values() if p.qualifier != qualifier]
            require_sense(name, function.row, [*others, wanted])
            self._require_room(name, count - (old.count if old else 0))
            await _whole(self._provision(function, wanted))

    async def _provision(self, function: Record, wanted: Provisioned) -> None:
        await self._rows.provision(wanted)
        function.provisioned[wanted.qualifier] = wanted
        self._told_provisioned(function, wanted.qualifier, wanted.count)

    async def _unprovision(self, function: Record, qualifier: str) -> None:
        await self._rows.unprovision(function.row.name, qualifier)
        function.provisioned.pop(qualifier, None)
        self._told_provisioned(function, qualifier, 0)

    def _told_provisioned(self, function: Record, qualifier: str, count: int) -> None:
        name = function.row.name
        self._events.emit("function.provisioned", name, qualifier=qualifier, count=count)
        self._tell_kept(name)

    def _provisionable(self, function: Record, qualifier: str) -> None:
        if qualifier == LATEST:
            raise InvalidRequest(
                f"nothing is provisioned for {LATEST}, which changes",
                hint=f"keep instances of it: templated function scale {function.row.name} --min N",
            )
        if qualifier not in function.aliases:
            self._found(function, qualifier)

    def _require_room(self, name: str, more: int) -> None:
        """Less may always be kept, also when the bounds are lower than they were."""
        if more > 0:
            kept = {other: record.kept_in_all for other, record in self._functions.items()}
            require_room(name, kept, more, self._capacity)

    # --- what there is --------------------------------------------------------------------------

    def names(self) -> list[str]:
        """All functions, in order."""
        return sorted(self._functions)

    def latest(self, name: str) -> Version:
        """`$LATEST`. Raises NotFound."""
        return self._function(name).latest

    def created(self, name: str) -> str:
        """When the function was made. Raises NotFound."""
        return self._function(name).row.created

    def version(self, name: str, qualifier: str | None) -> Version:
        """A version by its number, by `$LATEST`, or by an alias (its first). Raises NotFound."""
        function = self._function(name)
        alias = self._alias(function, qualifier)
        label = next(iter(alias.versions)) if alias else qualifier or LATEST
        return self._found(function, label)

    def current(self, version: Version) -> bool:
        """Whether this version is there, and is the same still."""
        function = self._functions.get(version.function)
        return function is not None and function.versions.get(version.number) == version

    def versions(self, name: str) -> list[Version]:
        """The numbered versions, newest first. Raises NotFound."""
        return self._function(name).numbered()

    def aliases(self, name: str) -> list[Alias]:
        """The aliases, by name. Raises NotFound."""
        aliases = self._function(name).aliases
        return [aliases[alias] for alias in sorted(aliases)]

    def pointed(self, name: str, alias: str, versions: Mapping[str, float]) -> Alias:
        """An alias as `set_alias` would make it. Raises what that raises for `versions`."""
        return pointed(name, alias, versions, "", self._function(name).labels())

    def routed(self, name: str, alias: str) -> Alias | None:
        """Where an alias's requests go now; None when there is none. Raises NotFound."""
        function = self._function(name)
        return function.held.get(alias) or function.aliases.get(alias)

    def reserved(self, name: str) -> int | None:
        """How many requests may run at once; None: no bound of its own. Raises NotFound."""
        return self._function(name).row.reserved

    def maximum(self, name: str) -> int | None:
        """How many instances there may be of all versions; None: no bound of its own. Raises
        NotFound."""
        return self._function(name).row.most

    def least(self, name: str) -> int:
        """How many instances of `$LATEST` are kept ready. Raises NotFound."""
        return self._function(name).row.least

    def provisioned(self, name: str) -> list[Provisioned]:
        """What is provisioned for versions and aliases, by these. Raises NotFound."""
        provisioned = self._function(name).provisioned
        return [provisioned[qualifier] for qualifier in sorted(provisioned)]

    def shares(self, provisioned: Provisioned) -> list[tuple[Version, int]]:
        """The versions that provisioned instances are of, and how many of each."""
        function = self._function(provisioned.function)
        shares = function.shares(provisioned.qualifier, provisioned.count)
        return [(self._found(function, label), count) for label, count in shares.items()]

    def kept_by(self, alias: Alias, label: str) -> int:
        """How many instances of a version are to be ready for what is provisioned for an alias,
        once it points where `alias` does."""
        one = self._function(alias.function).provisioned.get(alias.name)
        return 0 if one is None else shared(alias.versions, one.count).get(label, 0)

    def kept(self, version: Version) -> int:
        """How many instances of a version are to be ready; 0 for one that is gone."""
        function = self._functions.get(version.function)
        return 0 if function is None else function.kept(version.label)

    def resolve(self, name: str, qualifier: str | None) -> Version:
        """The version that serves one request: by an alias's weights, each request anew.

        Raises NotFound, or InvalidRequest for what is no qualifier.
        """
        function = self._function(name)
        alias = self._alias(function, qualifier)
        if alias is None:
            return self._found(function, qualifier or LATEST)
        return self._found(function, self._drawn(function.held.get(alias.name, alias)))

    def needed(self) -> set[str]:
        """The digests of all code that a version has, or is about to have."""
        functions = self._functions.values()
        return {v.code.digest for f in functions for v in f.versions.values()} | {*self._admitted}

    # --- inside -------------------------------------------------------------------------------

    def _drawn(self, alias: Alias) -> str:
        labels = list(alias.versions)
        if len(labels) == 1:
            return labels[0]
        return labels[0] if self._random() < alias.versions[labels[0]] else labels[1]

    def _function(self, name: str) -> Record:
        function = self._functions.get(name)
        if function is None:
            raise self._unknown(name)
        return function

    def _alias(self, function: Record, qualifier: str | None) -> Alias | None:
        return function.aliases.get(qualifier) if qualifier else None

    def _found(self, function: Record, label: str) -> Version:
        version = function.find(check_qualifier(label))
        if version is None:
            raise NotFound(
                f"function {function.row.name} has no version or alias {label[:_SHOWN]}",
                hint=f"versions: {listed(function.labels())}; aliases: {listed(function.aliases)}",
            )
        return version

    def _removable(self, function: Record, label: str) -> int:
        if label == LATEST:
            raise InvalidRequest(
                f"{LATEST} cannot be removed alone", hint="remove the whole function"
            )
        version = None if label in function.aliases else self._found(function, label)
        if version is None:
            raise InvalidRequest(f"{label} is an alias, not a version", hint="remove the alias")
        aliases = (*function.aliases.values(), *function.held.values())
        named = [alias for alias in aliases if label in alias.versions]
        if named:
            raise Conflict(
                f"the alias {named[0].name} points at version {label} of {version.function}",
                hint="point it at another version first, or remove it",
            )
        return version.number

    def _unknown(self, name: str) -> NotFound:
        shown = name if name.isprintable() and len(name) <= _SHOWN else repr(name[:_SHOWN])
        return NotFound(f"there is no function {shown}", hint=f"functions: {listed(self.names())}")

    def _no_alias(self, function: Record, alias: str) -> NotFound:
        return NotFound(
            f"function {function.row.name} has no alias {alias[:_SHOWN]}",
            hint=f"aliases: {listed(function.aliases)}",
        )

    def _tell(self, version: Version) -> None:
        for told in self.on_changed:
            told(version)

    def _tell_kept(self, name: str) -> None:
        for told in self.on_kept:
            told(name)

    @contextlib.contextmanager
    def _kept(self, digest: str) -> Iterator[None]:
        self._admitted[digest] += 1
        try:
            yield
        finally:
            self._admitted[digest] -= 1
            self._admitted += Counter()  # drops those at zero

    @contextlib.asynccontextmanager
    async def _alone(self, name: str) -> AsyncIterator[None]:
        """One change of a function at a time, in the order in which they came."""
        lock = self._locks.setdefault(name, asyncio.Lock())
        self._users[name] += 1
        try:
            async with lock:
                yield
        finally:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name], self._locks[name]


async def _whole(work: Coroutine[Any, Any, T]) -> T:
    """`work` to its end, also when the caller is cancelled meanwhile: else what is known here
    would not be what the journal has."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # nobody is left to be told
        raise


def _still(found: object, expected: object) -> None:
    if expected is not None and found != expected:
        raise Changed("it was changed meanwhile", hint="look at it again, and try again")
