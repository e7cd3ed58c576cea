"""Manual pages, made from the command tree: what --help says is what `man` says.

scripts/man runs it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from templated import __version__
from templated.cli import exit_codes
from templated.cli.main import root
from templated.cli.options import GlobalOption

ENVIRONMENT = (
    ("TEMPLATED_SOCKET", "The daemon's socket, unless --socket is given."),
    ("TEMPLATED_DEBUG", "With 1, a failure is shown with its traceback."),
    ("NO_COLOR", "When set and not empty, nothing is coloured."),
    ("XDG_RUNTIME_DIR, XDG_CONFIG_HOME, XDG_STATE_HOME", "Without root, the places of FILES."),
)
FILES = (
    ("/etc/templated/templated.yaml", "The daemon's configuration."),
    ("/etc/templated/templates/NAME.yaml", "Templates."),
    ("/run/templated/templated.sock", "The socket."),
    ("/var/lib/templated", "Images, overlays and the journal."),
    ("/dev/shm/templated", "Memory and device state of frozen templates."),
    ("~/.config/templated, $XDG_RUNTIME_DIR/templated", "The same without root, and so on."),
)


def main(directory: Path) -> None:
    """Write the manual pages into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (directory / name).write_text(text, encoding="utf-8")
        print(f"wrote {directory / name}", file=sys.stderr)


def pages() -> dict[str, str]:
    """All pages by file name: templated.1, and one for each command that help lists."""
    context = click.Context(root, info_name="templated", **root.context_settings)
    commands = {context.command_path: context, **{c.command_path: c for c in _children(context)}}
    names = [path.replace(" ", "-") for path in commands]
    return {
        f"{name}.1": _page(name, child, [other for other in names if other != name])
        for name, child in zip(names, commands.values(), strict=True)
    }


def _page(name: str, context: click.Context, others: list[str]) -> str:
    is_root = context.parent is None
    lines = [
        f'.TH "{_escape(name.upper())}" "1" "" "templated {_escape(__version__)}" "templated"',
        '.SH "NAME"',
        f"{_escape(name)} \\- {_escape(_summary(context.command))}",
        '.SH "SYNOPSIS"',
        *_synopsis(context),
        '.SH "DESCRIPTION"',
        *_prose(context.command.help or ""),
        *_commands(context, by_reference=is_root),
        *_options(context, "OPTIONS", everywhere=False),
        *_options(context, "GLOBAL OPTIONS", everywhere=True),
    ]
    if is_root:
        lines += [".PP", "These are accepted before and after the name of a command."]
    lines += _examples('.SH "EXAMPLES"', context.command)
    meanings = exit_codes.MEANINGS
    if context.command.name == "exec":
        meanings = exit_codes.EXEC_MEANINGS + meanings
    lines += ['.SH "EXIT STATUS"', *_list(meanings), '.SH "ENVIRONMENT"', *_list(ENVIRONMENT)]
    lines += ['.SH "FILES"', *_list(FILES), '.SH "SEE ALSO"', *_see_also(others)]
    return "\n".join(lines) + "\n"


def _children(context: click.Context) -> Iterator[click.Context]:
    """A context for each command of a group that help lists."""
    group = context.command
    if not isinstance(group, click.Group):
        return
    for name in group.list_commands(context):
        found = group.get_command(context, name)
        if found is not None and not found.hidden:
            yield click.Context(found, info_name=name, parent=context)


def _summary(found: click.Command) -> str:
    first = re.split(r"\n\s*\n", (found.help or found.name or "").strip())[0]
    text = " ".join(first.split()).split(". ")[0].rstrip(".")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _synopsis(context: click.Context) -> list[str]:
    pieces = " ".join(context.command.collect_usage_pieces(context))
    return [f".B {_escape(context.command_path)}", _escape(pieces)]


def _commands(context: click.Context, *, by_reference: bool) -> list[str]:
    """A group's commands: a reference to the page of each, or all that there is to say."""
    children = list(_children(context))
    if not children:
        return []
    if by_reference:
        entries = [
            (f"{c.command_path.replace(' ', '-')}(1)", _summary(c.command) + ".") for c in children
        ]
        return ['.SH "COMMANDS"', *_list(entries)]
    lines = ['.SH "COMMANDS"']
    for child in children:
        lines += [f'.SS "{_escape(child.command_path)}"', *_synopsis(child), ".PP"]
        lines += _prose(child.command.help or "")
        lines += _records(child, everywhere=False)
        lines += _examples(None, child.command)
    return lines


def _options(context: click.Context, title: str, *, everywhere: bool) -> list[str]:
    return [f'.SH "{title}"', *_records(context, everywhere=everywhere)]


def _records(context: click.Context, *, everywhere: bool) -> list[str]:
    chosen = [
        parameter.get_help_record(context)
        for parameter in context.command.get_params(context)
        if isinstance(parameter, click.Option) and isinstance(parameter, GlobalOption) == everywhere
    ]
    return _list([record for record in chosen if record is not None])


def _examples(heading: str | None, found: click.Command) -> list[str]:
    text = getattr(found, "examples", "")
    if not text:
        return []
    return [heading or ".PP", *([] if heading else ["Examples:"]), *_verbatim(text.split("\n"))]


def _see_also(others: list[str]) -> list[str]:
    references = [f".BR {_escape(name)} (1)" for name in others]
    return [*(f"{line}," for line in references[:-1]), *references[-1:]]


def _prose(text: str) -> list[str]:
    """Help text; a paragraph that begins with \\b keeps its lines, as click does it."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        lines.append(".PP")
        if paragraph.startswith("\b"):
            lines += _verbatim(paragraph.removeprefix("\b").strip("\n").split("\n"))
        else:
            lines.append(_escape(" ".join(paragraph.split())))
    return lines[1:]


def _list(entries: list[tuple[str, str]] | tuple[tuple[str, str], ...]) -> list[str]:
    lines = []
    for term, meaning in entries:
        lines += [".TP", f"\\fB{_escape(term)}\\fR", _escape(meaning)]
    return lines


def _verbatim(text: list[str]) -> list[str]:
    return [".PP", ".RS 4", ".nf", *map(_escape, text), ".fi", ".RE"]


def _escape(text: str) -> str:
    """Text for roff: a hyphen that can be copied, and no line that roff takes for a request."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    text = text.replace("'", "\\(aq").replace("`", "\\(ga").replace("~", "\\(ti")
    text = text.replace("^", "\\(ha").replace('"', "\\(dq")
    return "\\&" + text if text.startswith((".", "'")) else text


if __name__ == "__main__":
    main(Path(sys.argv[1]))
