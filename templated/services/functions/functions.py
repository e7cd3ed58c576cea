"""What the API and the gateway call of functions, and what they need of each part."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from templated.drivers.code import CodeFile
from templated.model.code import CodeCheck, CodeFreed, CodeRow
from templated.model.function import (
    Alias,
    AliasView,
    CodeView,
    EventView,
    FunctionView,
    InvokeView,
    ProvisionedView,
    UpdateView,
    Version,
    VersionView,
)
from templated.model.units import seconds
from templated.services.functions.networks import FunctionNetworks
from templated.services.functions.registry import Registry
from templated.services.functions.uploads import Uploads


class Outcome(Protocol):
    """What an invocation gave."""

    @property
    def view(self) -> InvokeView:
        """The answer."""
        ...

    @property
    def log(self) -> bytes:
        """The end of what the function printed meanwhile, at most 4 KiB."""
        ...


class Invokes(Protocol):
    """Runs requests: the router."""

    async def invoke(
        self, name: str, qualifier: str | None, payload: bytes, *, trace: str = ""
    ) -> Outcome:
        """Run one request; a function that fails is an outcome too. Raises NotFound, Throttled,
        or why no instance could be had; leaves no instance busy."""
        ...

    def counts(self, name: str) -> Mapping[str, int]:
        """How many instances a function has, by the value of their InstanceState."""
        ...


class Keeps(Protocol):
    """Keeps instances ready."""

    def views(self, name: str) -> tuple[ProvisionedView, ...]:
        """What is provisioned of a function, and how far that is. Raises NotFound."""
        ...


class Moves(Protocol):
    """Moves requests to other versions: shifts."""

    def update(self, name: str) -> UpdateView | None:
        """How the last change of `$LATEST` is going; None when none had to be waited for."""
        ...

    def hurry(self, name: str, seconds: float) -> None:
        """Bound what a change of `$LATEST` may take from now on; 0: none."""
        ...

    async def settled(self, name: str) -> None:
        """Wait until requests go to `$LATEST`; bounded."""
        ...

    async def move(
        self,
        name: str,
        alias: str,
        versions: Mapping[str, float],
        *,
        description: str | None = None,
        within: float | None = None,
    ) -> Alias:
        """Point an alias elsewhere once instances are ready, `within` so many seconds. Raises
        why they are not, and what `Registry.set_alias` raises; leaves it as it was then."""
        ...

    def follow(self, wanted: Alias) -> None:
        """Let requests follow an alias that was written with `hold`."""
        ...


class Queue(Protocol):
    """Runs requests later: the queue of events."""

    async def enqueue(
        self, name: str, qualifier: str | None, payload: bytes, *, trace: str = ""
    ) -> str:
        """Accept an event and return its id. Raises NotFound or Throttled; leaves nothing then."""
        ...

    async def views(self, name: str) -> list[EventView]:
        """The events of a function that are not done, oldest first."""
        ...

    async def retry(self, name: str, event: str) -> str:
        """Queue a dead letter's event anew, under the id that is returned. Raises NotFound, and
        what `enqueue` raises; leaves the dead letter then."""
        ...

    async def purge(self, name: str) -> int:
        """Forget the dead letters of a function; returns how many."""
        ...


class Logs(Protocol):
    """What functions print."""

    async def tail(self, function: str, lines: int) -> bytes:
        """The last lines; nothing when it has printed none."""
        ...

    def follow(self, function: str, lines: int) -> AsyncIterator[bytes]:
        """The last lines, then what is printed from now on, as it comes."""
        ...


class Codes(Protocol):
    """The code on this node: L1."""

    async def admit(self, archive: Path) -> CodeView:
        """Make an image of a zip. Raises InvalidRequest or HostError; leaves nothing then."""
        ...

    async def ensure(self, digest: str) -> CodeFile:
        """Code that is on this node, verified. Raises NotFound when no store has it either."""
        ...

    async def views(self) -> list[CodeRow]:
        """What is on this node, used last first."""
        ...

    async def prefetch(self, digest: str) -> CodeRow:
        """As `ensure`, ahead of a request."""
        ...

    async def verify(self) -> list[CodeCheck]:
        """Read all of it again; what is damaged is fetched again, or is gone."""
        ...

    async def gc(self) -> CodeFreed:
        """Remove what nothing needs."""
        ...


@dataclass(frozen=True)
class Functions:
    """The parts of functions."""

    registry: Registry
    router: Invokes
    queue: Queue
    logs: Logs
    code: Codes
    uploads: Uploads
    kept: Keeps
    shifts: Moves
    networks: FunctionNetworks

    def view(self, name: str) -> FunctionView:
        """A function as users see it. Raises NotFound."""
        view = function_view(self.registry, self.router.counts(name), name)
        return msgspec.structs.replace(
            view,
            network=self.networks.keys(name),
            provisioned=self.kept.views(name),
            update=self.shifts.update(name),
        )

    def views(self) -> list[FunctionView]:
        """All functions as users see them, by name."""
        return [self.view(name) for name in self.registry.names()]


def function_view(registry: Registry, counts: Mapping[str, int], name: str) -> FunctionView:
    """A function as its journal has it; `counts` are its instances by state. Raises NotFound."""
    latest = registry.latest(name)
    settings = latest.settings
    return FunctionView(
        name=name,
        handler=settings.handler,
        runtime=settings.runtime,
        template=settings.template,
        timeout_s=seconds(settings.timeout),
        description=settings.description,
        code=latest.code,
        versions=tuple(version_view(v) for v in (latest, *registry.versions(name))),
        aliases=tuple(
            AliasView(name=a.name, versions=a.versions, description=a.description)
            for a in registry.aliases(name)
        ),
        reserved=registry.reserved(name),
        min=registry.least(name),
        max=registry.maximum(name),
        provisioned=(),
        instances=dict(counts),
        created=registry.created(name),
    )


def version_view(version: Version) -> VersionView:
    """A version as users see it."""
    settings = version.settings
    return VersionView(
        function=version.function,
        version=version.label,
        handler=settings.handler,
        runtime=settings.runtime,
        template=settings.template,
        timeout_s=seconds(settings.timeout),
        env=tuple(settings.env),
        description=settings.description,
        code=version.code,
        created=version.created,
    )
