"""What functions will call: told to the scaler, and begun at once where a round comes too late."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from templated.model.function import Version
from templated.scaling import Scaler
from templated.scaling.chains import Agenda, Chains, Expected
from templated.services.functions.crews import Crews
from templated.services.functions.foreseen import Foreseen

# What a start takes while none was seen, and the time between two rounds, in seconds.
_START, _ROUND = 1.0, 1.0
# The aim of what is called before the next round.
_CALLED = "chains"


class Calls:
    """Learns from requests (`foreseen`, which the router tells of them), and acts on it."""

    def __init__(
        self,
        scaler: Scaler,
        chains: Chains,
        crews: Crews,
        versions: Mapping[str, Version],
        asked: Mapping[str, str],
        clock: Callable[[], float],
    ) -> None:
        """`versions` are those that there are, by the scaler's key; `asked` is for each function
        the one that was asked for last: calls are expected of that."""
        self._scaler, self._chains, self._crews = scaler, chains, crews
        self._versions, self._asked, self._clock = versions, asked, clock
        self._agenda = Agenda()
        self.foreseen = Foreseen(chains, self._agenda, self._wait, self._called)
        self.starts: dict[str, float] = {}
        """By function, how many seconds a start takes."""
        self.held = False
        """Nothing is begun before a round has decided on it."""
        self.begun: set[str] = set()
        """Versions of which something was begun since the last round."""
        self._foretold: dict[str, str] = {}
        """By function, the version that the scaler was told of."""

    def forget(self, function: str) -> None:
        """It is gone."""
        self._chains.forget(function)
        self._agenda.forget(function)
        self.starts.pop(function, None)
        self._foretold.pop(function, None)

    def foretell_all(self) -> None:
        """Tell the scaler what is expected now; before each round."""
        for function in {*self._agenda.functions(), *self._foretold}:
            self._foretell(function)

    def release(self) -> None:
        """A round has decided on what was begun."""
        for key in self.begun:
            if version := self._versions.get(key):
                self._crews.release(version, _CALLED)
        self.begun.clear()

    def _wait(self, function: str) -> float:
        return self.starts.get(function, 0.0)

    def _called(self, expected: tuple[Expected, ...]) -> None:
        """Something is newly expected."""
        for function in {one.function for one in expected}:
            foretold = self._foretell(function)
            if foretold is not None and not self.held:
                key, count = foretold
                level = self._scaler.demand(key).level
                self._crews.aim(self._versions[key], level + count, _CALLED)
                self.begun.add(key)

    def _foretell(self, function: str) -> tuple[str, int] | None:
        """Tell the scaler what is expected of a function now; the version, and how many requests.
        None: nothing, or of nothing that is there."""
        lead = self.starts.get(function, _START) + _ROUND
        wanted = self._agenda.wanted(function, time.perf_counter(), lead)
        now = self._clock()
        before = self._foretold.pop(function, None)
        key = self._asked.get(function, f"{function}:$LATEST")
        if before is not None and before in self._versions and (wanted is None or before != key):
            self._scaler.foresee(before, now, 0, now, "")
        if wanted is None or key not in self._versions:
            return None
        until = now + wanted.until - time.perf_counter()
        self._scaler.foresee(key, now, wanted.count, until, wanted.reason, wanted.sure)
        self._foretold[function] = key
        return key, wanted.count
