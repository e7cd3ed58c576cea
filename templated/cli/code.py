"""`code ls | prefetch | verify | gc`: the code of functions that is on this node."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from templated.cli import render
from templated.cli.completion import code_digests
from templated.cli.options import Group, Settings
from templated.client import requests
from templated.errors import HostError, InvalidRequest, NotFound

if TYPE_CHECKING:
    from templated.client import Client

EXAMPLES = """
templated code ls
templated code prefetch $(templated function show hello -o json | jq -r .code.digest)
templated code verify
templated code gc
"""
_SHORT = 12
"""Digits of a digest in a table."""
_PREFIX = re.compile("[0-9a-f]{8,63}")


@click.group("code", cls=Group, examples=EXAMPLES)
def code() -> None:
    """Look after the code of functions on this node.

    Code is a read-only image, named by the digest of its content. A deploy puts it on this node,
    and into the zone's store where there is one (code.store in the configuration). What no
    version of a function needs goes, least recently used first, when all takes more than
    code.cache_size.
    """


LS_EXAMPLES = """
templated code ls
templated code ls -o json | jq -r '.[] | select(.needed | not) | .digest'
"""


@code.command("ls", examples=LS_EXAMPLES)
@click.pass_obj
def ls(settings: Settings) -> None:
    """List the code on this node, used last first.

    NEEDED: a version of a function has it, so that it stays. VERIFIED: its content was read since
    the daemon started; otherwise it is before its first use.
    """
    rows = settings.client().json(requests.list_code())
    if not settings.table:
        render.dump(rows, settings)
    elif settings.quiet:
        for row in rows:
            click.echo(row["digest"])
    else:
        render.table(
            ("DIGEST", "FILES", "SIZE", "USED", "NEEDED", "VERIFIED"),
            [
                (
                    row["digest"][:_SHORT],
                    render.size(row["bytes"]),
                    render.size(row["size"]),
                    render.age(row["used"]),
                    _yes(row["needed"]),
                    _yes(row["verified"]),
                )
                for row in rows
            ],
        )


PREFETCH_EXAMPLES = """
templated code prefetch c0ffee12ab34
templated code prefetch $(templated function show hello -o json | jq -r .code.digest)
templated function ls -o json | jq -r '.[].code.digest' | xargs templated code prefetch
"""


@code.command("prefetch", examples=PREFETCH_EXAMPLES)
@click.argument(
    "digests", metavar="DIGEST...", nargs=-1, required=True, shell_complete=code_digests
)
@click.pass_obj
def prefetch(settings: Settings, digests: tuple[str, ...]) -> None:
    """Have code on this node ahead of a request: it is verified, or fetched from the zone.

    The first digits of a digest do, at least eight, when this node has such code or a function
    that needs it.
    """
    client = settings.client()
    rows = []
    for digest in _completed(client, digests):
        rows.append(client.json(requests.prefetch_code(digest)))
        settings.note(f"{digest[:_SHORT]} is on this node")
    if not settings.table:
        render.dump(rows, settings)


def _completed(client: Client, given: tuple[str, ...]) -> list[str]:
    """Whole digests, for some that may be cut short."""
    if not any(map(_PREFIX.fullmatch, given)):
        return list(given)
    known = {row["digest"] for row in client.json(requests.list_code())}
    for view in client.json(requests.list_functions()):
        known |= {version["code"]["digest"] for version in view["versions"]}
    return [_whole(digest, known) if _PREFIX.fullmatch(digest) else digest for digest in given]


def _whole(prefix: str, known: set[str]) -> str:
    found = sorted(digest for digest in known if digest.startswith(prefix))
    if not found:
        raise NotFound(
            f"no code that this node knows has a digest {prefix}...",
            hint="give all 64 digits; see: templated code ls -q",
        )
    if len(found) > 1:
        raise InvalidRequest(
            f"{len(found)} digests begin with {prefix}",
            hint="give more digits; see: templated code ls -q",
        )
    return found[0]


@code.command("verify", examples="templated code verify\ntemplated code verify -o json")
@click.pass_obj
def verify(settings: Settings) -> None:
    """Read all code on this node again, and compare it with its digests.

    What is damaged is fetched from the zone again, or else removed; that is an error.
    """
    checks = settings.client().json(requests.verify_code())
    if not settings.table:
        render.dump(checks, settings)
    elif not settings.quiet:
        render.table(
            ("DIGEST", "STATE", "PROBLEM"),
            [(check["digest"][:_SHORT], check["state"], check["problem"]) for check in checks],
        )
    damaged = [check["digest"] for check in checks if check["state"] == "damaged"]
    if damaged:
        raise HostError(
            f"{len(damaged)} of {len(checks)} code images were damaged, and are gone: "
            + ", ".join(digest[:_SHORT] for digest in damaged),
            hint="deploy their functions again, and see the host's log for errors of this disk",
        )


@code.command("gc", examples="templated code gc\ntemplated code gc -o json")
@click.pass_obj
def gc(settings: Settings) -> None:
    """Remove the code on this node that no version of a function needs.

    What was used within the last ten seconds stays. The zone's store is left as it is: other nodes
    may need what is in it.
    """
    freed = settings.client().json(requests.collect_code())
    if not settings.table:
        render.dump(freed, settings)
    elif settings.quiet:
        for digest in freed["removed"]:
            click.echo(digest)
    else:
        click.echo(f"removed {len(freed['removed'])}, freed {render.size(freed['size'])}")


def _yes(value: bool) -> str:
    return "yes" if value else "no"
