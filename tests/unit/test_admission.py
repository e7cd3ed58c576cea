"""What is promised is counted, refused when it would be too much, and given back."""

from __future__ import annotations

import pytest

from templated.errors import Busy
from templated.services.machines.admission import Admission, Promise

MIB = 1 << 20
SMALL = Promise("t", 100 * MIB, 10 * MIB, None)


def enter(admission: Admission, slot: str, promise: Promise = SMALL) -> None:
    with admission.entering(promise) as hold:
        hold(slot)


@pytest.mark.parametrize(
    ("admission", "said"),
    [
        (Admission(memory=250 * MIB), "100 MiB of memory, and 200 MiB of the 250 MiB"),
        (Admission(disk=29 * MIB), "10 MiB of disk, and 20 MiB of the 29 MiB"),
    ],
    ids=["memory", "disk"],
)
def test_no_more_than_there_is(admission: Admission, said: str) -> None:
    """The arithmetic is said, and a slot that is given back makes room."""
    enter(admission, "a")
    enter(admission, "b")
    with pytest.raises(Busy, match=said) as refused:
        enter(admission, "c")
    assert "in the configuration" in refused.value.hint
    admission.release("a")
    admission.release("a")
    enter(admission, "c")


def test_a_template_has_a_number_of_its_own() -> None:
    """Others are not refused."""
    admission, few = Admission(), Promise("few", MIB, MIB, 1)
    enter(admission, "a", few)
    with pytest.raises(
        Busy, match=r"1 VM more of few would be too many: there are 1, .* its limits\.vms is 1"
    ):
        enter(admission, "b", few)
    enter(admission, "c")


def test_one_that_is_being_made_counts() -> None:
    """Two at once do not both get the last place; a failure gives it back."""
    admission = Admission(memory=100 * MIB)
    with pytest.raises(RuntimeError), admission.entering(SMALL):  # noqa: PT012
        with pytest.raises(Busy):
            enter(admission, "b")
        raise RuntimeError
    enter(admission, "b")


def test_builds_and_what_was_there_are_not_asked() -> None:
    """A build counts for nothing; a clone of an earlier daemon counts, even beyond the bound."""
    admission = Admission(memory=MIB)
    with admission.entering(None) as hold:
        hold("build")
    admission.hold("old", SMALL)
    with pytest.raises(Busy):
        enter(admission, "new")
    admission.release("build")
    admission.release("old")
    enter(Admission(memory=100 * MIB), "new")


def test_a_dead_clone_keeps_its_disk() -> None:
    """Its memory and its place are free for others, until `rm` gives the rest back."""
    admission = Admission(memory=100 * MIB, disk=20 * MIB)
    one = Promise("t", 100 * MIB, 10 * MIB, 1)
    enter(admission, "a", one)
    for _ in range(2):
        admission.died("a")
    enter(admission, "b", one)
    admission.died("b")
    with pytest.raises(Busy, match="10 MiB of disk, and 20 MiB of the 20 MiB"):
        enter(admission, "c", one)
    for _ in range(2):
        admission.release("a")
    enter(admission, "c", one)


def test_several_at_once() -> None:
    """A request for many is refused before the first is made."""
    admission = Admission(memory=250 * MIB)
    admission.require(SMALL, 2)
    with pytest.raises(Busy, match="3 VMs of t may come to use 300 MiB of memory, and 0 MiB"):
        admission.require(SMALL, 3)
