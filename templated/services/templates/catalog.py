"""Templates: which generation serves, building the next one, going back, removing."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

from templated.drivers.configfile import load_template, parse_template, template_files
from templated.errors import (
    BuildError,
    Conflict,
    HostError,
    InvalidRequest,
    NotFound,
    TemplatedError,
)
from templated.journal import GenerationRow
from templated.model.api import BuildRequest
from templated.model.generation import (
    TRANSITIONS,
    GenerationState,
    GenerationView,
    TemplateView,
)
from templated.model.spec import TemplateSpec
from templated.services.context import Context
from templated.services.machines import generation as generations
from templated.services.machines.generation import Generation
from templated.services.reports.operations import Progress
from templated.services.templates.build import Build
from templated.services.templates.probes import check_patterns

log = logging.getLogger(__name__)
_BUILD_TIMEOUT = 3600.0


class Dependents(Protocol):
    """Who uses generations, by their ids."""

    def in_use(self, generation: str) -> int:
        """How many clones map a generation."""

    async def drain(self, generation: str) -> None:
        """Give back what is kept ready of a generation that serves no more."""

    def served(self) -> None:
        """A generation serves from now on."""


class Templates:
    """All templates of one daemon.

    The active generation is loaded and verified before it serves, so that a start only looks it
    up. `problems` says in one line why a template's active generation cannot serve.
    """

    def __init__(self, context: Context, dependents: Dependents) -> None:
        self._context = context
        self._dependents = dependents
        self._rows: dict[str, GenerationRow] = {}
        self._active: dict[str, str] = {}
        self._loaded: dict[str, Generation] = {}
        self._building: set[str] = set()
        self.problems: dict[str, str] = {}

    async def open(self) -> None:
        """Find again what an earlier daemon knew; unfinished builds are removed."""
        journal = self._context.journal
        for row in await journal.generations():
            if row.state is GenerationState.BUILDING:
                await generations.remove_files(self._context.layout, row.template, row.id)
                await journal.drop_generation(row.id)
            else:
                self._rows[row.id] = row
        self._active = await journal.active()
        for template, generation in self._active.items():
            await self._load(template, generation)
        for row in list(self._rows.values()):
            await self._release_if_unused(row)

    def serving(self, template: str | None) -> Generation:
        """The generation that clones start from; the start path's only look-up.

        Raises NotFound for a template that does not exist or was never built, HostError when its
        files or the host's QEMU are no longer what was frozen.
        """
        generation = self.known(template)
        name = generation.manifest.template
        if name in self.problems:
            raise HostError(self.problems[name], hint=f"run: templated template build {name}")
        return generation

    def known(self, template: str | None) -> Generation:
        """The active generation, also when nothing more can be started from it."""
        name = template or self._only_template()
        generation = self._loaded.get(name)
        if generation is None:
            raise self._not_serving(name)
        return generation

    def loaded(self) -> Mapping[str, Generation]:
        """The generations that serve, by their templates."""
        return self._loaded

    async def recheck_if_touched(self, generation: Generation) -> None:
        """`recheck` when a stat tells that files or QEMU changed; costs some stat calls."""
        qemu = generation.manifest.qemu.version
        if generation.changed() or not self._context.host.qemu_is(qemu):
            await self.recheck(generation)

    async def recheck(self, generation: Generation) -> None:
        """Digest a generation again whose files were touched; HostError when they changed."""
        template = generation.manifest.template
        try:
            await generation.verify()
            await self._check_qemu(generation)
        except TemplatedError as error:
            self.problems[template] = error.message
            raise

    async def spec(self, name: str) -> TemplateSpec:
        """The template as its file says now; NotFound or ConfigError."""
        directories = self._context.config.template_dirs
        spec = await asyncio.to_thread(load_template, directories, name)
        check_patterns(spec.probes)
        return spec

    async def prepare_build(self, name: str, request: BuildRequest) -> TemplateSpec:
        """Check a request to build before it is accepted."""
        if request.spec is not None:
            spec = await asyncio.to_thread(parse_template, request.spec, request.source)
            check_patterns(spec.probes)
        else:
            spec = await self.spec(name)
        if spec.name != name:
            raise InvalidRequest(f"the spec is of template {spec.name}, not of {name}")
        if name in self._building:
            raise Conflict(
                f"template {name} is being built already",
                hint="wait for that build to end",
            )
        return spec

    async def build(self, spec: TemplateSpec, progress: Progress) -> dict[str, Any]:
        """Build and activate a generation. On failure the previous one goes on serving."""
        if spec.name in self._building:
            raise Conflict(f"template {spec.name} is being built already")
        self._building.add(spec.name)
        build = Build(self._context, spec, progress)
        self._context.events.emit("template.building", spec.name, generation=build.id)
        try:
            async with asyncio.timeout(_BUILD_TIMEOUT):
                generation = await build.run()
            await self._activate(generation)
        except BaseException as error:
            reason = error.message if isinstance(error, TemplatedError) else repr(error)
            self._context.events.emit("template.build_failed", spec.name, reason=reason)
            self._context.metrics.build_failures.labels(spec.name, _code(error)).inc()
            # Stopped in the middle of the activation: what the journal calls active stays.
            if (await self._context.journal.active()).get(spec.name) != build.id:
                await asyncio.shield(build.discard())
            if isinstance(error, TimeoutError):
                raise BuildError(f"the build did not end within {_BUILD_TIMEOUT:g} s") from None
            raise
        finally:
            self._building.discard(spec.name)
        return {"template": spec.name, "generation": generation.id}

    async def rollback(self, name: str) -> TemplateView:
        """Serve the generation before the active one again; Conflict when there is none."""
        active = self._active.get(name)
        if active is None:
            raise self._not_serving(name)
        older = [row for row in self._of(name) if row.id < active]
        ready = [row for row in older if row.state is GenerationState.READY]
        if not ready:
            raise Conflict(
                f"template {name} has no generation before {active}",
                hint=f"see: templated template show {name}",
            )
        generation = await generations.load(self._context.layout, name, ready[-1].id)
        await self._check_qemu(generation)
        await self._context.journal.activate(generation.id, name)
        await self._serve(generation)
        self._context.events.emit("template.rolled_back", name, generation=generation.id)
        return await self.view(name)

    async def remove(self, name: str) -> None:
        """Remove all generations of a template; Conflict while clones of it exist."""
        rows = self._of(name)
        if not rows:
            raise self._not_serving(name)
        if name in self._building:
            raise Conflict(f"template {name} is being built")
        if used := sum(self._dependents.in_use(row.id) for row in rows):
            raise Conflict(
                f"{used} clones of template {name} exist",
                hint="remove them first: templated rm",
            )
        await self._context.journal.deactivate(name)
        self._active.pop(name, None)
        self._loaded.pop(name, None)
        self.problems.pop(name, None)
        self._clear_info(name)
        for row in rows:
            await self._remove_generation(row)
        self._context.events.emit("template.removed", name)

    async def clone_ended(self, generation_id: str) -> None:
        """A clone let go of a generation: remove it when it was only kept for that."""
        row = self._rows.get(generation_id)
        if row is not None:
            await self._release_if_unused(row)

    def names(self) -> list[str]:
        """All templates: those with a file and those with a generation."""
        files = template_files(self._context.config.template_dirs)
        return sorted({*files, *(row.template for row in self._rows.values())})

    def can_serve(self, name: str) -> bool:
        """Whether clones can be started from a template, as far as is known."""
        return name in self._loaded and name not in self.problems

    def count_generations(self) -> Counter[tuple[str, str]]:
        """How many generations there are, by template and state."""
        return Counter((row.template, row.state.value) for row in self._rows.values())

    async def view(self, name: str, *, full: bool = False) -> TemplateView:
        """A template as users see it; NotFound when there is none."""
        rows = self._of(name)
        spec, problem = None, self.problems.get(name, "")
        try:
            spec = await self.spec(name)
        except NotFound:
            if not rows:
                raise
        except TemplatedError as error:
            problem = problem or error.message
        active = self._loaded.get(name)
        manifest = active.manifest if active else None
        shown = spec or (manifest.spec if manifest else None)
        return TemplateView(
            name=name,
            description=shown.description if shown else "",
            active=self._active.get(name),
            generations=tuple(self._generation_view(row) for row in rows),
            spec=shown if full else None,
            manifest=manifest if full else None,
            problem=problem,
        )

    def _generation_view(self, row: GenerationRow) -> GenerationView:
        return GenerationView(
            id=row.id,
            state=row.state,
            active=self._active.get(row.template) == row.id,
            clones=self._dependents.in_use(row.id),
            created=row.created,
        )

    def _of(self, template: str) -> list[GenerationRow]:
        return sorted(
            (r for r in self._rows.values() if r.template == template),
            key=lambda r: r.id,
        )

    def _only_template(self) -> str:
        if len(self._active) == 1:
            return next(iter(self._active))
        if not self._active:
            raise NotFound(
                "no template has been built yet",
                hint="run: templated template build NAME",
            )
        names = ", ".join(sorted(self._active))
        raise InvalidRequest(f"there are several templates: {names}", hint="choose: --template T")

    def _not_serving(self, name: str) -> TemplatedError:
        if len(name) > 60 or not name.isprintable():
            return NotFound(
                f"there is no template {name[:60]!r}", hint="see: templated template ls"
            )
        if name in self.problems:
            return HostError(self.problems[name], hint=f"run: templated template build {name}")
        if name in template_files(self._context.config.template_dirs):
            return NotFound(
                f"template {name} has not been built",
                hint=f"run: templated template build {name}",
            )
        known = ", ".join(self.names()) or "none"
        return NotFound(f"there is no template {name}", hint=f"known templates: {known}")

    async def _activate(self, generation: Generation) -> None:
        """Make a proven generation the one that serves, in one step, and retire old ones."""
        manifest = generation.manifest
        before = self._active.get(manifest.template)
        await self._context.journal.activate(generation.id, manifest.template)
        self._rows[generation.id] = GenerationRow(
            id=generation.id,
            template=manifest.template,
            state=GenerationState.READY,
            created=manifest.created,
        )
        await self._serve(generation)
        self._context.events.emit("generation.active", manifest.template, generation=generation.id)
        # The one before stays, for a rollback.
        kept = {generation.id, before}
        for row in self._of(manifest.template):
            if row.id not in kept and row.state is GenerationState.READY:
                await self._retire(row)

    async def _serve(self, generation: Generation) -> None:
        template = generation.manifest.template
        before = self._loaded.get(template)
        self._active[template] = generation.id
        self._loaded[template] = generation
        self.problems.pop(template, None)
        self._context.slots.serve(generation.layer)
        if before is not None and before.id != generation.id:
            await self._dependents.drain(before.id)
        self._dependents.served()
        self._context.metrics.expect(template)
        self._clear_info(template)
        manifest = generation.manifest
        self._context.metrics.generation_info.labels(
            template, generation.id, manifest.accel, manifest.qemu.version
        ).set(1)

    def _clear_info(self, template: str) -> None:
        gauge = self._context.metrics.generation_info
        for metric in gauge.collect():
            for sample in metric.samples:
                if sample.labels["template"] == template:
                    gauge.remove(*(sample.labels[name] for name in gauge._labelnames))

    async def _retire(self, row: GenerationRow) -> None:
        assert GenerationState.RETIRED in TRANSITIONS[row.state]
        await self._context.journal.generation_state(row.id, GenerationState.RETIRED)
        retired = GenerationRow(
            id=row.id,
            template=row.template,
            state=GenerationState.RETIRED,
            created=row.created,
        )
        self._rows[row.id] = retired
        await self._release_if_unused(retired)

    async def _release_if_unused(self, row: GenerationRow) -> None:
        if row.state is GenerationState.RETIRED and not self._dependents.in_use(row.id):
            await self._remove_generation(row)

    async def _remove_generation(self, row: GenerationRow) -> None:
        self._rows.pop(row.id, None)
        await self._dependents.drain(row.id)
        await generations.remove_files(self._context.layout, row.template, row.id)
        await self._context.journal.drop_generation(row.id)
        self._context.events.emit("generation.removed", row.template, generation=row.id)

    async def _load(self, template: str, generation_id: str) -> None:
        """Load the active generation at the daemon's start; a problem is kept, not raised."""
        try:
            generation = await generations.load(self._context.layout, template, generation_id)
            await self._check_qemu(generation)
        except TemplatedError as error:
            log.warning("template %s cannot serve: %s", template, error.message)
            self.problems[template] = error.message
            return
        await self._serve(generation)

    async def _check_qemu(self, generation: Generation) -> None:
        manifest = generation.manifest
        present = await self._context.host.qemu()
        if present.version != manifest.qemu.version:
            raise HostError(
                f"generation {generation.id} of {manifest.template} was frozen by QEMU "
                f"{manifest.qemu.version}, this host has {present.version}",
                hint=f"run: templated template build {manifest.template}",
            )


def _code(error: BaseException) -> str:
    """Why a build failed, for a label."""
    if isinstance(error, TemplatedError):
        return error.code
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    return "timeout" if isinstance(error, TimeoutError) else "internal"
