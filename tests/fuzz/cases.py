"""Cases made by hypothesis until the seconds of a target are over.

TEMPLATED_FUZZ_SECONDS sets the seconds of each target. Without it a run begins with the same seed
as the last one, so that it finds what that found; with it, at random. A failure says its seed, and
TEMPLATED_FUZZ_SEED begins with that one.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from templated.errors import TemplatedError
from tests.fuzz import LONGER, SECONDS, SEED

_SETTINGS = settings(
    # A seed's cases: few, so that the seconds are kept.
    max_examples=20,
    # To explain a failure it traces every line, and calls a case again and again.
    phases=(Phase.generate, Phase.shrink),
    # A seed repeats a failure; what an earlier run found is no case of this one.
    database=None,
    # pytest-timeout has a bound for all of them; on a busy host one of them may be slow.
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)
counts: dict[str, str] = {}
"""What each target was given, for the end of the run."""


def fuzz(target: str, strategy: SearchStrategy[Any], case: Callable[[Any], None]) -> None:
    """Give `case` what `strategy` makes until the seconds are over; what it raises is a finding."""
    first = _first_seed()
    begun, number, count = time.monotonic(), first, 0

    def counted(value: Any) -> None:
        nonlocal count
        count += 1
        try:
            case(value)
        except BaseException as error:
            error.add_note(f"given: {repr(value)[:2000]}")
            raise

    while True:
        try:
            seed(number)(_SETTINGS(given(strategy)(counted)))()
        except BaseException as error:
            error.add_note(f"again with: {SEED}={number}")
            raise
        seconds = time.monotonic() - begun
        counts[target] = f"{count} cases in {seconds:.0f} s, seeds {first} to {number}"
        if seconds >= SECONDS:
            return
        number += 1


def check_error(error: TemplatedError, *, hint: bool = True) -> None:
    """An error that a person can use: one line, what to do next, and no defect."""
    assert error.code != "internal"
    assert error.message and error.message.isprintable() and len(error.message) < 5000
    assert error.hint.isprintable() and (error.hint or not hint)


def _first_seed() -> int:
    if given_seed := os.environ.get(SEED):
        return int(given_seed)
    return random.SystemRandom().randrange(1 << 32) if os.environ.get(LONGER) else 1
