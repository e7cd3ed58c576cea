"""The operator's guide as a program: the commands of its install section, as they are written."""

from __future__ import annotations

from tests.lab.image import ROOT

GUIDE = ROOT / "docs/operators-guide.md"


def install_commands() -> list[str]:
    """The lines of the first block below "## Install"."""
    section = GUIDE.read_text().partition("\n## Install\n")[2].partition("\n## ")[0]
    block: list[str] = []
    for line in section.splitlines():
        if line.startswith("    "):
            block.append(line[4:])
        elif block:
            return block
    raise ValueError("the guide's install section has no block of commands")
