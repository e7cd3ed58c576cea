"""Functions on real virtual machines: deployed, invoked, in versions, and what goes wrong."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from templated.client import Client
from templated.errors import RemoteError
from templated.model.function import InvokeView
from tests.real.harness import Daemon
from tests.unit.zips import FILE, LINK, files, zipped

pytestmark = pytest.mark.real

APP = """
import os, sys, time

LOADED = time.time()
SEEN = []


def echo(event, context):
    return event


def tell(event, context):
    SEEN.append(context.aws_request_id)
    print("told", len(SEEN))
    try:
        open("/var/task/new", "w")
    except OSError as error:
        written = error.errno
    return {
        "function": [context.function_name, context.function_version],
        "arn": context.invoked_function_arn,
        "left": context.get_remaining_time_in_millis(),
        "calls": len(SEEN),
        "greeting": os.environ.get("GREETING"),
        "uid": os.getuid(),
        "hostname": os.uname().nodename,
        "time": time.time(),
        "written": written,
    }


def fail(event, context):
    raise ValueError("no such luck")


def leave(event, context):
    os._exit(3)


def sleep(event, context):
    time.sleep(event)
    return "awake"


def loud(event, context):
    for _ in range(event):
        print("x" * 99)
    return event


def strange(event, context):
    return {1, 2}


def linger(event, context):
    if os.fork() == 0:
        time.sleep(3600)
        os._exit(0)
    return "left one"


def large(event, context):
    return "y" * event


def scratch(event, context):
    time.sleep(event)
    seen = sorted(name for name in os.listdir("/tmp") if name.startswith("of-"))
    open("/tmp/of-" + context.aws_request_id, "w").close()
    return [os.uname().nodename, seen]
"""


def until(condition: Callable[[], Any], what: str, bound: float = 60.0) -> None:
    deadline = time.monotonic() + bound
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of code."""
    directory = tmp_path_factory.mktemp("code")
    (directory / "app.py").write_text(APP)
    (directory / "broken.py").write_text("import no_such_module\n")
    return directory


@pytest.fixture
def functions(host: Daemon) -> Iterator[Daemon]:
    """The shared daemon; functions that a test made are removed again."""
    yield host
    for function in host.json("function", "ls"):
        host.cli("function", "rm", function["name"])
    until(lambda: not host.json("ls"), "instances stay behind")


def deploy(daemon: Daemon, source: Path, name: str, handler: str, *options: str) -> Any:
    words = ("--code", str(source), "--handler", f"app.{handler}", *options)
    daemon.cli("function", "deploy", name, *words)
    return daemon.json("function", "show", name)


def invoke(daemon: Daemon, name: str, payload: Any = None) -> Any:
    return daemon.json("invoke", name, "--payload", json.dumps(payload))


def outcome(daemon: Daemon, name: str, payload: Any = None) -> Any:
    """As `invoke`, of a function that may fail."""
    done = daemon.run("-o", "json", "invoke", name, "--payload", json.dumps(payload))
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_the_first_request_and_the_next(functions: Daemon, source: Path) -> None:
    """A function is deployed and invoked: the first starts an instance, the next finds it."""
    shown = deploy(functions, source, "hello", "tell", "--env", "GREETING=hi", "--timeout", "20s")
    assert len(shown["code"]["digest"]) == 64 and shown["versions"] and shown["aliases"] == []
    first = invoke(functions, "hello")
    assert first["status"] == 200 and first["error"] is None and first["version"] == "$LATEST"
    assert first["start"] in ("pool", "direct")
    assert {"route", "start", "init", "run"} <= set(first["phases_ms"])
    told = first["payload"]
    assert told["function"] == ["hello", "$LATEST"] and told["greeting"] == "hi"
    assert told["uid"] != 0 and told["hostname"] == first["instance"]
    assert told["written"] == 30 and 0 < told["left"] <= 20_100
    assert told["arn"].endswith("function:hello")
    second = invoke(functions, "hello")
    assert second["start"] == "warm" and second["instance"] == first["instance"]
    assert second["payload"]["calls"] == 2
    assert set(second["phases_ms"]) == {"route", "run"}
    log = functions.cli("function", "logs", "hello")
    assert "told 1" in log and "told 2" in log


def test_paused_between_requests(functions: Daemon, source: Path) -> None:
    """An instance without a request is paused, and its clock is right when it is woken."""
    deploy(functions, source, "sleepy", "tell")
    first = invoke(functions, "sleepy")
    until(lambda: "paused" in functions.json("function", "show", "sleepy")["instances"], "paused")
    time.sleep(1.0)
    before = time.time()
    woken = invoke(functions, "sleepy")
    assert woken["start"] == "warm" and woken["instance"] == first["instance"]
    assert before - 0.1 <= woken["payload"]["time"] <= time.time() + 0.1


def test_from_a_pool(functions: Daemon, source: Path) -> None:
    """A pool's member gets the code of the function that takes it."""
    sizes = ("--warm", "1", "--standby", "1", "--wait", "--timeout", "120")
    functions.cli("pool", "set", "python-fn", *sizes)
    try:
        deploy(functions, source, "pooled", "sleep")
        answers: list[Any] = []
        threads = [
            threading.Thread(target=lambda: answers.append(invoke(functions, "pooled", 1.5)))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [answer["payload"] for answer in answers] == ["awake"] * 2
        assert {answer["start"] for answer in answers} == {"pool"}
        assert len({answer["instance"] for answer in answers}) == 2
        assert all("attach" in answer["phases_ms"] for answer in answers)
    finally:
        functions.cli("pool", "set", "python-fn", "--reset", "--wait")
        until(lambda: len(functions.qemus()) == len(functions.json("ls")), "members stay behind")


def test_versions_and_aliases(functions: Daemon, source: Path, tmp_path: Path) -> None:
    """A version stays what it is; an alias divides its requests by weight, and moves."""
    deploy(functions, source, "grey", "tell")
    functions.cli("function", "publish", "grey")
    shutil.copytree(source, tmp_path / "new")
    text = (tmp_path / "new/app.py").read_text()
    (tmp_path / "new/app.py").write_text(text.replace('"calls": len(SEEN)', '"calls": "new"'))
    deploy(functions, tmp_path / "new", "grey", "tell")
    functions.cli("function", "publish", "grey")
    functions.cli("function", "alias", "grey", "prod", "1=0.5", "2=0.5")
    seen = [invoke(functions, "grey:prod") for _ in range(20)]
    assert set(Counter(answer["version"] for answer in seen)) == {"1", "2"}
    assert all((a["payload"]["calls"] == "new") == (a["version"] == "2") for a in seen)
    functions.cli("function", "alias", "grey", "prod", "2")
    assert {invoke(functions, "grey:prod")["version"] for _ in range(3)} == {"2"}
    assert invoke(functions, "grey:1")["payload"]["calls"] != "new"
    assert "prod" in functions.fails("function", "rm", "grey", "--version", "2")


@pytest.mark.parametrize(
    ("handler", "payload", "kind"),
    [
        ("fail", None, "ValueError"),
        ("strange", None, "Runtime.MarshalError"),
        ("leave", None, "Runtime.ExitError"),
        ("missing", None, "Runtime.HandlerNotFound"),
    ],
)
def test_what_handlers_do_wrong(
    functions: Daemon, source: Path, handler: str, payload: Any, kind: str
) -> None:
    """Each ends in an error that says what it was, and the next request is served again."""
    deploy(functions, source, "wrong", handler)
    for _ in range(2):
        answer = outcome(functions, "wrong", payload)
        assert answer["error"] == "Unhandled" and answer["status"] == 200
        assert answer["payload"]["errorType"] == kind, answer


def test_a_module_that_cannot_be_imported(functions: Daemon, source: Path) -> None:
    """What the import says reaches the caller."""
    words = ("--code", str(source), "--handler", "broken.handler")
    functions.cli("function", "deploy", "broken", *words)
    answer = outcome(functions, "broken")
    assert answer["payload"]["errorType"] == "Runtime.ImportModuleError"
    assert "no_such_module" in answer["payload"]["errorMessage"]
    until(lambda: not functions.json("ls"), "its instance stays")


def test_past_its_timeout(functions: Daemon, source: Path) -> None:
    """The request ends at its timeout, and its instance with it."""
    deploy(functions, source, "slow", "sleep", "--timeout", "1s")
    answer = outcome(functions, "slow", 30)
    assert "timed out after 1" in answer["payload"]["errorMessage"]
    gone = answer["instance"]
    until(lambda: gone not in [c["name"] for c in functions.json("ls")], "the instance stays")
    assert invoke(functions, "slow", 0)["payload"] == "awake"


def test_much_output_and_large_payloads(functions: Daemon, source: Path) -> None:
    """Megabytes go in and out, more than 6 MB don't, and the log keeps to its bound."""
    deploy(functions, source, "loud", "loud")
    assert invoke(functions, "loud", 60_000)["payload"] == 60_000
    size = sum(path.stat().st_size for path in (functions.state / "functions/loud").iterdir())
    assert 1 << 20 < size <= (4 << 20) + (1 << 16)
    deploy(functions, source, "echo", "echo")
    large = json.dumps("z" * (5 << 20))
    got = functions.cli("invoke", "echo", "--payload", "-", stdin=large.encode())
    assert json.loads(got) == json.loads(large)
    too_large = json.dumps("z" * (6 << 20)).encode()
    done = functions.run("invoke", "echo", "--payload", "-", stdin=too_large)
    assert done.returncode != 0 and "6" in done.stderr and "Traceback" not in done.stderr
    deploy(functions, source, "large", "large")
    answer = outcome(functions, "large", 7 << 20)
    assert answer["error"] == "Unhandled"
    assert answer["payload"]["errorType"] == "Function.ResponseSizeTooLarge"


def test_a_child_that_lingers(functions: Daemon, source: Path) -> None:
    """A handler that forks is answered for, at once."""
    deploy(functions, source, "fork", "linger")
    assert [invoke(functions, "fork")["payload"] for _ in range(2)] == ["left one"] * 2


def test_killed_in_the_middle(functions: Daemon, source: Path) -> None:
    """Who waits for an instance that is killed is told so."""
    deploy(functions, source, "victim", "sleep")
    invoke(functions, "victim", 0)
    (clone,) = functions.json("ls")
    answers: list[Any] = []
    caller = threading.Thread(
        target=lambda: answers.append(
            functions.run("-o", "json", "invoke", "victim", "--payload", "20")
        )
    )
    caller.start()
    until(lambda: functions.json("function", "show", "victim")["instances"].get("busy"), "busy")
    os.kill(clone["pid"], signal.SIGKILL)
    caller.join(30)
    assert not caller.is_alive() and answers[0].returncode != 0
    assert "Traceback" not in answers[0].stderr
    assert "killed" in answers[0].stdout + answers[0].stderr
    assert invoke(functions, "victim", 0)["payload"] == "awake"


def test_a_bootstrap_of_its_own(functions: Daemon, tmp_path: Path) -> None:
    """`provided` runs the code's own program; one that cannot be run is an error."""
    bootstrap = tmp_path / "bootstrap"
    bootstrap.write_text(
        "#!/bin/sh\n"
        'api="http://$AWS_LAMBDA_RUNTIME_API/2018-06-01/runtime/invocation"\n'
        "while :; do\n"
        '  wget -q -S -O /tmp/event "$api/next" 2>/tmp/head || exit 1\n'
        "  id=$(sed -n 's/.*[Rr]equest-[Ii]d: *//p' /tmp/head | tr -d '\\r')\n"
        '  wget -q -O /dev/null --post-file /tmp/event "$api/$id/response" || exit 1\n'
        "done\n"
    )
    words = ("--code", str(tmp_path), "--handler", "any", "--runtime", "provided")
    functions.cli("function", "deploy", "own", *words)
    answer = outcome(functions, "own", {"a": 1})
    assert answer["error"] == "Unhandled" and "bootstrap" in json.dumps(answer["payload"])
    bootstrap.chmod(0o755)
    functions.cli("function", "deploy", "own", *words)
    assert [invoke(functions, "own", {"a": n})["payload"] for n in range(2)] == [{"a": 0}, {"a": 1}]


def test_the_daemon_is_killed(copied: Daemon, source: Path) -> None:
    """Accepted events are not lost, functions are there again, instances of before are ended."""
    copied.start()
    deploy(copied, source, "lasting", "tell")
    copied.cli("function", "publish", "lasting")
    invoke(copied, "lasting")
    pids = set(copied.qemus())
    copied.cli("invoke", "lasting", "--event", "--payload", '"one"')
    copied.stop(signal.SIGKILL)
    copied.start()
    assert not pids & set(copied.qemus())
    assert [v["version"] for v in copied.json("function", "show", "lasting")["versions"]] == [
        "$LATEST",
        "1",
    ]
    until(lambda: not copied.json("function", "events", "lasting"), "the event is not done")
    assert "told" in copied.cli("function", "logs", "lasting")
    assert invoke(copied, "lasting:1")["payload"]["calls"] == 1


def kept(daemon: Daemon) -> set[str]:
    """The files of code on a node, those on their way among them."""
    return {path.name for path in (daemon.state / "code").rglob("*") if path.is_file()}


def zip_of(source: Path) -> bytes:
    """A directory's files."""
    return files({path.name: path.read_bytes() for path in source.iterdir() if path.is_file()})


def bomb() -> bytes:
    """300 MB of zeros in 300 KB."""
    content = io.BytesIO()
    with (
        zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("zeros", "w") as zeros,
    ):
        for _ in range(300):
            zeros.write(bytes(1 << 20))
    return content.getvalue()


def test_archives_that_are_no_code(functions: Daemon, tmp_path: Path) -> None:
    """Each is refused in one line that says why, and nothing of it is left."""
    whole = files({"app.py": os.urandom(9000)})
    bad = {
        "leaves the code|\\.\\.": zipped([("../app.py", b"x", FILE)]),
        "absolute": zipped([("/etc/app.py", b"x", FILE)]),
        "out of the code": zipped([("app.py", b"../../etc/shadow", LINK)]),
        "times as many|more than 250 MiB": bomb(),
        "broken": whole[: len(whole) // 2],
        "no zip|broken": b"#!/bin/sh\n",
    }
    before = kept(functions)
    for number, (why, archive) in enumerate(bad.items()):
        path = tmp_path / f"{number}.zip"
        path.write_bytes(archive)
        words = ("--code", str(path), "--handler", "app.handler")
        error = functions.fails("function", "deploy", "bad", *words)
        assert re.search(why, error), error
        assert kept(functions) == before
    assert functions.json("function", "ls") == []


def content(answer: InvokeView) -> Any:
    """What the function returned."""
    return json.loads(bytes(answer.payload))


def told(
    client: Client, name: str, payload: Any = None, qualifier: str | None = None
) -> InvokeView:
    """As `invoke`, without a process of the command line; from any thread."""
    return client.invoke_function(name, json.dumps(payload).encode(), qualifier=qualifier)


def test_deploys_and_a_removal_at_once(functions: Daemon, source: Path) -> None:
    """Each is done or refused in a line; what is there in the end is one of them, whole."""
    client, archive = functions.client, zip_of(source)
    other = files({"app.py": APP.replace('return "awake"', 'return "other"').encode()})

    def work(number: int) -> str:
        try:
            if number % 3 == 2:
                client.remove_function("both")
            else:
                client.deploy_function("both", (archive, other)[number % 3], handler="app.sleep")
        except RemoteError as error:
            return error.code
        return "done"

    with ThreadPoolExecutor(6) as threads:
        results = list(threads.map(work, range(12)))
    assert results.count("done") >= 8, results
    assert set(results) <= {"done", "not_found", "conflict", "busy"}, results
    if functions.json("function", "ls"):
        assert content(told(client, "both", 0)) in ("awake", "other")
    assert not [path for path in (functions.state / "code").iterdir() if path.name[0] == "."]
    client.deploy_function("both", archive, handler="app.sleep")
    assert content(told(client, "both", 0)) == "awake"


def test_tmp_is_the_instance_s_own(functions: Daemon, source: Path) -> None:
    """It is writable, and has what requests of the same instance left, and no other's."""
    deploy(functions, source, "tmp", "scratch")
    client = functions.client
    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(lambda _: told(client, "tmp", 2), range(2)))
    first, second = (content(answer) for answer in both)
    assert first[0] != second[0] and first[1] == second[1] == []
    third = content(told(client, "tmp", 0))
    assert len(third[1]) == 1 and third[0] in (first[0], second[0])


@pytest.mark.parametrize("paused", [True, False])
def test_killed_while_it_rests(functions: Daemon, source: Path, paused: bool) -> None:
    """Requests are served by a new one; before its end is known, one may be told of it."""
    deploy(functions, source, "rest", "echo")
    first = invoke(functions, "rest")
    if paused:
        until(lambda: "paused" in functions.json("function", "show", "rest")["instances"], "paused")
    (clone,) = functions.json("ls")
    os.kill(clone["pid"], signal.SIGKILL)
    with contextlib.suppress(RemoteError):  # as long as the kernel is at it
        told(functions.client, "rest")
    until(lambda: not os.path.exists(f"/proc/{clone['pid']}"), "it does not end")
    answer = told(functions.client, "rest", "again")
    assert answer.error is None and content(answer) == "again"
    assert answer.instance != first["instance"]
    until(lambda: len(functions.json("ls")) == 1, "the dead one stays")


def test_more_than_can_be_served(copied: Daemon, source: Path) -> None:
    """Beyond what may run and wait, requests are refused; none is lost, none runs beside."""
    copied.config["functions"] = {"concurrency": 4, "queue": 5}
    copied.start()
    deploy(copied, source, "crowd", "sleep")
    client, refused = copied.client, "429 busy"

    def work(_: int) -> str:
        try:
            return str(content(told(client, "crowd", 1)))
        except RemoteError as error:
            return f"{error.status} {error.code}"

    with ThreadPoolExecutor(20) as threads:
        results = Counter(threads.map(work, range(20)))
    assert sum(results.values()) == 20 and set(results) == {"awake", refused}
    assert results["awake"] >= 9 and len(copied.json("ls")) <= 4
    assert content(told(client, "crowd", 0)) == "awake"
    copied.cli("function", "rm", "crowd")


def test_an_alias_that_moves_under_load(functions: Daemon, source: Path) -> None:
    """300 requests divide as their weights say; while all goes to one, no request fails."""
    client = functions.client
    deploy(functions, source, "moves", "echo")
    client.publish_function("moves")
    client.deploy_function("moves", handler="app.tell")
    client.publish_function("moves")
    client.set_alias("moves", "prod", {"1": 0.9, "2": 0.1})

    def versions(count: int) -> Counter[str]:
        with ThreadPoolExecutor(2) as threads:
            answers = list(threads.map(lambda n: told(client, "moves", n, "prod"), range(count)))
        assert not [answer for answer in answers if answer.error is not None]
        return Counter(answer.version for answer in answers)

    # By chance, one run in 370 is beyond three standard deviations, and so are two in a row in
    # 137,000.
    bound = 3 * math.sqrt(300 * 0.9 * 0.1)
    assert any(abs(versions(300)["2"] - 30) <= bound for _ in range(2))
    with ThreadPoolExecutor(1) as threads:
        load = threads.submit(versions, 400)
        time.sleep(0.2)
        client.set_alias("moves", "prod", {"2": 1.0}, ready=0)
        assert set(versions(10)) == {"2"}
        assert load.result()["2"] >= 50
