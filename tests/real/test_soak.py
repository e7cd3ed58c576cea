"""Many clones one after the other, with kills in between: nothing is lost, nothing grows.

TEMPLATED_SOAK_ROUNDS sets how many; then the seed is random. A failure has the seed in its report,
and TEMPLATED_SOAK_SEED repeats it. Times are the business of `templated bench soak`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
from collections.abc import Iterator

import pytest

from tests.real.harness import Daemon, processes

pytestmark = pytest.mark.real

LONGER, SEED = "TEMPLATED_SOAK_ROUNDS", "TEMPLATED_SOAK_SEED"
ROUNDS = int(os.environ.get(LONGER, "50"))
_SECONDS_EACH = 4


@pytest.fixture
def stopped(copied: Daemon) -> Iterator[Daemon]:
    """A daemon with `python-fn` built that is stopped; one that the soak left is ended."""
    copied.start()
    copied.stop()
    config = str(copied.places / "templated.yaml")
    try:
        yield copied
    finally:
        for pid, arguments in processes():
            if arguments.rstrip().endswith(f"serve --config {config}"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _seed() -> int:
    if given := os.environ.get(SEED):
        return int(given)
    return random.SystemRandom().randrange(1 << 32) if os.environ.get(LONGER) else 1


@pytest.mark.timeout(300 + ROUNDS * _SECONDS_EACH)
def test_soak(stopped: Daemon) -> None:
    """Clones that stay outlive every kill of the daemon; its memory and all it holds stay flat."""
    kills = max(2, ROUNDS // 50)
    options = ["--rounds", str(ROUNDS), "--seed", str(_seed()), "--kills", str(kills)]
    serve = ["--serve", str(stopped.places / "templated.yaml")]
    command = ("-o", "json", "bench", "soak", *options, *serve)
    report = json.loads(stopped.cli(*command, timeout=240 + ROUNDS * _SECONDS_EACH))
    assert report["kills"] == {"daemon": kills, "vm": kills}
    assert (report["lost"], report["left"], report["not_flat"]) == ([], [], []), report
    assert stopped.qemus() == []
    assert stopped.rows()["clones"] == stopped.rows()["slots"] == 0
