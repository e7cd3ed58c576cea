"""The catalog of templates: the generation that serves, build, rollback and removal.

Others subscribe to learn that a generation serves, that one no longer serves, or that a template
is gone (`on_serving`, `on_retired`, `on_removed`): the catalog knows neither slots nor pools.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from templated import failpoints
from templated.drivers.configfile import load_template, parse_template, template_files
from templated.errors import Conflict, HostError, InvalidRequest, NotFound, TemplatedError
from templated.journal import GenerationRow
from templated.model.api import BuildRequest
from templated.model.generation import GenerationState, TemplateState, TemplateView
from templated.model.spec import TemplateSpec
from templated.model.units import seconds
from templated.services.context import Context
from templated.services.machines import generation as generations
from templated.services.machines.generation import Generation, Holder, Lease, Leases
from templated.services.reports.operations import Progress
from templated.services.templates.build import Build
from templated.services.templates.probes import check_patterns
from templated.services.templates.template import Known, Template
from templated.timing import within

log = logging.getLogger(__name__)
_BUILD_TIMEOUT = 3600.0
_SLOWEST = 20 << 20
"""Bytes per second at which frozen files can be read on any host that is well."""


class Templates:
    """All templates of one daemon.

    The active generation is loaded and verified before it serves, so that a start only looks it
    up.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._stall = seconds(context.config.limits.stall)
        self._templates: dict[str, Template] = {}
        self.on_serving: list[Callable[[Generation], None]] = []
        """Called with a generation that serves from now on."""
        self.on_retired: list[Callable[[str], Awaitable[None]]] = []
        """Called with the id of a generation that no longer serves: ready slots and VMs must go."""
        self.on_removed: list[Callable[[str], Awaitable[None]]] = []
        """Called with the name of a template whose generations are gone."""

    async def open(self) -> None:
        """Read the templates that an earlier daemon left; unfinished builds are removed.

        Raises HostError when the journal cannot be read. Nothing serves before `load`.
        """
        journal = self._context.journal
        active = await journal.active()
        for row in await journal.generations():
            if row.state is GenerationState.BUILDING:
                _require_unfinished(row, active)
                await self._remove_unfinished(row)
            else:
                self._learn(row, Leases())
        for name, generation in active.items():
            self._template(name).active = generation

    async def _remove_unfinished(self, row: GenerationRow) -> None:
        try:
            async with within(self._stall, "removing an unfinished build"):
                await generations.remove_files(self._context.layout, row.template, row.id)
                await self._context.journal.drop_generation(row.id)
        except TemplatedError as error:
            log.error("generation %s stays until the next start: %s", row.id, error.message)

    async def load(self) -> None:
        """Verify the active generations, after clones have taken their leases; serve them.

        A generation that cannot be used leaves its template broken, and raises nothing.
        """
        for template in list(self._templates.values()):
            if template.active is not None:
                await self._load(template, template.active)
            for known in template.oldest_first():
                await self._freed(template, known)

    # --- looking up ---------------------------------------------------------------------------

    def active(self, name: str | None) -> Generation:
        """The active generation, also when nothing more can be started from it.

        Raises NotFound for a template that does not exist or was never built, InvalidRequest when
        there is no name and several templates, HostError when no generation could be loaded,
        Conflict while the template is being removed.
        """
        template = self._templates.get(name or self._only_template())
        if template is not None:
            template.require_not_removing()
        if template is None or template.generation is None:
            raise self._not_built(name or "", template)
        return template.generation

    def serving(self, name: str | None) -> Generation:
        """The generation that clones start from.

        Raises as `active` does, and HostError when its files or the host's QEMU are no longer
        what was frozen.
        """
        generation = self.active(name)
        self._templates[generation.template].require_serving()
        return generation

    def generation(self, name: str) -> Generation | None:
        """The active generation of a template; None when there is none."""
        template = self._templates.get(name)
        return template.generation if template else None

    def memory(self, name: str) -> int | None:
        """What the guests of a template have, in MiB; None when no generation is active."""
        generation = self.generation(name)
        return None if generation is None else generation.hardware.memory_bytes >> 20

    def built(self) -> list[str]:
        """The templates that have an active generation, in the order of their first one."""
        return [
            name
            for name, template in self._templates.items()
            if template.generation is not None and template.state is not TemplateState.REMOVING
        ]

    def takers(self) -> list[str]:
        """Those of them whose VMs have a disk for the code of a function."""
        return [name for name in self.built() if self.active(name).code is not None]

    def own_network(self, name: str) -> str | None:
        """The network of libvirt that a template's VMs are on; None: the daemon's, or unknown."""
        generation = self.generation(name)
        own = None if generation is None else generation.own_network
        return None if own is None else own.name

    def lease(self, generation_id: str, holder: Holder) -> Lease:
        """A lease for a VM of an earlier daemon, also of a generation that is no longer known."""
        for template in self._templates.values():
            if generation_id in template.known:
                return template.known[generation_id].leases.take(holder)
        return Leases().take(holder)

    async def check(self, generation: Generation, *, loads_state: bool) -> None:
        """Raise HostError when a generation is not what was frozen. Costs some stat calls.

        One whose files or QEMU were touched is digested again, and when it changed its template
        is left broken. A VM that has loaded its state already (not `loads_state`) only needs
        memory and disk unchanged.
        """
        try:
            self.serving(generation.template)
            qemu = generation.manifest.qemu.version
            if generation.changed() or not self._context.hypervisor.is_version(qemu):
                await self._recheck(generation)
        except HostError:
            if loads_state or not generation.runs_on():
                raise

    async def _recheck(self, generation: Generation) -> None:
        try:
            await generation.verify()
            await self._context.host.check(generation.id, generation.manifest)
        except TemplatedError as error:
            template = self._templates.get(generation.template)
            if template is not None and template.active == generation.id:
                template.break_down(error.message)
            raise

    # --- building -----------------------------------------------------------------------------

    async def spec(self, name: str) -> TemplateSpec:
        """The template as its file says now. Raises NotFound or ConfigError."""
        directories = self._context.config.template_dirs
        spec = await asyncio.to_thread(load_template, directories, name)
        check_patterns(spec.probes)
        return spec

    async def prepare_build(self, name: str, request: BuildRequest) -> TemplateSpec:
        """Check a request to build before it is accepted.

        Raises NotFound, ConfigError or InvalidRequest for its spec, Conflict when the template is
        being built or removed.
        """
        if request.spec is not None:
            spec = await asyncio.to_thread(parse_template, request.spec, request.source)
            check_patterns(spec.probes)
        else:
            spec = await self.spec(name)
        if spec.name != name:
            raise InvalidRequest(f"the spec is of template {spec.name}, not of {name}")
        self._require_idle(name)
        await self._context.policies.check(name, spec.network)
        return spec

    def _require_idle(self, name: str) -> None:
        template = self._templates.get(name)
        if template is not None and template.building:
            raise Conflict(
                f"template {name} is being built already",
                hint="wait for that build to end",
            )
        if template is not None:
            template.require_not_removing()

    async def apply_network(self, name: str) -> None:
        """Put the network policy in force that the template's file has now, without a build.

        Raises NotFound, ConfigError or InvalidRequest for the file, HostError when the host
        refuses; leaves the policy that held before then.
        """
        spec = await self.spec(name)
        self.active(name)
        await self._context.policies.apply(name, spec.network)

    async def build(self, spec: TemplateSpec, progress: Progress) -> dict[str, Any]:
        """Build and activate a generation.

        Raises Conflict when a build is under way, BuildError, ProbeError or HostError; leaves the
        previous generation serving then, and nothing of the new one.
        """
        self._require_idle(spec.name)
        template = self._template(spec.name)
        template.building = True
        build = Build(self._context, spec, progress)
        self._context.events.emit("template.building", spec.name, generation=build.id)
        try:
            async with within(_BUILD_TIMEOUT, "the build"):
                generation = await build.run()
            # Before its first clone; ports of the generation before change with it.
            await self._context.policies.apply(spec.name, spec.network)
            await self.activate(generation)
        except BaseException as error:
            await asyncio.shield(self._undo(build, error))
            raise
        finally:
            template.building = False
            self._forget_if_empty(template)
        return {"template": spec.name, "generation": generation.id}

    async def _undo(self, build: Build, error: BaseException) -> None:
        name = build.spec.name
        reason = error.message if isinstance(error, TemplatedError) else repr(error)
        self._context.events.emit("template.build_failed", name, reason=reason)
        self._context.metrics.build_failures.labels(name, _code(error)).inc()
        # Stopped in the middle of the activation: a generation that the journal calls active stays.
        try:
            if (await self._context.journal.active()).get(name) != build.id:
                await build.discard()
        except TemplatedError as failed:  # the build's own error is raised
            log.warning("the next start removes what is left of %s: %s", build.id, failed.message)

    async def activate(self, generation: Generation) -> None:
        """Make a proven generation the one that serves, in one step, and retire old ones.

        Raises HostError when the journal cannot be written; leaves the one before active then.
        """
        template = self._template(generation.template)
        before = template.active
        await self._context.journal.activate(generation.id, template.name)
        if failpoints.armed:
            failpoints.hit("build.activated")
        row = GenerationRow(
            id=generation.id,
            template=template.name,
            state=GenerationState.READY,
            created=generation.manifest.created,
        )
        self._learn(row, generation.leases)
        await self._serve(template, generation)
        self._context.events.emit("generation.active", template.name, generation=generation.id)
        # The one before stays, for a rollback.
        kept = {generation.id, before}
        for known in template.oldest_first():
            if known.row.id not in kept and known.row.state is GenerationState.READY:
                try:
                    await self._retire(template, known)
                except HostError as error:  # the new one serves all the same
                    log.warning("cannot retire %s: %s", known.row.id, error.message)

    async def _serve(self, template: Template, generation: Generation) -> None:
        before = template.generation
        template.serve(generation)
        if before is not None and before.id != generation.id:
            await self._tell_retired(before.id)
        for tell in self.on_serving:
            tell(generation)
        manifest = generation.manifest
        self._context.metrics.serves(
            template.name, generation.id, manifest.accel, manifest.qemu.version
        )

    async def _tell_retired(self, generation_id: str) -> None:
        for tell in self.on_retired:
            await tell(generation_id)

    async def rollback(self, name: str) -> TemplateView:
        """Serve the generation before the active one again.

        Raises NotFound, Conflict when there is none before, HostError when it cannot be used;
        leaves the active one serving then.
        """
        template = self._templates.get(name)
        if template is None or template.active is None:
            raise self._not_built(name, template)
        template.require_not_removing()
        ready = [
            known
            for known in template.oldest_first()
            if known.row.id < template.active and known.row.state is GenerationState.READY
        ]
        if not ready:
            raise Conflict(
                f"template {name} has no generation before {template.active}",
                hint=f"see: templated template show {name}",
            )
        target = ready[-1]
        generation = await generations.load(
            self._context.layout, self._context.hypervisor, name, target.row.id, target.leases
        )
        await self._context.host.check(generation.id, generation.manifest)
        await self._context.journal.activate(generation.id, name)
        await self._serve(template, generation)
        self._context.events.emit("template.rolled_back", name, generation=generation.id)
        return await self.view(name)

    # --- ending -------------------------------------------------------------------------------

    async def remove(self, name: str) -> None:
        """Remove all generations of a template.

        Raises NotFound, and Conflict while clones of it exist or it is being built or removed;
        leaves it as it was then. Raises HostError when something cannot be removed; leaves it
        broken then, and it can be removed again.
        """
        template = self._templates.get(name)
        if template is None or not template.known:
            raise self._not_built(name, template)
        self._require_idle(name)
        used = sum(known.leases.count(Holder.CLONE) for known in template.known.values())
        if used:
            raise Conflict(
                f"{used} clones of template {name} exist",
                hint="remove them first: templated rm",
            )
        template.remove()
        try:
            await self._context.journal.deactivate(name)
            for known in template.oldest_first():
                await self._remove_generation(template, known)
            for tell in self.on_removed:
                await tell(name)
        except BaseException as error:
            template.break_down(f"its removal did not end: {error}")
            raise
        del self._templates[name]
        self._context.metrics.serves_no_more(name)
        self._context.events.emit("template.removed", name)

    async def _retire(self, template: Template, known: Known) -> None:
        known.move(GenerationState.RETIRED)
        await self._context.journal.generation_state(known.row.id, GenerationState.RETIRED)
        await self._freed(template, known)

    async def _freed(self, template: Template, known: Known) -> None:
        """Remove a retired generation once no clone or member uses it."""
        if not known.unwanted:
            return
        known.going = True
        try:
            async with within(self._stall, "removing its files"):
                await self._remove_generation(template, known)
        except TemplatedError as error:  # the next start of the daemon tries again
            log.warning("cannot remove generation %s: %s", known.row.id, error.message)

    async def _remove_generation(self, template: Template, known: Known) -> None:
        await self._tell_retired(known.row.id)
        await generations.remove_files(self._context.layout, template.name, known.row.id)
        await self._context.journal.drop_generation(known.row.id)
        template.known.pop(known.row.id, None)
        self._context.events.emit("generation.removed", template.name, generation=known.row.id)

    # --- showing ------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """All templates: those with a file and those with a generation."""
        files = template_files(self._context.config.template_dirs)
        return sorted({*files, *(name for name, t in self._templates.items() if t.known)})

    def can_serve(self, name: str) -> bool:
        """Whether clones can be started from a template, as far as is known."""
        template = self._templates.get(name)
        return template is not None and template.state is TemplateState.SERVING

    def count_generations(self) -> Counter[tuple[str, str]]:
        """How many generations there are, by template and state."""
        return Counter(
            (template.name, known.row.state.value)
            for template in self._templates.values()
            for known in template.known.values()
        )

    async def views(self) -> list[TemplateView]:
        """All templates as users see them, without their specs and manifests.

        Raises nothing: one whose file is gone meanwhile is left out.
        """
        found = []
        for name in self.names():
            with contextlib.suppress(TemplatedError):  # gone since
                found.append(await self.view(name))
        return found

    async def view(self, name: str, *, full: bool = False) -> TemplateView:
        """A template as users see it. Raises NotFound, or ConfigError when only its file is bad."""
        template = self._templates.get(name) or Template(name)
        spec, problem = None, template.problem
        try:
            spec = await self.spec(name)
        except NotFound:
            if not template.known:
                raise
        except TemplatedError as error:
            problem = problem or error.message
        manifest = template.generation.manifest if template.generation else None
        shown = spec or (manifest.spec if manifest else None)
        return TemplateView(
            name=name,
            description=shown.description if shown else "",
            active=template.active,
            generations=template.views(),
            spec=shown if full else None,
            manifest=manifest if full else None,
            problem=problem,
        )

    # --- inside -------------------------------------------------------------------------------

    def _template(self, name: str) -> Template:
        return self._templates.setdefault(name, Template(name))

    def _forget_if_empty(self, template: Template) -> None:
        if not template.known and template.state is TemplateState.UNBUILT:
            self._templates.pop(template.name, None)

    def _learn(self, row: GenerationRow, leases: Leases) -> None:
        template = self._template(row.template)
        known = template.known[row.id] = Known(row, leases)
        leases.freed = functools.partial(self._freed, template, known)

    async def _load(self, template: Template, generation_id: str) -> None:
        """Load the active generation at the daemon's start; a problem is kept, not raised."""
        try:
            if generation_id not in template.known:
                raise HostError(f"the journal has no generation {generation_id} of it")
            leases = template.known[generation_id].leases
            async with within(self._patience(template.name, generation_id), "reading its files"):
                generation = await generations.load(
                    self._context.layout,
                    self._context.hypervisor,
                    template.name,
                    generation_id,
                    leases,
                )
            await self._context.host.check(generation.id, generation.manifest)
        except TemplatedError as error:
            log.warning("template %s cannot serve: %s", template.name, error.message)
            template.break_down(error.message)
            return
        await self._serve(template, generation)

    def _patience(self, template: str, generation_id: str) -> float:
        """Seconds that a generation may take to be read and digested, by its size."""
        layout = self._context.layout
        directories = (
            layout.frozen(template, generation_id),
            layout.generation(template, generation_id),
        )
        sizes = [path.stat().st_size for d in directories if d.is_dir() for path in d.iterdir()]
        return self._stall + 2 * sum(sizes) / _SLOWEST  # after a reboot they are copied, too

    def _only_template(self) -> str:
        active = sorted(name for name, t in self._templates.items() if t.active is not None)
        if len(active) == 1:
            return active[0]
        if not active:
            raise NotFound(
                "no template has been built yet",
                hint="run: templated template build NAME",
            )
        raise InvalidRequest(
            f"there are several templates: {', '.join(active)}", hint="choose: --template T"
        )

    def _not_built(self, name: str, template: Template | None) -> TemplatedError:
        if template is not None and template.problem:
            hint = f"run: templated template build {template.name}"
            return HostError(template.problem, hint=hint)
        if len(name) > 60 or not name.isprintable():
            return NotFound(
                f"there is no template {name[:60]!r}", hint="see: templated template ls"
            )
        if name in template_files(self._context.config.template_dirs):
            return NotFound(
                f"template {name} has not been built",
                hint=f"run: templated template build {name}",
            )
        known = ", ".join(self.names()) or "none"
        return NotFound(f"there is no template {name}", hint=f"known templates: {known}")


def _require_unfinished(row: GenerationRow, active: dict[str, str]) -> None:
    """A build becomes ready and active in one step, so that its files would be of use."""
    if row.id in active.values():
        raise HostError(
            f"the journal calls generation {row.id} active and yet being built",
            hint="mend its row with sqlite3, or stop all VMs and move state_dir away",
        )


def _code(error: BaseException) -> str:
    """Why a build failed, for a label."""
    if isinstance(error, TemplatedError):
        return error.code
    return "cancelled" if isinstance(error, asyncio.CancelledError) else "internal"
