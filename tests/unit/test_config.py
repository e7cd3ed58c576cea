"""The configuration: its places, its defaults, and what a mistake in it says."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from templated.drivers.configfile import exposed, load_config
from templated.errors import ConfigError
from templated.model.config import Config, default_config_path, defaults
from templated.model.network import BridgeNetwork, UserNetwork
from templated.model.socket import default_socket
from templated.services.places import Layout


def written(tmp_path: Path, text: str) -> Path:
    """A configuration file."""
    path = tmp_path / "templated.yaml"
    path.write_text(text)
    return path


def test_root() -> None:
    """The places that docs and units name."""
    config = msgspec.convert(defaults({}, 0), Config)
    assert config.state_dir == "/var/lib/templated"
    assert (config.runtime_dir, config.shm_dir) == ("/run/templated", "/dev/shm/templated")
    assert config.socket == "/run/templated/templated.sock"
    assert config.template_dirs == ("/etc/templated/templates",)
    assert config.metrics is not None and config.metrics.listen == "127.0.0.1:9177"
    assert (config.accel, config.restore.transport) == ("auto", "fd")
    assert config.network == UserNetwork()
    assert default_config_path({}, 0) == Path("/etc/templated/templated.yaml")


def test_anyone_else() -> None:
    """The XDG Base Directory Specification, with its own defaults where a variable is missing."""
    env = {
        "HOME": "/home/u",
        "XDG_STATE_HOME": "/x/state",
        "XDG_CONFIG_HOME": "/x/config",
        "XDG_RUNTIME_DIR": "/x/run",
    }
    config = msgspec.convert(defaults(env, 1000), Config)
    assert config.state_dir == "/x/state/templated"
    assert config.template_dirs == ("/x/config/templated/templates",)
    assert config.socket == "/x/run/templated/templated.sock"
    assert config.shm_dir == "/dev/shm/templated-1000"
    assert default_config_path(env, 1000) == Path("/x/config/templated/templated.yaml")
    config = msgspec.convert(defaults({"HOME": "/home/u"}, 1000), Config)
    assert config.state_dir == "/home/u/.local/state/templated"
    assert config.template_dirs == ("/home/u/.config/templated/templates",)


@pytest.mark.parametrize(
    ("environment", "uid"),
    [
        ({}, 0),
        ({"XDG_RUNTIME_DIR": "/run/user/0"}, 0),
        ({}, 1000),
        ({"XDG_RUNTIME_DIR": "/run/user/1000"}, 1000),
        ({"TEMPLATED_SOCKET": "", "XDG_RUNTIME_DIR": ""}, 1000),
    ],
)
def test_the_client_finds_the_daemon(environment: dict[str, str], uid: int) -> None:
    """TEMPLATED_SOCKET, or the place where the daemon listens by default."""
    assert default_socket(environment, uid) == defaults(environment, uid)["socket"]
    assert default_socket({**environment, "TEMPLATED_SOCKET": "/s"}, uid) == "/s"


def test_file(tmp_path: Path) -> None:
    """What is given replaces its default, and the socket follows runtime_dir."""
    text = """\
runtime_dir: /r
accel: tcg
metrics: null
network: {mode: bridge, bridge: br0, nat: true}
restore: {transport: exec}
slots: {ready: 0}
socket_access: {mode: "0600", group: kvm}
"""
    config = load_config(written(tmp_path, text))
    assert (config.runtime_dir, config.socket) == ("/r", "/r/templated.sock")
    assert config.metrics is None and config.accel == "tcg" and config.slots.ready == 0
    assert config.network == BridgeNetwork(bridge="br0", nat=True)
    assert config.socket_access.group == "kvm" and config.restore.transport == "exec"


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    """So does one of only comments."""
    assert load_config(written(tmp_path, "# nothing\n")) == load_config(written(tmp_path, ""))


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("acel: tcg\n", ":1", "unknown field `acel`"),
        ("# a\nmetrics:\n  port: 1\n", ":3", "unknown field `port`"),
        ("accel: xen\n", ":1", "`$.accel`"),
        ("state_dir: here\n", ":1", "`$.state_dir`"),
        ("runtime_dir: 5\n", ":1", "`$.runtime_dir`"),
        ("template_dirs: /t\n", ":1", "Expected `array`"),
        ("template_dirs:\n- /t\n- t\n", ":3", "`$.template_dirs[1]`"),
        ("metrics: {listen: here}\n", ":1", "`$.metrics.listen`"),
        ("network: {mode: vlan}\n", ":1", "Invalid value 'vlan'"),
        ("network:\n  mode: user\n  bridge: x\n", ":3", "unknown field `bridge`"),
        ("network:\n  mode: user\n  subnet: 10.0.0.1/16\n", ":1", "host bits set"),
        ("limits: {clones: 0}\n", ":1", ">= 1"),
        ("socket_access: {mode: rwx}\n", ":1", "`$.socket_access.mode`"),
        ("restore: {transport: tcp}\n", ":1", "`$.restore.transport`"),
        ("accel: tcg\naccel: kvm\n", ":2", "stands here twice"),
        ("accel: [\n", ":2", "not YAML"),
        ("- accel\n", "", "mapping of keys to values"),
        ("text\n", "", "mapping of keys to values"),
    ],
)
def test_refused(tmp_path: Path, text: str, where: str, what: str) -> None:
    """One line that begins with FILE:LINE and names the key; and a hint."""
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.message.startswith(f"{path}{where}: ")
    assert what in caught.value.message and "\n" not in caught.value.message
    assert caught.value.hint


def test_secrets_that_others_can_read(tmp_path: Path) -> None:
    """The file is named when it has one and is not the daemon's alone."""
    path = written(tmp_path, "gateway: {keys: [{id: ABC, secret: 0123456789}]}\n")
    for mode, found in ((0o644, path), (0o640, path), (0o600, None)):
        path.chmod(mode)
        assert exposed(path, load_config(path)) == found
    path = written(tmp_path, "gateway: {keys: [{id: ABC, secret_file: /x}]}\n")
    path.chmod(0o644)
    assert exposed(path, load_config(path)) is None


def test_a_missing_file(tmp_path: Path) -> None:
    """One that was asked for must be there."""
    with pytest.raises(ConfigError, match=r"cannot read .*: No such file") as caught:
        load_config(tmp_path / "none.yaml")
    assert caught.value.hint


def test_sockets_fit_their_path(tmp_path: Path) -> None:
    """A runtime_dir that is too long for a socket's address is told at the start."""
    config = load_config(written(tmp_path, f"runtime_dir: {tmp_path}/{'x' * 100}\n"))
    with pytest.raises(ConfigError, match="too long for the sockets"):
        Layout(config).create()


def test_aliases_of_aliases(tmp_path: Path) -> None:
    """They could name each other exponentially often: none is taken."""
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    path = tmp_path / "c.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"c\.yaml:2: not YAML: an alias"):
        load_config(path)
