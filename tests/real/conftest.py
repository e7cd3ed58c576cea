"""Fixtures with real virtual machines. The image is built once per run of the tests."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from templated.drivers.image.store import Image, ImageStore
from templated.model.spec import ImageSpec
from tests.real.harness import Daemon

pytest.register_assert_rewrite("tests.hypervisor_contract")


@pytest.fixture(scope="session")
def image_store() -> Iterator[Path]:
    """A state directory whose `images` all daemons of the run share.

    TEMPLATED_TEST_IMAGES names one that stays, so that a developer builds the image only once.
    """
    kept = os.environ.get("TEMPLATED_TEST_IMAGES")
    if kept:
        Path(kept, "images").mkdir(parents=True, exist_ok=True)
        yield Path(kept)
        return
    store = Path(tempfile.mkdtemp(prefix="tpi.", dir="/tmp"))
    (store / "images").mkdir()
    yield store
    shutil.rmtree(store, ignore_errors=True)


@pytest.fixture(scope="session")
def shared_image(image_store: Path) -> Image:
    """The image of templates that ask for nothing special, python-fn among them."""
    work = ImageStore(image_store).ensure(ImageSpec(), on_progress=lambda line: None)
    return asyncio.run(work)


def prepare(daemon: Daemon, image_store: Path) -> Daemon:
    """Let a daemon use the shared images."""
    daemon.state.mkdir(parents=True, mode=0o700)
    (daemon.state / "images").symlink_to(image_store / "images")
    return daemon


@pytest.fixture(scope="session")
def built(image_store: Path) -> Iterator[Daemon]:
    """A daemon with `python-fn` built, shared by tests that leave no clone behind."""
    daemon = prepare(Daemon(), image_store)
    try:
        daemon.start()
        daemon.build()
        yield daemon
    finally:
        daemon.close()


@pytest.fixture
def host(built: Daemon) -> Iterator[Daemon]:
    """The shared daemon; whatever a test leaves is removed, and it must then hold nothing."""
    yield built
    built.cli("rm", "--all", "--yes")
    assert built.qemus() == []


@pytest.fixture
def copied(built: Daemon, fresh: Daemon) -> Daemon:
    """A daemon of a test's own that has `python-fn` built, not started yet."""
    fresh.copy_build(built)
    return fresh


@pytest.fixture
def fresh(image_store: Path) -> Iterator[Daemon]:
    """A daemon of a test's own, not started yet."""
    daemon = prepare(Daemon(), image_store)
    try:
        yield daemon
    finally:
        daemon.close()
