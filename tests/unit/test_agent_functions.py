"""Functions in the guest: load, invoke, rehearse, over the real agent, runtime and host's end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from templated.drivers.guest_functions import Answer, InitFailed
from templated.errors import GuestError, InvalidRequest
from templated.guest.agent.commands import Agent
from templated.guest.agent.runtimes import NOBODY, Process
from templated.model.function import MAX_PAYLOAD, Runtime
from tests.unit.function_guest import ECHO, UUID, Caller, Guest, calling, functions_in
from tests.unit.test_agent import Recorder

AWS_BOOTSTRAP = f"#!/bin/sh\nexec {sys.executable} -m awslambdaric $_HANDLER\n"


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    with functions_in(tmp_path) as guest:
        yield guest


def said(answer: Answer) -> dict[str, object]:
    """What a failed request says."""
    assert answer.error == "Unhandled"
    body = json.loads(answer.payload)
    assert set(body) == {"errorMessage", "errorType", "stackTrace"}
    return dict(body)


async def killed(guest: Guest) -> None:
    """The runtime is killed, and the agent has seen that."""
    process = guest.functions.process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    while guest.functions.process is process:
        await asyncio.sleep(0.01)


def failing(guest: Guest, handler: str = "app.handler", **changes: object) -> dict[str, object]:
    """How a load failed."""

    async def body(caller: Caller) -> dict[str, object]:
        with pytest.raises(InitFailed) as caught:
            await caller.load(handler, **changes)
        answer = await caller.invoke()
        assert answer.error == "Unhandled" and not answer.begun and answer.ended
        return dict(json.loads(caught.value.payload))

    return calling(guest, body)


CONTEXT = """
import os, sys, logging
print("loaded")
def handler(event, context):
    print("hello", event["a"])
    print("oops", file=sys.stderr)
    logging.warning("careful")
    return {
        "event": event,
        "id": context.aws_request_id,
        "arn": context.invoked_function_arn,
        "name": context.function_name,
        "version": context.function_version,
        "memory": context.memory_limit_in_mb,
        "left": context.get_remaining_time_in_millis(),
        "env": os.environ["COLOUR"],
        "root": os.environ["LAMBDA_TASK_ROOT"],
        "trace": os.environ["_X_AMZN_TRACE_ID"],
        "cwd": os.getcwd(),
    }
"""


def test_a_handler_gets_what_lambda_gives(guest: Guest) -> None:
    guest.write("app.py", CONTEXT)
    env = {
        "COLOUR": "bleu é",
        "AWS_LAMBDA_FUNCTION_NAME": "hello",
        "AWS_LAMBDA_FUNCTION_VERSION": "3",
        "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "128",
    }

    async def body(caller: Caller) -> None:
        loaded = await caller.load(env=env)
        assert loaded.init_ms > 0 and loaded.mount_ms >= 0
        assert caller.text() == "loaded\n"
        deadline = int(time.time() * 1000) + 60_000
        answer = await caller.invoke(
            '{"a": "ü"}'.encode(), request="r-7", deadline_ms=deadline, trace="Root=1"
        )
        assert answer.error is None and not answer.ended and answer.begun
        result = json.loads(answer.payload)
        assert 30_000 < result.pop("left") <= 60_000
        assert result == {
            "event": {"a": "ü"},
            "id": "r-7",
            "arn": "arn:x",
            "name": "hello",
            "version": "3",
            "memory": "128",
            "env": "bleu é",
            "root": str(guest.code),
            "trace": "Root=1",
            "cwd": str(guest.code),
        }
        out = caller.text()
        assert out.startswith("loaded\nhello ü\n") and "[WARNING]" in out and "careful" in out
        assert caller.text("stderr") == "oops\n"
        with pytest.raises(GuestError, match="a function already"):
            await caller.load()

    calling(guest, body)


def test_a_package_and_many_requests(guest: Guest) -> None:
    guest.write("pkg/mod.py", "import json\ncount = 0\n" + ECHO.replace("event\n", "[event, 1]\n"))
    guest.write("pkg/__init__.py", "")

    async def body(caller: Caller) -> None:
        await caller.load("pkg/mod.handler")
        for number in range(30):
            answer = await caller.invoke(b"%d" % number, request=f"r-{number}")
            assert answer.payload == b"[%d, 1]" % number

    calling(guest, body)


@pytest.mark.parametrize(
    ("code", "handler", "kind", "words"),
    [
        (ECHO, "app.missing", "Runtime.HandlerNotFound", "Handler 'missing' missing on"),
        (ECHO, "none.handler", "Runtime.ImportModuleError", "No module named 'none'"),
        ("import nothing_here\n", "app.handler", "Runtime.ImportModuleError", "nothing_here"),
        (ECHO, "handler", "Runtime.MalformedHandlerName", "Bad handler"),
        ("def handler(:\n", "app.handler", "Runtime.UserCodeSyntaxError", "Syntax error"),
        ("raise ValueError('at import')\n", "app.handler", "ValueError", "at import"),
        ("import os; os._exit(3)\n", "app.handler", "Runtime.ExitError", "exit status 3"),
        ("raise SystemExit(4)\n", "app.handler", "Runtime.ExitError", "exit status 4"),
        ("import sys; sys.exit()\n", "app.handler", "Runtime.ExitError", "without providing"),
    ],
)
def test_an_init_that_fails_says_why(
    guest: Guest, code: str, handler: str, kind: str, words: str
) -> None:
    guest.write("app.py", code)
    said = failing(guest, handler)
    assert said["errorType"] == kind and words in str(said["errorMessage"])


def test_an_init_that_never_ends(guest: Guest) -> None:
    guest.write("app.py", "import time\nwhile True: time.sleep(0.05)\n")
    assert failing(guest, init_timeout=0.2)["errorType"] == "Sandbox.Timedout"


def test_the_wrong_code_is_refused(guest: Guest) -> None:
    guest.write("app.py", ECHO)

    async def body(caller: Caller) -> None:
        with pytest.raises(GuestError, match="not the right one"):
            await caller.load(uuid="ff" * 16)
        with pytest.raises(GuestError, match="it is empty"):
            await caller.invoke()
        await caller.load()

    calling(guest, body)


FAILING = """
import os, sys, time, subprocess
def handler(event, context):
    if event == "raise":
        raise KeyError("no such thing")
    if event == "exit":
        print("last words")
        sys.exit(5)
    if event == "os-exit":
        os._exit(6)
    if event == "kill":
        os.kill(os.getpid(), 9)
    if event == "set":
        return {1, 2}
    if event == "nan":
        return float("nan")
    if event == "circle":
        a = []; a.append(a)
        return a
    if event == "surrogate":
        return "\\ud800"
    if event == "large":
        return "x" * (7 << 20)
    if event == "fork":
        if os.fork() == 0:
            time.sleep(30)
        return "parent"
    if event == "fork-return":
        os.fork()
        return "once"
    if event == "linger":
        child = subprocess.Popen(["sleep", "30"])
        return child.pid
    if event == "close":
        sys.stdout.close()
    if event == "deep":
        return handler(event, context)
    return "well"
"""


@pytest.mark.parametrize(
    ("event", "kind", "words"),
    [
        ("raise", "KeyError", "no such thing"),
        ("set", "Runtime.MarshalError", "not JSON serializable"),
        ("nan", "Runtime.MarshalError", "not JSON compliant"),
        ("circle", "Runtime.MarshalError", "Circular"),
        ("surrogate", "Runtime.MarshalError", "surrogates not allowed"),
        ("large", "Function.ResponseSizeTooLarge", "exceeded"),
        ("deep", "RecursionError", "recursion"),
    ],
)
def test_a_request_that_fails_and_the_next_one(
    guest: Guest, event: str, kind: str, words: str
) -> None:
    guest.write("app.py", FAILING)

    async def body(caller: Caller) -> None:
        await caller.load()
        failed = said(await caller.invoke(json.dumps(event).encode()))
        assert failed["errorType"] == kind and words in str(failed["errorMessage"])
        assert f"[ERROR] {kind}" in caller.text("stderr")
        if event == "raise":
            frames = failed["stackTrace"]
            assert isinstance(frames, list) and len(frames) == 1
            assert "app.py" in frames[0] and "raise KeyError" in frames[0]
        assert (await caller.invoke(b'"x"')).payload == b'"well"'

    calling(guest, body)


@pytest.mark.parametrize(
    ("event", "ended"),
    [("exit", "exit status 5"), ("os-exit", "exit status 6"), ("kill", "killed by SIGKILL")],
)
def test_a_runtime_that_ends_in_a_request_is_told_at_once(
    guest: Guest, event: str, ended: str
) -> None:
    guest.write("app.py", FAILING)

    async def body(caller: Caller) -> None:
        await caller.load()
        answer = await caller.invoke(json.dumps(event).encode(), request="r-9")
        assert answer.ended == ended and answer.begun
        failed = said(answer)
        assert failed["errorType"] == "Runtime.ExitError"
        assert str(failed["errorMessage"]).startswith("RequestId: r-9 Error: Runtime exited")
        assert caller.text() == ("last words\n" if event == "exit" else "")
        again = await caller.invoke()
        assert (again.ended, again.begun) == (ended, False)

    calling(guest, body)


@pytest.mark.parametrize("event", ["fork", "fork-return", "linger", "close"])
def test_children_that_linger_and_a_closed_stdout_do_no_harm(guest: Guest, event: str) -> None:
    guest.write("app.py", FAILING)

    async def body(caller: Caller) -> None:
        await caller.load()
        answer = await caller.invoke(json.dumps(event).encode())
        assert answer.error is None
        for _ in range(3):
            assert (await caller.invoke(b'"x"')).payload == b'"well"'
        if event == "linger":
            os.kill(int(answer.payload), signal.SIGKILL)
        await killed(guest)  # while a child of its has its pipes and its socket
        assert not (await caller.invoke()).begun

    calling(guest, body)


def test_megabytes_of_output_come_before_the_answer(guest: Guest) -> None:
    code = "import sys\ndef handler(event, context):\n"
    guest.write("app.py", code + "    sys.stdout.write('x' * 5_000_000 + 'end')\n    return 1\n")

    async def body(caller: Caller) -> None:
        await caller.load()
        for _ in range(3):
            caller.printed.clear()
            assert (await caller.invoke()).payload == b"1"
            text = caller.text()
            assert len(text) == 5_000_003 and text.endswith("end")

    calling(guest, body)


def test_what_is_printed_between_requests_comes_with_the_next(guest: Guest) -> None:
    code = "import threading\ndef late():\n    print('x' * 300_000 + 'late', flush=True)\n"
    code += "def handler(event, context):\n    threading.Timer(0.02, late).start()\n"
    guest.write("app.py", code)

    async def body(caller: Caller) -> None:
        await caller.load()
        assert (await caller.invoke()).payload == b"null"
        while not b"".join(data for _, data in guest.functions._kept).endswith(b"late\n"):
            await asyncio.sleep(0.01)
        assert caller.text() == ""
        await caller.invoke()
        text = caller.text()
        assert text.endswith("late\n") and len(text) < 200_000, "the last of it is kept"

    calling(guest, body)


@pytest.mark.parametrize("size", [60_000, 70_000, 1_000_000, MAX_PAYLOAD - 2])
def test_large_payloads_in_both_directions(guest: Guest, size: int) -> None:
    guest.write("app.py", ECHO)

    async def body(caller: Caller) -> None:
        await caller.load()
        payload = b'"' + b"x" * size + b'"' if size < MAX_PAYLOAD - 2 else b'"' + b"y" * size + b'"'
        assert (await caller.invoke(payload)).payload == payload
        with pytest.raises(InvalidRequest, match="more than 6 MiB"):
            await caller.invoke(payload + b" " * MAX_PAYLOAD)
        with pytest.raises(InvalidRequest, match="not UTF-8"):
            await caller.invoke(b"\xff")

    calling(guest, body)


def test_the_clock_is_set_before_the_handler_runs_and_counts_from_the_mark(guest: Guest) -> None:
    guest.write("app.py", ECHO)

    async def body(caller: Caller) -> None:
        await caller.load()
        begin = time.monotonic()
        await caller.invoke(time=5000.0)
        name, clock = guest.system.calls[-1]
        assert name == "clock" and clock >= 5000.0
        guest.system.calls.clear()
        await caller.invoke()
        assert not guest.system.calls
        await asyncio.sleep(0.05)
        await caller.invoke(time=6000.0)
        assert 6000.05 <= guest.system.calls[-1][1] <= 6000 + time.monotonic() - begin

    calling(guest, body)


def test_one_request_at_a_time(guest: Guest, tmp_path: Path) -> None:
    code = "import os, time\ndef handler(event, context):\n"
    code += "    while not os.path.exists(event): time.sleep(0.01)\n    return 1\n"
    guest.write("app.py", code)

    async def body(caller: Caller) -> None:
        await caller.load()
        go = tmp_path / "go"
        first = asyncio.create_task(caller.invoke(json.dumps(str(go)).encode()))
        while guest.functions.state != "busy":
            await asyncio.sleep(0.01)
        with pytest.raises(GuestError, match="it is busy"):
            await caller.invoke()
        go.touch()
        assert (await first).payload == b"1"

    calling(guest, body)


@pytest.mark.parametrize("field", ["request", "arn", "trace"])
def test_nothing_gets_into_the_heads_of_the_api(guest: Guest, field: str) -> None:
    guest.write("app.py", ECHO)

    async def body(caller: Caller) -> None:
        await caller.load()
        for bad in ("a\r\nX: y", "é", "x" * 2000):
            changes: dict[str, Any] = {field: bad}
            with pytest.raises(GuestError, match="not printable"):
                await caller.invoke(**changes)
        assert (await caller.invoke()).payload == b"{}"

    calling(guest, body)


def test_a_rehearsal_leaves_nothing(guest: Guest) -> None:
    guest.write(
        "app.py",
        "import sys, os\n"
        + ECHO.replace("event\n", "[dict(os.environ), 'templated_rehearsal' in sys.modules]\n"),
    )

    async def body(caller: Caller) -> None:
        await caller.agent.rehearse_code(30.0)
        await caller.agent.rehearse_code(30.0)
        assert guest.drive.calls == ["attach", "detach"] * 4
        assert not guest.agent.sources, "it can wait in a plain read again"
        assert (await caller.agent.request("quiesce", 5.0)) is not None
        await caller.load()
        environment, known = json.loads((await caller.invoke()).payload)
        assert not known and "AWS_LAMBDA_FUNCTION_NAME" not in environment
        with pytest.raises(GuestError, match="has a function already"):
            await caller.agent.rehearse_code(30.0)

    calling(guest, body)


def test_a_rehearsal_that_fails_says_why(guest: Guest) -> None:
    guest.write("templated_rehearsal.py", "raise ValueError('not today')\n")

    async def body(caller: Caller) -> None:
        with pytest.raises(GuestError, match="not today"):
            await caller.agent.rehearse_code(30.0)

    calling(guest, body)


def test_code_that_is_exchanged_under_the_same_times_is_seen(guest: Guest) -> None:
    """All code images have the same times: a listing of the folder that is kept would be old."""

    async def body(caller: Caller) -> None:
        os.utime(guest.code, (1, 1))
        await caller.agent.rehearse_code(30.0)
        guest.write("fresh.py", ECHO)
        os.utime(guest.code, (1, 1))
        await caller.load("fresh.handler")

    calling(guest, body)


def test_a_resident_that_died_is_started_again(guest: Guest) -> None:
    guest.write("app.py", ECHO)

    async def body(caller: Caller) -> None:
        await killed(guest)
        await caller.load()
        assert (await caller.invoke(b"[1]")).payload == b"[1]"

    calling(guest, body)


CURL = """#!/bin/sh
set -e
echo starting $_HANDLER $COLOUR
api=http://$AWS_LAMBDA_RUNTIME_API/2018-06-01/runtime
while true; do
    event=$(curl -sS -D $TMPDIR/head $api/invocation/next)
    id=$(sed -n 's/^Lambda-Runtime-Aws-Request-Id: *//p' $TMPDIR/head | tr -d '\\r')
    echo got $event
    [ "$event" = '"exit"' ] && exit 7
    [ "$event" = '"fail"' ] && what=error || what=response
    curl -sS -X POST $api/invocation/$id/$what -d "{\\"echo\\": $event}" >/dev/null
done
"""


@pytest.mark.skipif(not os.path.exists("/usr/bin/curl"), reason="needs curl")
def test_a_bootstrap_of_shell_and_curl(guest: Guest, tmp_path: Path) -> None:
    guest.write("bootstrap", CURL, 0o755)
    resident = guest.functions.process

    async def body(caller: Caller) -> None:
        env = {"COLOUR": "red", "TMPDIR": str(tmp_path)}
        await caller.load("any.thing", runtime=Runtime.PROVIDED, env=env)
        assert guest.functions.process is not resident
        for number in range(3):
            answer = await caller.invoke(b"%d" % number, request=f"id-{number}")
            assert answer == Answer(payload=b'{"echo": %d}' % number)
        assert caller.text() == "starting any.thing red\ngot 0\ngot 1\ngot 2\n"
        assert (await caller.invoke(b'"fail"')).error == "Unhandled"
        assert (await caller.invoke(b'"exit"')).ended == "exit status 7"

    calling(guest, body)


@pytest.mark.parametrize(
    ("mode", "text", "words"),
    [
        (None, "", "no file named bootstrap"),
        (0o644, "#!/bin/sh\n", "is not executable"),
        (0o755, "#!/no/such/program\n", "cannot be executed"),
        (0o755, "no program", "cannot be executed"),
    ],
)
def test_a_bootstrap_that_cannot_start(
    guest: Guest, mode: int | None, text: str, words: str
) -> None:
    if mode is not None:
        guest.write("bootstrap", text, mode)
    failed = failing(guest, runtime=Runtime.PROVIDED)
    assert failed["errorType"] == "Runtime.InvalidEntrypoint"
    assert words in str(failed["errorMessage"])


def test_awslambdaric_as_it_is(guest: Guest) -> None:
    """AWS's own client of the Runtime API."""
    pytest.importorskip("awslambdaric")
    guest.write("bootstrap", AWS_BOOTSTRAP, 0o755)
    guest.write(
        "app.py", FAILING.replace('return "well"', "return [event, context.aws_request_id]")
    )

    async def body(caller: Caller) -> None:
        await caller.load(runtime=Runtime.PROVIDED)
        for number in range(5):
            answer = await caller.invoke(b"%d" % number, request=f"id-{number}", trace="Root=1-2")
            assert json.loads(answer.payload) == [number, f"id-{number}"]
        failed = json.loads((await caller.invoke(b'"raise"')).payload)
        assert failed["errorType"] == "KeyError"
        large = b'"' + b"z" * 3_000_000 + b'"'
        answer = await caller.invoke(large)
        assert json.loads(answer.payload) == [json.loads(large), "r-1"]
        size = json.loads((await caller.invoke(b'"large"')).payload)
        assert size["errorType"] == "Function.ResponseSizeTooLarge"
        # It ends when its answer was refused; no other request is lost with it.
        answer = await caller.invoke(b"1")
        assert (answer.ended, answer.begun) == ("exit status 1", False)

    calling(guest, body)


def test_awslambdaric_tells_of_a_missing_handler(guest: Guest) -> None:
    pytest.importorskip("awslambdaric")
    guest.write("bootstrap", AWS_BOOTSTRAP, 0o755)
    guest.write("app.py", ECHO)
    failed = failing(guest, "app.missing", runtime=Runtime.PROVIDED)
    assert "missing" in str(failed["errorMessage"])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_functions_run_as_nobody(tmp_path: Path) -> None:
    ends = socket.socketpair()
    system = Recorder(tmp_path)
    agent = Agent(ends[0].fileno(), ends[0].fileno(), system)
    printed: list[bytes] = []
    ended: list[str] = []
    process = Process(
        agent,
        ["/bin/sh", "-c", "id -u; id -g; id -G; echo $HOME"],
        {"PATH": "/usr/bin:/bin", "HOME": "/tmp"},
        "/",
        user=NOBODY,
        printed=lambda _, data: printed.append(data),
        ended=ended.append,
    )
    process.resume()
    while not ended:
        agent.turn(0.1)
    assert b"".join(printed).split() == [b"65534"] * 3 + [b"/tmp"] and ended == ["exit status 0"]
    agent.close()
    system.close()
    for end in ends:
        end.close()


def test_the_same_uuid_in_all_notations(guest: Guest) -> None:
    guest.write("app.py", ECHO)
    dashed = f"{UUID[:8]}-{UUID[8:12]}-{UUID[12:16]}-{UUID[16:20]}-{UUID[20:]}"
    calling(guest, lambda caller: caller.load(uuid=dashed))
