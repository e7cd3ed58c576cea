"""`function deploy | ls | show | rm | publish | alias | unalias | reserve | scale | logs | ...`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from templated.cli import render
from templated.cli.completion import function_names, template_names
from templated.cli.function_network import fields as network_fields
from templated.cli.function_network import network, network_options, said
from templated.cli.options import Group, Settings
from templated.client import requests
from templated.errors import InvalidRequest
from templated.model.names import LATEST, check_function_name, check_qualifier

_COUNT = click.IntRange(min=0)

GROUP_EXAMPLES = """
templated function deploy hello --code ./hello --handler app.handler
templated function publish hello
templated function alias hello live 1
templated function show hello
"""


@click.group("function", cls=Group, examples=GROUP_EXAMPLES)
def function() -> None:
    """Deploy functions, and manage their versions and aliases.

    A function is code with a handler that runs on clones of a template. A deploy changes
    $LATEST; `publish` makes a numbered copy that never changes; an alias names one version, or
    two with weights. `templated invoke` runs a request.
    """


function.add_command(network)


def _waiting(function: Callable[..., None]) -> Callable[..., None]:
    """Options of what moves requests to other code."""
    wait = click.option(
        "--wait",
        "patience",
        metavar="SECONDS",
        type=click.IntRange(0, 3600),
        help="How long instances may take to be ready before. Default: 60.",
    )
    now = click.option("--now", is_flag=True, help="Do not wait for instances.")
    return wait(now(function))


DEPLOY_EXAMPLES = """
templated function deploy hello --code ./hello --handler app.handler
templated function deploy hello --code hello.zip --template python-fn --timeout 10s
templated function deploy hello --env STAGE=test --env LEVEL=2   # the code stays
templated function deploy native --code ./out --runtime provided # runs its bootstrap
templated function deploy hello --code ./hello --now             # no instance is waited for
templated function deploy hello --egress acme --allow 10.1.0.0/16:443
"""


@function.command("deploy", examples=DEPLOY_EXAMPLES)
@click.argument("name", shell_complete=function_names)
@click.option("--code", metavar="DIR|ZIP", type=click.Path(), help="The files, or a zip of them.")
@click.option("--handler", metavar="MODULE.FUNCTION", help="What is called for each request.")
@click.option(
    "--template",
    metavar="NAME",
    shell_complete=template_names,
    help="The template to run on. Default: the only one that takes code.",
)
@click.option(
    "--runtime",
    type=click.Choice(["python", "provided"]),
    help="python loads the handler; provided starts the code's own `bootstrap`. Default: python.",
)
@click.option("--env", metavar="K=V", multiple=True, help="A variable; all of them are replaced.")
@click.option("--timeout", metavar="TIME", help="For one request, as 30s or 30. Default: 30s.")
@click.option("--description", metavar="TEXT", help="What it is for.")
@network_options
@_waiting
@click.pass_obj
def deploy(
    settings: Settings,
    name: str,
    code: str | None,
    handler: str | None,
    template: str | None,
    runtime: str | None,
    env: tuple[str, ...],
    timeout: str | None,
    description: str | None,
    egress: str | None,
    allow: tuple[str, ...],
    peers: str | None,
    limits: tuple[str, ...],
    patience: int | None,
    now: bool,
) -> None:
    """Make a function, or change its $LATEST.

    What is not given stays as it is. Requests that run end on the code that they began with. The
    network options are of the function, for all its versions: see `function network`.

    Where the code before has instances, they serve until as many of the new one are ready. When
    that fails, or takes longer than --wait, requests go to the new code all the same.
    """
    from templated.cli.shift import follow_deploy
    from templated.cli.upload import archive

    check_function_name(name)
    variables = _variables(env)
    with archive(settings, code) as (stream, size):
        request = requests.deploy_function(
            name,
            stream,
            size=size,
            handler=handler,
            template=template,
            runtime=runtime,
            env=variables,
            timeout=_duration(timeout),
            description=description,
            network=said(egress, allow, peers, limits),
            ready=0 if now else patience,
            background=True,
        )
        view = follow_deploy(settings, settings.client().json(request))
    if not settings.table:
        render.dump(view, settings)
    elif settings.quiet:
        click.echo(view["name"])
    else:
        render.fields(_settings(view))


def _variables(given: tuple[str, ...]) -> dict[str, str] | None:
    variables = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InvalidRequest(f"--env takes K=V, not {text!r}", hint="as in: --env STAGE=test")
        variables[key] = value
    return variables or None


def _duration(text: str | None) -> str | None:
    return f"{text}s" if text and text.replace(".", "", 1).isdecimal() else text


@function.command("ls", examples="templated function ls\ntemplated function ls -o json")
@click.pass_obj
def ls(settings: Settings) -> None:
    """List the functions."""
    views = settings.client().json(requests.list_functions())
    headers = ("NAME", "TEMPLATE", "HANDLER", "VERSION", "ALIASES", "CODE", "INSTANCES", "AGE")
    render.listing(settings, views, headers, _row)


def _row(view: dict[str, Any]) -> tuple[object, ...]:
    newest = next((v["version"] for v in view["versions"] if v["version"] != LATEST), None)
    aliases = ", ".join(alias["name"] for alias in view["aliases"])
    shown = view["name"], view["template"], view["handler"], newest, aliases
    rest = render.size(view["code"]["bytes"]), sum(view["instances"].values())
    return *shown, *rest, render.age(view["created"])


@function.command(
    "show", examples="templated function show hello\ntemplated function show hello -o json"
)
@click.argument("name", shell_complete=function_names)
@click.pass_obj
def show(settings: Settings, name: str) -> None:
    """Show a function: its settings, versions, aliases and instances."""
    view = settings.client().json(requests.show_function(check_function_name(name)))
    if not settings.table:
        render.dump(view, settings)
        return
    instances = ", ".join(f"{count} {state}" for state, count in view["instances"].items() if count)
    env: list[str] = next((v["env"] for v in view["versions"] if v["version"] == LATEST), [])
    reserved = "none" if view["reserved"] is None else view["reserved"]
    render.fields(
        [
            *_settings(view),
            *network_fields(view["network"]),
            ("variables", " ".join(env)),
            ("reserved", reserved),
            ("min", view["min"]),
            ("max", view["max"] or "none"),
            ("instances", instances or "none"),
            *_update(view["update"]),
            ("created", view["created"]),
        ]
    )
    click.echo()
    rows = [_version(version) for version in view["versions"]]
    render.table(("VERSION", "HANDLER", "DIGEST", "CODE", "AGE", "DESCRIPTION"), rows)
    if view["aliases"]:
        click.echo()
        aliases = [(a["name"], _weights(a["versions"]), a["description"]) for a in view["aliases"]]
        render.table(("ALIAS", "VERSIONS", "DESCRIPTION"), aliases)
    if view["provisioned"]:
        click.echo()
        headers = ("PROVISIONED", "READY", "STATUS", "REASON")
        render.table(headers, map(_provisioned, view["provisioned"]))


def _update(update: dict[str, Any] | None) -> list[tuple[str, object]]:
    """Of a change of $LATEST that is under way, or did not go as it should."""
    if update is None or (update["done"] and not update["problem"]):
        return []
    ready = f"{update['ready']} of {update['wanted']} instances of the new code are ready"
    return [("update", update["problem"] if update["done"] else ready)]


def _provisioned(view: dict[str, Any]) -> tuple[object, ...]:
    return (
        view["qualifier"],
        f"{view['available']}/{view['requested']}",
        view["status"].lower().replace("_", " "),
        view["reason"] or None,
    )


def _settings(view: dict[str, Any]) -> list[tuple[str, object]]:
    code = view["code"]
    return [
        ("name", view["name"]),
        ("handler", view["handler"]),
        ("runtime", view["runtime"]),
        ("template", view["template"]),
        ("timeout", f"{view['timeout_s']:g} s"),
        ("description", view["description"]),
        ("code", f"{code['digest'][:12]}, {render.size(code['bytes'])}"),
    ]


def _version(version: dict[str, Any]) -> tuple[object, ...]:
    code, age = version["code"], render.age(version["created"])
    shown = version["version"], version["handler"], code["digest"][:12], render.size(code["bytes"])
    return *shown, age, version["description"]


def _weights(versions: dict[str, float]) -> str:
    if len(versions) == 1:
        return next(iter(versions))
    return " ".join(f"{label}={weight:g}" for label, weight in versions.items())


@function.command(
    "rm", examples="templated function rm hello\ntemplated function rm hello --version 3"
)
@click.argument("name", shell_complete=function_names)
@click.option("--version", metavar="N", help="Remove this version alone.")
@click.pass_obj
def rm(settings: Settings, name: str, version: str | None) -> None:
    """Remove a function with all its versions and aliases, or one version.

    Its instances end. A version that an alias points at stays.
    """
    settings.client().json(requests.remove_function(check_function_name(name), version))
    settings.note(f"removed {name}" + (f":{version}" if version is not None else ""))


@function.command(
    "publish",
    examples="templated function publish hello\n"
    "templated function publish hello --description 'with the new parser'",
)
@click.argument("name", shell_complete=function_names)
@click.option("--description", metavar="TEXT", help="Of the version. Default: that of $LATEST.")
@click.pass_obj
def publish(settings: Settings, name: str, description: str | None) -> None:
    """Make a numbered version of what $LATEST is now, and print its number.

    When nothing has changed since the newest version, it prints the number of that.
    """
    request = requests.publish_function(check_function_name(name), description=description)
    view = settings.client().json(request)
    if settings.table:
        click.echo(view["version"] if settings.quiet else f"{name}: version {view['version']}")
    else:
        render.dump(view, settings)


ALIAS_EXAMPLES = """
templated function alias hello live 1
templated function alias hello live 1=0.9 2=0.1   # one request in ten goes to version 2
templated function alias hello live 1=0.5 2=0.5
templated function alias hello live 2
templated function alias hello live 1 --now       # back, whether instances are ready or not
"""


@function.command("alias", examples=ALIAS_EXAMPLES)
@click.argument("name", shell_complete=function_names)
@click.argument("alias")
@click.argument("versions", metavar="VERSION[=WEIGHT] [VERSION=WEIGHT]", nargs=-1, required=True)
@click.option("--description", metavar="TEXT", help="What it is for.")
@_waiting
@click.pass_obj
def alias_(
    settings: Settings,
    name: str,
    alias: str,
    versions: tuple[str, ...],
    description: str | None,
    patience: int | None,
    now: bool,
) -> None:
    """Point an alias at one version, or at two by weights that add up to 1.

    A version that gets more requests than before has its instances ready first: as many as its
    part needs of those that serve now. When that fails, or takes longer than --wait, the alias
    stays as it was. Requests that come after the move are routed by it.
    """
    weights = _parsed_weights(versions)
    check_function_name(name)
    ready = 0 if now else patience
    request = requests.set_alias(name, alias, weights, description=description, ready=ready)
    view = settings.client().json(request)
    if settings.table:
        click.echo(f"{name}:{view['name']}: {_weights(view['versions'])}")
    else:
        render.dump(view, settings)


def _parsed_weights(given: tuple[str, ...]) -> dict[str, float]:
    """By version; one without a weight gets what the other one leaves."""
    weights: dict[str, float] = {}
    open_ones = []
    for text in given:
        label, equals, number = text.partition("=")
        if label in weights or label in open_ones:
            raise InvalidRequest(f"version {label} is given twice")
        if not equals:
            open_ones.append(label)
        try:
            weights[label] = float(number) if equals else 0.0
        except ValueError:
            raise InvalidRequest(f"{number!r} is not a weight", hint="as in: 3=0.9 4=0.1") from None
    if len(open_ones) > 1 or len(given) > 2:
        raise InvalidRequest(
            "an alias points at one version, or at two by weight", hint="as in: 3=0.9 4=0.1"
        )
    for label in open_ones:
        weights[label] = round(1.0 - sum(weights.values()), 9)
    return weights


@function.command("unalias", examples="templated function unalias hello live")
@click.argument("name", shell_complete=function_names)
@click.argument("alias")
@click.pass_obj
def unalias(settings: Settings, name: str, alias: str) -> None:
    """Remove an alias; the version that it points at stays."""
    settings.client().json(requests.remove_alias(check_function_name(name), alias))
    settings.note(f"removed {name}:{alias}")


@function.command(
    "reserve",
    examples="templated function reserve hello 5\ntemplated function reserve hello none",
)
@click.argument("name", shell_complete=function_names)
@click.argument("count", metavar="N|none")
@click.pass_obj
def reserve(settings: Settings, name: str, count: str) -> None:
    """Set how many requests of a function may run at once; 0 lets none run.

    Others never take what is reserved, and it never takes more.
    """
    if count != "none" and not count.isdecimal():
        raise InvalidRequest(f"{count!r} is neither a number nor none", hint="as in: reserve fn 5")
    wanted = None if count == "none" else int(count)
    view = settings.client().json(requests.set_concurrency(check_function_name(name), wanted))
    if settings.table:
        settings.note(f"{name}: reserved {count}")
    else:
        render.dump(view, settings)


SCALE_EXAMPLES = """
templated function scale hello --min 2            # of $LATEST, always ready
templated function scale hello --max 10           # more requests than that wait
templated function scale hello:live --min 5       # of what an alias points at, or a version
templated function scale hello --min 0 --max none
"""


@function.command("scale", examples=SCALE_EXAMPLES)
@click.argument("name", metavar="NAME[:VERSION|ALIAS]", shell_complete=function_names)
@click.option("--min", "least", metavar="N", type=_COUNT, help="Instances that are kept ready.")
@click.option("--max", "most", metavar="N|none", help="Instances that there may be at once.")
@click.pass_obj
def scale(settings: Settings, name: str, least: int | None, most: str | None) -> None:
    """Set how many instances of a function are kept ready, and how many there may be.

    What is kept is started in the background, also after a start of the daemon and a deploy, and
    replaced when it ends. Without a version or an alias, --min is of $LATEST, and --max of all
    versions together. What is not given stays as it is.
    """
    function, colon, given = name.partition(":")
    check_function_name(function)
    if least is None and most is None:
        raise InvalidRequest("nothing to set", hint="give --min or --max")
    if colon:
        _provision(settings, function, check_qualifier(given), least, most)
        return
    request = requests.scale_function(function, least=least, most=_bound(most))
    view = settings.client().json(request)
    if settings.table:
        settings.note(f"{function}: min {view['min']}, max {view['max'] or 'none'}")
    else:
        render.dump(view, settings)


def _bound(text: str | None) -> int | None:
    """0 for none, which a bound cannot be."""
    if text is None or text == "none":
        return None if text is None else 0
    if not text.isdecimal() or int(text) == 0:
        raise InvalidRequest(f"{text!r} is no bound", hint="as in --max 5, or --max none")
    return int(text)


def _provision(
    settings: Settings, name: str, qualifier: str, count: int | None, most: str | None
) -> None:
    if most is not None or count is None:
        raise InvalidRequest(
            "--max is of all versions of a function", hint=f"as in: scale {name} --max 5"
        )
    if count == 0:
        settings.client().json(requests.unprovision_function(name, qualifier))
        settings.note(f"{name}:{qualifier}: min 0")
        return
    view = settings.client().json(requests.provision_function(name, qualifier, count))
    if settings.table:
        settings.note(f"{name}:{qualifier}: min {count}")
    else:
        render.dump(view, settings)


@function.command(
    "logs", examples="templated function logs hello\ntemplated function logs hello -n 20 -f"
)
@click.argument("name", shell_complete=function_names)
@click.option("-n", "--lines", type=click.IntRange(min=0), help="Only the last LINES lines.")
@click.option("-f", "--follow", is_flag=True, help="Go on with new output until Ctrl-C.")
@click.pass_obj
def logs(settings: Settings, name: str, lines: int | None, follow: bool) -> None:
    """Print what a function's instances wrote to stdout and stderr.

    On a terminal, control characters are left out: the function must not steer it.
    """
    from templated.cli.watch import print_text

    print_text(settings, requests.function_logs(check_function_name(name), lines, follow))


EVENTS_EXAMPLES = """
templated function events hello
templated function events hello --retry 453112b8-2c74-4406-8e73-79d4c0fd3275
templated function events hello --purge
"""


@function.command("events", examples=EVENTS_EXAMPLES)
@click.argument("name", shell_complete=function_names)
@click.option("--retry", metavar="ID", help="Run one that failed again, and print its new id.")
@click.option("--purge", is_flag=True, help="Forget all that failed.")
@click.pass_obj
def events(settings: Settings, name: str, retry: str | None, purge: bool) -> None:
    """List asynchronous events that are not done: queued, running, and those that failed.

    One that failed was tried three times, or became too old; it is kept here.
    """
    if retry is not None and purge:
        raise InvalidRequest("--retry and --purge exclude each other", hint="give one of them")
    if retry is not None:
        accepted = settings.client().json(
            requests.retry_event(check_function_name(name), _event_id(retry))
        )
        if settings.table:
            click.echo(accepted["id"])
        else:
            render.dump(accepted, settings)
        return
    if purge:
        settings.client().json(requests.purge_events(check_function_name(name)))
        settings.note(f"forgot the events of {name} that failed")
        return
    views = settings.client().json(requests.function_events(check_function_name(name)))
    headers = ("ID", "STATE", "QUALIFIER", "TRIES", "AGE", "DUE", "REASON")
    render.listing(settings, views, headers, _event, name="id")


def _event_id(text: str) -> str:
    if not text:
        raise InvalidRequest("--retry takes the id of an event", hint="see the list without it")
    return text


def _event(view: dict[str, Any]) -> tuple[object, ...]:
    shown = view["id"], view["state"], view["qualifier"], view["attempts"]
    due = view["due"] if view["state"] == "queued" else None
    return *shown, render.age(view["created"]), due, view.get("reason")
