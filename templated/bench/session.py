"""A benchmark's dealings with the daemon: clones and pools that are put back as they were."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from templated.bench.interrupts import interruptible, uninterrupted
from templated.client import Client
from templated.drivers.host.procfs import read_memory
from templated.drivers.image.store import image_disk
from templated.errors import HostError, InvalidRequest, RemoteError, TemplatedError, Timeout
from templated.model.api import Info, PoolView, TierView
from templated.model.clone import CloneView
from templated.services.machines.generation import Generation, read_manifest

Progress = Callable[[str], None]
Row = dict[str, float]
"""Milliseconds of each phase of one start, and `total`."""
POOLED = ("standby", "warm")
# A generous bound on what an idle clone takes: QEMU, and the pages that its guest wrote.
CLONE_BYTES = 64 << 20
PATIENCE = 20.0
"""Seconds for which a pool may have a problem before a run gives up on it."""
_POLL, _GRACE = 0.02, 0.3
# Longer than any start is allowed to take.
_STARTS_WITHIN = 300.0


class Session:
    """One run against a running daemon. Everything it makes, `close` removes."""

    def __init__(self, client: Client, template: str | None, progress: Progress) -> None:
        self.client = client
        self.progress = progress
        self.tag = f"bench-{secrets.token_hex(3)}"
        self.template = built_template(client, template)
        self._cut_short = False
        self.pools = Pools(client, self.template, progress)

    def make(
        self,
        name: str,
        path: str | None = None,
        template: str | None = None,
        client: Client | None = None,
    ) -> CloneView:
        """Make a clone and return the API's view of it."""
        try:
            return (client or self.client).create_clone(
                f"{self.tag}-{name}", template=template or self.template, path=path
            )
        except KeyboardInterrupt:
            self._cut_short = True
            raise

    def start(self, path: str, template: str | None = None) -> Row:
        """Start a clone on a path, remove it again, and return its phases and `total`.

        `total` is the daemon's: from the arrival of the request. `wall` is the client's.
        """
        begin = time.perf_counter()
        clone = self.make(path, path, template)
        wall = (time.perf_counter() - begin) * 1000
        self.client.remove_clone(clone.name)
        assert clone.total_ms is not None  # it ran
        return {**clone.phases_ms, "total": clone.total_ms, "wall": wall}

    def host(self) -> dict[str, Any]:
        """The facts that the figures depend on; `load` is the average of the minute before."""
        info = self.client.info()
        return {
            "cpus": len(os.sched_getaffinity(0)),
            "load": round(os.getloadavg()[0], 2),
            "accel": info.accel,
            "qemu": info.qemu_version,
        }

    def info(self) -> Info:
        """What the daemon says of itself: a floor has its way of starting a VM."""
        return self.client.info()

    def generation(self) -> Generation:
        """The active generation's files, for who speaks with its guests without the daemon.

        Raises HostError when they cannot be read, InvalidRequest for guests with another agent.
        """
        active = str(self.client.show_template(self.template).active)
        info = self.client.info()
        directory = Path(info.state_dir) / "generations" / self.template / active
        hint = "the bench reads the daemon's files: run it as the daemon's user"
        try:
            manifest = read_manifest(directory)
        except HostError as error:
            raise HostError(error.message, hint=hint) from error
        if manifest.spec.identity.agent != "templated":
            raise InvalidRequest(
                f"guests of {self.template} have qemu-ga, and this speaks our own agent's protocol",
                hint="take --paths direct,standby,warm,cold, or another template",
            )
        found = Generation(
            manifest=manifest,
            directory=directory,
            frozen=Path(info.shm_dir) / self.template / active,
            image=image_disk(Path(info.state_dir), manifest.image),
            read_only_memory=False,
            placeholder=Path(info.state_dir) / "code/placeholder.img",
        )
        for path in (*found.files().values(), found.layer.empty):
            if not os.access(path, os.R_OK):
                raise HostError(f"cannot read {path}", hint=hint)
        return found

    def close(self) -> None:
        """Remove every clone of this run and set the pools back. Raises what first went wrong."""
        errors: list[TemplatedError] = []
        for work in (self.clear, self.pools.restore):
            try:
                work()
            except TemplatedError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def clear(self) -> None:
        """Remove every clone of this run, also those still starting; Timeout if one stays."""
        if self._cut_short:
            # The daemon goes on with a request whose client left: let it write the name down.
            time.sleep(_GRACE)
        deadline = time.monotonic() + _STARTS_WITHIN
        while left := self._remove_some():
            if time.monotonic() > deadline:
                raise Timeout(
                    f"{left[0]} does not end", hint=f"later: templated rm {' '.join(left[:3])}"
                )
            time.sleep(_POLL)

    def _remove_some(self) -> list[str]:
        """Names of this run's clones that are there still: one that starts cannot be removed."""
        left = []
        for clone in self.client.list_clones():
            if clone.name.startswith(f"{self.tag}-"):
                self.progress(f"removing {clone.name}")
                try:
                    self.client.remove_clone(clone.name)
                except RemoteError as error:
                    if error.code not in ("conflict", "not_found"):
                        raise
                    left.append(clone.name)
        return left


class Pools:
    """The sizes of a template's pools, for as long as a run needs other ones."""

    def __init__(self, client: Client, template: str, progress: Progress) -> None:
        self._client = client
        self._template = template
        self._progress = progress
        self._before: dict[str, int] | None = None
        self._followed = False
        """They followed functions, and go on to."""

    def fill(self, tier: str, size: int) -> None:
        """Have at least `size` members ready.

        Raises what `settled` raises, or Busy when the host has no room; the tier is then as it was.
        """
        sizes = self.targets()
        self._remember()
        try:
            if sizes[tier] < size:
                self._set({tier: size})
            self.settled()
        except TemplatedError:
            self._set({tier: sizes[tier]})
            raise

    def empty(self) -> None:
        """Have no members. Raises as `settled` does."""
        self._remember()
        self._set(dict.fromkeys(POOLED, 0))
        self.settled()

    def follow(self) -> None:
        """Have the sizes that they have when nobody sets them. Raises as `settled` does."""
        self._remember()
        self._client.set_pool(self._template, reset=True)
        self.settled()

    def _remember(self) -> None:
        if self._before is None:
            self._before = self.targets()
            self._followed = self._view().source == "scaling"

    def targets(self) -> dict[str, int]:
        """The sizes as they are now."""
        return {tier: view.target for tier, view in self._tiers().items()}

    def settled(self) -> None:
        """Wait until no member is being made, so that a refill disturbs no figure.

        Raises Timeout, or HostError with the daemon's reason for making none.
        """
        if self._before is None:
            return
        view = self._view()
        bound = 60.0 + 2.0 * (view.standby.target + view.warm.target)
        begin = well = time.monotonic()
        while any(tier.ready != tier.target for tier in (view.standby, view.warm)):
            now = time.monotonic()
            # A host under pressure is a problem that passes.
            well = well if view.problem else now
            if now - well > PATIENCE:
                raise HostError(
                    f"the pools of {self._template} are not filled: {view.problem}",
                    hint="see: templated pool ls",
                )
            if now - begin > bound:
                raise Timeout(f"the pools of {self._template} were not filled in {bound:g} s")
            self._progress("filling the pools: " + _shown(view))
            time.sleep(_POLL)
            view = self._view()

    def restore(self) -> None:
        """Set the sizes that were found."""
        if self._before is None:
            return
        spec = self._client.show_template(self._template).spec
        # Sizes that are the spec's go on following it.
        says = spec and self._before == {tier: getattr(spec.pool, tier) for tier in POOLED}
        if says or self._followed:
            self._client.set_pool(self._template, reset=True)
        else:
            self._set(self._before)
        self._before = None

    def _set(self, sizes: Mapping[str, int]) -> None:
        self._client.set_pool(self._template, standby=sizes.get("standby"), warm=sizes.get("warm"))

    def _tiers(self) -> dict[str, TierView]:
        view = self._view()
        return {"standby": view.standby, "warm": view.warm}

    def _view(self) -> PoolView:
        return self._client.show_pool(self._template)


def _shown(view: PoolView) -> str:
    tiers = {"standby": view.standby, "warm": view.warm}
    return ", ".join(f"{name} {tier.ready} of {tier.target}" for name, tier in tiers.items())


def built_template(client: Client, wanted: str | None) -> str:
    """The template to measure: the given one, otherwise the only one built.

    InvalidRequest when it is not built or when there is a choice.
    """
    if wanted is not None:
        if not client.show_template(wanted).active:
            raise InvalidRequest(
                f"the template {wanted} is not built",
                hint=f"build it: templated template build {wanted}",
            )
        return wanted
    built = [view.name for view in client.list_templates() if view.active]
    if len(built) != 1:
        raise InvalidRequest(
            f"{len(built)} templates are built: {', '.join(built) or 'none'}",
            hint="choose one with --template, or build one: templated template build NAME",
        )
    return built[0]


def require_memory(clones: int, what: str = "clones") -> None:
    """HostError unless this host has room for this many idle clones."""
    need, free = clones * CLONE_BYTES, read_memory().available
    if need > free:
        raise HostError(
            f"{clones} {what} may need {need >> 20} MiB, and {free >> 20} MiB are available",
            hint=f"at most {free // CLONE_BYTES} fit here",
        )


@contextlib.contextmanager
def session(client: Client, template: str | None, progress: Progress) -> Iterator[Session]:
    """A session that is closed at the end, also on Ctrl-C and SIGTERM."""
    opened = Session(client, template, progress)
    with interruptible():
        try:
            yield opened
        finally:
            with uninterrupted():
                opened.close()
