"""Functions of nodes that share a store: code goes there once, and comes back whole or not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import obstore
import pytest

from templated.drivers.objectstore import connect
from tests.real.conftest import prepare
from tests.real.harness import Daemon
from tests.real.objectstore import Server

if TYPE_CHECKING:
    from obstore import ObjectMeta

pytestmark = pytest.mark.real

APP = "def handler(event, context):\n    return [event, {number}]\n"
_DATA = 2 << 20


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A store that all nodes share."""
    made = Server()
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def nodes(built: Daemon, image_store: Path, server: Server) -> Iterator[list[Daemon]]:
    """Two daemons that serve functions."""
    made = [_node(image_store, server) for _ in range(2)]
    try:
        for node in made:
            node.copy_build(built)
            node.start()
        yield made
    finally:
        for node in made:
            node.close()


def _node(image_store: Path, server: Server) -> Daemon:
    store = msgspec.to_builtins(server.config(timeout="2s"))
    return prepare(Daemon(code={"store": store}), image_store)


def _source(folder: Path, number: int, size: int = _DATA) -> Path:
    """A directory of code that no other test has."""
    folder.mkdir(exist_ok=True)
    (folder / "app.py").write_text(APP.format(number=number))
    (folder / "data").write_bytes(os.urandom(size))
    return folder


def _words(name: str, source: Path) -> tuple[str, ...]:
    return "function", "deploy", name, "--code", str(source), "--handler", "app.handler"


def _deploy(node: Daemon, name: str, source: Path) -> str:
    """Deploy, and return the digest."""
    node.cli(*_words(name, source))
    return str(node.json("function", "show", name)["code"]["digest"])


def _invoke(node: Daemon, name: str, event: Any = None) -> Any:
    return node.json("invoke", name, "--payload", json.dumps(event))


def _objects(server: Server) -> dict[str, ObjectMeta]:
    store: Any = connect(server.config())._store
    return {meta["path"]: meta for batch in obstore.list(store) for meta in batch}


def _kept(node: Daemon) -> set[str]:
    """The files of the code on a node."""
    return {path.name for path in (node.state / "code").rglob("*") if path.is_file()}


def _image(node: Daemon, digest: str) -> Path:
    return node.state / "code" / f"{digest}.img"


def _content(image: Path) -> bytes:
    """Without the hole at its end."""
    record = json.loads(image.with_suffix(".json").read_text())
    with open(image, "rb") as content:
        return content.read(record["size"])


def test_code_is_sent_once(
    nodes: list[Daemon], server: Server, image_store: Path, tmp_path: Path
) -> None:
    """The second node sends no chunk again; a third one that never saw the function has it."""
    source = _source(tmp_path / "code", 1)
    digest = _deploy(nodes[0], "shared", source)
    before = _objects(server)
    assert f"code/{digest}" in before
    assert sum(key.startswith("chunks/") for key in before) >= _DATA // 524288
    assert _deploy(nodes[1], "shared", source) == digest
    after = _objects(server)
    assert {key for key in after if after[key] != before.get(key)} <= {f"code/{digest}"}
    assert [_invoke(node, "shared", "x")["payload"] for node in nodes] == [["x", 1]] * 2
    third = _node(image_store, server)
    try:
        third.start()
        third.cli("code", "prefetch", digest)
        (row,) = third.json("code", "ls")
        assert row["digest"] == digest and row["verified"] and not row["needed"]
        assert _content(_image(third, digest)) == _content(_image(nodes[0], digest))
        assert "there is no code" in third.fails("code", "prefetch", "0" * 64)
        # Nothing needs it here: it goes when it is asked for, once it rests.
        third.stop()
        os.utime(third.state / "code" / f"{digest}.json", (0, 0))
        third.start()
        third.cli("code", "gc")
        assert third.json("code", "ls") == [] and not _image(third, digest).exists()
        third.cli("code", "prefetch", digest)
        assert _image(third, digest).exists()
    finally:
        third.close()


def test_code_that_is_gone_or_damaged_is_fetched(nodes: list[Daemon], tmp_path: Path) -> None:
    """An image that was removed or changed is never used: it comes from the store again."""
    node = nodes[0]
    source = _source(tmp_path / "code", 2)
    digest = _deploy(node, "again", source)
    image = _image(node, digest)
    whole = _content(image)
    image.unlink()
    assert _invoke(node, "again", 1)["payload"] == [1, 2]
    assert _content(image) == whole
    node.stop()
    image.chmod(0o644)
    with open(image, "r+b") as content:
        at = whole.index(b"def handler")
        content.seek(at)
        content.write(b"xef")
    image.chmod(0o444)
    node.start()
    assert _invoke(node, "again", 2)["payload"] == [2, 2]
    assert _content(image) == whole
    assert f"code {digest} is damaged on this node" in node.log


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_the_disk_is_full(copied: Daemon, tmp_path: Path) -> None:
    """Code that does not fit is refused in one line and leaves nothing; smaller code is served."""
    folder = copied.state / "code"
    folder.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True)
    try:
        copied.start()
        before = _kept(copied)
        large = _source(tmp_path / "large", 5, size=8 << 20)
        assert "No space left" in copied.fails(*_words("large", large))
        # Small as an archive.
        (large / "data").write_bytes(b"templated" * (1 << 20))
        assert "no space is left" in copied.fails(*_words("large", large))
        assert _kept(copied) == before
        assert copied.json("function", "ls") == []
        _deploy(copied, "small", _source(tmp_path / "small", 6, size=1000))
        assert _invoke(copied, "small", 1)["payload"] == [1, 6]
        copied.cli("function", "rm", "small")
        copied.stop()
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("silent", [True, False])
def test_the_store_is_down(
    nodes: list[Daemon], server: Server, tmp_path: Path, silent: bool
) -> None:
    """What is on the node goes on, a new instance too; a deploy fails and leaves nothing.

    It does not answer, or is gone: the last test here, since it is not started again.
    """
    node, name = nodes[0], f"local-{silent}".lower()
    digest = _deploy(node, name, _source(tmp_path / "code", 3))
    kept = _kept(node)
    other = _source(tmp_path / "other", 4)
    assert server.process is not None
    os.killpg(server.process.pid, signal.SIGSTOP if silent else signal.SIGKILL)
    try:
        assert _invoke(node, name, "new")["payload"] == ["new", 3]
        for wanted in (name, "absent"):
            error = node.fails(*_words(wanted, other), timeout=60)
            assert "s3://" in error, error
            assert ("did not answer within 2 s" if silent else "refused") in error, error
        assert _kept(node) == kept
        assert node.json("function", "show", name)["code"]["digest"] == digest
        assert "absent" in node.fails("function", "show", "absent")
        assert _invoke(node, name, "old")["payload"] == ["old", 3]
    finally:
        os.killpg(server.process.pid, signal.SIGCONT)
    if silent:
        _deploy(node, name, other)
        assert _invoke(node, name, "x")["payload"] == ["x", 4]
