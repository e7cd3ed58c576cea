"""Lambda's API on a real daemon, by clients that people have: boto3, and AWS's own runtime."""

from __future__ import annotations

import base64
import io
import json
import math
import socket
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config as ClientConfig
from botocore.exceptions import ClientError

from tests.real.conftest import prepare
from tests.real.harness import Daemon

pytestmark = pytest.mark.real

SIGNING = "of-these-tests"
TRACE = Path(__file__).parents[1] / "data" / "azure2019-60apps.csv"
ROLE = "arn:aws:iam::000000000000:role/any"
APP = """
import time


def handler(event, context):
    print("asked for", event)
    if isinstance(event, dict) and "sleep" in event:
        time.sleep(event["sleep"])
    if event == "fail":
        raise KeyError("no such event")
    return {"revision": 1, "event": event, "request": context.aws_request_id,
            "arn": context.invoked_function_arn}
"""
BOOTSTRAP = """#!/bin/sh
PYTHONPATH=$LAMBDA_TASK_ROOT/packages exec python3 -m awslambdaric "$_HANDLER"
"""
AWS_APP = """
import logging, os

logging.getLogger().setLevel("INFO")
CALLS = []


def handler(event, context):
    CALLS.append(event)
    logging.info("call %d", len(CALLS))
    if event == "fail":
        raise ValueError("as asked")
    return {
        "event": event,
        "calls": len(CALLS),
        "request": context.aws_request_id,
        "arn": context.invoked_function_arn,
        "function": [context.function_name, context.function_version],
        "left": context.get_remaining_time_in_millis(),
        "stage": os.environ["STAGE"],
        "trace": os.environ.get("_X_AMZN_TRACE_ID"),
    }
"""


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def served(built: Daemon, image_store: Path) -> Iterator[Daemon]:
    """A daemon that has a gateway."""
    gateway = {"listen": f"127.0.0.1:{_free_port()}", "keys": [{"id": "TESTS", "secret": SIGNING}]}
    daemon = prepare(Daemon(gateway=gateway), image_store)
    try:
        daemon.copy_build(built)
        daemon.start()
        _until(lambda: _listens(daemon), daemon.log)
        yield daemon
    finally:
        daemon.close()


def _listens(daemon: Daemon) -> bool:
    """The gateway listens a moment after the unix socket."""
    gateway: Any = daemon.config["gateway"]
    host, _, port = gateway["listen"].partition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


@pytest.fixture
def client(served: Daemon) -> Iterator[Any]:
    """boto3's client; functions that a test made are removed again."""
    gateway: Any = served.config["gateway"]
    made = boto3.client(
        "lambda",
        endpoint_url=f"http://{gateway['listen']}",
        region_name="us-east-1",
        aws_access_key_id="TESTS",
        aws_secret_access_key=SIGNING,
        config=ClientConfig(retries={"max_attempts": 0}, proxies={}, read_timeout=60),
    )
    yield made
    for function in made.list_functions()["Functions"]:
        made.delete_function(FunctionName=function["FunctionName"])
    made.close()
    _until(lambda: not served.json("ls"), "instances stay behind")


def _until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def _zip(text: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("app.py", text)
    return content.getvalue()


def _create(client: Any, name: str, code: bytes, **others: Any) -> Any:
    made = client.create_function(
        FunctionName=name,
        Role=ROLE,
        Code={"ZipFile": code},
        **{"Runtime": "python3.11", "Handler": "app.handler", **others},
    )
    client.get_waiter("function_active_v2").wait(FunctionName=name)
    return made


def _invoke(client: Any, name: str, event: Any = None, **others: Any) -> tuple[Any, Any]:
    """The payload, and the answer."""
    answer = client.invoke(FunctionName=name, Payload=json.dumps(event), **others)
    with answer["Payload"] as payload:
        return json.loads(payload.read() or b"null"), answer


def _refused(call: Callable[..., Any], **arguments: Any) -> Any:
    with pytest.raises(ClientError) as caught:
        call(**arguments)
    return caught.value.response


def test_a_function_of_boto3(client: Any, served: Daemon) -> None:
    """Made, waited for, invoked in each way there is, and removed."""
    _create(client, "hello", _zip(APP))
    told, answer = _invoke(client, "hello", {"a": 1}, LogType="Tail")
    assert answer["StatusCode"] == 200 and answer["ExecutedVersion"] == "$LATEST"
    assert "FunctionError" not in answer and told["event"] == {"a": 1}
    assert told["arn"].endswith(":function:hello")
    tail = base64.b64decode(answer["LogResult"]).decode()
    assert "asked for {'a': 1}" in tail
    assert _invoke(client, "hello", InvocationType="DryRun")[1]["StatusCode"] == 204
    assert _invoke(client, "hello", "later", InvocationType="Event")[1]["StatusCode"] == 202
    _until(lambda: "asked for later" in served.cli("function", "logs", "hello"), "no event ran")
    failed, answer = _invoke(client, "hello", "fail")
    assert answer["StatusCode"] == 200 and answer["FunctionError"] == "Unhandled"
    assert failed["errorType"] == "KeyError" and failed["stackTrace"]
    large = _refused(client.invoke, FunctionName="hello", Payload=b'"%s"' % (b"x" * (6 << 20)))
    assert large["Error"]["Code"] == "RequestTooLargeException"
    assert large["ResponseMetadata"]["HTTPStatusCode"] == 413
    broken = _refused(client.invoke, FunctionName="hello", Payload=b"{")
    assert broken["Error"]["Code"] == "InvalidRequestContentException"
    client.delete_function(FunctionName="hello")
    gone = _refused(client.invoke, FunctionName="hello")
    assert gone["Error"]["Code"] == "ResourceNotFoundException"
    _until(lambda: not served.json("ls"), "its instance stays")


def test_versions_by_weight(client: Any) -> None:
    """A version stays what it was; an alias divides the requests among two."""
    _create(client, "grey", _zip(APP))
    assert client.publish_version(FunctionName="grey")["Version"] == "1"
    client.update_function_code(
        FunctionName="grey", ZipFile=_zip(APP.replace('"revision": 1', '"revision": 2'))
    )
    client.get_waiter("function_updated_v2").wait(FunctionName="grey")
    assert client.publish_version(FunctionName="grey")["Version"] == "2"
    routing = {"AdditionalVersionWeights": {"2": 0.3}}
    client.create_alias(
        FunctionName="grey", Name="prod", FunctionVersion="1", RoutingConfig=routing
    )
    seen: Counter[str] = Counter()
    for _ in range(100):
        told, answer = _invoke(client, "grey", Qualifier="prod")
        assert str(told["revision"]) == answer["ExecutedVersion"]
        seen[answer["ExecutedVersion"]] += 1
    # Four standard deviations: one run in some 16,000 is beyond them.
    assert abs(seen["2"] - 30) <= 4 * math.sqrt(100 * 0.3 * 0.7), seen
    client.update_alias(
        FunctionName="grey",
        Name="prod",
        FunctionVersion="2",
        RoutingConfig={"AdditionalVersionWeights": {}},
    )
    # Requests go there once enough instances of it are ready.
    deadline = time.monotonic() + 60
    while {_invoke(client, "grey:prod")[1]["ExecutedVersion"] for _ in range(5)} != {"2"}:
        assert time.monotonic() < deadline
    held = _refused(client.delete_function, FunctionName="grey", Qualifier="2")
    assert held["Error"]["Code"] == "ResourceConflictException"


def test_reserved_concurrency(client: Any) -> None:
    """Beyond its own number a function is refused at once, and served again after."""
    _create(client, "narrow", _zip(APP))
    client.put_function_concurrency(FunctionName="narrow", ReservedConcurrentExecutions=1)
    assert _invoke(client, "narrow", 1)[0]["event"] == 1
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(_invoke, client, "narrow", {"sleep": 1})
        time.sleep(0.3)
        refused = _refused(client.invoke, FunctionName="narrow", Payload=b"2")
        assert slow.result()[0]["event"] == {"sleep": 1}
    assert refused["Error"]["Code"] == "TooManyRequestsException"
    assert refused["Reason"] == "ReservedFunctionConcurrentInvocationLimitExceeded"
    assert refused["ResponseMetadata"]["HTTPHeaders"]["retry-after"]
    client.put_function_concurrency(FunctionName="narrow", ReservedConcurrentExecutions=0)
    stopped = _refused(client.invoke, FunctionName="narrow", Payload=b"2")
    assert stopped["Error"]["Code"] == "TooManyRequestsException"
    client.delete_function_concurrency(FunctionName="narrow")
    assert _invoke(client, "narrow", 3)[0]["event"] == 3


@pytest.fixture(scope="module")
def aws_runtime(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A zip with AWS's runtime for the guest's Python, as its wheels have it, and a bootstrap.

    Its extension is in C++, whose library the guest has not.
    """
    folder = tmp_path_factory.mktemp("awslambdaric")
    _fetch_wheels(folder)
    library = _fetch_library(folder / "root")
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as packed:
                for entry in packed.infolist():
                    archive.writestr(f"packages/{entry.filename}", packed.read(entry))
        archive.writestr("lib/libstdc++.so.6", library)
        archive.writestr("app.py", AWS_APP)
        bootstrap = zipfile.ZipInfo("bootstrap")
        bootstrap.create_system, bootstrap.external_attr = 3, 0o100755 << 16
        archive.writestr(bootstrap, BOOTSTRAP)
    return content.getvalue()


def _fetch_wheels(folder: Path) -> None:
    platforms = ("manylinux_2_28_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64", "any")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"]
    subprocess.run(
        [
            *(*pip, "--dest", str(folder), "--only-binary=:all:", "--implementation=cp"),
            *("--python-version=3.11", "--abi=cp311", "--abi=abi3", "--abi=none"),
            *(f"--platform={platform}" for platform in platforms),
            "awslambdaric>=3.0",
        ],
        check=True,
        timeout=120,
    )


def _fetch_library(root: Path) -> bytes:
    """That of the guest's Debian: one of a newer host would ask for a newer libc."""
    command = ["mmdebstrap", "--variant=extract", "--quiet", "--skip=output/mknod"]
    include = "--include=libstdc++6"
    subprocess.run([*command, include, "bookworm", str(root)], check=True, timeout=120)
    return (root / "usr/lib/x86_64-linux-gnu/libstdc++.so.6").read_bytes()


def test_the_runtime_of_aws(client: Any, served: Daemon, aws_runtime: bytes) -> None:
    """awslambdaric, as it is, is served by the guest: answers, errors, context and logs."""
    stage = {"Variables": {"STAGE": "test"}}
    _create(client, "aws", aws_runtime, Runtime="provided.al2023", Timeout=20, Environment=stage)
    for number in (1, 2):
        told, answer = _invoke(client, "aws", {"n": number}, LogType="Tail")
        log = base64.b64decode(answer["LogResult"]).decode()
        assert "FunctionError" not in answer, served.cli("function", "logs", "aws")
        assert told["event"] == {"n": number} and told["calls"] == number
        assert told["function"] == ["aws", "$LATEST"] and told["stage"] == "test"
        assert told["arn"].endswith(":function:aws") and 0 < told["left"] <= 20_100
        assert len(told["request"]) == 36 and told["request"] in log
        assert f"call {number}" in log
    failed, answer = _invoke(client, "aws", "fail")
    assert answer["FunctionError"] == "Unhandled"
    assert failed["errorType"] == "ValueError" and failed["errorMessage"] == "as asked"
    assert any("app.py" in line for line in failed["stackTrace"])
    assert _invoke(client, "aws", 4)[0]["calls"] == 4


@pytest.mark.long
def test_a_trace_is_replayed(served: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """`bench scaling --live`: all requests succeed, and the first of each function is cold."""
    gateway: Any = served.config["gateway"]
    keys = {"AWS_ACCESS_KEY_ID": "TESTS", "AWS_SECRET_ACCESS_KEY": SIGNING}
    for name, value in {**keys, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    report = served.json(
        *("bench", "scaling", "--trace", str(TRACE), "--functions", "5", "--live", "144"),
        *("--minutes", "36", "--gateway", f"http://{gateway['listen']}"),
    )
    live = report["live"]
    assert (live["errors"], live["last_error"]) == (0, "")
    used = [row for row in live["rows"] if row["requests"]]
    assert used and all(row["cold_live"] >= 1 for row in used)
    assert live["cold_live"] == sum(row["cold_live"] for row in live["rows"])
    assert live["late_ms"]["n"] == live["requests"] == sum(row["requests"] for row in live["rows"])
    assert served.json("function", "ls") == []
