"""Template files: an error names the file, the line and the field, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from templated.drivers.configfile import load_template, parse_template, template_files
from templated.errors import ConfigError, InvalidRequest, NotFound
from templated.model.spec import ExecProbe, HttpProbe, SettleProbe, TcpProbe
from templated.model.units import size_bytes
from templated.services.templates.probes import check_patterns, forwarded_ports, type_of

SHIPPED = sorted((Path(__file__).parents[2] / "templates").glob("*.yaml"))

FULL = """\
name: full
description: all there is
image: {suite: bookworm, packages: [python3-minimal], size: 2GiB, mirror: "http://deb.debian.org"}
machine: {type: q35, memory: 256MiB, vcpus: 2, cmdline: "a=1"}
boot_timeout: 60s
start_timeout: 500ms
probes:
  - {name: up, type: agent}
  - {name: console, type: serial, pattern: "login:"}
  - {name: run, type: exec, command: [sh, -c, "exit 3"], exit_code: 3, interval: 1s}
  - {name: port, type: tcp, port: 8080, via: forward}
  - {name: web, type: http, port: 80, path: /health, status: 204, timeout: 2m}
  - {name: quiet, type: settle, cpu_percent: 50, quiet: 250ms}
identity: {timeout: 3s, clock_tolerance: 10ms}
network: {dns: [10.0.0.53]}
"""


def refused(text: str) -> ConfigError:
    """The error for a template's text, with what holds for every one of them checked."""
    with pytest.raises(ConfigError) as caught:
        parse_template(text, "/t/a.yaml")
    error = caught.value
    assert error.message.startswith("/t/a.yaml") and "\n" not in error.message
    assert error.hint and "\n" not in error.hint
    return error


def test_everything() -> None:
    """Every key and every type of probe."""
    spec = parse_template(FULL, "here")
    assert (spec.machine.type, spec.machine.vcpus, spec.boot_timeout) == ("q35", 2, "60s")
    kinds = [type_of(probe) for probe in spec.probes]
    assert kinds == ["agent", "serial", "exec", "tcp", "http", "settle"]
    _, _, run, port, web, quiet = spec.probes
    assert isinstance(run, ExecProbe) and run.command == ("sh", "-c", "exit 3")
    assert isinstance(port, TcpProbe) and isinstance(web, HttpProbe) and web.status == 204
    assert isinstance(quiet, SettleProbe) and quiet.cpu_percent == 50
    assert forwarded_ports(spec.probes) == [8080]


OWN = "name: t\nmachine: {type: q35}\nidentity: {agent: qemu-ga}\n"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("name: t\nimage: {boot: disk}\n", "needs machine.type: q35"),
        ("name: t\nmachine: {type: q35}\nimage: {path: /a}\n", "needs identity.agent: qemu-ga"),
        ("name: t\nidentity: {agent: qemu-ga}\n", "go with an image that boots itself"),
        ("name: t\nmachine: {type: q35, firmware: uefi}\n", "go with an image that boots itself"),
        (OWN + "code: true\nimage: {boot: disk}\n", "code: true needs our agent"),
        (OWN + "image: {path: /a, boot: disk}\n", "neither boot, packages nor mirror"),
        (OWN + "image: {path: /a, packages: [b]}\n", "neither boot, packages nor mirror"),
        (OWN + "image: {seed: {}, boot: disk}\n", "seed is for an image that has a path"),
        (OWN + "image: {path: a.qcow2}\n", "path"),
        (OWN + "image: {path: /a, seed: {user-data: x}}\n", "unknown field `user-data`"),
        (OWN.replace("q35}", 'q35, cmdline: "a=1"}') + "image: {path: /a}\n", "cmdline has no use"),
    ],
)
def test_images_that_boot_themselves(text: str, what: str) -> None:
    """What does not go together is refused when it is read."""
    assert what in refused(text).message


def test_an_image_of_ones_own() -> None:
    """A file, a seed, UEFI."""
    spec = parse_template(
        OWN.replace("q35", "q35, firmware: uefi")
        + "image: {path: /a.qcow2, seed: {user_data: '#cloud-config'}}\n",
        "here",
    )
    assert spec.image.boots_itself and spec.identity.agent == "qemu-ga"
    assert spec.image.seed is not None and spec.image.seed.user_data == "#cloud-config"


def test_a_name_is_enough() -> None:
    """All else has a default."""
    spec = parse_template("name: t", "here")
    assert (spec.machine.type, spec.machine.memory, spec.probes) == ("microvm", "128MiB", ())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_templates(path: Path) -> None:
    """What comes with the project is right, down to its patterns."""
    spec = load_template((str(path.parent),), path.stem)
    check_patterns(spec.probes)
    assert spec.description


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("name: t\nimages: {}\n", ":2", "unknown field `images`"),
        ("name: t\nmachine:\n  type: q35\n  ram: 1\n", ":4", "unknown field `ram`"),
        ("name: t\nmachine:\n  memory: 12\n", ":3", "`$.machine.memory`"),
        ("name: t\nmachine:\n  memory: 128MB\n", ":3", "`$.machine.memory`"),
        ("name: t\nmachine:\n  memory: 0MiB\n", ":3", "`$.machine.memory`"),
        ("name: t\nmachine:\n  memory: -1MiB\n", ":3", "`$.machine.memory`"),
        ("name: t\nboot_timeout: 30\n", ":2", "`$.boot_timeout`"),
        ("name: t\nboot_timeout: soon\n", ":2", "`$.boot_timeout`"),
        ("name: t\nmachine:\n  vcpus: 65\n", ":3", "<= 64"),
        ("name: t\nmachine:\n  vcpus: two\n", ":3", "Expected `int`, got `str`"),
        ("name: t\nmachine:\n  vcpus: true\n", ":3", "Expected `int`, got `bool`"),
        ("name: t\nmachine:\n  type: pc\n", ":3", "Invalid enum value 'pc'"),
        ("name: t\nmachine: q35\n", ":2", "Expected `object`, got `str`"),
        ("name: t\nimage:\n  packages: curl\n", ":3", "Expected `array`, got `str`"),
        ("name: t\nimage:\n  packages:\n  - a\n  - ../b\n", ":5", "`$.image.packages[1]`"),
        ("name: t\nimage:\n  mirror: ftp://x/\n", ":3", "`$.image.mirror`"),
        ("name: t\nprobes:\n- {name: a, type: agent}\n- {name: b}\n", ":4", "field `type`"),
        ("name: t\nprobes:\n- {name: b, type: ping}\n", ":3", "Invalid value 'ping'"),
        ("name: t\nprobes:\n- {name: b, type: exec}\n", ":3", "field `command`"),
        ("name: t\nprobes:\n- {name: b, type: exec, command: []}\n", ":3", "length >= 1"),
        ("name: t\nprobes:\n- {name: b, type: tcp, port: 0}\n", ":3", ">= 1"),
        ("name: t\nprobes:\n- {name: b, type: tcp, port: 1, path: /}\n", ":3", "field `path`"),
        ("name: t\nprobes:\n- name: b\n  type: http\n  port: 1\n  path: x\n", ":6", "].path`"),
        ("name: t\nprobes:\n- {name: s, type: settle, cpu_percent: .nan}\n", ":3", "> 0.0"),
        ("name: t\nprobes:\n- {name: B, type: agent}\n", ":3", "`$.probes[0].name`"),
        ("name: T\n", ":1", "`$.name`"),
        ("name: 2020-01-01\n", ":1", "got `date`"),
        ("name: 'a/../b'\n", ":1", "`$.name`"),
        (f"name: {'a' * 50}\n", ":1", "`$.name`"),
        ("description: no name\n", "", "missing required field `name`"),
        ("", "", "got `null`"),
        ("- name: t\n", "", "got `array`"),
        ("just text\n", "", "got `str`"),
        ("{1: 2}\n", "", "Expected `str`"),
        ("name: t\nname: u\n", ":2", "'name' stands here twice"),
        ("name: t\nmachine:\n  vcpus: 1\n  vcpus: 2\n", ":4", "'vcpus' stands here twice"),
        ("name: t\nprobes:\n- name: a\n  type: agent\n  name: b\n", ":5", "stands here twice"),
        ("name: t\n  machine: {}\n", ":2", "not YAML"),
        ("name: [t\n", ":2", "not YAML"),
        ("\tname: t\n", ":1", "not YAML"),
        ("name: *nobody\n", ":1", "not YAML: an alias"),
        ("name: t\n---\nname: u\n", ":2", "not YAML"),
        (
            "name: !!python/object:os.system x\n",
            ":1",
            "not YAML: could not determine a constructor",
        ),
        ('name: "a\x00b"\n', "", "not YAML"),
        ("a: 1\nb: &b [*b]\n", ":2", "not YAML: an alias"),
        # Found by tests/fuzz/test_files.py, as are those below.
        ("name: !!int ''\n", "", "not YAML"),
        ("name: !!bool x\n", "", "not YAML"),
        ("name: !!timestamp x\n", "", "not YAML"),
        ('name: t\n"a\\nb": 1\n', ":2", "unknown field `a b`"),
        ("a: " + "[" * 5000, "", "not YAML"),
    ],
)
def test_refused(text: str, where: str, what: str) -> None:
    """One line, beginning with FILE:LINE, that names the field."""
    message = refused(text).message
    assert what in message
    assert message.startswith(f"/t/a.yaml{where}: ")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(
            "? [a, b]\n: c\n",
            id="a list as a key",
        ),
        pytest.param(
            'name: t\nmachine: {memory: "128MiB\\n"}\n',
            id="a newline after a size",
        ),
        pytest.param(
            'name: t\nboot_timeout: "30s\\n"\n',
            id="a newline after a duration",
        ),
        pytest.param(
            'name: t\nimage: {packages: ["curl\\n"]}\n',
            id="a newline after a package",
        ),
        pytest.param(
            'name: t\ndescription: "\\ud800"\n',
            id="half a character",
        ),
        pytest.param(
            "name: t\nprobes: [{name: s, type: settle, quiet: 0s}]\n",
            id="no time to settle in",
        ),
    ],
)
def test_refused_too(text: str) -> None:
    """What would only fail in the middle of a build is refused when it is read."""
    refused(text)


def test_sizes_are_whole_sizes() -> None:
    """What the pattern lets through can be counted."""
    spec = parse_template("name: t\nmachine: {memory: 9999999999GiB}", "here")
    assert size_bytes(spec.machine.memory) == 9999999999 << 30


def test_patterns() -> None:
    """A pattern that is no regular expression is told with the probe's number."""
    spec = parse_template(FULL.replace('"login:"', '"log(in"'), "here")
    with pytest.raises(InvalidRequest, match=r"probes\[1\]\.pattern") as caught:
        check_patterns(spec.probes)
    assert "backslash" in caught.value.hint


def test_files(tmp_path: Path) -> None:
    """The first directory wins; what is not NAME.yaml is not a template."""
    first, second = tmp_path / "1", tmp_path / "2"
    for directory, text in ((first, "first"), (second, "second")):
        directory.mkdir()
        (directory / "a.yaml").write_text(f"name: a\ndescription: {text}\n")
    (second / "b.yaml").write_text("name: b\n")
    (second / "c.yml").write_text("name: c\n")
    directories = (str(first), str(second), str(tmp_path / "missing"))
    assert sorted(template_files(directories)) == ["a", "b"]
    assert load_template(directories, "a").description == "first"
    with pytest.raises(NotFound, match="no template c") as caught:
        load_template(directories, "c")
    assert "c.yaml" in caught.value.hint
    with pytest.raises(NotFound):
        load_template(directories, "../1/a")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"name: \xff\n", "not UTF-8"),
        (b"name: a\n" + b"#" * (1 << 20), "too large"),
        (b"name: b\n", "the name in it is b, not a"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, what: str) -> None:
    """Errors of the file itself name it too."""
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=what) as caught:
        load_template((str(tmp_path),), "a")
    assert str(path) in caught.value.message and caught.value.hint


def test_a_directory_is_not_a_template(tmp_path: Path) -> None:
    """What cannot be read is told with the reason."""
    (tmp_path / "a.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"cannot read .*a\.yaml: Is a directory"):
        load_template((str(tmp_path),), "a")


def test_a_text_that_is_too_large() -> None:
    """Also one that did not come from a file: reading it would take minutes."""
    assert "too large" in refused("#" * (1 << 20) + "\nname: t\n").message
