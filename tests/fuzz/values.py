"""Strategies that several targets share."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

# Also what breaks in the middle: numbers without a double, lone surrogates, terminals' escapes.
NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 1 << 31, 1 << 63, 1 << 64, -(1 << 64), 1e300, float("inf")]),
)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["", "\ud800", "a\nb", "\x1b[2J", "\0", "é" * 100, "x" * 3000]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
JSON: SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)


@st.composite
def mutated(draw: st.DrawFn, originals: SearchStrategy[bytes]) -> bytes:
    """Bytes with a few places replaced, left out, repeated or cut off."""
    data = bytearray(draw(originals))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 12)))
        kind = draw(st.sampled_from(["replace", "repeat", "cut"]))
        if kind == "replace":
            data[at:end] = draw(st.binary(max_size=8))
        elif kind == "repeat":
            data[at:at] = data[at:end] * draw(st.integers(1, 50))
        else:
            del data[at:]
    return bytes(data)


def nested(depth: int) -> bytes:
    """JSON lists in lists."""
    return b"[" * depth + b"]" * depth
