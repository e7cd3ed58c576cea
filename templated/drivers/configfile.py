"""YAML files: the configuration and the templates. Every error names the file and the line."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from templated.errors import ConfigError, NotFound
from templated.model.config import Config, default_config_path, defaults
from templated.model.spec import TemplateSpec

T = TypeVar("T")
_MAX_BYTES = 1 << 20


def load_config(path: Path | None) -> Config:
    """Read the configuration, or the defaults when no path is given and no file is there."""
    base = defaults(os.environ, os.geteuid())
    chosen = path or default_config_path(os.environ, os.geteuid())
    if path is None and not chosen.exists():
        return msgspec.convert(base, Config)
    text = _read(chosen)
    given = _parse(text, str(chosen)) or {}
    if not isinstance(given, dict):
        raise ConfigError(
            f"{chosen}: a configuration is a mapping of keys to values", hint="as in accel: auto"
        )
    if "runtime_dir" in given and "socket" not in given:
        base["socket"] = f"{given['runtime_dir']}/templated.sock"
    return _convert({**base, **given}, Config, text, str(chosen))


def parse_template(text: str, source: str) -> TemplateSpec:
    """A template from YAML text; ConfigError names `source`, the line and the field."""
    return _convert(_parse(text, source), TemplateSpec, text, source)


def template_files(directories: tuple[str, ...]) -> dict[str, Path]:
    """The template files by the name they stand for; the first directory wins."""
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
        if len(content) > _MAX_BYTES:
            raise ConfigError(
                f"{path} is too large: {len(content)} bytes", hint="a template is a few KB of YAML"
            )
        return content.decode()
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", hint="check the path and its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8: {error.reason}", hint="save it as UTF-8"
        ) from error


def _parse(text: str, source: str) -> Any:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_duplicates(node, source, set())
        if _expanded(node, {}) > _MAX_BYTES:
            raise ValueError("its aliases name each other too often")
        data = yaml.safe_load(text)
        msgspec.json.encode(data)  # what cannot be told over the API is refused here
        return data
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        where = f"{source}:{mark.line + 1}" if mark else source
        raise ConfigError(f"{where}: not YAML: {problem}", hint="check the indentation") from error
    except (RecursionError, ValueError, TypeError) as error:
        raise ConfigError(f"{source}: not YAML: {error}", hint="check its syntax") from error


def _refuse_duplicates(node: yaml.Node | None, source: str, visited: set[int]) -> None:
    """YAML forbids a key that stands twice; PyYAML takes the last one silently.

    `visited` holds the nodes seen: aliases of aliases would else be walked exponentially often.
    """
    if id(node) in visited:
        return
    visited.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, source, visited)
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
            _refuse_duplicates(value, source, visited)


def _expanded(node: yaml.Node | None, known: dict[int, int]) -> int:
    """How many nodes there are once every alias is written out; each node is counted once."""
    if id(node) not in known:
        known[id(node)] = 1  # of one that holds itself, which is refused later
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        known[id(node)] += sum(_expanded(part, known) for part in inner)
    return known[id(node)]


def _convert(data: Any, kind: type[T], text: str, source: str) -> T:
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        message = str(error)
        line = _line_of(text, message)
        where = f"{source}:{line}" if line else source
        raise ConfigError(f"{where}: {message}", hint="see the manual for the keys") from error


def _line_of(text: str, message: str) -> int | None:
    """The line of the field that an error's `$.path` names, or of the unknown key itself."""
    path = re.search(r"at `\$([^`]*)`", message)
    node = yaml.compose(text, Loader=yaml.SafeLoader)
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
