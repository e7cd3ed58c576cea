"""The manual pages: complete, and free of what a formatter warns about."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from scripts.manpages import pages
from templated.cli import exit_codes
from templated.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = pages()
SECTIONS = {"NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "GLOBAL OPTIONS", "EXAMPLES"}
SECTIONS |= {"EXIT STATUS", "ENVIRONMENT", "FILES", "SEE ALSO"}


def test_a_page_for_each_command() -> None:
    expected = {f"templated-{name}.1" for name in COMMANDS if name not in ("bench", "forwarder")}
    assert set(PAGES) - {"templated-bench.1"} == expected | {"templated.1"}


@pytest.mark.parametrize("name", PAGES)
def test_sections(name: str) -> None:
    titles = re.findall(r'^\.SH "(.*)"$', PAGES[name], re.MULTILINE)
    missing = SECTIONS - set(titles)
    assert not missing or name == "templated-bench.1"
    assert PAGES[name].startswith(".TH ")


@pytest.mark.parametrize("name", PAGES)
def test_only_requests_begin_with_a_dot(name: str) -> None:
    for line in PAGES[name].splitlines():
        if line.startswith((".", "'")):
            assert re.match(r"\.(TH|SH|SS|PP|TP|B|BR|RS|RE|nf|fi)( |$)", line), line
        assert line.strip(), "an empty line is an error in mandoc's eyes"


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_groff_has_no_warnings(name: str) -> None:
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-z"],
        input=PAGES[name].encode(),
        capture_output=True,
        timeout=30,
        check=True,
    )
    assert done.stderr == b""


def test_every_exit_code_is_documented() -> None:
    for code, meaning in exit_codes.MEANINGS:
        assert f"\\fB{code}\\fR\n{meaning.split('-')[0]}" in PAGES["templated.1"]
    assert "\\fB128+N\\fR" in PAGES["templated-exec.1"]


def test_subcommands_are_on_the_page_of_their_group() -> None:
    assert '.SS "templated template rollback"' in PAGES["templated-template.1"]


def test_options_can_be_copied() -> None:
    """A hyphen that is not escaped comes out as a typographic one in UTF-8."""
    assert "\\-\\-template" in PAGES["templated-clone.1"]
    assert not re.search(r"[^\\]-[a-z]", PAGES["templated-clone.1"])


def test_the_script_writes_them(tmp_path: Path) -> None:
    if not (ROOT / ".venv/bin/python").exists():
        pytest.skip("scripts/man runs the interpreter of .venv, which is not there")
    command = [ROOT / "scripts/man", tmp_path / "man1"]
    subprocess.run(command, capture_output=True, timeout=60, check=True)
    assert {path.name for path in (tmp_path / "man1").iterdir()} == set(PAGES)
