"""`templated serve`: the process around the services and the listeners."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import uvloop

from templated import failpoints
from templated.api.server import listeners
from templated.api.systemd import ask_for_time, notify, watchdog
from templated.drivers.configfile import exposed, load_config
from templated.model.config import Config
from templated.services.daemon import Installation, services

log = logging.getLogger("templated")
_THREADS = 32
"""For calls of the host. One that hangs keeps its thread, and others must not wait for that one."""


def run(config_path: Path | None, *, verbose: bool = False) -> None:
    """Serve until SIGTERM or SIGINT. Raises TemplatedError when the daemon cannot start.

    `verbose` logs what hypervisors are asked, too.
    VMs go on when it ends, and the next daemon on the same state_dir adopts them.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(message)s")
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    os.umask(0o077)
    failpoints.arm(os.environ.get(failpoints.VARIABLE, ""))
    _allow_many_files()
    config = load_config(config_path)
    _warn(config, config_path)
    installation = Installation(config)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(config, installation))
    finally:
        installation.close()


async def _serve(config: Config, installation: Installation) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(_THREADS, "call"))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    starting = asyncio.create_task(ask_for_time())
    try:
        await _run_services(stop, starting, config, installation)
    finally:
        await _end(starting)


async def _run_services(
    stop: asyncio.Event, starting: asyncio.Task[None], config: Config, installation: Installation
) -> None:
    async with services(installation) as running, listeners(config, running):
        await _end(starting)
        # The objects made so far stay. The collector need not look at them again, above all not
        # in the middle of a start.
        gc.collect()
        gc.freeze()
        beat = asyncio.create_task(watchdog())
        log.info("serving on %s", config.socket)
        notify(f"READY=1\nSTATUS=serving, {running.clones.lasting()} clones")
        await stop.wait()
        notify("STOPPING=1")
        log.info("stopping; %d clones go on without the daemon", running.clones.lasting())
        running.context.events.close()  # the listeners wait for clients that follow events
        await _end(beat)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _warn(config: Config, path: Path | None) -> None:
    if (found := exposed(path, config)) is not None:
        log.warning(
            "others can read %s, and a secret of gateway.keys is in it: chmod 600 it, or move the "
            "secret to a `secret_file:`",
            found,
        )
    if not config.confine:
        log.warning("confine is false: VMs may do all that the daemon's user may")
    elif config.restore.transport == "exec":
        log.warning("restore.transport is exec: VMs may start programs")


def _allow_many_files() -> None:
    """Raise the soft limit on open files to the hard one: each clone costs three."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # the unit may forbid it, and sets it itself
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))
