"""Shell completion: click's scripts, and names that come from the daemon."""

from __future__ import annotations

from typing import Any

import click

from templated.cli.options import Settings, command
from templated.client import requests
from templated.client.requests import Request
from templated.model.names import check_function_name

# A shell waits for this while the user holds Tab.
_SECONDS = 1.0


def clone_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of clones that begin with `incomplete`; none when the daemon does not say."""
    return _names(context, requests.list_clones(), incomplete)


def template_names(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[str]:
    """Names of templates that begin with `incomplete`; none when the daemon does not say."""
    return _names(context, requests.list_templates(), incomplete)


def function_names(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[str]:
    """Names of functions that begin with `incomplete`; none when the daemon does not say."""
    return _names(context, requests.list_functions(), incomplete)


def egress_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of egresses that begin with `incomplete`; none when the daemon does not say."""
    return _names(context, requests.list_egresses(), incomplete)


def function_versions(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[str]:
    """Names of functions, or after a colon their versions and aliases."""
    name, colon, _ = incomplete.partition(":")
    if not colon:
        return function_names(context, parameter, incomplete)
    try:
        client = context.ensure_object(Settings).client(timeout=_SECONDS)
        view = client.json(requests.show_function(check_function_name(name)))
        labels = [v["version"] for v in view["versions"]] + [a["name"] for a in view["aliases"]]
        return [full for label in labels if (full := f"{name}:{label}").startswith(incomplete)]
    except Exception:
        return []


def code_digests(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Digests of code on this node that begin so; none when the daemon does not say."""
    return _names(context, requests.list_code(), incomplete, "digest")


def domain_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of libvirt's domains that are shut off; none when libvirt does not say."""
    try:
        from templated.drivers.libvirt.address import SYSTEM
        from templated.drivers.libvirt.connection import connect
        from templated.drivers.libvirt.domains import names

        uri = context.params.get("connect") or SYSTEM
        connection = connect(uri, read_only=True, bound=_SECONDS)
        return [name for name in names(connection) if name.startswith(incomplete)]
    except Exception:
        return []


def _names(
    context: click.Context, request: Request[Any], incomplete: str, key: str = "name"
) -> list[str]:
    try:
        found = context.ensure_object(Settings).client(timeout=_SECONDS).json(request)
        given = set(_flat(context.params.values()))
        names = [item[key] for item in found]
        return [name for name in names if name.startswith(incomplete) and name not in given]
    except Exception:
        # Errors stay silent: a message in the middle of a command line would only disturb.
        return []


def _flat(values: object) -> list[str]:
    if isinstance(values, str):
        return [values]
    try:
        return [text for value in values for text in _flat(value)]  # type: ignore[attr-defined]
    except TypeError:
        return []


EXAMPLES = """
templated completion bash > /etc/bash_completion.d/templated
templated completion zsh > "${fpath[1]}/_templated"
templated completion fish > ~/.config/fish/completions/templated.fish
"""


@command("completion", examples=EXAMPLES)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script for a shell.

    Names of clones, templates and functions are completed too, while the daemon runs.
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    root = context.find_root().command
    click.echo(found(root, {}, "templated", "_TEMPLATED_COMPLETE").source())
