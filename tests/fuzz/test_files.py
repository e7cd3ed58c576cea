"""Template and configuration files: a value, or one error that a person can use."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from hypothesis import strategies as st

from templated.drivers.configfile import load_config, parse_template
from templated.drivers.libvirt.domainxml import translate
from templated.errors import TemplatedError
from templated.services.templates.probes import check_patterns
from tests.fuzz.cases import check_error, fuzz
from tests.fuzz.values import mutated

ROOT = Path(__file__).parents[2]
_TEMPLATES = st.sampled_from([path.read_bytes() for path in sorted(ROOT.glob("templates/*.yaml"))])
_CONFIGS = st.sampled_from(
    [
        b"accel: tcg\nnetwork: {mode: user}\nlimits: {clones: 5}\npools: {max_age: 5m}\n",
        b"network:\n  mode: bridge\n  bridge: br0\n  subnet: 10.1.0.0/16\n  nat: true\n",
        b"runtime_dir: /run/x\nsocket_access: {mode: '0660'}\nmetrics: {listen: 'a:1'}\n",
        b"template_dirs: [/a, /b]\nslots: {ready: 1}\nrestore: {transport: exec}\n",
    ]
)
# YAML by its parts, since random text is hardly ever any.
_KEYS = [
    "name",
    "image",
    "machine",
    "probes",
    "pool",
    "memory",
    "type",
    "<<",
    "a\nb",
    "runtime_dir",
]
_PLAIN = [
    "~",
    "1",
    "-1",
    "1e999",
    ".nan",
    "1:30:00",
    "0o17",
    "yes",
    "2001-99-99",
    "=",
    "*a",
    "&a x",
]
_TAGS = [
    "int",
    "float",
    "bool",
    "null",
    "timestamp",
    "binary",
    "set",
    "omap",
    "pairs",
    "map",
    "seq",
]
_TAGGED = st.builds(
    "!!{} {}".format, st.sampled_from(_TAGS), st.sampled_from(["''", "x", "[]", "{}"])
)
_QUOTED = st.text(max_size=8).map(lambda text: repr(text).replace("\\'", "''"))
_OVER = st.sampled_from(["9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59", "9" * 5000])
_SCALAR = st.one_of(st.sampled_from(_PLAIN), _TAGGED, _QUOTED, _OVER)
_YAML = st.recursive(
    _SCALAR,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(lambda items: f"[{', '.join(items)}]"),
        st.lists(
            st.tuples(st.one_of(st.sampled_from(_KEYS).map(repr), inner), inner), max_size=4
        ).map(lambda items: "{" + ", ".join(f"{key}: {value}" for key, value in items) + "}"),
    ),
    max_leaves=8,
)
_FIELDS = st.lists(st.tuples(st.sampled_from(_KEYS[:7]), _YAML), min_size=1, max_size=4)
_BUILT = st.one_of(
    _YAML, _FIELDS.map(lambda fields: "".join(f"{key}: {value}\n" for key, value in fields))
).map(lambda text: text.encode(errors="replace"))
_HUGE = st.sampled_from(
    [
        b"[" * 5000,
        b"- " * 5000,
        b"a: " + b"{b: " * 400,
        b"a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
        b"name: " + b"x" * 60_000,
        b"? " * 3000,
        b"%YAML 9.9\n---\na",
        b"--- a\n--- b\n",
        b"\xff\xfea\0",
    ]
)
_TEXT = st.text(max_size=60).map(lambda text: text.encode(errors="replace"))


def _usable(work: Callable[[], object]) -> None:
    try:
        work()
    except TemplatedError as error:
        check_error(error)


def test_templates() -> None:
    def case(data: bytes) -> None:
        text = data.decode(errors="replace")
        _usable(lambda: check_patterns(parse_template(text, "it").probes))

    mutations = mutated(_TEMPLATES)
    fuzz("template files", st.one_of(mutations, mutations, _BUILT, _TEXT, _HUGE), case)


def test_configurations(tmp_path: Path) -> None:
    path = tmp_path / "templated.yaml"

    def case(data: bytes) -> None:
        path.write_bytes(data)
        _usable(lambda: load_config(path))

    mutations = mutated(_CONFIGS)
    junk = st.one_of(_BUILT, _TEXT, _HUGE, st.binary(max_size=60))
    fuzz("configuration files", st.one_of(mutations, mutations, junk), case)


_DOMAINS = sorted((ROOT / "tests/unit/domains").glob("*.xml"))


@st.composite
def _domains(draw: st.DrawFn) -> str:
    """Domains with some of their values and elements otherwise, which are XML still."""
    text = draw(st.sampled_from(_DOMAINS)).read_text()
    for _ in range(draw(st.integers(1, 4))):
        places = [*re.finditer(r"'[^'<>]*'|(?<=>)[^<>]+(?=<)|<[^<>]*/>", text)]
        place = draw(st.sampled_from(places))
        values = st.sampled_from(
            ["", "-1", "9" * 5000, "\u0663", "hostdev", "block", "/x", "a&#10;b"]
        )
        value = draw(values)
        old = place[0]
        new = f"'{value}'" if old.startswith("'") else value
        if old.startswith("<"):
            new = draw(st.sampled_from(["", "<new x='1'/>", old * 3]))
        text = text[: place.start()] + new + text[place.end() :]
    return text


def test_domains() -> None:
    """Of libvirt: what a template can have of them and what not, each on a line."""

    def case(data: bytes | str) -> None:
        text = data if isinstance(data, str) else data.decode(errors="replace")
        _usable(lambda: check(text))

    def check(text: str) -> None:
        found = translate(text)
        assert found.memory > 0 and 1 <= found.vcpus <= 64
        assert all(f"{one.what}{one.why}".isprintable() for one in found.leftovers)

    mutations = mutated(st.sampled_from([path.read_bytes() for path in _DOMAINS]))
    fuzz("domains of libvirt", st.one_of(_domains(), mutations), case)
