"""Both clients of the API: one method for each route, and what keeps them from an answer."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, get_args
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec
import pytest

import templated.client
from templated.api import server
from templated.api.route import Route
from templated.api.routes import ROUTES
from templated.client import AsyncClient, Client, failures, requests
from templated.client.answers import answer_type
from templated.client.requests import Request, Stream
from templated.drivers.hypervisor.fake import FakeHypervisor
from templated.errors import (
    DaemonUnavailable,
    InvalidRequest,
    RemoteError,
    TemplatedError,
    Timeout,
)
from templated.model.api import Event, ExecFrame, Operation
from templated.model.clone import CloneState, CloneView, StartPath
from templated.services.daemon import Services
from tests.unit.cli_daemon import CLONE, ROOT, Daemon, b64, serving
from tests.unit.fake_daemon import play
from tests.unit.test_egress import GOOD as EGRESS

# A program that uses a client: the method, its arguments, and how the client is made.
Ask = Callable[..., Any]
BOUND = 20.0


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that knows one clone and one template."""
    with serving(tmp_path / "d.sock") as served:
        yield served


def waiting(path: str, method: str, *args: Any, **options: Any) -> Any:
    """Ask as a program that waits; a stream is read to its end."""
    with Client(path, **options) as client:
        answer = getattr(client, method)(*args)
        return list(answer) if isinstance(answer, Iterator) else answer


def on_asyncio(path: str, method: str, *args: Any, **options: Any) -> Any:
    """The same as a program on asyncio."""

    async def main() -> Any:
        async with asyncio.timeout(BOUND), AsyncClient(path, **options) as client:
            answer = getattr(client, method)(*args)
            if isinstance(answer, AsyncIterator):
                return [item async for item in answer]
            return await answer

    return asyncio.run(main())


both = pytest.mark.parametrize("ask", [waiting, on_asyncio])


def refused(kind: type[TemplatedError], ask: Ask, *args: Any, **options: Any) -> TemplatedError:
    """The error that asking ends with; one line says what, one what to do."""
    with pytest.raises(kind) as caught:
        ask(*args, **options)
    assert "\n" not in caught.value.message
    return caught.value


# The contract with the API

FUNCTIONS = {
    name: make
    for name, make in vars(requests).items()
    if inspect.isfunction(make) and make.__module__ == requests.__name__ and name[0] != "_"
}
# Of the route that starts one clone or several, and of the one that runs a request now or later.
TWICE = {"create_clone": "create_clones", "queue_event": "invoke_function"}
EXAMPLES: dict[str, Any] = {
    "name": "{name}",
    "target": "10.1.2.3:80/tcp",
    "template": "{template}",
    "operation": "{id}",
    "count": 2,
    "argv": ["x"],
    "stdin": b"x",
    "env": {"A": "b"},
    "timeout": 5.0,
    "spec": "name: x",
    "source": "x.yaml",
    "standby": 1,
    "warm": 1,
    "reset": True,
    "content": b"x",
    "mode": 0o755,
    "size": 1,
    "lines": 3,
    "follow": True,
    "since": 60,
    "user": "nobody",
    "code": b"x",
    "handler": "app.handler",
    "runtime": "python",
    "description": "x",
    "version": "3",
    "versions": {"3": 1.0},
    "alias": "{alias}",
    "event": "{event}",
    "digest": "0" * 64,
    "reserved": 1,
    "payload": b"{}",
    "qualifier": "live",
    "tail": True,
    "ready": 5,
    "background": True,
    "least": 1,
    "most": 2,
    "network": {"egress": "nat"},
    "keys": {"egress": "none", "limits": {"packets": 100}},
    "egress": EGRESS,
}
# Parameters of the query that only one of the two functions of a route sends.
ONE_OF_TWO = {"event", "tail"}


def example(make: Callable[..., Request[Any]]) -> Request[Any]:
    """A request with every argument given."""
    path = "/f" if "file" in make.__name__ else "cold"
    values = {**EXAMPLES, "path": path}
    if make is requests.deploy_function:
        values |= {"template": "t", "timeout": "5s"}
    if make in (requests.provision_function, requests.unprovision_function):
        values |= {"qualifier": "{qualifier}"}
    if make is requests.prefetch_code:
        values |= {"digest": "{digest}"}
    return make(**{name: values[name] for name in inspect.signature(make).parameters})


def test_every_route_has_a_method_of_both_clients() -> None:
    """Named as the operation, and there is nothing that no route answers."""
    names = {route.handler.__name__ for route in ROUTES} | set(TWICE)
    assert names == set(FUNCTIONS)
    for kind in (Client, AsyncClient):
        assert names <= set(vars(kind))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_requests_are_what_the_routes_take(name: str) -> None:
    """Method, path, query and body; and the answer is read as what the route answers."""
    make = FUNCTIONS[name]
    route = next(r for r in ROUTES if r.handler.__name__ == TWICE.get(name, name))
    request = example(make)
    target = urlsplit(request.target)
    assert (request.method, unquote(target.path)) == (route.method, route.path)
    left_out = set(route.query) - set(parse_qs(target.query))
    assert set(parse_qs(target.query)) <= set(route.query) and left_out <= ONE_OF_TWO
    assert isinstance(request, Stream) == (bool(route.stream) and name not in WHOLE)
    assert answer_type(make) in answers_of(route)
    if route.body is None:
        # A POST without a body of its own sends an empty one.
        assert not request.content
    elif route.body is bytes:
        assert request.content == b"x"
    else:
        assert isinstance(request.content, bytes)
        msgspec.json.decode(request.content, type=route.body)


# What comes as a stream of text, and is read as a whole.
WHOLE = {"metrics", "get_file"}


def answers_of(route: Route) -> tuple[Any, ...]:
    """What may be read of a route's answer: text also as the bytes that it is."""
    if route.answer is None:
        return (type(None),)
    if route.answer is str:
        return str, bytes
    alternatives = get_args(route.answer)
    return (route.answer, *alternatives, *route.also.values())


def test_arguments_that_are_not_given_are_not_sent() -> None:
    """The daemon's defaults hold."""
    assert requests.create_clone("a").content == b'{"name": "a"}'
    assert requests.set_pool("t", warm=0).content == b'{"warm": 0}'
    assert requests.logs("a").target == "/v1/clones/a/logs"


@both
def test_names_cannot_leave_their_place(daemon: Daemon, ask: Ask) -> None:
    """Whatever is in them."""
    refused(TemplatedError, ask, daemon.socket, "show_clone", "../x?y%2F.")
    assert daemon.requests == [("GET", "/v1/clones/..%2Fx%3Fy%252F.", b"")]


def test_importing_it_is_cheap() -> None:
    """Without what only the asynchronous client and types need."""
    code = (
        "import sys, templated.client as c; c.Client('/s');"
        "heavy = {'aiohttp', 'asyncio', 'msgspec', 'yaml'};"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys();"
        "from templated.client import AsyncClient; assert 'aiohttp' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30, check=True)


def test_the_example(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of the module runs, and docs/api.md has the same."""
    text = inspect.cleandoc(templated.client.__doc__ or "")
    example = "".join(
        line for line in text.splitlines(keepends=True) if line.startswith("    ") or line == "\n"
    ).strip("\n")
    assert example in (ROOT / "docs/api.md").read_text()
    daemon.lines("POST", EXEC, OUTPUT, {"exit_code": 0, "done": True})
    daemon.lines("GET", "/v1/events", EVENT)
    monkeypatch.setenv("TEMPLATED_SOCKET", daemon.socket)
    names: dict[str, Any] = {}
    exec(textwrap.dedent(example), names)  # noqa: S102
    asyncio.run(names["watch"]())
    assert capsys.readouterr().out.splitlines() == [
        "10.77.0.3 116.2",
        "stdout b'\\xffhi' None",
        "None b'' 0",
        "clone.running fn-123",
    ]


# Answers


@both
def test_answers_are_typed(daemon: Daemon, ask: Ask) -> None:
    """Structs of the model; keys of a later version are passed over."""
    daemon.on("GET", "/v1/clones/fn-123", {**CLONE, "a key of the future": 1})
    clone = ask(daemon.socket, "show_clone", "fn-123")
    assert clone == msgspec.convert(CLONE, CloneView)
    assert (clone.state, clone.path) == (CloneState.RUNNING, StartPath.DIRECT)
    assert ask(daemon.socket, "list_clones") == [clone]
    assert ask(daemon.socket, "remove_clone", "fn-123") is None
    daemon.on("GET", "/metrics", b"# TYPE x\n\xff")
    assert ask(daemon.socket, "metrics") == "# TYPE x\n\ufffd"


@both
@pytest.mark.parametrize("body", [b"<html>", b"", b"[]", b'{"name": "fn-123"}'])
def test_an_answer_of_another_version(daemon: Daemon, ask: Ask, body: bytes) -> None:
    """It is an error, and no half of an object."""
    daemon.on("GET", "/v1/clones/fn-123", body)
    error = refused(RemoteError, ask, daemon.socket, "show_clone", "fn-123")
    assert error.code == "internal"


@both
def test_errors_that_the_daemon_reports(daemon: Daemon, ask: Ask) -> None:
    """With their code, message, hint and status."""
    daemon.fail("POST", "/v1/clones", "conflict", 409)
    error = refused(RemoteError, ask, daemon.socket, "create_clone", "fn-123")
    assert isinstance(error, RemoteError)
    told = (error.code, error.message, error.hint, error.status)
    assert told == ("conflict", "no luck: conflict", "try something else", 409)
    daemon.on("GET", "/v1/info", b"Bad Gateway", 502)
    assert "HTTP status 502" in refused(RemoteError, ask, daemon.socket, "info").message


@both
def test_files(daemon: Daemon, ask: Ask, tmp_path: Path) -> None:
    """From bytes and from an open file."""
    daemon.on("PUT", "/v1/clones/fn-123/files", b"", 204)
    daemon.on("GET", "/v1/clones/fn-123/files", b"\xffdata")
    assert ask(daemon.socket, "get_file", "fn-123", "/f") == b"\xffdata"
    ask(daemon.socket, "put_file", "fn-123", "/f", b"\x00" * 300_000)
    (tmp_path / "file").write_bytes(b"\x00" * 300_000)
    with open(tmp_path / "file", "rb") as content:
        ask(daemon.socket, "put_file", "fn-123", "/f", content)
    target = "/v1/clones/fn-123/files?path=%2Ff&mode=644"
    assert daemon.requests[1:] == [("PUT", target, b"\x00" * 300_000)] * 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@both
def test_a_body_that_is_refused_half_way(daemon: Daemon, ask: Ask) -> None:
    """The daemon answers and closes while the file is still being sent; the answer counts."""
    error = refused(RemoteError, ask, daemon.socket, "put_file", "x", "/f", bytes(64 << 20))
    assert isinstance(error, RemoteError) and error.status == 413
    # Where the daemon has not closed yet, asyncio warns of what was not sent: here, not later.
    gc.collect()


@both
def test_connections(daemon: Daemon, ask: Ask) -> None:
    """One for each request, or one for all."""

    def three(keep: bool) -> int:
        daemon.connections.clear()
        if ask is waiting:
            with Client(daemon.socket, keep_alive=keep) as client:
                for _ in range(3):
                    client.list_clones()
        else:
            asyncio.run(three_async(daemon.socket, keep))
        return len(daemon.connections)

    assert (three(False), three(True)) == (3, 1)


async def three_async(path: str, keep: bool) -> None:
    async with AsyncClient(path, keep_alive=keep) as client:
        for _ in range(3):
            await client.list_clones()


def test_a_kept_connection_that_brought_an_error(daemon: Daemon) -> None:
    """Is not used again."""
    with Client(daemon.socket, keep_alive=True) as client:
        client.list_clones()
        with pytest.raises(RemoteError):
            client.show_clone("none")
        client.list_clones()
    assert len(daemon.connections) == 2


def test_many_at_once(daemon: Daemon) -> None:
    """Of one client on asyncio."""

    async def main() -> None:
        async with AsyncClient(daemon.socket) as client:
            answers = await asyncio.gather(*(client.list_clones() for _ in range(200)))
        assert len(answers) == 200 and all(answer == answers[0] for answer in answers)

    asyncio.run(main())


# Streams

EVENT = {"time": "T", "type": "clone.running", "subject": "fn-123", "details": {"a": 1}}
EXEC = "/v1/clones/fn-123/exec"
OUTPUT = {"stream": "stdout", "data": b64(b"\xffhi")}
STREAMS = [
    ("events", (True,), "GET", "/v1/events", EVENT),
    ("exec_in_clone", ("fn-123", ["x"]), "POST", EXEC, OUTPUT),
    (
        "operation_events",
        ("op1",),
        "GET",
        "/v1/operations/op1/events",
        {"time": "T", "type": "log"},
    ),
]


@both
def test_a_stream(daemon: Daemon, ask: Ask) -> None:
    """Its items are typed, and the last one ends it."""
    daemon.lines("POST", EXEC, OUTPUT, {"exit_code": 3, "done": True})
    output, end = ask(daemon.socket, "exec_in_clone", "fn-123", ["x"])
    assert (output.stream, output.content()) == ("stdout", b"\xffhi")
    assert end == ExecFrame(exit_code=3, done=True)
    daemon.lines("GET", "/v1/events", EVENT, EVENT)
    assert ask(daemon.socket, "events") == [msgspec.convert(EVENT, Event)] * 2
    daemon.on("GET", "/v1/clones/fn-123/logs", b"\x1b[1mboot\xff\n")
    assert b"".join(ask(daemon.socket, "logs", "fn-123", 5)) == b"\x1b[1mboot\xff\n"


@both
def test_items_come_at_once(daemon: Daemon, ask: Ask) -> None:
    """Before the stream has ended."""
    end = {"exit_code": 0, "done": True}
    daemon.lines("POST", EXEC, OUTPUT, end, hold=True)
    frames = []

    def take(frame: ExecFrame) -> None:
        frames.append(frame)
        daemon.release.set()  # only now the daemon sends the second one

    if ask is waiting:
        for frame in Client(daemon.socket).exec_in_clone("fn-123", ["x"]):
            take(frame)
    else:
        asyncio.run(each_frame(daemon.socket, take))
    assert [frame.done for frame in frames] == [False, True]


async def each_frame(path: str, take: Callable[[ExecFrame], None]) -> None:
    async with asyncio.timeout(BOUND), AsyncClient(path) as client:
        async for frame in client.exec_in_clone("fn-123", ["x"]):
            take(frame)


@both
@pytest.mark.parametrize("stream", STREAMS, ids=lambda s: s[0])
def test_a_connection_that_breaks(daemon: Daemon, ask: Ask, stream: Any) -> None:
    """In the middle of a stream."""
    name, args, method, path, item = stream
    daemon.lines(method, path, item, cut=True)
    refused(DaemonUnavailable, ask, daemon.socket, name, *args)


@both
@pytest.mark.parametrize("stream", STREAMS[1:], ids=lambda s: s[0])
def test_a_stream_without_its_end(daemon: Daemon, ask: Ask, stream: Any) -> None:
    """Was cut off, however cleanly; so was one of no items."""
    name, args, method, path, item = stream
    for items in ([item], []):
        daemon.lines(method, path, *items)
        error = refused(DaemonUnavailable, ask, daemon.socket, name, *args)
        assert error.message.startswith("the daemon ended")


@both
def test_nonsense_in_a_stream(daemon: Daemon, ask: Ask) -> None:
    """Is an error of its own."""
    daemon.on("POST", EXEC, b'{"stream": "stdout"}\n<html>\n')
    assert refused(RemoteError, ask, daemon.socket, "exec_in_clone", "fn-123", ["x"])


@both
def test_an_answer_that_is_cut_off(daemon: Daemon, ask: Ask) -> None:
    """No half of it is taken for the whole."""
    daemon.lines("GET", "/v1/clones/fn-123/files", "x", cut=True)
    refused(DaemonUnavailable, ask, daemon.socket, "get_file", "fn-123", "/f")


# A daemon that is away, or hangs


@both
def test_no_daemon(tmp_path: Path, ask: Ask) -> None:
    """Each way of it has its own line, and what to do."""
    path = str(tmp_path / "d.sock")
    assert "no socket" in refused(DaemonUnavailable, ask, path, "info").message
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    assert "nothing listens" in refused(DaemonUnavailable, ask, path, "info").message
    assert "shorter" in refused(InvalidRequest, ask, "/" + "x" * 200, "info").hint


def test_permission_denied() -> None:
    # Made by hand: root, who may run the tests, is never refused.
    error = failures.unreachable(PermissionError(13, "Permission denied"), "/run/d.sock")
    assert error.code == "daemon_unavailable"
    assert error.message == "permission denied on the daemon's socket /run/d.sock"
    assert "sudo" in error.hint
    assert "templated serve" in error.hint


@contextlib.contextmanager
def hanging(path: Path, *sent: bytes) -> Iterator[str]:
    """A daemon that accepts, sends what is given here, and then nothing."""
    ended = threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(BOUND)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                for part in sent:
                    connection.sendall(part)
                ended.wait(BOUND)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield str(path)
        finally:
            ended.set()
            thread.join()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"


@both
@pytest.mark.parametrize("sent", [(), (HEAD[:20],), (HEAD,), (HEAD, b"[")])
def test_a_daemon_that_hangs(tmp_path: Path, ask: Ask, sent: tuple[bytes, ...]) -> None:
    """The wait has a bound, and the error says which."""
    with hanging(tmp_path / "d.sock", *sent) as path:
        error = refused(Timeout, ask, path, "list_clones", timeout=0.2)
    assert error.message == "the daemon did not answer within 0.2 s"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_wait_has_a_bound(name: str) -> None:
    """But for following what may be silent for any time."""
    unbounded = example(FUNCTIONS[name]).timeout is None
    silent = ("events", "logs", "operation_events", "function_logs")
    assert unbounded == (name in silent)


def test_closing_ends_what_is_under_way(tmp_path: Path) -> None:
    """And the client can be used again."""

    async def main(path: str) -> None:
        async with asyncio.timeout(BOUND), AsyncClient(path) as client:
            asking = asyncio.ensure_future(client.list_clones())
            while client._session is None:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            await client.close()
            with pytest.raises(DaemonUnavailable):
                await asking
            await client.close()

    with hanging(tmp_path / "d.sock") as path:
        asyncio.run(main(path))


# The real API, over a fake hypervisor


def talk(tmp_path: Path, work: Callable[[str], None]) -> None:
    """Serve the API, and do some work beside it."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        path = running.context.config.socket
        async with server.listeners(running.context.config, running):
            await asyncio.to_thread(work, path)

    play(tmp_path, scenario)


@both
def test_a_clones_life(tmp_path: Path, ask: Ask) -> None:
    """From its start to its end, with all that there is to look at."""

    def work(path: str) -> None:
        assert ask(path, "info").clones == 0
        (template,) = ask(path, "list_templates")
        assert template.name == "t" and template.spec is None
        assert ask(path, "show_template", "t").manifest.qemu.version == "7.2.0"
        clone = ask(path, "create_clone", "a")
        assert isinstance(clone, CloneView) and clone.total_ms is not None
        assert [c.name for c in ask(path, "create_clones", "b", 2)] == ["b-1", "b-2"]
        assert ask(path, "show_clone", "a") == clone
        assert [c.name for c in ask(path, "list_clones")] == ["a", "b-1", "b-2"]
        assert ask(path, "logs", "a") == []
        assert {e.type for e in ask(path, "events")} == {"clone.running"}
        (pool,) = ask(path, "list_pools")
        assert pool == ask(path, "show_pool", "t") and pool.warm.target == 0
        assert ask(path, "set_pool", "t").standby.target == 0
        assert "templated_build_info" in ask(path, "metrics")
        assert "/v1/clones" in ask(path, "openapi")["paths"]
        assert refused(RemoteError, ask, path, "rollback", "t").code == "conflict"
        for name in ("a", "b-1", "b-2"):
            ask(path, "remove_clone", name)
        assert ask(path, "list_clones") == []
        assert ask(path, "remove_template", "t") is None

    talk(tmp_path, work)


@both
def test_a_build(tmp_path: Path, ask: Ask) -> None:
    """It is followed to its end: here no image can be made."""

    def work(path: str) -> None:
        (tmp_path / "x.yaml").write_text("name: x\nimage: {mirror: 'file:///nowhere'}\n")
        (tmp_path / "s/images").touch()
        operation = ask(path, "build_template", "x")
        assert isinstance(operation, Operation) and operation.kind == "build"
        events = ask(path, "operation_events", operation.id)
        assert events[-1].type == "end" and events[-1].error.message
        assert ask(path, "show_operation", operation.id).state == "failed"

    talk(tmp_path, work)


def test_json_is_the_daemons_answer(daemon: Daemon) -> None:
    """Also what this version does not know of it."""
    answer = {**CLONE, "a key of the future": 1}
    daemon.on("GET", "/v1/clones/fn-123", answer)
    client = Client(daemon.socket)
    assert client.json(requests.show_clone("fn-123")) == answer
    assert client.json(requests.remove_clone("fn-123")) is None
    daemon.lines("GET", "/v1/events", EVENT)
    assert list(client.json_lines(requests.events())) == [EVENT]
