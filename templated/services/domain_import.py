"""`template import`: a template's file, made of a domain of libvirt.

It looks at the domain, writes one file, and on demand a copy of the disk. Neither the domain nor
its disk is changed, and no daemon is needed.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import yaml

from templated.drivers.configfile import template_files
from templated.drivers.libvirt import disks, domains
from templated.drivers.libvirt.address import SYSTEM
from templated.drivers.libvirt.connection import Connection, connect
from templated.drivers.libvirt.domainxml import DiskSource, Translation, translate
from templated.drivers.libvirt.leftovers import Leftover
from templated.errors import ConfigError, Conflict, InvalidRequest, host_errors
from templated.model.config import Config
from templated.model.spec import TemplateName, TemplateSpec
from templated.services.places import Layout

STDOUT = "-"


@dataclass(frozen=True)
class Order:
    """What is to be imported."""

    domain: str
    uri: str = SYSTEM
    name: str | None = None
    """Of the template; the domain's own when it is left out."""
    file: str | None = None
    """Where the template is written: NAME.yaml in the first template directory when it is left
    out, and nowhere for `-`."""
    copy: bool = False
    hypervisor: str = "libvirt"
    """Who will start the template's VMs: `libvirt` or `qemu`, on whose network they are."""


@dataclass(frozen=True)
class Imported:
    """A template that was made of a domain."""

    template: str
    file: str | None
    disk: str
    copied: bool
    spec: dict[str, Any]
    leftovers: tuple[Leftover, ...]
    text: str
    """The file's content: YAML."""


def import_domain(order: Order, config: Config, say: Callable[[str], None]) -> Imported:
    """Make a template of a domain that is shut off; `say` is told of what takes long.

    Blocks. Raises InvalidRequest for a name, a URI or a domain that cannot be used, NotFound,
    Conflict when the domain or its disk is in use or a file is there already, HostError and
    Timeout. Nothing is written then, and a copy that was begun is removed.
    """
    name = _template_name(order)
    target = _target(order, config, name)
    copy = Layout(config).imported(name) if order.copy else None
    if copy is not None and copy.exists():
        raise Conflict(f"{copy} is there already", hint="rm it, if no template has it")
    domain, translation, path, more = _looked_up(order)
    image = asyncio.run(disks.examine(path, translation.disk.format))
    obstacle = image.obstacle or _odd(path)
    if obstacle and copy is None:
        raise InvalidRequest(
            f"the disk {path} {obstacle}", hint="--copy makes a qcow2 of it, for the template"
        )
    leftovers = (*translation.leftovers, *more)
    spec = make_spec(name, translation, order.hypervisor)
    spec["image"] = {"path": str(copy or path), "size": _size(image.virtual_size)}
    _check(spec, order.domain)
    text = _commented(domain, order.uri, leftovers, copied=copy is not None) + _yaml(spec)
    if copy is not None:
        say(f"copying {path} ({image.size >> 20} MiB)")
        asyncio.run(disks.copy(image, copy))
    try:
        if target is not None:
            _write(target, text)
    except BaseException:
        if copy is not None:
            copy.unlink(missing_ok=True)
        raise
    return Imported(
        template=name,
        file=None if target is None else str(target),
        disk=str(copy or path),
        copied=copy is not None,
        spec=spec,
        leftovers=leftovers,
        text=text,
    )


def _odd(path: Path) -> str:
    """Why a template cannot name `path`; empty when it can."""
    return "" if str(path).isascii() else "has a path with characters that are not ASCII"


def make_spec(name: str, found: Translation, hypervisor: str) -> dict[str, Any]:
    """The template's values, in the order of its file; `image` is for the caller to fill."""
    spec: dict[str, Any] = {"name": name}
    spec["description"] = found.description or f"libvirt domain {found.domain}"
    spec["hypervisor"] = hypervisor
    spec["image"] = {}
    spec["machine"] = {
        "type": "q35",
        "memory": _size(found.memory),
        "vcpus": found.vcpus,
        "firmware": found.firmware,
    }
    # What the agent is asked to do is slow without KVM, as is the boot.
    spec["identity"] = {"agent": "qemu-ga", "timeout": "60s"}
    if found.network is not None and hypervisor == "libvirt":
        spec["network"] = {"mode": "libvirt", "name": found.network}
    spec["boot_timeout"] = "300s"
    spec["probes"] = [
        {"type": "agent", "name": "agent", "timeout": "300s"},
        {"type": "settle", "name": "settle", "timeout": "120s"},
    ]
    return spec


def _check(spec: dict[str, Any], domain: str) -> None:
    """Raise InvalidRequest for a template that no daemon would take."""
    try:
        msgspec.convert(spec, TemplateSpec)
    except msgspec.ValidationError as error:
        raise InvalidRequest(
            f"the domain {domain} makes no template: {error}",
            hint="change it: virsh edit; for what is of its network: --hypervisor qemu",
        ) from None


def _size(count: int) -> str:
    """Bytes as a template says them, rounded up to MiB."""
    mebibytes = -(-count >> 20)
    return f"{mebibytes >> 10}GiB" if mebibytes % 1024 == 0 else f"{mebibytes}MiB"


def _template_name(order: Order) -> str:
    name = order.domain if order.name is None else order.name
    try:
        return msgspec.convert(name, TemplateName)
    except msgspec.ValidationError:
        raise InvalidRequest(
            f"{name[:100]!r} cannot be the name of a template",
            hint=f"give it one, of at most 49 of a-z, 0-9 and '-': --name {_suggested(name)}",
        ) from None


def _suggested(name: str) -> str:
    """A name that a template can have, near to one that it cannot have."""
    kept = "".join(c if c.isascii() and c.isalnum() else "-" for c in name.lower())
    return "-".join(filter(None, kept.split("-")))[:49].strip("-") or "imported"


def _target(order: Order, config: Config, name: str) -> Path | None:
    """Where the file will be; Conflict when it, or another of that template, is there."""
    if order.file == STDOUT:
        return None
    if order.file is not None:
        target = Path(order.file)
    elif config.template_dirs:
        target = Path(config.template_dirs[0]) / f"{name}.yaml"
        if (other := template_files(config.template_dirs).get(name)) is not None:
            raise Conflict(f"there is a template {name}: {other}", hint="--name gives another name")
    else:
        raise ConfigError("template_dirs is empty", hint="say where to write it: -f FILE")
    if os.path.lexists(target):
        raise Conflict(f"{target} is there already", hint="rm it, or name another with -f FILE")
    return target


def _looked_up(order: Order) -> tuple[domains.Domain, Translation, Path, list[Leftover]]:
    """All that libvirt is asked, over one connection that can change nothing."""
    connection = connect(order.uri, read_only=True)
    try:
        domain = domains.shut_off(connection, order.domain)
        found = translate(domain.xml)
        path = _path(found.disk, lambda d: domains.volume_path(connection, d.pool, d.path))
        problem = _network_problem(connection, found.network, order.hypervisor)
        more = [Leftover(f"network {found.network}", problem)] if problem else []
    finally:
        connection.close()
    return domain, found, path, more


def _network_problem(connection: Connection, network: str | None, hypervisor: str) -> str:
    if network is None:
        return ""
    if hypervisor != "libvirt":
        return "clones are on the daemon's network"
    return domains.network_problem(connection, network)


def _path(disk: DiskSource, volume_path: Callable[[DiskSource], str]) -> Path:
    return Path(volume_path(disk) if disk.kind == "volume" else disk.path)


def _commented(
    domain: domains.Domain, uri: str, leftovers: tuple[Leftover, ...], *, copied: bool
) -> str:
    lines = [f"Of the libvirt domain {domain.name} ({domain.uuid}, {uri})."]
    if not copied:
        lines += [
            "A build copies its disk: keep the domain shut off until the template is built, or",
            "import it with --copy.",
        ]
    if leftovers:
        lines.append("Not carried over:")
        lines += [f"- {one.what}: {one.why}" for one in leftovers]
    return "".join(f"# {line}\n" for line in lines)


def _yaml(spec: dict[str, Any]) -> str:
    return yaml.safe_dump(spec, sort_keys=False, allow_unicode=True, width=100)


def _write(target: Path, text: str) -> None:
    """All of the file or nothing, and never over another one."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    with host_errors(f"cannot write {target}", hint="-f FILE names another place"):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(text, encoding="utf-8")
            os.link(part, target)
        except FileExistsError:
            raise Conflict(f"{target} is there already", hint="rm it, or take -f FILE") from None
        finally:
            part.unlink(missing_ok=True)
