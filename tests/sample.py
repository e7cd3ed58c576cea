"""What takes long is left out of a run by default, in parts or as a whole, so that all of it fits
into half an hour on two CPUs. TEMPLATED_TEST_ALL=1 takes everything.

`sampled` marks cases that are alike: a run takes a part of each kind, SAMPLE or the marker's own,
by a fixed seed; TEMPLATED_TEST_SEED takes another part. `long` marks a test that takes a minute or
more beside one that is near to it: another way to restart in the lab, another machine there. What
was chosen by its name, or by -k, is never left out. Before a release everything is taken.

TEMPLATED_TEST_PART=0.2 takes a fifth of all tests: what runs them in Debian 13 sets it.
"""

from __future__ import annotations

import math
import os
import random

import pytest

ALL, SEED, PART = "TEMPLATED_TEST_ALL", "TEMPLATED_TEST_SEED", "TEMPLATED_TEST_PART"
SAMPLE = 0.03


def leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what this run does not take."""
    chosen = config.option.keyword or any("::" in argument for argument in config.args)
    if chosen or os.environ.get(ALL):
        return
    dice = random.Random(os.environ.get(SEED) or "1")  # noqa: S311  # no secret
    left_out = {item for item in items if item.get_closest_marker("long")}
    left_out |= _not_drawn(items, dice)
    if part := os.environ.get(PART):
        left_out |= set(dice.sample(items, len(items) - math.ceil(len(items) * float(part))))
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def _not_drawn(items: list[pytest.Item], dice: random.Random) -> set[pytest.Item]:
    kinds: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled"):
            kinds.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return {
        item
        for cases in kinds.values()
        for item in dice.sample(cases, len(cases) - math.ceil(len(cases) * _part(cases[0])))
    }


def _part(item: pytest.Item) -> float:
    marker = item.get_closest_marker("sampled")
    return marker.args[0] if marker is not None and marker.args else SAMPLE
