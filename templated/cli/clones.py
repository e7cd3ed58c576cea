"""`clone`, `ls`, `show` and `rm`."""

from __future__ import annotations

import sys
from typing import Any

import click

from templated.cli import render
from templated.cli.completion import clone_names, template_names
from templated.cli.failures import report
from templated.cli.options import Settings, command
from templated.client import requests
from templated.errors import InvalidRequest, TemplatedError
from templated.model.names import check_clone_name, numbered

# Removals that run at once: a clone that shuts down slowly must not hold up the others.
_REMOVERS = 8

CLONE_EXAMPLES = """
templated clone fn-123
templated clone fn-123 --template python-fn -o json
templated clone fn --count 8        # fn-1 to fn-8
templated clone fn-cold --path cold # a full boot, to compare with
"""


@command("clone", examples=CLONE_EXAMPLES)
@click.argument("name")
@click.option(
    "--template",
    metavar="NAME",
    shell_complete=template_names,
    help="The template to clone. Default: the only one that has an active generation.",
)
@click.option("--count", type=int, metavar="N", help="Start NAME-1 to NAME-N.")
@click.option(
    "--path",
    type=click.Choice(["cold", "direct", "standby", "warm"]),
    help="How to start: cold is a full boot, direct restores the template, standby and warm take "
    "a VM from a pool. Default: the fastest that is ready.",
)
@click.pass_obj
def clone(
    settings: Settings, name: str, template: str | None, count: int | None, path: str | None
) -> None:
    """Start a clone and wait until it has confirmed its identity.

    NAME becomes the guest's host name: 1 to 63 of a-z, 0-9 and '-'. With --count the output is
    a list, also for one.
    """
    numbered(name, count)
    request: requests.Request[Any] = (
        requests.create_clone(name, template=template, path=path)
        if count is None
        else requests.create_clones(name, count, template=template, path=path)
    )
    made = settings.client().json(request)
    if not settings.table:
        render.dump(made, settings)
        return
    views = made if isinstance(made, list) else [made]
    if settings.quiet:
        _print_names(views)
        return
    headers = ("NAME", "STATE", "PATH", "IP", "TOTAL")
    render.table(headers, [(*_start(view), _total(view)) for view in views])
    if len(views) == 1:
        click.echo(f"phases (ms): {render.phases(views[0]['phases_ms'])}")


LS_EXAMPLES = """
templated ls
templated ls -o json
templated rm $(templated ls -q)
"""


@command("ls", examples=LS_EXAMPLES)
@click.pass_obj
def ls(settings: Settings) -> None:
    """List the clones.

    An instance of a function is one, too, under a name that begins as the function's.
    """
    views = settings.client().json(requests.list_clones())
    headers = ("NAME", "STATE", "PATH", "IP", "TEMPLATE", "PID", "TOTAL", "AGE")
    render.listing(settings, views, headers, _row)


SHOW_EXAMPLES = """
templated show fn-123
templated show fn-123 -o json
"""


@command("show", examples=SHOW_EXAMPLES)
@click.argument("name", shell_complete=clone_names)
@click.pass_obj
def show(settings: Settings, name: str) -> None:
    """Show a clone: its identity and the phases of its start."""
    view = settings.client().json(requests.show_clone(check_clone_name(name)))
    if not settings.table:
        render.dump(view, settings)
        return
    identity = view["identity"]
    render.fields(
        [
            ("name", view["name"]),
            ("state", view["state"]),
            *([("reason", view["reason"])] if view.get("reason") else []),
            ("template", view["template"]),
            ("generation", view["generation"]),
            ("path", view["path"]),
            ("pid", view["pid"]),
            ("created", view.get("created")),
            ("uuid", view["uuid"]),
            *((key.replace("_", " "), value) for key, value in identity.items()),
            *(
                (f"{phase} phase", render.milliseconds(value))
                for phase, value in view["phases_ms"].items()
            ),
            ("total", _total(view)),
        ]
    )


RM_EXAMPLES = """
templated rm fn-123
templated rm fn-1 fn-2 fn-3
templated rm --all --yes
"""


@command("rm", examples=RM_EXAMPLES)
@click.argument("names", metavar="NAME...", nargs=-1, shell_complete=clone_names)
@click.option("--all", "everything", is_flag=True, help="Remove every clone there is.")
@click.option("--yes", is_flag=True, help="Do not ask before --all.")
@click.pass_obj
@click.pass_context
def rm(
    context: click.Context,
    settings: Settings,
    names: tuple[str, ...],
    everything: bool,
    yes: bool,
) -> None:
    """Stop clones and remove all that belongs to them.

    After a failure it goes on with the next one; the exit code is then that of the first failure.
    """
    if bool(names) == everything:
        raise click.UsageError("give either names or --all", context)
    if everything:
        names = tuple(view["name"] for view in settings.client().json(requests.list_clones()))
        if not names:
            settings.note("there are no clones")
            return
        _confirm(len(names), yes)
    codes = _remove_all(settings, list(dict.fromkeys(names)))
    context.exit(next((code for code in codes if code), 0))


def _confirm(count: int, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise InvalidRequest("--all asks first, and there is nobody to ask", hint="add --yes")
    if not click.confirm(f"Remove all {count} clones?", err=True):
        raise click.exceptions.Exit(1)


def _remove_all(settings: Settings, names: list[str]) -> list[int]:
    if len(names) == 1:  # without the 10 ms that threads cost to import
        return [_report_removal(settings, names[0], _remove(settings, names[0]))]
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(_REMOVERS)
    try:
        results = pool.map(lambda name: _remove(settings, name), names)
        return [
            _report_removal(settings, name, error)
            for name, error in zip(names, results, strict=True)
        ]
    finally:
        pool.shutdown(cancel_futures=True)


def _remove(settings: Settings, name: str) -> TemplatedError | None:
    try:
        settings.client().json(requests.remove_clone(check_clone_name(name)))
    except TemplatedError as error:
        return error
    return None


def _report_removal(settings: Settings, name: str, error: TemplatedError | None) -> int:
    if error is not None:
        return report(error, settings)
    settings.note(f"removed {name}")
    return 0


def _print_names(views: list[dict[str, Any]]) -> None:
    for view in views:
        click.echo(view["name"])


def _start(view: dict[str, Any]) -> tuple[object, ...]:
    return view["name"], view["state"], view["path"], view["identity"]["ip"]


def _row(view: dict[str, Any]) -> tuple[object, ...]:
    rest = view["template"], view["pid"], _total(view), render.age(view.get("created", ""))
    return *_start(view), *rest


def _total(view: dict[str, Any]) -> str:
    return render.milliseconds(view["total_ms"])
