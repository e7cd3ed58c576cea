"""Names: what is a host name is a clone name, and nothing else."""

from __future__ import annotations

import pytest

from templated.errors import InvalidRequest
from templated.model.names import MAX_COUNT, check_clone_name, numbered
from templated.model.units import seconds, size_bytes


@pytest.mark.parametrize("name", ["a", "fn-123", "0", "x" * 63, "a--b"])
def test_good(name: str) -> None:
    """RFC 1123 labels in lower case."""
    assert check_clone_name(name) == name


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "empty"),
        ("x" * 64, "64 characters"),
        ("Fn", "upper case"),
        ("-a", "begins or ends"),
        ("a-", "begins or ends"),
        ("../x", "'.'"),
        ("a b", "' '"),
        ("a\n", "'\\n'"),
        ("ü", "'ü'"),
        ("~base", "'~'"),
    ],
)
def test_bad(name: str, why: str) -> None:
    """The error says which rule is broken, on one line, and what a name is."""
    with pytest.raises(InvalidRequest) as caught:
        check_clone_name(name)
    assert why in caught.value.message and "\n" not in caught.value.message
    assert "1 to 63" in caught.value.hint


def test_numbered() -> None:
    """`--count N` makes NAME-1 to NAME-N; the numbers count for the length."""
    assert numbered("a", None) == ["a"]
    assert numbered("a", 1) == ["a-1"]
    assert numbered("a", 3) == ["a-1", "a-2", "a-3"]
    for count in (0, -1, MAX_COUNT + 1):
        with pytest.raises(InvalidRequest):
            numbered("a", count)
    with pytest.raises(InvalidRequest):
        numbered("x" * 62, 2)


def test_units() -> None:
    """Sizes are bytes, durations seconds."""
    assert [size_bytes(s) for s in ("1KiB", "128MiB", "1GiB")] == [1024, 128 << 20, 1 << 30]
    assert [seconds(s) for s in ("250ms", "1.5s", "2m")] == [0.25, 1.5, 120.0]
