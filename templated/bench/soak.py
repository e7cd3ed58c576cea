"""`bench soak`: many rounds of create, exec and rm, with kills in between, by a seed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from templated.bench.burst import check_distinct
from templated.bench.interrupts import deferred
from templated.bench.served import Supervised
from templated.bench.session import Session
from templated.bench.stats import summarize
from templated.drivers.host.procfs import with_argument
from templated.errors import RemoteError, TemplatedError
from templated.model.api import ExecFrame
from templated.model.clone import CloneView

WINDOW = 100
"""Rounds at the beginning, and as many at the end, that are compared."""
RESIDENTS = 3
"""Clones that stay over the whole run: no kill of the daemon may lose one."""
BOUNDS = {"latency": 1.2, "rss": 1.1, "journal": 1.1}
_SPARE = 2
"""Descriptors and threads, more or fewer: of a slot that is being made at that moment."""
_JOURNAL_KIB, _WAL_KIB = 256, 8 << 10
"""It is small before its log is first emptied into it, at 4 MiB."""
_WARM_OF = 4
_WITHIN, _POLL = 30.0, 0.01
# Looks without a change after which nothing is being made.
_STILL = 50
_GAUGES = ("rss_kib", "descriptors", "threads", "journal_kib", "wal_kib")


@dataclass(frozen=True)
class Plan:
    """What is done."""

    rounds: int
    seed: int
    kills: int
    """Of the daemon, and as many of VMs."""
    paths: tuple[str, ...]


@dataclass
class Sample:
    """One round: milliseconds of its parts, and the daemon as it was after it."""

    path: str
    ms: dict[str, float]
    gauges: dict[str, int]


@dataclass
class Found:
    """What went wrong: what is here is a defect of the daemon."""

    lost: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


class Soak:
    """One run. The session removes what an end in the middle leaves."""

    def __init__(self, session: Session, daemon: Supervised, plan: Plan) -> None:
        self._session = session
        self._client = session.client
        self._daemon = daemon
        self._plan = plan
        self._random = random.Random(plan.seed)  # noqa: S311  # to be repeated, not to be secret
        self._uuids: set[str] = set()
        self._residents: list[CloneView] = []
        self._pid = daemon.pid()
        self._state = Path(self._client.info().state_dir)
        self._slots_before = self._settled()
        self._samples: list[Sample] = []
        self._found = Found()
        self._kills = {"daemon": 0, "vm": 0}

    def run(self) -> dict[str, Any]:
        """All rounds; the report says what was lost or left, and what did not stay flat."""
        daemon_kills, vm_kills = self._when()
        self._residents = [self._made(f"resident-{i}") for i in range(RESIDENTS)]
        check_distinct(self._residents)
        if "warm" in self._plan.paths:
            self._session.pools.fill("warm", 1)
        for number in range(1, self._plan.rounds + 1):
            self._session.progress(f"round {number} of {self._plan.rounds}")
            self._round(number, number in vm_kills)
            if number in daemon_kills:
                self._kill_daemon(number)
        self._end()
        return self._report()

    def _when(self) -> tuple[set[int], set[int]]:
        """After which rounds the daemon is killed, and in which the VM.

        None in the rounds that are compared; and the daemon's last one in the middle, so that it
        lives for the whole second half, in which a leak would show.
        """
        rounds, window = self._plan.rounds, self._window()
        quiet = range(window + 1, rounds - window + 1)
        first_half = range(window + 1, max(rounds // 2, window + 1) + 1)
        daemon = self._random.sample(first_half, min(self._plan.kills, len(first_half)))
        return set(daemon), set(self._random.sample(quiet, min(self._plan.kills, len(quiet))))

    def _window(self) -> int:
        return max(1, min(WINDOW, self._plan.rounds // 4))

    # --- one round ------------------------------------------------------------------------------

    def _round(self, number: int, kill_vm: bool) -> None:
        path = self._random.choices(self._plan.paths, weights=self._weights())[0]
        if path == "warm":
            self._session.pools.settled()
        begin = time.perf_counter()
        clone = self._made(f"soak-{number}", path)
        created = time.perf_counter()
        self._check(clone)
        answered = time.perf_counter()
        if kill_vm:
            self._kill_vm(clone)
        removing = time.perf_counter()
        self._client.remove_clone(clone.name)
        ended = time.perf_counter()
        ms = {"create": created - begin, "exec": answered - created, "rm": ended - removing}
        ms = {key: value * 1000 for key, value in ms.items()}
        self._samples.append(Sample(path, ms, self._gauges()))

    def _weights(self) -> list[int]:
        """A warm start costs a refill, which takes longer than any start."""
        return [1 if path == "warm" else _WARM_OF - 1 for path in self._plan.paths]

    def _made(self, name: str, path: str | None = None) -> CloneView:
        clone = self._session.make(name, path)
        self._uuids.add(clone.uuid)
        return clone

    def _check(self, clone: CloneView) -> None:
        """Its guest answers, and as who it is. Otherwise it counts as lost."""
        name = "/proc/sys/kernel/random/boot_id"
        try:
            *output, end = self._client.exec_in_clone(clone.name, ["cat", name])
        except TemplatedError as error:
            self._found.lost.append(f"{clone.name}: {error.message}")
            return
        said = b"".join(frame.content() for frame in output).decode(errors="replace").strip()
        if said != clone.identity.boot_id:
            self._found.lost.append(f"{clone.name}: {_end(end)}, boot_id {said[:40]!r}")

    def _kill_vm(self, clone: CloneView) -> None:
        """From outside; the daemon has to notice it."""
        assert clone.pid is not None
        os.kill(clone.pid, signal.SIGKILL)
        self._kills["vm"] += 1
        deadline = time.monotonic() + _WITHIN
        while self._client.show_clone(clone.name).state == "running":
            if time.monotonic() > deadline:
                self._found.lost.append(f"{clone.name}: that its VM was killed is not noticed")
                return
            time.sleep(_POLL)

    def _gauges(self) -> dict[str, int]:
        """The daemon's process, and its journal (proc(5))."""
        proc = Path(f"/proc/{self._pid}")
        status = dict(
            line.split(":", 1) for line in (proc / "status").read_text().splitlines() if ":" in line
        )
        journal = self._state / "journal.sqlite"
        return {
            "rss_kib": int(status["VmRSS"].split()[0]),
            "descriptors": len(os.listdir(proc / "fd")),
            "threads": int(status["Threads"]),
            "journal_kib": journal.stat().st_size >> 10,
            "wal_kib": (journal.with_name(f"{journal.name}-wal").stat().st_size) >> 10,
        }

    # --- the daemon's end -----------------------------------------------------------------------

    def _kill_daemon(self, number: int) -> None:
        """While it does something, chosen by the seed; then all that ran has to be there."""
        kept = [self._made(f"kept-{number}")]
        self._kills["daemon"] += 1
        work = self._random.choice((self._creates, self._removes, lambda _: None))
        pause = self._random.uniform(0.0, 0.15)
        with deferred():  # an interrupted run needs a daemon to clean up with
            busy = threading.Thread(target=_quietly, args=(work, number))
            busy.start()
            time.sleep(pause)
            self._daemon.kill()
            busy.join()
            self._daemon.restart()
            self._pid = self._daemon.pid()
        for clone in (*self._residents, *kept):
            self._kept(clone)
        self._clear(f"kept-{number}", f"cut-{number}")

    def _creates(self, number: int) -> None:
        for path in self._plan.paths:
            self._made(f"cut-{number}-{path}", path)

    def _removes(self, number: int) -> None:
        name = f"cut-{number}-rm"
        self._made(name)
        self._client.remove_clone(name)

    def _kept(self, clone: CloneView) -> None:
        try:
            found = self._client.show_clone(clone.name)
        except RemoteError as error:
            self._found.lost.append(f"{clone.name}: {error.message}")
            return
        if found.state != "running" or found.identity != clone.identity or found.pid != clone.pid:
            self._found.lost.append(f"{clone.name}: {found.state} {found.reason}")
        else:
            self._check(clone)

    def _clear(self, *prefixes: str) -> None:
        """Remove what is there of these: of some starts the daemon's end took the answer."""
        for clone in self._client.list_clones():
            if clone.name.startswith(tuple(f"{self._session.tag}-{prefix}" for prefix in prefixes)):
                self._uuids.add(clone.uuid)
                self._client.remove_clone(clone.name)

    # --- the end --------------------------------------------------------------------------------

    def _end(self) -> None:
        for clone in self._residents:
            self._kept(clone)
        self._session.clear()
        self._session.pools.restore()
        deadline = time.monotonic() + _WITHIN
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(_POLL * 10)
        self._found.left += left

    def _left(self) -> list[str]:
        """Processes, files and names that the run's clones have left."""
        found = [f"process {pid} of {uuid}" for uuid, pid in with_argument(self._uuids)]
        found += [f"clone {clone.name}" for clone in self._mine()]
        more = self._slots() - self._slots_before
        return [*found, f"{more} directories in slots"] if more > 0 else found

    def _slots(self) -> int:
        return len(os.listdir(self._state / "slots"))

    def _settled(self) -> int:
        """How many slots there are, once the daemon makes no more of them."""
        seen = [self._slots()]
        while len(seen) < _STILL or len(set(seen[-_STILL:])) > 1:
            time.sleep(_POLL)
            seen.append(self._slots())
        return seen[-1]

    def _mine(self) -> list[CloneView]:
        tag = self._session.tag
        return [clone for clone in self._client.list_clones() if clone.name.startswith(f"{tag}-")]

    def _report(self) -> dict[str, Any]:
        window = self._window()
        first, last = self._samples[:window], self._samples[-window:]
        figures = {"first": _figures(first), "last": _figures(last)}
        ratios = _ratios(figures["first"], figures["last"])
        return {
            "kind": "soak",
            "template": self._session.template,
            "rounds": self._plan.rounds,
            "seed": self._plan.seed,
            "kills": self._kills,
            "window": window,
            **figures,
            "ratios": ratios,
            "lost": self._found.lost,
            "left": self._found.left,
            "not_flat": _not_flat(figures["first"], figures["last"], ratios),
        }


def measure_soak(session: Session, daemon: Supervised, plan: Plan) -> dict[str, Any]:
    """Run the plan. Raises when a round cannot be done; its findings are in the report."""
    return Soak(session, daemon, plan).run()


def _end(end: ExecFrame) -> str:
    return end.error or f"exit code {end.exit_code}"


def _quietly(work: Callable[[int], None], number: int) -> None:
    """What the daemon's end cuts short."""
    with contextlib.suppress(TemplatedError):
        work(number)


def _figures(samples: list[Sample]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for path in dict.fromkeys(sample.path for sample in samples):
        creates = [sample.ms["create"] for sample in samples if sample.path == path]
        figures[path] = summarize(creates).as_dict()
    for part in ("exec", "rm"):
        figures[part] = summarize([sample.ms[part] for sample in samples]).as_dict()
    for name in _GAUGES:
        values = [sample.gauges[name] for sample in samples]
        figures[name] = {"median": int(statistics.median(values)), "max": max(values)}
    return figures


def _ratios(first: dict[str, Any], last: dict[str, Any]) -> dict[str, float]:
    """Last to first: medians of times and of memory, the largest journal."""
    ratios = {}
    for name in first.keys() & last.keys():
        key = "p50" if "p50" in first[name] else "median"
        if name not in ("descriptors", "threads", "wal_kib"):
            ratios[name] = round(last[name][key] / first[name][key], 3)
    return dict(sorted(ratios.items()))


def _not_flat(first: dict[str, Any], last: dict[str, Any], ratios: dict[str, float]) -> list[str]:
    """What grew by more than its bound, apart from times: those of a busy host mean little."""
    grew = []
    if ratios["rss_kib"] > BOUNDS["rss"]:
        grew.append(f"rss_kib: {ratios['rss_kib']:g} times")
    before, after = first["journal_kib"]["max"], last["journal_kib"]["max"]
    if after > max(before * BOUNDS["journal"], _JOURNAL_KIB):
        grew.append(f"journal_kib: {before} to {after}")
    for name in ("descriptors", "threads"):
        if last[name]["median"] > first[name]["median"] + _SPARE:
            grew.append(f"{name}: {first[name]['median']} to {last[name]['median']}")
    if last["wal_kib"]["max"] > _WAL_KIB:
        grew.append(f"the journal's log: {last['wal_kib']['max']} KiB")
    return grew


def slower(report: dict[str, Any]) -> list[str]:
    """Times whose p50 grew by more than their bound."""
    times = {name: ratio for name, ratio in report["ratios"].items() if "kib" not in name}
    return [
        f"{name}: {ratio:g} times" for name, ratio in times.items() if ratio > BOUNDS["latency"]
    ]
