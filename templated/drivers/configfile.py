"""YAML files: the configuration and the templates. Every error names the file and the line."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from templated.drivers.accounts import access_rules
from templated.drivers.secretfile import others_read
from templated.errors import ConfigError, NotFound
from templated.model.config import Config, default_config_path, defaults
from templated.model.egress import EgressSpec
from templated.model.spec import TemplateSpec

T = TypeVar("T")
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class _Document:
    """A file's values, and the nodes that know the lines of them."""

    source: str
    node: yaml.Node | None
    data: Any


class _Loader(yaml.SafeLoader):
    """YAML without aliases, which could name each other exponentially often."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="an alias; write it out", problem_mark=mark)
        return super().compose_node(parent, index)


def load_config(path: Path | None) -> Config:
    """Read the configuration, or the defaults when no path is given and no file is there."""
    base = defaults(os.environ, os.geteuid())
    chosen = path or default_config_path(os.environ, os.geteuid())
    if path is None and not chosen.exists():
        return msgspec.convert(base, Config)
    document = _parse(_read(chosen), str(chosen))
    given = document.data or {}
    if not isinstance(given, dict):
        raise ConfigError(
            f"{chosen}: a configuration is a mapping of keys to values", hint="as in accel: auto"
        )
    if "runtime_dir" in given and "socket" not in given:
        base["socket"] = f"{given['runtime_dir']}/templated.sock"
    config = _convert(replace(document, data={**base, **given}), Config)
    if config.access is not None:
        try:
            access_rules(config.access)  # who is not there is reported with the line
        except ConfigError as error:
            raise ConfigError(_with_line(document, error.message), hint=error.hint) from None
    return config


def exposed(path: Path | None, config: Config) -> Path | None:
    """The configuration's file when a secret is in it that others can read. Costs one stat."""
    if config.gateway is None or all(key.secret is None for key in config.gateway.keys):
        return None
    chosen = path or default_config_path(os.environ, os.geteuid())
    try:
        return chosen if others_read(chosen.stat()) else None
    except OSError:
        return None


def parse_template(text: str, source: str) -> TemplateSpec:
    """A template from YAML text; ConfigError names `source`, the line and the field."""
    _require_short(len(text), source)
    return _convert(_parse(text, source), TemplateSpec)


def parse_egress(text: str, source: str) -> EgressSpec:
    """An egress from YAML text; ConfigError names `source`, the line and the field."""
    _require_short(len(text), source)
    return _convert(_parse(text, source), EgressSpec)


def template_files(directories: tuple[str, ...]) -> dict[str, Path]:
    """The template files by their templates' names; the first directory wins."""
    found: dict[str, Path] = {}
    for directory in map(Path, directories):
        if directory.is_dir():
            for path in sorted(directory.glob("*.yaml")):
                found.setdefault(path.stem, path)
    return found


def load_template(directories: tuple[str, ...], name: str) -> TemplateSpec:
    """The template `name`; NotFound when no directory has it, ConfigError when it is broken."""
    path = template_files(directories).get(name)
    if path is None:
        raise NotFound(
            f"there is no template {name}",
            hint=f"put {name}.yaml into {' or '.join(directories) or 'a template directory'}",
        )
    spec = parse_template(_read(path), str(path))
    if spec.name != name:
        raise ConfigError(
            f"{path}: the name in it is {spec.name}, not {name} as the file's",
            hint=f"write `name: {name}`, or rename the file to {spec.name}.yaml",
        )
    return spec


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
        _require_short(len(content), str(path))
        return content.decode()
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", hint="check the path and its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8: {error.reason}", hint="save it as UTF-8"
        ) from error


def _require_short(size: int, source: str) -> None:
    if size > _MAX_BYTES:
        raise ConfigError(
            f"{source} is too large: {size} bytes", hint="a template is a few KB of YAML"
        )


def _parse(text: str, source: str) -> _Document:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _refuse_duplicates(node, source)
        data = None if node is None else loader.construct_document(node)
        msgspec.json.encode(data)  # values that the API could not report are refused here
        return _Document(source, node, data)
    except ConfigError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        where = f"{source}:{mark.line + 1}" if mark else source
        raise ConfigError(f"{where}: not YAML: {problem}", hint="check the indentation") from error
    except Exception as error:  # PyYAML's constructors raise anything, such as an IndexError
        raise ConfigError(f"{source}: not YAML: {error}", hint="check its syntax") from error


def _refuse_duplicates(node: yaml.Node | None, source: str) -> None:
    """YAML forbids the same key twice; PyYAML silently takes the last one."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, source)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                line = key.start_mark.line + 1
                raise ConfigError(
                    f"{source}:{line}: the key {key.value!r} stands here twice",
                    hint="keep one of them",
                )
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
            _refuse_duplicates(value, source)


def _convert(document: _Document, kind: type[T]) -> T:
    try:
        return msgspec.convert(document.data, kind)
    except msgspec.ValidationError as error:
        message = _with_line(document, str(error))
        raise ConfigError(message, hint="see the manual for the keys") from error


def _with_line(document: _Document, message: str) -> str:
    """A message about a field, behind the file and the line of that field."""
    line = _line_of(document.node, message)
    return f"{document.source}:{line}: {message}" if line else f"{document.source}: {message}"


def _line_of(node: yaml.Node | None, message: str) -> int | None:
    """The line of the field that an error's `$.path` names, or of the unknown key itself."""
    path = re.search(r"at `\$([^`]*)`", message)
    steps = re.findall(r"\.([\w-]+)|\[(\d+)\]", path[1]) if path else []
    if unknown := re.search(r"unknown field `([^`]*)`", message):
        steps.append((unknown[1], ""))
    line = None
    for key, index in steps:
        step = _child(node, key, int(index) if index else None)
        if step is None:
            break
        line, node = step
    return line


def _child(node: yaml.Node | None, key: str, index: int | None) -> tuple[int, yaml.Node] | None:
    if isinstance(node, yaml.SequenceNode) and index is not None and index < len(node.value):
        item = node.value[index]
        return item.start_mark.line + 1, item
    if isinstance(node, yaml.MappingNode):
        for found, value in node.value:
            if found.value == key:
                return found.start_mark.line + 1, value
    return None
