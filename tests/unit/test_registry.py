"""Functions, versions and aliases: what may be changed, in which order, and what a request gets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from templated.errors import Conflict, HostError, InvalidRequest, NotFound, TemplatedError
from templated.journal import FunctionRows, Journal
from templated.model.function import CodeView, DeployRequest, Runtime, Version
from templated.services.functions.registry import Registry
from templated.services.reports.events import EventBus
from tests.unit.fake_functions import FakeCode
from tests.unit.test_function_rows import spoil

HELLO = DeployRequest(handler="app.handler")
Play = Callable[["Rig"], Coroutine[Any, Any, None]]


class Rig:
    """A registry over a journal in a test's directory."""

    def __init__(self, journal: Journal, archive: Path) -> None:
        self.rows = FunctionRows(journal)
        self.bus = EventBus()
        self.code = FakeCode()
        self.takers = ["t"]
        self.drawn = 0.0
        self.archive = archive
        self.registry = Registry(
            self.rows, self.bus, self.code, lambda: self.takers, random=lambda: self.drawn
        )

    async def deploy(self, name: str = "f", content: bytes = b"1", **wanted: Any) -> Version:
        """Deploy code of this content."""
        await asyncio.to_thread(self.archive.write_bytes, content)
        request = DeployRequest(**{"handler": "app.handler", **wanted})
        return await self.registry.deploy(name, request, self.archive)

    async def published(self, count: int) -> None:
        """A function with so many versions."""
        for number in range(count):
            await self.deploy(content=str(number).encode())
            assert (await self.registry.publish("f")).number == number + 1

    def told(self) -> list[tuple[str, str]]:
        """The events so far."""
        return [(event.type, event.subject) for event in self.bus.recent()]


@asynccontextmanager
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    """A rig that is open."""
    journal = Journal(tmp_path / "journal.sqlite")
    await journal.open()
    try:
        made = Rig(journal, tmp_path / "code.zip")
        await made.registry.open()
        yield made
    finally:
        await journal.close()


def play(tmp_path: Path, *plays: Play) -> None:
    """Run one after the other, each on a registry that was opened anew."""

    async def main() -> None:
        for one in plays:
            async with asyncio.timeout(20), rig(tmp_path) as made:
                await one(made)

    asyncio.run(main())


async def refused(
    kind: type[TemplatedError], work: Coroutine[Any, Any, object], match: str
) -> TemplatedError:
    """The error that `work` ends with: one line, with a hint."""
    with pytest.raises(kind, match=match) as caught:
        await work
    assert "\n" not in caught.value.message
    return caught.value


def test_a_deploy_is_there_after_a_restart(tmp_path: Path) -> None:
    """With what it left out: settings that were there before, or defaults."""

    async def first(rig: Rig) -> None:
        made = await rig.deploy(env={"A": "1"}, timeout="5s", description="x")
        assert (made.label, made.settings.template, made.settings.runtime) == (
            *("$LATEST", "t"),
            Runtime.PYTHON,
        )
        code = made.code
        changed = await rig.registry.deploy("f", DeployRequest(handler="app.other"), None)
        assert changed.code == code and changed.settings.env == {"A": "1"}
        assert (await rig.registry.publish("f")).number == 1
        await rig.registry.set_alias("f", "live", {"1": 1.0})
        await rig.registry.reserve("f", 3)
        assert rig.told() == [
            *[("function.deployed", "f")] * 2,
            *(("function.published", "f"), ("function.alias", "f"), ("function.reserved", "f")),
        ]

    async def second(rig: Rig) -> None:
        registry = rig.registry
        assert registry.names() == ["f"] and registry.reserved("f") == 3
        assert registry.latest("f").settings.handler == "app.other"
        assert registry.latest("f").settings.timeout == "5s"
        assert [v.number for v in registry.versions("f")] == [1]
        assert [a.name for a in registry.aliases("f")] == ["live"]
        assert registry.resolve("f", "live").number == registry.version("f", "1").number == 1
        assert registry.resolve("f", None).label == registry.resolve("f", "$LATEST").label
        await registry.reserve("f", None)
        assert registry.reserved("f") is None and registry.created("f")

    play(tmp_path, first, second)


BAD_DEPLOYS: list[tuple[DeployRequest, type[TemplatedError], str]] = [
    (DeployRequest(), InvalidRequest, "needs a handler"),
    (DeployRequest(handler="app"), InvalidRequest, "MODULE.FUNCTION"),
    (DeployRequest(handler="app.1x"), InvalidRequest, "MODULE.FUNCTION"),
    (DeployRequest(handler="app.h", template="other"), InvalidRequest, "'other' does not serve"),
    (DeployRequest(handler="app.h", timeout="901s"), InvalidRequest, "at most 900s"),
    (DeployRequest(handler="app.h", timeout="0s"), InvalidRequest, "more than 0s"),
    (DeployRequest(handler="app.h", timeout="soon"), InvalidRequest, "timeout"),
    (DeployRequest(handler="app.h", env={"A": "x" * 4096}), InvalidRequest, "at most 4096"),
    (DeployRequest(handler="app.h", env={"1": "x"}), InvalidRequest, "not the name of a variable"),
    (DeployRequest(handler="app.h", env={"A": "\0"}), InvalidRequest, "NUL"),
    (DeployRequest(handler="app.h", env={"A": "\ud800"}), InvalidRequest, "surrogates"),
    (DeployRequest(handler="app.h", description="\ud800"), InvalidRequest, "half of a character"),
    (DeployRequest(handler="app.h", description="x" * 257), InvalidRequest, "length"),
]


@pytest.mark.parametrize(("wanted", "kind", "match"), BAD_DEPLOYS)
def test_a_bad_deploy(
    tmp_path: Path, wanted: DeployRequest, kind: type[TemplatedError], match: str
) -> None:
    """Refused before its code is taken, also where nobody has checked the types before."""

    async def first(rig: Rig) -> None:
        await refused(kind, rig.registry.deploy("f", wanted, rig.archive), match)
        assert rig.registry.names() == [] and rig.code.admitted == []

    play(tmp_path, first)


def test_what_a_deploy_needs(tmp_path: Path) -> None:
    """A name, code, and a template that takes it; and what `new` says."""

    async def first(rig: Rig) -> None:
        registry = rig.registry
        await refused(InvalidRequest, registry.deploy("a/b", HELLO, None), "not a function name")
        await refused(InvalidRequest, registry.deploy("f", HELLO, None), "needs code")
        rig.takers = []
        error = await refused(NotFound, rig.deploy(), "no template that serves takes code")
        assert "code: true" in error.hint
        rig.takers = ["t", "u"]
        error = await refused(InvalidRequest, rig.deploy(), "several templates take code: t, u")
        assert (await rig.deploy(template="u")).settings.template == "u"
        rig.takers = []  # the one that it has need not serve for a change of another setting
        assert (await registry.deploy("f", DeployRequest(timeout="9s"), None)).settings.template
        await refused(Conflict, registry.deploy("f", HELLO, None, new=True), "f exists already")
        error = await refused(NotFound, registry.deploy("g", HELLO, None, new=False), "no function")
        assert error.hint == "functions: f"
        rig.takers = ["t"]
        provided = DeployRequest(runtime=Runtime.PROVIDED)
        made = await registry.deploy("p", provided, rig.archive)
        assert made.settings.handler == "bootstrap"

    play(tmp_path, first)


def test_code_that_is_refused(tmp_path: Path) -> None:
    """The function stays what it was, and a new one is not there."""

    async def first(rig: Rig) -> None:
        made = await rig.deploy()
        await refused(InvalidRequest, rig.deploy(content=b""), "empty")
        await refused(InvalidRequest, rig.deploy("g", content=b""), "empty")
        assert rig.registry.latest("f") == made and rig.registry.names() == ["f"]

    play(tmp_path, first)


def test_publish(tmp_path: Path) -> None:
    """A number for each change, and none for none; the code may be asked for."""

    async def first(rig: Rig) -> None:
        await rig.deploy(description="d")
        registry = rig.registry
        changed: list[str] = []
        registry.on_changed.append(lambda version: changed.append(version.label))
        one = await registry.publish("f")
        assert await registry.publish("f") == one
        assert await registry.publish("f", description="other") == one
        await rig.deploy(content=b"2")
        digest = registry.latest("f").code.digest
        error = await refused(Conflict, registry.publish("f", digest="0" * 64), "the code of f is")
        assert "again" in error.hint
        two = await registry.publish("f", digest=digest, description="two")
        assert (two.number, two.settings.description) == (2, "two")
        await registry.deploy("f", DeployRequest(env={"A": "1"}), None)
        assert (await registry.publish("f")).number == 3
        assert changed == ["1", "$LATEST", "2", "$LATEST", "3"]
        await refused(NotFound, registry.publish("g"), "no function g")

    play(tmp_path, first)


BAD_ALIASES: list[tuple[str, dict[str, float], type[TemplatedError], str]] = [
    ("live", {}, InvalidRequest, "not at 0"),
    ("live", {"1": 0.4, "2": 0.3, "3": 0.3}, InvalidRequest, "not at 3"),
    ("live", {"4": 1.0}, NotFound, "no version 4"),
    ("live", {"x": 1.0}, NotFound, "no version x"),
    ("live", {"1": 0.5}, InvalidRequest, "add up to 0.5"),
    ("live", {"1": 0.5, "2": 0.6}, InvalidRequest, "add up to 1.1"),
    ("live", {"1": 0.9, "2": 0.1 + 1e-8}, InvalidRequest, "add up to 1"),
    ("live", {"1": 1.5, "2": -0.5}, InvalidRequest, "<= 1.0|>= 0.0"),
    ("live", {"1": float("nan")}, InvalidRequest, ">= 0.0"),
    ("live", {"$LATEST": 0.5, "1": 0.5}, InvalidRequest, "cannot point at"),
    ("3", {"1": 1.0}, InvalidRequest, "not the name of an alias"),
    ("$LATEST", {"1": 1.0}, InvalidRequest, "not the name of an alias"),
    ("a/b", {"1": 1.0}, InvalidRequest, "not the name of an alias"),
]


@pytest.mark.parametrize(("name", "versions", "kind", "match"), BAD_ALIASES)
def test_a_bad_alias(
    tmp_path: Path,
    name: str,
    versions: dict[str, float],
    kind: type[TemplatedError],
    match: str,
) -> None:
    """Refused, and the alias stays as it was."""

    async def first(rig: Rig) -> None:
        await rig.published(3)
        before = await rig.registry.set_alias("f", "live", {"3": 1.0})
        await refused(kind, rig.registry.set_alias("f", name, versions), match)
        assert rig.registry.aliases("f") == await rig.rows.aliases() == [before]

    play(tmp_path, first)


def test_aliases(tmp_path: Path) -> None:
    """One version, two by weight, `$LATEST` alone; and what `new` says."""

    async def first(rig: Rig) -> None:
        await rig.published(2)
        registry = rig.registry
        await registry.set_alias("f", "live", {"1": 1.0}, description="d", new=True)
        await refused(Conflict, registry.set_alias("f", "live", {"1": 1.0}, new=True), "already")
        alias = await registry.set_alias("f", "live", {"2": 0.7, "1": 0.3}, new=False)
        assert alias.description == "d" and registry.version("f", "live").number == 2
        error = await refused(
            NotFound, registry.set_alias("f", "none", {"1": 1.0}, new=False), "no alias none"
        )
        assert error.hint == "aliases: live"
        await registry.set_alias("f", "next", {"$LATEST": 1.0})
        assert registry.resolve("f", "next").number == 0
        await registry.remove_alias("f", "live")
        assert [a.name for a in registry.aliases("f")] == ["next"]
        await refused(NotFound, registry.remove_alias("f", "live"), "no alias live")
        weights = [event.details.get("versions") for event in rig.bus.recent()][-4:]
        assert weights == [{"1": 1.0}, {"2": 0.7, "1": 0.3}, {"$LATEST": 1.0}, None]

    play(tmp_path, first)


def test_weights(tmp_path: Path) -> None:
    """Each request is drawn anew: below the first's weight it is the first."""

    async def first(rig: Rig) -> None:
        await rig.published(2)
        await rig.registry.set_alias("f", "live", {"1": 0.9, "2": 0.1})
        drawn = {}
        for rig.drawn in (0.0, 0.89, 0.9, 0.999):
            drawn[rig.drawn] = rig.registry.resolve("f", "live").number
        assert drawn == {0.0: 1, 0.89: 1, 0.9: 2, 0.999: 2}
        await rig.registry.set_alias("f", "live", {"1": 0.0, "2": 1.0})
        rig.drawn = 0.0
        assert rig.registry.resolve("f", "live").number == 2
        await rig.registry.set_alias("f", "live", {"1": 1.0})
        rig.drawn = 0.999
        assert rig.registry.resolve("f", "live").number == 1

    play(tmp_path, first)


def test_what_is_not_there(tmp_path: Path) -> None:
    """The hint says what is."""

    async def first(rig: Rig) -> None:
        await rig.published(2)
        await rig.registry.set_alias("f", "live", {"1": 1.0})
        with pytest.raises(NotFound, match="no version or alias 7") as caught:
            rig.registry.resolve("f", "7")
        assert caught.value.hint == "versions: $LATEST, 2, 1; aliases: live"
        for qualifier in ("none", "999999999"):
            with pytest.raises(NotFound):
                rig.registry.version("f", qualifier)
        for qualifier in ("a/b", "0", "٣", "1" * 10, "x" * 500):
            with pytest.raises(InvalidRequest) as refusal:
                rig.registry.resolve("f", qualifier)
            assert len(refusal.value.message) < 250
        for look in (rig.registry.latest, rig.registry.versions, rig.registry.aliases):
            with pytest.raises(NotFound, match="no function g"):
                look("g")
        with pytest.raises(NotFound) as unknown:
            rig.registry.latest("\x1b" * 900)
        assert unknown.value.message.isprintable() and len(unknown.value.message) < 400

    play(tmp_path, first)


def test_remove_a_version(tmp_path: Path) -> None:
    """Not `$LATEST`, not an alias, and none that an alias points at."""

    async def first(rig: Rig) -> None:
        await rig.published(2)
        registry = rig.registry
        removed: list[tuple[str, int | None]] = []

        async def told(name: str, number: int | None) -> None:
            removed.append((name, number))

        registry.on_removed.append(told)
        await registry.set_alias("f", "live", {"1": 0.9, "2": 0.1})
        error = await refused(Conflict, registry.remove("f", "2"), "alias live points at version 2")
        assert "another version" in error.hint
        await refused(InvalidRequest, registry.remove("f", "$LATEST"), "cannot be removed alone")
        await refused(InvalidRequest, registry.remove("f", "live"), "is an alias")
        await refused(NotFound, registry.remove("f", "3"), "no version or alias 3")
        await registry.set_alias("f", "live", {"2": 1.0})
        needed = registry.needed()
        await registry.remove("f", "1")
        assert len(registry.needed()) == len(needed) - 1
        assert [v.number for v in registry.versions("f")] == [2]
        await registry.remove("f")
        assert registry.names() == [] == await rig.rows.functions()
        assert removed == [("f", 1), ("f", None)] and registry.needed() == set()
        await refused(NotFound, registry.remove("f"), "no function f")
        assert rig.told()[-2:] == [("function.removed", "f")] * 2

    play(tmp_path, first)


def test_an_instance_that_does_not_end(tmp_path: Path) -> None:
    """The version is gone, all are told, and the caller hears of it."""

    async def first(rig: Rig) -> None:
        await rig.published(1)
        removed: list[str] = []

        async def stuck(name: str, number: int | None) -> None:
            raise HostError("it does not end", hint="")

        async def told(name: str, number: int | None) -> None:
            removed.append(name)

        rig.registry.on_removed += [stuck, told]
        await refused(HostError, rig.registry.remove("f"), "does not end")
        assert removed == ["f"] and rig.registry.names() == []

    play(tmp_path, first)


def test_changes_at_once(tmp_path: Path) -> None:
    """Two deploys and a removal end in the order in which they came, and nothing is mixed."""

    async def first(rig: Rig) -> None:
        rig.code.pause = asyncio.Event()
        rig.archive.write_bytes(b"1")
        one = asyncio.ensure_future(rig.registry.deploy("f", HELLO, rig.archive))
        await asyncio.sleep(0)
        gone = asyncio.ensure_future(rig.registry.remove("f"))
        await asyncio.sleep(0)
        wanted = DeployRequest(handler="app.second")
        two = asyncio.ensure_future(rig.registry.deploy("f", wanted, rig.archive))
        beside = asyncio.ensure_future(rig.registry.deploy("g", HELLO, rig.archive))
        await asyncio.sleep(0)
        assert not any(task.done() for task in (one, gone, two, beside))
        rig.code.pause.set()
        await asyncio.gather(one, gone, two, beside)
        assert rig.registry.latest("f").settings.handler == "app.second"
        about_f = [kind for kind, name in rig.told() if name == "f"]
        assert about_f == ["function.deployed", "function.removed", "function.deployed"]

    async def second(rig: Rig) -> None:
        assert rig.registry.names() == ["f", "g"]
        assert rig.registry.latest("f").settings.handler == "app.second"

    play(tmp_path, first, second)


def test_code_that_was_admitted_is_needed(tmp_path: Path) -> None:
    """Also before the row is written."""

    async def first(rig: Rig) -> None:
        seen: list[set[str]] = []
        write = rig.rows.deploy

        async def deploy(latest: Version) -> None:
            seen.append(rig.registry.needed())
            await write(latest)

        rig.rows.deploy = deploy  # type: ignore[method-assign]
        made = await rig.deploy()
        assert seen == [{made.code.digest}] and rig.registry.needed() == seen[0]

    play(tmp_path, first)


def test_a_caller_that_goes_away(tmp_path: Path) -> None:
    """What was begun to be written is known; what was not is not there."""

    async def first(rig: Rig) -> None:
        rig.code.pause = asyncio.Event()
        early = asyncio.ensure_future(rig.deploy("early"))
        await asyncio.sleep(0.02)
        early.cancel()
        await asyncio.wait({early})
        rig.code.pause.set()
        assert rig.registry.names() == []
        await rig.deploy()
        late = asyncio.ensure_future(rig.registry.publish("f"))
        await asyncio.sleep(0)
        late.cancel()
        await asyncio.wait({late})
        assert late.cancelled()
        assert [v.number for v in rig.registry.versions("f")] == [1]

    async def second(rig: Rig) -> None:
        assert rig.registry.names() == ["f"]
        assert [v.number for v in rig.registry.versions("f")] == [1]

    play(tmp_path, first, second)


def test_a_journal_that_cannot_be_written(tmp_path: Path) -> None:
    """Nothing is known that is not kept."""

    async def first(rig: Rig) -> None:
        await rig.published(1)

        async def full(*_: object) -> None:
            raise HostError("the disk is full", hint="")

        for name in ("deploy", "publish", "set_alias", "drop_version", "drop_function", "reserve"):
            setattr(rig.rows, name, full)
        registry, before = rig.registry, rig.told()
        kept = registry.latest("f")
        await refused(HostError, rig.deploy(content=b"other"), "full")
        await refused(HostError, registry.set_alias("f", "live", {"1": 1.0}), "full")
        await refused(HostError, registry.remove("f", "1"), "full")
        await refused(HostError, registry.remove("f"), "full")
        await refused(HostError, registry.reserve("f", 1), "full")
        assert registry.latest("f") == kept and len(registry.versions("f")) == 1
        assert registry.aliases("f") == [] and registry.reserved("f") is None
        assert rig.told() == before and registry.needed() == {kept.code.digest}

    play(tmp_path, first)


UNFIT = [
    ("DELETE FROM versions WHERE number = 0", "no \\$LATEST"),
    ("DELETE FROM versions WHERE number = 1", "alias live: function f has no version 1"),
    ("DELETE FROM functions", "is not there"),
    ("UPDATE aliases SET versions = '{\"1\": 0.5}'", "add up to 0.5"),
    ("UPDATE aliases SET function = 'g'", "of function 'g'"),
]


@pytest.mark.parametrize(("change", "what"), UNFIT)
def test_rows_that_do_not_fit(tmp_path: Path, change: str, what: str) -> None:
    """Refused in one line that names the function."""

    async def first(rig: Rig) -> None:
        await rig.published(1)
        await rig.registry.set_alias("f", "live", {"1": 1.0})

    play(tmp_path, first)
    spoil(tmp_path, change)

    async def nothing(rig: Rig) -> None:
        raise AssertionError

    with pytest.raises(HostError, match=what):
        play(tmp_path, nothing)


def test_a_bad_reservation(tmp_path: Path) -> None:
    """A number that the journal could not be read with again."""

    async def first(rig: Rig) -> None:
        await rig.deploy()
        await refused(InvalidRequest, rig.registry.reserve("f", -1), ">= 0")
        await refused(NotFound, rig.registry.reserve("g", 1), "no function g")
        await rig.registry.reserve("f", 0)
        assert rig.registry.reserved("f") == 0

    play(tmp_path, first)


def test_code_view_is_what_was_admitted(tmp_path: Path) -> None:
    """The version has the digest and the bytes that the cache gave."""

    async def first(rig: Rig) -> None:
        made = await rig.deploy(content=b"12345")
        assert made.code == CodeView(digest=rig.code.admitted[0], bytes=5)

    play(tmp_path, first)
