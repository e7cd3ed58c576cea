"""The gateway's operations, asked by boto3 as it is."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from templated.errors import Busy, HostError, Throttled
from templated.model.function import MAX_CODE, DeployRequest, Runtime
from tests.unit.fake_functions import FakeCode, FakeRouter
from tests.unit.lambda_client import ROLE, Gate, create, refusal, talk, zipped

pytestmark = pytest.mark.usefixtures("no_blocking_calls")
ARN = "arn:aws:lambda:us-east-1:000000000000:function:hello"
Call = Callable[[Any], Any]


def test_a_function_is_made_and_shown(tmp_path: Path) -> None:
    """With what a client said, and with what the template has."""

    def work(gate: Gate) -> None:
        client = gate.client()
        made = create(
            client,
            Timeout=7,
            Description="it greets",
            Environment={"Variables": {"A": "b"}},
            MemorySize=128,
            Tags={"templated:template": "t"},
        )
        assert made["ResponseMetadata"]["HTTPStatusCode"] == 201
        digest = gate.functions.registry.latest("hello").code.digest
        expected = {
            "FunctionName": "hello",
            "FunctionArn": ARN,
            "Runtime": "python3.12",
            "Role": ROLE,
            "Handler": "app.handler",
            "CodeSize": len(zipped("x")),
            "Description": "it greets",
            "Timeout": 7,
            "MemorySize": 256,
            "CodeSha256": base64.b64encode(bytes.fromhex(digest)).decode(),
            "Version": "$LATEST",
            "Environment": {"Variables": {"A": "b"}},
            "State": "Active",
            "LastUpdateStatus": "Successful",
            "PackageType": "Zip",
            "Architectures": ["x86_64"],
        }
        assert {key: made[key] for key in expected} == expected
        shown = client.get_function(FunctionName="hello")
        assert {key: shown["Configuration"][key] for key in expected} == expected
        assert shown["Tags"] == {"templated:template": "t"}
        assert client.get_function_configuration(FunctionName=ARN)["RevisionId"]
        for name in ("function_active_v2", "function_updated_v2", "function_exists"):
            client.get_waiter(name).wait(FunctionName="hello")
        client.get_waiter("published_version_active").wait(FunctionName="hello")

    talk(tmp_path, work)


def test_code_and_settings_change(tmp_path: Path) -> None:
    """Each makes another revision; what is left out stays."""

    def work(gate: Gate) -> None:
        client = gate.client()
        made = create(client, Environment={"Variables": {"A": "b"}}, Timeout=3)
        dry = client.update_function_code(FunctionName="hello", ZipFile=zipped("y"), DryRun=True)
        assert dry["CodeSha256"] == made["CodeSha256"]
        code = client.update_function_code(
            FunctionName="hello", ZipFile=zipped("y"), RevisionId=made["RevisionId"]
        )
        assert code["CodeSha256"] != made["CodeSha256"] and code["Timeout"] == 3
        settings = client.update_function_configuration(
            FunctionName="hello", Timeout=9, Environment={"Variables": {}}, Role=f"{ROLE}2"
        )
        assert (settings["Timeout"], settings["Role"]) == (9, f"{ROLE}2")
        assert "Environment" not in settings and settings["Runtime"] == "python3.12"
        assert settings["CodeSha256"] == code["CodeSha256"]
        assert len({made["RevisionId"], code["RevisionId"], settings["RevisionId"]}) == 3
        published = client.update_function_code(
            FunctionName="hello", ZipFile=zipped("z"), Publish=True
        )
        assert (published["Version"], published["FunctionArn"]) == ("1", f"{ARN}:1")

    talk(tmp_path, work)


def test_runtimes(tmp_path: Path) -> None:
    """`provided` is the code's own bootstrap, whatever the handler is called."""

    def work(gate: Gate) -> None:
        client = gate.client()
        made = create(client, Runtime="provided.al2023", Handler="anything")
        assert made["Runtime"] == "provided.al2023"
        assert gate.functions.registry.latest("hello").settings.runtime.value == "provided"

    talk(tmp_path, work)


def test_versions(tmp_path: Path) -> None:
    """As Lambda numbers them; without a change there is no other number."""

    def work(gate: Gate) -> None:
        client = gate.client()
        made = create(client, Publish=True)
        assert (made["Version"], made["FunctionArn"]) == ("1", f"{ARN}:1")
        again = client.publish_version(FunctionName="hello", CodeSha256=made["CodeSha256"])
        assert again["Version"] == "1"
        client.update_function_code(FunctionName="hello", ZipFile=zipped("y"))
        second = client.publish_version(FunctionName="hello", Description="second")
        assert (second["Version"], second["Description"]) == ("2", "second")
        listed = client.list_versions_by_function(FunctionName="hello")["Versions"]
        assert [one["Version"] for one in listed] == ["$LATEST", "1", "2"]
        assert [one["FunctionArn"] for one in listed] == [f"{ARN}:$LATEST", f"{ARN}:1", f"{ARN}:2"]
        status, code, message = refusal(
            client.publish_version, FunctionName="hello", CodeSha256=made["CodeSha256"]
        )
        assert (status, code) == (400, "InvalidParameterValueException")
        assert second["CodeSha256"] in message
        client.delete_function(FunctionName="hello", Qualifier="1")
        assert client.get_function(FunctionName="hello:2")["Configuration"]["Version"] == "2"
        client.delete_function(FunctionName="hello")
        assert client.list_functions()["Functions"] == []

    talk(tmp_path, work)


def test_pages(tmp_path: Path) -> None:
    """All come, each once, however small the pages are."""

    def work(gate: Gate) -> None:
        client = gate.client()
        names = ["a", "a-b", "a_b", "b", "c"]
        for name in names:
            create(client, name, Publish=True)
            for number in "12":
                versions = {"FunctionVersion": "1", "Name": f"x{number}"}
                client.create_alias(FunctionName=name, **versions)

        def pages(operation: str, key: str, size: int, **arguments: str) -> list[Any]:
            found = client.get_paginator(operation).paginate(
                PaginationConfig={"PageSize": size}, **arguments
            )
            chosen = [page[key] for page in found]
            assert all(len(page) <= size for page in chosen)
            return [one for page in chosen for one in page]

        for size in (1, 2, 3, 50):
            found = pages("list_functions", "Functions", size)
            assert sorted(one["FunctionName"] for one in found) == names
            found = pages("list_functions", "Functions", size, FunctionVersion="ALL")
            assert len({(f["FunctionName"], f["Version"]) for f in found}) == len(found) == 10
            found = pages("list_versions_by_function", "Versions", size, FunctionName="a")
            assert [one["Version"] for one in found] == ["$LATEST", "1"]
            found = pages("list_aliases", "Aliases", size, FunctionName="a")
            assert [one["Name"] for one in found] == ["x1", "x2"]
        first = client.list_functions(MaxItems=2)
        client.delete_function(FunctionName=first["Functions"][1]["FunctionName"])
        rest = client.list_functions(Marker=first["NextMarker"])["Functions"]
        assert len(rest) == 3

    talk(tmp_path, work)


def test_aliases(tmp_path: Path) -> None:
    """One version, or two by weight; what an update leaves out stays."""

    def work(gate: Gate) -> None:
        client = gate.client()
        create(client, Publish=True)
        client.update_function_code(FunctionName="hello", ZipFile=zipped("y"), Publish=True)
        made = client.create_alias(FunctionName="hello", Name="live", FunctionVersion="1")
        assert (made["AliasArn"], made["FunctionVersion"]) == (f"{ARN}:live", "1")
        assert "RoutingConfig" not in made
        weights = {"AdditionalVersionWeights": {"2": 0.1}}
        shifted = client.update_alias(FunctionName="hello", Name="live", RoutingConfig=weights)
        assert shifted["FunctionVersion"] == "1" and shifted["RoutingConfig"] == weights
        named = client.update_alias(FunctionName="hello", Name="live", Description="grey")
        assert named["RoutingConfig"] == weights and named["Description"] == "grey"
        assert gate.functions.registry.aliases("hello")[0].versions == {"1": 0.9, "2": 0.1}
        code, told = refusal(
            client.update_alias, FunctionName="hello", Name="live", RevisionId=made["RevisionId"]
        )[1:]
        assert code == "PreconditionFailedException" and "RevisionId" in told
        moved = client.update_alias(
            FunctionName="hello",
            Name="live",
            FunctionVersion="2",
            RoutingConfig={"AdditionalVersionWeights": {}},
            RevisionId=named["RevisionId"],
        )
        assert moved["FunctionVersion"] == "2" and "RoutingConfig" not in moved
        shown = client.get_alias(FunctionName="hello", Name="live")
        assert {key: shown[key] for key in ("Description", "RevisionId")} == {
            "Description": "grey",
            "RevisionId": moved["RevisionId"],
        }
        assert client.get_function_configuration(FunctionName="hello", Qualifier="live")[
            "FunctionArn"
        ] == (f"{ARN}:live")
        assert len(client.list_aliases(FunctionName="hello", FunctionVersion="2")["Aliases"]) == 1
        assert client.list_aliases(FunctionName="hello", FunctionVersion="1")["Aliases"] == []
        busy = refusal(client.delete_function, FunctionName="hello", Qualifier="2")
        assert busy[:2] == (409, "ResourceConflictException")
        client.delete_alias(FunctionName="hello", Name="live")
        assert client.list_aliases(FunctionName="hello")["Aliases"] == []

    talk(tmp_path, work)


def test_two_changes_of_one_revision(tmp_path: Path) -> None:
    """One is made; the other is told, however late it comes."""

    def work(gate: Gate) -> None:
        client, code = gate.client(), gate.functions.code
        made = create(client)
        assert isinstance(code, FakeCode)
        code.pause = asyncio.Event()

        def update(number: int) -> str:
            arguments = {"FunctionName": "hello", "ZipFile": zipped(str(number))}
            try:
                gate.client().update_function_code(RevisionId=made["RevisionId"], **arguments)
            except ClientError as error:
                return str(error.response["Error"]["Code"])
            return "made"

        with ThreadPoolExecutor(3) as pool:
            changes = [pool.submit(update, number) for number in range(3)]
            while gate.functions.registry._users["hello"] != 3:
                time.sleep(0.005)
            gate.loop.call_soon_threadsafe(code.pause.set)
        refused = "PreconditionFailedException"
        assert sorted(change.result() for change in changes) == [refused, refused, "made"]

    talk(tmp_path, work)


def test_a_runtime_that_is_changed_elsewhere(tmp_path: Path) -> None:
    """What a client said once is not told when it is not so any more."""

    def work(gate: Gate) -> None:
        client = gate.client()
        create(client)
        change = gate.functions.registry.deploy(
            "hello", DeployRequest(runtime=Runtime.PROVIDED), None
        )
        asyncio.run_coroutine_threadsafe(change, gate.loop).result(10)
        shown = client.get_function_configuration(FunctionName="hello")
        assert (shown["Runtime"], shown["Role"]) == ("provided.al2023", ROLE)

    talk(tmp_path, work)


def test_invoke(tmp_path: Path) -> None:
    """By name, version, alias and ARN; what came back, by which version, and its log."""

    def work(gate: Gate) -> None:
        client, operator = gate.client(), gate.client("OPERATOR")
        create(client, Publish=True)
        client.create_alias(FunctionName="hello", Name="live", FunctionVersion="1")
        names = {"hello": "$LATEST", "hello:1": "1", "hello:live": "1", ARN: "$LATEST"}
        names |= {f"{ARN}:live": "1", "000000000000:function:hello": "$LATEST"}
        for name, version in names.items():
            answer = operator.invoke(FunctionName=name, Payload=b'{"a": 1}')
            assert (answer["StatusCode"], answer["ExecutedVersion"]) == (200, version)
            assert json.load(answer["Payload"]) == {"a": 1} and "FunctionError" not in answer
        assert json.load(operator.invoke(FunctionName="hello")["Payload"]) == {}
        failed = operator.invoke(FunctionName="hello", Qualifier="1", Payload=b'"fail"')
        assert (failed["StatusCode"], failed["FunctionError"]) == (200, "Unhandled")
        assert json.load(failed["Payload"])["errorType"] == "ValueError"
        tail = operator.invoke(FunctionName="hello", LogType="Tail")
        assert base64.b64decode(tail["LogResult"]) == b"START\nprinted\x1b[2J\n"
        event = operator.invoke(FunctionName="hello", InvocationType="Event", Payload=b"[1]")
        assert event["StatusCode"] == 202 and event["Payload"].read() == b""
        assert event["ResponseMetadata"]["RequestId"] == "e-0"
        dry = operator.invoke(FunctionName="hello:live", InvocationType="DryRun")
        assert dry["StatusCode"] == 204
        large = json.dumps("x" * (6 * 1024 * 1024 - 2)).encode()
        assert operator.invoke(FunctionName="hello", Payload=large)["Payload"].read() == large

    talk(tmp_path, work)


def test_concurrency_and_account(tmp_path: Path) -> None:
    """The bound of a function is a part of the account's."""

    def work(gate: Gate) -> None:
        client = gate.client()
        create(client)
        assert "ReservedConcurrentExecutions" not in client.get_function_concurrency(
            FunctionName="hello"
        )
        made = client.put_function_concurrency(FunctionName="hello", ReservedConcurrentExecutions=7)
        assert made["ReservedConcurrentExecutions"] == 7
        shown = client.get_function_concurrency(FunctionName="hello")
        assert shown["ReservedConcurrentExecutions"] == 7
        assert client.get_function(FunctionName="hello")["Concurrency"] == {
            "ReservedConcurrentExecutions": 7
        }
        account = client.get_account_settings()
        assert account["AccountLimit"] == {
            "TotalCodeSize": 10 << 30,
            "CodeSizeUnzipped": MAX_CODE,
            "CodeSizeZipped": 50 << 20,
            "ConcurrentExecutions": 100,
            "UnreservedConcurrentExecutions": 93,
        }
        assert account["AccountUsage"]["FunctionCount"] == 1
        client.delete_function_concurrency(FunctionName="hello")
        assert gate.functions.registry.reserved("hello") is None
        assert client.get_function_code_signing_config(FunctionName="hello")["FunctionName"]

    talk(tmp_path, work)


REFUSED: dict[str, tuple[str, dict[str, Any], int, str, str]] = {
    "no such function": (
        *("get_function", {"FunctionName": "none"}),
        *(404, "ResourceNotFoundException", "there is no function none"),
    ),
    "no such version": (
        *("invoke", {"FunctionName": "hello:9"}),
        *(404, "ResourceNotFoundException", "no version or alias 9"),
    ),
    "no such alias": (
        *("get_alias", {"FunctionName": "hello", "Name": "none"}),
        *(404, "ResourceNotFoundException", f"Cannot find alias arn: {ARN}:none"),
    ),
    "another region": (
        *("get_function", {"FunctionName": ARN.replace("us-east-1", "eu-west-1")}),
        *(404, "ResourceNotFoundException", "not reachable"),
    ),
    "another account": (
        *("get_function", {"FunctionName": "123456789012:function:hello"}),
        *(404, "ResourceNotFoundException", "This is account"),
    ),
    "two qualifiers": (
        *("get_function", {"FunctionName": "hello:1", "Qualifier": "2"}),
        *(400, "InvalidParameterValueException", "Qualifier"),
    ),
    "$LATEST alone": (
        *("delete_function", {"FunctionName": "hello", "Qualifier": "$LATEST"}),
        *(400, "InvalidParameterValueException", "$LATEST"),
    ),
    "an old revision": (
        "update_function_code",
        {"FunctionName": "hello", "ZipFile": b"x", "RevisionId": "old"},
        *(412, "PreconditionFailedException", "RevisionId"),
    ),
    "no code": (
        *("update_function_code", {"FunctionName": "hello"}),
        *(400, "InvalidParameterValueException", "ZipFile is missing"),
    ),
    "code in S3": (
        "update_function_code",
        {"FunctionName": "hello", "S3Bucket": "bucket", "S3Key": "key"},
        *(400, "InvalidParameterValueException", "S3Bucket"),
    ),
    "a dry run without a zip": (
        "update_function_code",
        {"FunctionName": "hello", "ZipFile": b"x", "DryRun": True},
        *(400, "InvalidParameterValueException", "ZipFile"),
    ),
    "another architecture": (
        "update_function_code",
        {"FunctionName": "hello", "ZipFile": b"x", "Architectures": ["arm64"]},
        *(400, "InvalidParameterValueException", "Architectures"),
    ),
    "another runtime": (
        "update_function_configuration",
        {"FunctionName": "hello", "Runtime": "nodejs20.x"},
        *(400, "InvalidParameterValueException", "Runtime: 'nodejs20.x'"),
    ),
    "no MODULE.FUNCTION": (
        "update_function_configuration",
        {"FunctionName": "hello", "Handler": "nothing"},
        *(400, "InvalidParameterValueException", "MODULE.FUNCTION"),
    ),
    "too long": (
        *("update_function_configuration", {"FunctionName": "hello", "Timeout": 901}),
        *(400, "InvalidParameterValueException", "$.Timeout"),
    ),
    "a large environment": (
        "update_function_configuration",
        {"FunctionName": "hello", "Environment": {"Variables": {"A": "x" * 5000}}},
        *(400, "InvalidParameterValueException", "environment"),
    ),
    "weights over 1": (
        "create_alias",
        {
            "FunctionName": "hello",
            "Name": "x",
            "FunctionVersion": "1",
            "RoutingConfig": {"AdditionalVersionWeights": {"2": 1.5}},
        },
        *(400, "InvalidParameterValueException", "AdditionalVersionWeights"),
    ),
    "an alias of no version": (
        *("create_alias", {"FunctionName": "hello", "Name": "x", "FunctionVersion": "9"}),
        *(404, "ResourceNotFoundException", "no version 9"),
    ),
    "an alias that is there": (
        *("create_alias", {"FunctionName": "hello", "Name": "live", "FunctionVersion": "1"}),
        *(409, "ResourceConflictException", "has an alias live"),
    ),
    "an alias of a version": (
        *("create_alias", {"FunctionName": "hello:1", "Name": "x", "FunctionVersion": "1"}),
        *(400, "InvalidParameterValueException", "FunctionName"),
    ),
    "no JSON": (
        *("invoke", {"FunctionName": "hello", "Payload": b"{"}),
        *(400, "InvalidRequestContentException", "Could not parse"),
    ),
    "no text": (
        *("invoke", {"FunctionName": "hello", "Payload": b'"\xff"'}),
        *(400, "InvalidRequestContentException", "Could not parse"),
    ),
    "JSON without end": (
        *("invoke", {"FunctionName": "hello", "Payload": b"[" * 100_000}),
        *(400, "InvalidRequestContentException", "Could not parse"),
    ),
    "too large": (
        *("invoke", {"FunctionName": "hello", "Payload": b"1" * ((6 << 20) + 1)}),
        *(413, "RequestTooLargeException", "6291456"),
    ),
    "too large for later": (
        "invoke",
        {"FunctionName": "hello", "InvocationType": "Event", "Payload": b"1" * (1 << 20) + b"1"},
        *(413, "RequestTooLargeException", "1048576"),
    ),
    "a context of the client": (
        *("invoke", {"FunctionName": "hello", "ClientContext": "e30="}),
        *(400, "InvalidParameterValueException", "X-Amz-Client-Context"),
    ),
    "an operation that is not here": (
        *("get_policy", {"FunctionName": "hello"}),
        *(404, "UnknownOperationException", "GET /2015-03-31/functions/hello/policy"),
    ),
    "layers": (
        *("list_layers", {}),
        *(404, "UnknownOperationException", "/2018-10-31/layers"),
    ),
}


def test_refusals(tmp_path: Path) -> None:
    """Each with the status and the type that Lambda has for it; nothing is changed."""

    def work(gate: Gate) -> None:
        client = gate.client()
        create(client, Publish=True)
        client.create_alias(FunctionName="hello", Name="live", FunctionVersion="1")
        before = gate.functions.view("hello")
        for name, (method, arguments, *expected) in REFUSED.items():
            status, code, message = refusal(getattr(client, method), **arguments)
            assert [status, code] == expected[:2], (name, message)
            assert str(expected[2]) in message and "\n" not in message, (name, message)
        assert gate.functions.view("hello") == before

    talk(tmp_path, work)


ELSEWHERE: dict[str, Any] = {
    "PackageType": "Image",
    "Layers": ["arn:aws:lambda:us-east-1:000000000000:layer:x:1"],
    "VpcConfig": {"SubnetIds": ["subnet-1"]},
    "DeadLetterConfig": {"TargetArn": "arn:aws:sqs:us-east-1:000000000000:q"},
    "KMSKeyArn": "arn:aws:kms:us-east-1:000000000000:key/x",
    "TracingConfig": {"Mode": "Active"},
    "SnapStart": {"ApplyOn": "PublishedVersions"},
    "EphemeralStorage": {"Size": 1024},
    "Architectures": ["arm64"],
    "LoggingConfig": {"LogFormat": "JSON"},
    "ImageConfig": {"Command": ["x"]},
    "FileSystemConfigs": [{"Arn": "arn:aws:elasticfilesystem:x", "LocalMountPath": "/mnt/x"}],
    "Tags": {"team": "x"},
    "Code": {"ImageUri": "x"},
    "Role": "",
    "Runtime": "java21",
    "FunctionName": "a b",
}


def test_what_is_not_here_is_told(tmp_path: Path) -> None:
    """A field that would mean something there is refused by its name, and not ignored."""

    def work(gate: Gate) -> None:
        client = gate.client()
        # botocore would refuse some of these itself.
        client.meta.config.parameter_validation = False
        for field, value in ELSEWHERE.items():
            status, code, message = refusal(lambda c=client, f=field, v=value: create(c, **{f: v}))
            assert (status, code) == (400, "InvalidParameterValueException"), (field, message)
            shown = {"Code": "ImageUri", "FunctionName": "function name"}.get(field, field)
            assert shown in message, message
        assert gate.functions.registry.names() == []
        create(
            client,
            PackageType="Zip",
            Layers=[],
            VpcConfig={"SubnetIds": [], "SecurityGroupIds": [], "Ipv6AllowedForDualStack": False},
            TracingConfig={"Mode": "PassThrough"},
            Architectures=["x86_64"],
            SnapStart={"ApplyOn": "None"},
            DeadLetterConfig={},
            Tags={},
        )

    talk(tmp_path, work)


def test_bounds_of_functions(tmp_path: Path) -> None:
    """Too many at once: when to try again, and which bound it is. Anything else is a fault."""

    def work(gate: Gate) -> None:
        client, router = gate.client(), gate.functions.router
        create(client)
        assert isinstance(router, FakeRouter)
        reasons = {
            "concurrency": "ConcurrentInvocationLimitExceeded",
            "reserved": "ReservedFunctionConcurrentInvocationLimitExceeded",
            "queue": "FunctionInvocationRateLimitExceeded",
        }
        for reason, told in reasons.items():
            router.error = Throttled("too many", reason=reason, retry_after=2.1)
            with pytest.raises(client.exceptions.TooManyRequestsException) as caught:
                client.invoke(FunctionName="hello")
            answer = caught.value.response
            assert answer["Reason"] == told and answer["retryAfterSeconds"] == "3"
            assert answer["ResponseMetadata"]["HTTPStatusCode"] == 429
        router.error = Busy("full")
        assert refusal(client.invoke, FunctionName="hello")[0] == 429
        router.error = HostError("no space", hint="make some")
        fault = refusal(client.invoke, FunctionName="hello")
        assert fault == (500, "ServiceException", "no space; make some")

    talk(tmp_path, work)


def test_what_nobody_thought_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is an answer, too, and in the daemon's log; the next request is served."""

    def work(gate: Gate) -> None:
        client, router = gate.client(), gate.functions.router
        create(client)
        assert isinstance(router, FakeRouter)
        router.error = RuntimeError("secret detail")
        status, code, message = refusal(client.invoke, FunctionName="hello")
        assert (status, code) == (500, "ServiceException") and "secret" not in message
        router.error = None
        assert client.invoke(FunctionName="hello")["StatusCode"] == 200

    talk(tmp_path, work)
    assert "secret detail" in caplog.text


def test_many_clients_at_once(tmp_path: Path) -> None:
    """Each gets its own answer."""

    def work(gate: Gate) -> None:
        create(gate.client())
        clients = [gate.client() for _ in range(4)]

        def ask(number: int) -> int:
            answer = clients[number % 4].invoke(
                FunctionName="hello", Payload=json.dumps(number).encode()
            )
            told: int = json.load(answer["Payload"])
            return told

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, range(200))) == list(range(200))

    talk(tmp_path, work)
