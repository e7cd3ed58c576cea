"""`template build | import | ls | show | rm | rollback`."""

from __future__ import annotations

import sys
from typing import Any

import click

from templated.cli import render
from templated.cli.completion import template_names
from templated.cli.import_cmd import import_
from templated.cli.options import Group, Settings
from templated.client import requests
from templated.errors import InvalidRequest

GROUP_EXAMPLES = """
templated template build python-fn
templated template import --domain web
templated template ls
templated template show python-fn
"""


@click.group("template", cls=Group, examples=GROUP_EXAMPLES)
def template() -> None:
    """Build templates and manage their generations.

    A build boots the base VM, runs the template's probes, freezes it and proves the result with
    a first clone. Only then does the new generation become the active one.
    """


BUILD_EXAMPLES = """
templated template build python-fn
templated template build python-fn -f ./python-fn.yaml
templated template build python-fn -o json | jq -c 'select(.type == "probe")'
templated template build python-fn --follow 6b1f0c92d3aa
"""


@template.command("build", examples=BUILD_EXAMPLES)
@click.argument("name", shell_complete=template_names)
@click.option(
    "-f", "--file", metavar="FILE", help="Build from this YAML; - reads stdin.",
    type=click.Path(),
)  # fmt: skip
@click.option("--follow", metavar="ID", help="Follow a build that is under way; start none.")
@click.pass_obj
def build(settings: Settings, name: str, file: str | None, follow: str | None) -> None:
    """Build a new generation of a template and follow the build to its end.

    Without -f the daemon reads NAME.yaml in its template directories. With -o json each event of
    the build is one line. Ctrl-C ends only the following: the build goes on in the daemon.
    """
    from templated.cli.progress import follow_build

    if file and follow:
        raise InvalidRequest("-f and --follow exclude each other", hint="--follow starts no build")
    client = settings.client()
    if follow is None:
        spec, source = _spec(file) if file else (None, None)
        request = requests.build_template(name, spec=spec, source=source)
        follow = client.json(request)["id"]
    assert follow is not None
    follow_build(settings, name, follow)
    if settings.table:
        view = client.json(requests.show_template(name))
        click.echo(view["active"] if settings.quiet else f"{name}: {view['active']} is active")


def _spec(file: str) -> tuple[str, str]:
    if file == "-":
        return sys.stdin.read(), "stdin"
    try:
        with open(file, encoding="utf-8") as stream:
            return stream.read(), file
    except UnicodeDecodeError:
        raise InvalidRequest(f"{file} is not UTF-8 text") from None


template.add_command(import_)


LS_EXAMPLES = """
templated template ls
templated template ls -o json | jq -r '.[] | select(.active) | .name'
"""


@template.command("ls", examples=LS_EXAMPLES)
@click.pass_obj
def ls(settings: Settings) -> None:
    """List the templates."""
    views = settings.client().json(requests.list_templates())
    headers = ("NAME", "ACTIVE", "GENERATIONS", "CLONES", "NOTE")
    render.listing(settings, views, headers, _row)


SHOW_EXAMPLES = """
templated template show python-fn
templated template show python-fn -o yaml
"""


@template.command("show", examples=SHOW_EXAMPLES)
@click.argument("name", shell_complete=template_names)
@click.pass_obj
def show(settings: Settings, name: str) -> None:
    """Show a template and its generations; with -o yaml also its whole spec and manifest."""
    view = settings.client().json(requests.show_template(name))
    if not settings.table:
        render.dump(view, settings)
        return
    render.fields(_facts(view))
    if view["generations"]:
        click.echo()
        render.table(
            ("GENERATION", "STATE", "ACTIVE", "CLONES", "CREATED"),
            map(_generation, view["generations"]),
        )
    if probes := (view.get("manifest") or {}).get("probes"):
        click.echo()
        render.table(
            ("PROBE", "TYPE", "SECONDS", "SAW"),
            ((p["name"], p["type"], f"{p['seconds']:.2f}", p["saw"][:60]) for p in probes),
        )


RM_EXAMPLES = """
templated template rm python-fn
"""


@template.command("rm", examples=RM_EXAMPLES)
@click.argument("name", shell_complete=template_names)
@click.pass_obj
def rm(settings: Settings, name: str) -> None:
    """Remove a template's generations. Refused while clones of it exist."""
    settings.client().json(requests.remove_template(name))
    settings.note(f"removed {name}")


ROLLBACK_EXAMPLES = """
templated template rollback python-fn
"""


@template.command("rollback", examples=ROLLBACK_EXAMPLES)
@click.argument("name", shell_complete=template_names)
@click.pass_obj
def rollback(settings: Settings, name: str) -> None:
    """Make the generation before the active one the active one. Running clones stay as they are."""
    view = settings.client().json(requests.rollback(name))
    if settings.table:
        click.echo(view["active"] if settings.quiet else f"{name}: {view['active']} is active")
    else:
        render.dump(view, settings)


def _row(view: dict[str, Any]) -> tuple[object, ...]:
    generations = view["generations"]
    clones = sum(generation["clones"] for generation in generations)
    note = view.get("problem") or view.get("description")
    return view["name"], view["active"], len(generations), clones, note


def _generation(generation: dict[str, Any]) -> tuple[object, ...]:
    active = "yes" if generation["active"] else "no"
    return (
        generation["id"],
        generation["state"],
        active,
        generation["clones"],
        generation["created"],
    )


def _facts(view: dict[str, Any]) -> list[tuple[str, object]]:
    facts: list[tuple[str, object]] = [("name", view["name"]), ("active", view["active"])]
    for key in ("description", "problem"):
        if view.get(key):
            facts.append((key, view[key]))
    if spec := view.get("spec"):
        machine, image = spec["machine"], spec["image"]
        facts.append(
            ("machine", f"{machine['type']}, {machine['memory']}, {machine['vcpus']} vCPU")
        )
        facts.append(("image", " ".join([image["suite"], *image["packages"]])))
    if manifest := view.get("manifest"):
        facts.append(("qemu", f"{manifest['qemu']['version']}, {manifest['accel']}"))
        facts.append(("build", render.phases(manifest["phases_s"]) + " s"))
    return facts
