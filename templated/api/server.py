"""The listeners: the API on its unix socket, the metrics and the gateway on TCP."""

from __future__ import annotations

import contextlib
import grp
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web

from templated.api import handlers
from templated.api.answers import SERVICES
from templated.api.callers import Callers
from templated.api.errors import errors_as_json
from templated.api.gate import Gate, guarded
from templated.api.gateway.server import gateway
from templated.api.routes import ROUTES
from templated.drivers.host.files import bind_private
from templated.errors import ConfigError, HostError
from templated.model.config import Config, MetricsConfig, SocketConfig
from templated.services.daemon import Services

_MAX_BODY = 64 << 20
# Bytes of a request's first line: the settings of a deploy are in it, with up to 4 KiB of
# environment, of which each byte may be written as eight.
_MAX_LINE = 1 << 16
_SHUTDOWN = 1.0
# Requests that wait to be accepted; more are refused. The kernel's bound is net.core.somaxconn.
_BACKLOG = 4096


def make_app(config: Config, services: Services) -> web.Application:
    """The API as an aiohttp application. ConfigError when `access` names nobody of this host."""
    gate = Gate(Callers(config.access), services.audit)
    app = web.Application(middlewares=[gate.middleware, errors_as_json], client_max_size=_MAX_BODY)
    app[SERVICES] = services
    for route in ROUTES:
        app.router.add_route(route.method, route.path, guarded(route))
    return app


@asynccontextmanager
async def listeners(config: Config, services: Services) -> AsyncIterator[None]:
    """Serve until the block ends. HostError or ConfigError when a listener cannot be had."""
    async with contextlib.AsyncExitStack() as stack:
        listener = _unix_listener(config)
        stack.callback(_unlink, Path(config.socket), os.stat(config.socket).st_ino)
        api = web.AppRunner(
            make_app(config, services),
            access_log=None,
            shutdown_timeout=_SHUTDOWN,
            max_line_size=_MAX_LINE,
        )
        await api.setup()
        stack.push_async_callback(api.cleanup)
        await web.SockSite(api, listener, backlog=_BACKLOG).start()
        if config.metrics is not None:
            await _serve_metrics(config.metrics, services, stack)
        memory = services.templates.memory
        await stack.enter_async_context(gateway(config, services.functions, services.audit, memory))
        yield


def _unix_listener(config: Config) -> socket.socket:
    path = Path(config.socket)
    _refuse_second_daemon(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_socket():
            raise HostError(f"{path} is there and is no socket", hint="remove it, or set `socket:`")
        path.unlink(missing_ok=True)
        bind_private(listener, path)  # nobody gets in before it has the right mode
        _give_access(path, config.socket_access)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise HostError(
            f"cannot listen on {path}: {error.strerror or error}", hint="see `socket:`"
        ) from error
    except BaseException:
        listener.close()
        raise
    return listener


def _refuse_second_daemon(path: Path) -> None:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(path))
        raise HostError(
            f"another daemon listens on {path}",
            hint="stop it, or set another `socket:`",
        )


def _give_access(path: Path, access: SocketConfig) -> None:
    if access.group is not None:
        try:
            gid = grp.getgrnam(access.group).gr_gid
        except KeyError:
            raise ConfigError(
                f"socket_access.group: there is no group {access.group}",
                hint=f"groupadd --system {access.group}",
            ) from None
        with contextlib.suppress(OSError):
            # chown(2): a file may be given to a group of one's own without CAP_CHOWN.
            os.setgroups([*os.getgroups(), gid])
        os.chown(path, -1, gid)
    os.chmod(path, int(access.mode, 8))


def _unlink(path: Path, inode: int) -> None:
    with contextlib.suppress(OSError):
        if path.stat().st_ino == inode:
            path.unlink()


async def _serve_metrics(
    config: MetricsConfig, services: Services, stack: contextlib.AsyncExitStack
) -> None:
    host, _, port = config.listen.rpartition(":")
    app = web.Application()
    app[SERVICES] = services
    app.router.add_get("/metrics", handlers.metrics)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=_SHUTDOWN)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    try:
        await web.TCPSite(runner, host.strip("[]") or None, int(port)).start()
    except (OSError, OverflowError) as error:
        raise HostError(
            f"cannot serve metrics on {config.listen}: {getattr(error, 'strerror', None) or error}",
            hint="set metrics.listen to a free address, or `metrics: null`",
        ) from error
