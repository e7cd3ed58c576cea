"""Instances of a function that were all started from one frozen runtime share nothing random."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.real.harness import Daemon
from tests.real.test_functions import until

pytestmark = pytest.mark.real

APP = """
import random, time

AT_LOAD = random.random()


def draw(event, context):
    time.sleep(1.5)  # as long as the others need to get instances of their own
    return [AT_LOAD, random.random(), random.getrandbits(64), random.SystemRandom().random()]
"""


@pytest.mark.parametrize("warm", [0, 3])
def test_instances_draw_apart(host: Daemon, tmp_path: Path, warm: int) -> None:
    """What `random` gives in one instance it gives in no other, from a pool or without."""
    (tmp_path / "app.py").write_text(APP)
    sizes = ("--warm", str(warm), "--wait", "--timeout", "120")
    host.cli("pool", "set", "python-fn", *sizes)
    try:
        words = ("--code", str(tmp_path), "--handler", "app.draw")
        host.cli("function", "deploy", "dice", *words)
        answers: list[Any] = []

        def ask() -> None:
            answers.append(json.loads(host.cli("-o", "json", "invoke", "dice")))

        callers = [threading.Thread(target=ask) for _ in range(3)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert len({answer["instance"] for answer in answers}) == 3
        drawn = [value for answer in answers for value in answer["payload"]]
        assert len(set(drawn)) == 12, drawn
    finally:
        host.cli("function", "rm", "dice")
        host.cli("pool", "set", "python-fn", "--reset", "--wait")
        until(lambda: len(host.qemus()) == len(host.json("ls")), "members stay behind")
