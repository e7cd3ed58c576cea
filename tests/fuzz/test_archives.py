"""Archives of code: an image, or one error that a person can use; and nothing beside it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hypothesis import strategies as st

from templated.drivers.code import pack
from templated.errors import InvalidRequest
from tests.fuzz.cases import check_error, fuzz
from tests.fuzz.values import mutated
from tests.unit.zips import FILE, FOLDER, LINK, Item, zipped

_WORDS = ["a", "b", "..", ".", "", "a\0b", "\\", "é", "x" * 260]
_NAMES = st.lists(st.sampled_from(_WORDS), min_size=1, max_size=4).map("/".join)
_MODES = st.sampled_from([FILE, FILE | 0o111, LINK, FOLDER, 0, 0o644, 0o20666, 0o60666, 0o140777])
_ITEMS: st.SearchStrategy[Item] = st.tuples(
    _NAMES, st.sampled_from([b"", b"x", b"..", b"../..", b"/etc", b"a/b", b"\xff"]), _MODES
)
_ARCHIVES = st.lists(_ITEMS, max_size=6).map(zipped)


def _unpacked(archive: bytes) -> None:
    """Unpack into a folder in a folder, and look at what is there then."""
    with tempfile.TemporaryDirectory(prefix="tpz.") as name:
        outer = Path(name)
        (outer / "a.zip").write_bytes(archive)
        tree = outer / "made" / "tree"
        tree.mkdir(parents=True)
        try:
            entries, contents, total = pack._unpack(outer / "a.zip", tree)
        except InvalidRequest as error:
            check_error(error)
        else:
            pack._identify(entries, contents)
            sizes = [path.stat().st_size for path in tree.rglob("*") if _plain(path)]
            assert total == sum(sizes)
        assert sorted(os.listdir(outer)) == ["a.zip", "made"]
        assert os.listdir(outer / "made") == ["tree"]
        for path in tree.rglob("*"):
            if path.is_symlink():
                assert path.resolve().is_relative_to(tree.resolve())
            else:
                assert path.is_file() or path.is_dir()


def _plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def test_archives_of_hostile_entries() -> None:
    fuzz("archives of code", _ARCHIVES, _unpacked)


def test_archives_that_are_damaged() -> None:
    fuzz("damaged archives of code", mutated(_ARCHIVES), _unpacked)
