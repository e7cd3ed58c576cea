"""The listener of the gateway, and the way of a request through it."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from aiohttp import web

from templated.api.gateway.body import Bodies, digest_of
from templated.api.gateway.call import Call, Desk, Operation
from templated.api.gateway.errors import Refused, answer, translated
from templated.api.gateway.keys import Key, read_keys
from templated.api.gateway.names import Place
from templated.api.gateway.record import Recorder
from templated.api.gateway.table import find
from templated.api.gateway.views import Memory, Views
from templated.errors import HostError, TemplatedError
from templated.model.access import describe, grant
from templated.model.config import Config, GatewayConfig
from templated.services.functions.functions import Functions
from templated.services.reports.audit import AuditLog

if TYPE_CHECKING:
    from templated.api.gateway.signature import Claim, Verifier

log = logging.getLogger("templated.api.gateway")
_SHUTDOWN = 1.0
_BACKLOG = 4096
# Seconds that a connection may be without a request, or begin one and not go on.
_IDLE = 75.0
_ID = "x-amzn-RequestId"


@asynccontextmanager
async def gateway(
    config: Config,
    functions: Functions,
    audit: AuditLog,
    memory: Memory = lambda template: None,
) -> AsyncIterator[tuple[str, int] | None]:
    """Serve Lambda's API until the block ends; None, and nothing listens, without a key.

    Gives the address that it listens on. `memory` tells the MiB of a template's guests, if it is
    known. Raises ConfigError for a key that cannot be used, HostError when the address cannot be
    had.
    """
    settings = config.gateway
    if settings is None or not settings.keys:
        yield None
        return
    verifier = await asyncio.to_thread(_verifier, settings)
    place = Place(settings.region, settings.account)
    desk = Desk(config, functions, place, Views(place, memory))
    # What is no HTTP is answered, and is no news: aiohttp would log a traceback for each.
    silent = logging.getLogger("templated.api.gateway.http")
    silent.setLevel(logging.CRITICAL + 1)
    # The body is what was signed: it is not unpacked.
    server = web.Server(
        Gateway(desk, verifier, Recorder(audit)).serve,
        access_log=None,
        logger=silent,
        auto_decompress=False,
        keepalive_timeout=_IDLE,
    )
    runner = web.ServerRunner(server, shutdown_timeout=_SHUTDOWN)
    await runner.setup()
    try:
        await _listen(settings.listen, runner)
        host, port = runner.addresses[0][:2]
        log.info("the gateway serves on %s:%s", host, port)
        yield host, port
    finally:
        await runner.cleanup()


def _verifier(settings: GatewayConfig) -> Verifier:
    # Only here: importing botocore takes a tenth of a second.
    from templated.api.gateway.signature import Verifier

    return Verifier(read_keys(settings.keys), settings.region)


async def _listen(address: str, runner: web.ServerRunner) -> None:
    host, _, port = address.rpartition(":")
    if not _loopback(host.strip("[]")):
        log.warning(
            "gateway.listen: other hosts can reach %s, and what they send is not encrypted", address
        )
    try:
        site = web.TCPSite(runner, host.strip("[]") or None, int(port), backlog=_BACKLOG)
        await site.start()
    except (OSError, OverflowError) as error:
        raise HostError(
            f"the gateway cannot listen on {address}: {getattr(error, 'strerror', None) or error}",
            hint="set gateway.listen to a free address, or `gateway: null`",
        ) from error


def _loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


class Gateway:
    """Finds the operation of a request, checks who sent it, and has it done."""

    def __init__(self, desk: Desk, verifier: Verifier, recorder: Recorder) -> None:
        self._desk = desk
        self._verifier = verifier
        self._recorder = recorder
        self._bodies = Bodies()

    async def serve(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request. No request ends in a traceback."""
        number = str(uuid.uuid4())
        try:
            response = await self._answered(request)
        except Refused as refused:
            response = answer(refused)
        except ConnectionError:
            raise  # the client has gone
        except Exception:
            log.exception("%s %s failed", request.method, request.raw_path[:200])
            response = answer(_defect())
        response.headers.setdefault(_ID, number)
        response.headers["Server"] = "templated"
        return response

    async def _answered(self, request: web.BaseRequest) -> web.Response:
        path = request.raw_path.partition("?")[0]
        operation, names = find(request.method, path)
        with self._strangers(request, operation):
            claim = self._claimed(request)
        with self._bodies.room(request, operation.limit, operation.name):
            body = await self._bodies.read(request, operation.limit, operation.name)
            digest = await digest_of(body)
            with self._strangers(request, operation):
                self._verifier.check(claim, digest)
            call = Call(self._desk, claim.key, names, request.query, request.headers, body)
            return await self._done(operation, call)

    @contextlib.contextmanager
    def _strangers(self, request: web.BaseRequest, operation: Operation) -> Iterator[None]:
        """Record who has not signed; the rest of such a request is not waited for."""
        try:
            yield
        except Refused as refused:
            refused.close = not request.content.at_eof()
            self._recorder.stranger(operation)
            raise

    def _claimed(self, request: web.BaseRequest) -> Claim:
        from templated.api.gateway.signature import Head

        return self._verifier.claim(Head(request.method, request.raw_path, request.headers.items()))

    async def _done(self, operation: Operation, call: Call) -> web.Response:
        refused = None
        try:
            _allow(operation, call.key, self._desk.place)
            response = await operation.handler(call)
        except Refused as error:
            refused = error
            raise
        except TemplatedError as error:
            refused = translated(error)
            raise refused from error
        except BaseException:
            refused = _defect()
            raise
        finally:
            with contextlib.suppress(Refused, TemplatedError):
                # What it was about, where the operation did not come to look.
                call.about = call.about or (call.target.name if call.names else "")
            self._recorder.answered(operation, call, refused)
        if call.id:
            response.headers[_ID] = call.id
        return response


def _allow(operation: Operation, key: Key, place: Place) -> None:
    if not grant(key.role, None).allows(operation.needs):
        raise Refused(
            "AccessDeniedException",
            f"Key {key.id} of account {place.account} is not authorized to perform: "
            f"lambda:{operation.action or operation.name}; it needs {describe(operation.needs)}, "
            f"and has {key.role}",
            status=403,
        )


def _defect() -> Refused:
    return Refused(
        "ServiceException", "This is a defect; the daemon's log has the details.", status=500
    )
