"""Functions without code, VMs or logs: the parts that the API needs, as small as can be."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry

from templated.drivers.code import CodeFile
from templated.errors import InvalidRequest, NotFound
from templated.journal import EventRow, FunctionRows, now
from templated.model.code import CodeCheck, CodeFreed, CodeRow
from templated.model.config import ScalingConfig
from templated.model.function import (
    Alias,
    CodeView,
    EventView,
    InvokeView,
    Provisioned,
    ProvisionedView,
    Readiness,
    UpdateView,
)
from templated.services.daemon import Services
from templated.services.functions.allotment import Capacity
from templated.services.functions.functions import Functions
from templated.services.functions.networks import FunctionNetworks
from templated.services.functions.payloads import checked
from templated.services.functions.registry import Registry
from templated.services.functions.uploads import Uploads
from templated.services.reports.scaling_metrics import ScalingMetrics
from templated.services.tasks import Tasks
from templated.services.upkeep.scale_views import ScaleViews
from templated.services.upkeep.scaling import Scaling, Surroundings


class FakeCode:
    """Takes whatever is not empty for code. It waits while `pause` is there and not set."""

    def __init__(self) -> None:
        self.admitted: list[str] = []
        self.pause: asyncio.Event | None = None

    async def admit(self, archive: Path) -> CodeView:
        """The digest of the archive itself."""
        if self.pause is not None:
            await self.pause.wait()
        content = await asyncio.to_thread(archive.read_bytes)
        if not content:
            raise InvalidRequest("the archive is empty")
        digest = hashlib.sha256(content).hexdigest()
        self.admitted.append(digest)
        return CodeView(digest=digest, bytes=len(content))

    async def ensure(self, digest: str) -> CodeFile:
        """There is none."""
        raise NotFound(f"there is no code {digest}")

    async def views(self) -> list[CodeRow]:
        """There is none."""
        return []

    async def prefetch(self, digest: str) -> CodeRow:
        """There is none."""
        raise NotFound(f"there is no code {digest}")

    async def verify(self) -> list[CodeCheck]:
        """There is none."""
        return []

    async def gc(self) -> CodeFreed:
        """There is none."""
        return CodeFreed(removed=(), size=0)


@dataclass
class Ran:
    """What an invocation gave."""

    view: InvokeView
    log: bytes


class FakeRouter:
    """Answers with the payload; one that has `fail` in it is the failure of a function.

    What is put into `error` is raised instead.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.error: Exception | None = None
        self.trace = "1-5759e988-bd862e3fe1be46a994272793"
        self.traces: list[str] = []

    async def invoke(
        self, name: str, qualifier: str | None, payload: bytes, *, trace: str = ""
    ) -> Ran:
        """An echo."""
        self.traces.append(trace)
        payload = await checked(payload)
        version = self._registry.resolve(name, qualifier)
        if self.error is not None:
            raise self.error
        failed = b"fail" in payload
        answer = {"errorMessage": "no\nway", "errorType": "ValueError", "stackTrace": []}
        view = InvokeView(
            status=200,
            error="Unhandled" if failed else None,
            payload=msgspec.Raw(json.dumps(answer).encode() if failed else payload),
            version=version.label,
            instance="f-1",
            start="warm",
            phases_ms={"route": 0.1, "run": 1.5},
            total_ms=1.6,
            trace=self.trace,
        )
        return Ran(view, b"START\nprinted\x1b[2J\n")

    def counts(self, name: str) -> Mapping[str, int]:
        """One that waits."""
        return {"busy": 0, "paused": 1}


class FakeKept:
    """What is provisioned is there at once; that of an alias named `slow` never is."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def views(self, name: str) -> tuple[ProvisionedView, ...]:
        """All there."""
        return tuple(map(self._view, self._registry.provisioned(name)))

    def _view(self, one: Provisioned) -> ProvisionedView:
        slow, failed = one.qualifier == "slow", one.qualifier == "broken"
        late = Readiness.FAILED if failed else Readiness.IN_PROGRESS
        return ProvisionedView(
            qualifier=one.qualifier,
            requested=one.count,
            allocated=one.count,
            available=0 if slow or failed else one.count,
            status=late if slow or failed else Readiness.READY,
            reason="its init fails: no" if failed else "",
            changed=one.changed,
        )


class FakeShifts:
    """Moves at once; a function in `updating` is not done with its change."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.updating: dict[str, UpdateView] = {}
        self.hurried: list[tuple[str, float]] = []
        self.moved: list[float | None] = []
        self.settling = 0

    def update(self, name: str) -> UpdateView | None:
        """As a test has set it."""
        return self.updating.get(name)

    def hurry(self, name: str, seconds: float) -> None:
        """Note it."""
        self.hurried.append((name, seconds))

    async def settled(self, name: str) -> None:
        """Note it."""
        self.settling += 1

    async def move(
        self,
        name: str,
        alias: str,
        versions: Mapping[str, float],
        *,
        description: str | None = None,
        within: float | None = None,
    ) -> Alias:
        """Moved."""
        self.moved.append(within)
        return await self._registry.set_alias(name, alias, versions, description=description)

    def follow(self, wanted: Alias) -> None:
        """It follows."""
        self._registry.release(wanted)


class FakeQueue:
    """Keeps events in the journal, and never runs them."""

    def __init__(self, registry: Registry, rows: FunctionRows) -> None:
        self._registry, self._rows = registry, rows

    async def enqueue(
        self, name: str, qualifier: str | None, payload: bytes, *, trace: str = ""
    ) -> str:
        """Kept."""
        payload = await checked(payload)
        self._registry.resolve(name, qualifier)
        count = len(await self._rows.events())
        row = EventRow(
            id=f"e-{count}",
            function=name,
            qualifier=qualifier or "$LATEST",
            payload=payload,
            created=now(),
            due=0.0,
        )
        await self._rows.add_event(row)
        return row.id

    async def retry(self, name: str, event: str) -> str:
        """There are no dead letters."""
        raise NotFound(f"function {name} has no dead letter {event}")

    async def purge(self, name: str) -> int:
        """There are none."""
        return 0

    async def views(self, name: str) -> list[EventView]:
        """All that were ever accepted."""
        return [
            EventView(
                id=row.id,
                function=row.function,
                qualifier=row.qualifier,
                state=row.state,
                attempts=row.attempts,
                created=row.created,
                due=row.created,
                reason=row.reason,
                payload=msgspec.json.decode(row.payload),
            )
            for row in await self._rows.events(name)
        ]


class FakeLogs:
    """Three lines for every function."""

    lines = (b"one\n", b"two\n", b"three\n")

    async def tail(self, function: str, lines: int) -> bytes:
        """The last lines."""
        return b"".join(self.lines[-lines:] if lines else ())

    async def follow(self, function: str, lines: int) -> AsyncIterator[bytes]:
        """The last lines, and the end."""
        yield await self.tail(function, lines)
        yield b"four\n"


async def with_functions(running: Services) -> Services:
    """The services with functions."""
    context = running.context
    rows, code = FunctionRows(context.journal), FakeCode()
    capacity = Capacity(concurrency=100, clones=1000)
    registry = Registry(rows, context.events, code, lambda: ["t"], capacity=capacity)
    uploads = Uploads(context.layout.incoming)
    await registry.open()
    await uploads.open()
    functions = Functions(
        registry=registry,
        router=FakeRouter(registry),
        queue=FakeQueue(registry, rows),
        logs=FakeLogs(),
        code=code,
        uploads=uploads,
        kept=FakeKept(registry),
        shifts=FakeShifts(registry),
        networks=FunctionNetworks(registry, context.policies, running.templates, (), Tasks()),
    )
    return dataclasses.replace(
        running, functions=functions, scaling=_scaling(running, registry, tmp=context.layout.state)
    )


def _scaling(running: Services, registry: Registry, tmp: Path) -> ScaleViews:
    """Scaling of these functions, none of which has an instance; no rounds are made."""
    assert running.scaling is not None
    crews = running.scaling._crews
    around = Surroundings(path=tmp / "learned", cost=lambda _: 30 << 20)
    metrics = ScalingMetrics(CollectorRegistry())
    scaling = Scaling(ScalingConfig(), registry, crews, metrics, running.context.events, around)
    registry.on_changed.append(scaling.changed)
    registry.on_kept.append(scaling.refresh)
    for name in registry.names():
        scaling.refresh(name)
    return ScaleViews(scaling, registry, crews)
