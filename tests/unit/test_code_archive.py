"""Directories become archives, the same for the same files."""

from __future__ import annotations

import io
import os
import socket
import stat
from pathlib import Path
from zipfile import ZipFile

import pytest

from templated.drivers.code import archive
from templated.drivers.code.archive import zip_directory
from templated.drivers.code.links import fault
from templated.errors import HostError, InvalidRequest


def _zipped(source: Path) -> bytes:
    out = io.BytesIO()
    zip_directory(source, out)
    return out.getvalue()


def _files(folder: Path, names: list[str]) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def test_the_same_files_give_the_same_archive(tmp_path: Path) -> None:
    names = ["b.py", "a/x.py", "a/y/z", "c"]
    first, second = _files(tmp_path / "1", names), _files(tmp_path / "2", names[::-1])
    for folder in (first, second):
        (folder / "empty").mkdir()
        (folder / "link").symlink_to("a/x.py")
    os.utime(second / "b.py", (1, 1))
    os.chmod(second / "c", 0o600)
    assert _zipped(first) == _zipped(second)
    entries = {
        e.filename: e.external_attr >> 16 for e in ZipFile(io.BytesIO(_zipped(first))).filelist
    }
    assert sorted(entries) == ["a/", "a/x.py", "a/y/", "a/y/z", "b.py", "c", "empty/", "link"]
    assert stat.S_ISLNK(entries["link"])
    assert ZipFile(io.BytesIO(_zipped(first))).read("a/y/z") == b"a/y/z"


def test_files_that_can_be_run_stay_so(tmp_path: Path) -> None:
    _files(tmp_path, ["bootstrap"])
    os.chmod(tmp_path / "bootstrap", 0o700)
    (entry,) = ZipFile(io.BytesIO(_zipped(tmp_path))).filelist
    assert stat.S_IMODE(entry.external_attr >> 16) == 0o755


@pytest.mark.parametrize("target", ["/etc/passwd", "../x", "a/../../x", "top/../x"])
def test_links_that_lead_out_are_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "top").symlink_to(".")
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(InvalidRequest, match="link"):
        _zipped(tmp_path)


def test_links_in_a_circle_are_refused() -> None:
    links = {"a": "b", "b": "a"}
    assert "circle" in fault("a", links)
    assert fault("x/deep/link", {"x/deep/link": "../../missing/file"}) == ""


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        with pytest.raises(InvalidRequest, match="socket"):
            _zipped(tmp_path)


def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/\xff")).write_text("x")
    with pytest.raises(InvalidRequest, match="UTF-8"):
        _zipped(tmp_path)


def test_too_many_bytes_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "MAX_CODE", 3)
    _files(tmp_path, ["four"])
    with pytest.raises(InvalidRequest, match="4 bytes"):
        _zipped(tmp_path)


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="there is nothing in"):
        _zipped(tmp_path)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="nowhere"):
        _zipped(tmp_path / "nowhere")
