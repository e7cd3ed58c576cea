"""A client of the API: HTTP over the daemon's unix socket, by default a connection per request.

It is built on http.client, whose import costs 15 to 20 ms of `templated ls`. That leaves
the start-up far within its bound, so there is no reason for HTTP code of our own; aiohttp or
anything on asyncio would cost 100 ms and more.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import IO, Any, Self
from urllib.parse import quote, urlencode

from templated.cli.failures import RemoteError
from templated.errors import DaemonUnavailable, InvalidRequest, TemplatedError, Timeout

START_HINT = "start it: systemctl start templated, or: templated serve"
SYSTEM_SOCKET = "/run/templated/templated.sock"
CHUNK = 65536
_CONNECT_SECONDS = 5.0
_BY_STATUS = {400: "invalid", 404: "not_found", 405: "invalid", 409: "conflict", 413: "invalid"}

Body = bytes | IO[bytes] | None


def default_socket(env: Mapping[str, str] = os.environ, uid: int | None = None) -> str:
    """TEMPLATED_SOCKET, or the default place.

    The same as `templated.model.config.default_socket`, without its module: that imports
    msgspec, more than all the rest of `templated ls`. A test holds the two together.
    """
    uid = os.geteuid() if uid is None else uid
    if given := env.get("TEMPLATED_SOCKET"):
        return given
    if uid == 0:
        return SYSTEM_SOCKET
    runtime = env.get("XDG_RUNTIME_DIR") or f"/tmp/templated-{uid}"
    return os.path.join(runtime, "templated/templated.sock")


class Client:
    """The API on one socket. Every method raises TemplatedError, and nothing else, on failure.

    Only answers that the daemon gives at once are bounded here. It bounds long work, such as
    a start, itself, and a second bound on this side would only hide which step was slow.
    """

    def __init__(self, path: str, *, keep_alive: bool = False) -> None:
        self.path = path
        self._keep_alive = keep_alive
        self._kept: list[_Connection] = []

    def close(self) -> None:
        """Disconnect what `keep_alive` kept."""
        while self._kept:
            self._kept.pop().close()

    def get(self, *parts: str, timeout: float = 30.0) -> Any:
        """The JSON at /v1/PART/PART..."""
        with self.request("GET", *parts, timeout=timeout) as answer:
            return answer.json()

    def post(self, *parts: str, body: Any = None) -> Any:
        """Send JSON and return the JSON of the answer."""
        data = None if body is None else json.dumps(body).encode()
        with self.request("POST", *parts, body=data) as answer:
            return answer.json()

    def put(self, *parts: str, body: Any) -> Any:
        """Replace what is at /v1/PART/PART... by JSON and return the JSON of the answer."""
        with self.request("PUT", *parts, body=json.dumps(body).encode()) as answer:
            return answer.json()

    def delete(self, *parts: str) -> None:
        """Remove what is at /v1/PART/PART..."""
        with self.request("DELETE", *parts) as answer:
            answer.json()

    def metrics(self, timeout: float = 30.0) -> str:
        """What Prometheus would scrape."""
        with self._exchange("GET", "/metrics", timeout=timeout) as answer:
            return b"".join(answer.chunks()).decode(errors="replace")

    def request(
        self,
        method: str,
        *parts: str,
        body: Body = None,
        headers: Mapping[str, str] = {},
        query: Mapping[str, object] = {},
        timeout: float | None = None,
    ) -> Answer:
        """Send a request and return the answer, which the caller closes; its body is not read.

        An answer that is not a success is raised as the error that its body holds.
        """
        target = "/v1/" + "/".join(quote(part, safe="") for part in parts)
        if query:
            target += "?" + urlencode(query)
        return self._exchange(method, target, body, headers, timeout)

    def _exchange(
        self,
        method: str,
        target: str,
        body: Body = None,
        headers: Mapping[str, str] = {},
        timeout: float | None = None,
    ) -> Answer:
        connection = self._kept.pop() if self._kept else _Connection(self.path)
        connection.bound(timeout)
        try:
            with self._explained(timeout):
                response = connection.exchange(method, target, body, headers)
            answer = Answer(self, connection, response, timeout)
            answer.check()
            return answer
        except BaseException:
            connection.close()
            raise

    @contextlib.contextmanager
    def _explained(self, timeout: float | None) -> Iterator[None]:
        """Turn what the socket and the HTTP parser raise into errors for people."""
        try:
            yield
        except TimeoutError:
            bound = f" within {timeout:g} s" if timeout else ""
            raise Timeout(
                f"the daemon did not answer{bound}", hint="journalctl -u templated may say why"
            ) from None
        except (http.client.HTTPException, ConnectionError) as error:
            raise DaemonUnavailable(
                f"the daemon ended the connection: {type(error).__name__}",
                hint="it may have been restarted; journalctl -u templated may say why",
            ) from error


class Answer:
    """An answer whose body is still to be read. A context manager: leaving it disconnects."""

    def __init__(
        self,
        client: Client,
        connection: _Connection,
        response: http.client.HTTPResponse,
        timeout: float | None,
    ) -> None:
        self._client = client
        self._connection = connection
        self._response = response
        self._timeout = timeout

    def check(self) -> None:
        """Raise the error that the answer is, if it is one."""
        if self._response.status >= 400:
            raise _error(self._response.status, self._response.reason, b"".join(self.chunks()))

    def json(self) -> Any:
        """The whole body; None when it is empty."""
        body = b"".join(self.chunks())
        return _decoded(body) if body.strip() else None

    def objects(self) -> Iterator[Any]:
        """The JSON objects of a body with one per line, each as soon as it is there."""
        while line := self._read(self._response.readline):
            if line.strip():
                yield _decoded(line)

    def chunks(self) -> Iterator[bytes]:
        """The body as it comes. DaemonUnavailable when it ends before it is complete."""
        while data := self._read(self._response.read1, CHUNK):
            yield data
        if self._response.length:  # http.client passes over this end of a body in silence
            with self._client._explained(self._timeout):
                raise http.client.IncompleteRead(b"", self._response.length)

    def _read(self, read: Any, *arguments: Any) -> bytes:
        with self._client._explained(self._timeout):
            data: bytes = read(*arguments)
            return data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        whole = self._response.isclosed() or self._response.length == 0
        self._response.close()
        if whole and self._client._keep_alive and not self._response.will_close:
            self._client._kept.append(self._connection)
        else:
            self._connection.close()


class _Connection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path
        self._bound: float | None = None

    def bound(self, timeout: float | None) -> None:
        """Wait so many seconds for each part of the next answer."""
        self._bound = timeout
        if self.sock is not None:
            self.sock.settimeout(timeout)

    def connect(self) -> None:
        """Connect; raises what `unreachable` makes of a failure."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.settimeout(min(self._bound or _CONNECT_SECONDS, _CONNECT_SECONDS))
            self.sock.connect(self._path)
        except OSError as error:
            raise unreachable(error, self._path) from None
        self.sock.settimeout(self._bound)

    def exchange(
        self, method: str, target: str, body: Body, headers: Mapping[str, str]
    ) -> http.client.HTTPResponse:
        """Send a request and wait for the head of its answer."""
        # A daemon that refuses a body answers before it has read all of it, and closes: the
        # answer is then there to be read, and says more than "broken pipe".
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.request(method, target, body, dict(headers))
        return self.getresponse()


def unreachable(error: OSError, path: str) -> TemplatedError:
    """What to tell the user when the socket at `path` cannot be connected to."""
    if isinstance(error, FileNotFoundError):
        return DaemonUnavailable(
            f"the daemon is not running: there is no socket {path}", hint=_start_hint(path)
        )
    if isinstance(error, ConnectionRefusedError):
        return DaemonUnavailable(
            f"the daemon is not running: nothing listens on {path}", hint=_start_hint(path)
        )
    if isinstance(error, PermissionError):
        return DaemonUnavailable(
            f"permission denied on the daemon's socket {path}",
            hint="use sudo, or join the group that owns it; to run a daemon of your own: "
            "templated serve",
        )
    if isinstance(error, (TimeoutError, BlockingIOError)):
        return DaemonUnavailable(
            f"the daemon does not accept connections on {path}",
            hint="it may be overloaded or stuck: systemctl status templated",
        )
    if error.errno is None:  # the path does not fit into a socket's address
        return InvalidRequest(f"{path} cannot be a socket: {error}", hint="use a shorter path")
    return DaemonUnavailable(f"{path}: {error.strerror}", hint=_start_hint(path))


def _start_hint(path: str) -> str:
    if path != SYSTEM_SOCKET and os.path.exists(SYSTEM_SOCKET):
        return f"{START_HINT}; for the system's daemon: --socket {SYSTEM_SOCKET}"
    return START_HINT


def _error(status: int, reason: str, body: bytes) -> TemplatedError:
    try:
        told = json.loads(body)["error"]
        return RemoteError(told["code"], told["message"], hint=told.get("hint", ""))
    except (ValueError, KeyError, TypeError):
        return RemoteError(
            _BY_STATUS.get(status, "internal"),
            f"the daemon answered with HTTP status {status} {reason}",
            hint="this command and the daemon may be of different versions: templated info",
        )


def _decoded(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError as error:
        raise RemoteError(
            "internal", f"the daemon's answer is not JSON: {error}", hint="templated info"
        ) from None
