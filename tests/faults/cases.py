"""Which places a clone's start comes to, by its path, in order."""

from __future__ import annotations

from templated.failpoints import POINTS, Kind

SLOT = (
    *("journal.new_slot", "journal.new_slot.commit", "cgroup.make", "slot.files", "slot.overlay"),
    *("slot.listen", "slot.open"),
)
SPAWN = ("process.spawn", "process.watch", "cgroup.join", "agent.connect", "qmp.greeting")
RESTORE = ("qmp.migrate-incoming", "qmp.restore")
WAKE = ("qmp.cont", "agent.identify", "qmp.set_link")
RECORD = ("start.confirmed", "journal.new_clone", "journal.new_clone.commit")
RECORDED = ("start.recorded", "clone.registered")
"""From here on the clone exists, whether its caller hears of it or not."""
CAPABILITIES = "qmp.migrate-set-capabilities"
PATHS = {
    "direct": (
        *(*SLOT, "start.taken", *SPAWN, CAPABILITIES, *RESTORE),
        *(*WAKE, *RECORD, *RECORDED),
    ),
    "standby": ("start.taken", *RESTORE, *WAKE, *RECORD, *RECORDED),
    "warm": ("start.taken", *WAKE, *RECORD, *RECORDED),
    "cold": ("program.start", "cold.rename", *SPAWN, "qmp.set_link", "agent.ping", *RECORDED),
}
REFILL = {
    "standby": (*SLOT, *SPAWN, CAPABILITIES, "refill.made", "refill.waiting"),
    "warm": (
        *("process.spawn", CAPABILITIES, *RESTORE, "qmp.cont", "agent.identify"),
        *("agent.rehearse", "qmp.stop"),
        *("refill.made", "refill.waiting"),
    ),
}
REMOVAL = (
    *("rm.moved", "rm.killed", "journal.clone_state", "journal.clone_state.commit", "rm.ended"),
    *("cgroup.remove", "files.remove", "journal.drop_slot", "journal.drop_slot.commit"),
)
RECOVERY = (
    *("journal.open", "journal.active", "journal.generations", "journal.pool_sizes"),
    *(
        "journal.policies",
        "journal.egresses",
        "journal.clones",
        "agent.connect",
        "qmp.greeting",
        "qmp.query-status",
        "recover.adopted",
    ),
    *("journal.free_slots", "recover.find", "cgroup.remove", "files.remove"),
    *("journal.drop_slot", "journal.drop_slot.commit", "recover.removed", "recover.strays"),
    "generation.read",
    *("generation.digest", "generation.seal", "program.start"),
)


def can(places: tuple[str, ...], kind: Kind) -> list[str]:
    """Those of the places at which this can happen."""
    return [place for place in places if kind in POINTS[place]]


def ends_daemon(place: str) -> bool:
    """Whether a hang at this place ends the daemon: nobody knows what came of a transaction."""
    return place.startswith("journal.")
