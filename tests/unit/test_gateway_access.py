"""Who may call the gateway: signatures, keys, roles; and what hostile clients send."""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import botocore.auth
import pytest

from templated.api.gateway import body as bodies
from templated.api.gateway.errors import Refused
from templated.api.gateway.keys import read_keys
from templated.api.gateway.signature import Head, Verifier
from templated.api.gateway.table import OPERATIONS
from templated.errors import ConfigError
from templated.model.access import Role
from templated.model.config import GatewayKey
from tests.unit.lambda_client import CONFIDENTIAL, KEYS, REGION, Gate, create, refusal, talk

pytestmark = pytest.mark.usefixtures("no_blocking_calls")
PATH = "/2015-03-31/functions/hello/invocations"
VIEWER = {
    *("GetFunction", "GetFunctionConfiguration", "GetFunctionCodeSigningConfig", "ListFunctions"),
    *("ListVersionsByFunction", "GetAlias", "ListAliases", "GetFunctionConcurrency"),
    "GetProvisionedConcurrencyConfig",
    "GetAccountSettings",
}
ALLOWED = {
    Role.VIEWER: VIEWER,
    Role.OPERATOR: VIEWER | {"Invoke"},
    Role.ADMIN: {operation.name for operation in OPERATIONS},
}


@contextmanager
def sent(
    gate: Gate, method: str, path: str, body: bytes, headers: dict[str, str]
) -> Iterator[HTTPResponse]:
    """A request as it is, by a connection of its own."""
    connection = HTTPConnection(*gate.address, timeout=10)
    try:
        connection.request(method, path, body=body, headers=headers)
        yield connection.getresponse()
    finally:
        connection.close()


def told(response: HTTPResponse) -> tuple[int, str]:
    """The status and the type of an error."""
    response.read()
    return response.status, response.headers["x-amzn-ErrorType"]


def raw(gate: Gate, request: bytes) -> bytes:
    """What comes back for these bytes, until the connection ends."""
    with socket.create_connection(gate.address, timeout=10) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


# Signatures

BAD: dict[str, Callable[[dict[str, str]], Any]] = {
    "UnrecognizedClientException": lambda h: h.update(
        Authorization=h["Authorization"].replace("ADMIN/", "NOBODY/")
    ),
    "InvalidSignatureException": lambda h: h.update(
        Authorization=re.sub("Signature=.", "Signature=g", h["Authorization"])
    ),
    "MissingAuthenticationTokenException": lambda h: h.pop("Authorization"),
    "IncompleteSignatureException": lambda h: h.update(Authorization="Bearer x"),
}


def test_signatures_that_are_wrong(tmp_path: Path) -> None:
    """Each is 403 with the type that AWS has for it, and nothing is run."""

    def work(gate: Gate) -> None:
        create(gate.client())
        for kind, spoil in BAD.items():
            headers = gate.signed("POST", PATH, b"1")
            spoil(headers)
            with sent(gate, "POST", PATH, b"1", headers) as response:
                assert told(response) == (403, kind)
        invalid = (403, "InvalidSignatureException")
        # A body, a path, a method, a query, a header that is another.
        headers = gate.signed("POST", PATH, b"1")
        for method, path, body in (
            ("POST", PATH, b"2"),
            ("POST", PATH, b""),
            ("POST", PATH.replace("hello", "hell%6f"), b"1"),
            ("POST", f"{PATH}?Qualifier=1", b"1"),
        ):
            with sent(gate, method, path, body, headers) as response:
                assert told(response) == invalid, (method, path, body)
        with sent(gate, "POST", PATH, b"1", {**headers, "Host": "elsewhere"}) as response:
            assert told(response) == invalid
        # What decides on something has to be signed.
        event = {**headers, "X-Amz-Invocation-Type": "Event"}
        with sent(gate, "POST", PATH, b"1", event) as response:
            assert told(response) == invalid
        with sent(gate, "POST", PATH, b"1", headers) as response:
            assert response.status == 200

    talk(tmp_path, work)


def test_clients_that_are_wrong(tmp_path: Path) -> None:
    """Of another key, of another region, of another service; of a session."""

    def work(gate: Gate) -> None:
        assert refusal(gate.client(signing="something-else").list_functions)[:2] == (
            *(403, "InvalidSignatureException"),
        )
        assert refusal(gate.client("NOBODY").list_functions)[:2] == (
            *(403, "UnrecognizedClientException"),
        )
        code, message = refusal(gate.client(region="eu-west-1").list_functions)[1:]
        assert code == "InvalidSignatureException" and REGION in message

    talk(tmp_path, work)


def test_a_digest_that_is_sent_is_that_of_the_body(tmp_path: Path) -> None:
    """Also when it is signed: what is not signed is not taken."""

    def work(gate: Gate) -> None:
        create(gate.client())
        for digest in ("UNSIGNED-PAYLOAD", "0" * 64):
            extra = {"X-Amz-Content-SHA256": digest}
            headers = gate.signed("POST", PATH, b"1", headers=extra)
            with sent(gate, "POST", PATH, b"1", headers) as response:
                assert told(response) == (403, "InvalidSignatureException")

    talk(tmp_path, work)


@pytest.mark.parametrize("minutes", [-6, -4, 4, 6])
def test_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: int) -> None:
    """A signature holds five minutes, whoever's clock is ahead."""
    shifted = datetime.now(UTC) + timedelta(minutes=minutes)

    def work(gate: Gate) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(botocore.auth, "get_current_datetime", lambda: shifted)
            headers = gate.signed("GET", "/2015-03-31/functions")
        with sent(gate, "GET", "/2015-03-31/functions", b"", headers) as response:
            assert response.status == (200 if abs(minutes) < 5 else 403)
            assert abs(minutes) < 5 or b"5 min" in response.read()

    talk(tmp_path, work)


def test_signing_keys_are_made_once_a_day() -> None:
    """Around midnight two days hold; older ones are forgotten."""
    verifier = Verifier(read_keys(KEYS), REGION)
    signer = verifier._signers["ADMIN"]
    made = {day: signer._key(day) for day in ("20260101", "20260102", "20260103")}
    assert len(set(made.values())) == 3 and list(signer._days) == ["20260102", "20260103"]
    assert signer._key("20260101") == made["20260101"]


ODD = [
    ("/x", [("Authorization", "x"), ("Authorization", "y")]),
    ("/x", [("Authorization", "AWS4-HMAC-SHA256 Credential=ADMIN, SignedHeaders=, Signature=")]),
    ("/x", [("Authorization", "AWS4-HMAC-SHA256 " + "Credential=ADMIN," * 1000)]),
    ("/x", [("Authorization", "AWS4-HMAC-SHA256 Credential=\udcff, SignedHeaders=a, Signature=b")]),
]


@pytest.mark.parametrize("odd", ODD)
def test_heads_that_are_odd(odd: tuple[str, list[tuple[str, str]]]) -> None:
    """All are refused, none is a fault."""
    verifier = Verifier(read_keys(KEYS), REGION)
    with pytest.raises(Refused) as caught:
        verifier.claim(Head("GET", *odd))
    assert caught.value.status == 403


def test_signed_text_that_is_no_text() -> None:
    """What cannot be hashed as text does not match."""
    verifier = Verifier(read_keys(KEYS), REGION)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    scope = f"ADMIN/{stamp[:8]}/{REGION}/lambda/aws4_request"
    signed = f"Credential={scope}, SignedHeaders=host;x-amz-date, Signature=\udcff"
    headers = [("Host", "\udcff"), ("X-Amz-Date", stamp)]
    headers.append(("Authorization", f"AWS4-HMAC-SHA256 {signed}"))
    for path in ("/\udcff", "/x?\udcff", "http://elsewhere/", "/x#y"):
        with pytest.raises(Refused, match="does not match"):
            verifier.check(verifier.claim(Head("GET", path, headers)), "0" * 64)


# Roles, and what is recorded


@pytest.mark.parametrize("role", Role)
def test_roles(tmp_path: Path, role: Role) -> None:
    """What a key may not is refused before it is looked at, and the answer names it."""

    def work(gate: Gate) -> None:
        allowed = set()
        for operation in OPERATIONS:
            path = "/" + operation.path.replace("*", "none")
            headers = gate.signed(operation.method, path, b"!", key=role.upper())
            with sent(gate, operation.method, path, b"!", headers) as response:
                kind, content = response.headers["x-amzn-ErrorType"], response.read().decode()
            if kind == "AccessDeniedException":
                assert response.status == 403
                assert f"lambda:{operation.action or operation.name};" in content
            else:
                allowed.add(operation.name)
        assert allowed == ALLOWED[role]

    talk(tmp_path, work)


def test_values_of_the_environment(tmp_path: Path) -> None:
    """Admins see them, others see that there are some."""

    def work(gate: Gate) -> None:
        create(gate.client(), Environment={"Variables": {"PASSWORD": CONFIDENTIAL}})
        shown = gate.client("VIEWER").get_function_configuration(FunctionName="hello")
        assert shown["Environment"]["Error"]["ErrorCode"] == "AccessDeniedException"
        listed = gate.client("OPERATOR").list_functions()
        assert CONFIDENTIAL not in str(shown) + str(listed)

    talk(tmp_path, work)


def test_changes_are_audited(tmp_path: Path) -> None:
    """By the key that signed them, with nothing that can be a secret; no invocation is."""

    def work(gate: Gate) -> None:
        client = gate.client()
        create(
            client,
            Environment={"Variables": {"PASSWORD": CONFIDENTIAL}},
            text=CONFIDENTIAL,
            Publish=True,
        )
        client.update_function_configuration(
            FunctionName="hello",
            Description=CONFIDENTIAL,
            Environment={"Variables": {"A": CONFIDENTIAL}},
        )
        client.create_alias(FunctionName="hello", Name="live", FunctionVersion="1")
        client.put_function_concurrency(FunctionName="hello", ReservedConcurrentExecutions=2)
        client.invoke(FunctionName="hello")
        client.list_functions()
        refusal(client.delete_function, FunctionName="none")
        refusal(gate.client("VIEWER").delete_function, FunctionName="hello")
        refusal(gate.client("NOBODY").delete_function, FunctionName="hello")
        with sent(gate, "GET", "/", b"", {}) as response:
            assert response.status == 404
        entries = gate.audited()
        assert [
            (e.key, e.role, e.action, e.target, e.detail, e.outcome, e.status) for e in entries
        ] == [
            ("ADMIN", "admin", "CreateFunction", "hello", "publish", "ok", 200),
            (
                *("ADMIN", "admin", "UpdateFunctionConfiguration", "hello"),
                *("Description Environment", "ok", 200),
            ),
            ("ADMIN", "admin", "CreateAlias", "hello", "live 1=1", "ok", 200),
            ("ADMIN", "admin", "PutFunctionConcurrency", "hello", "reserved 2", "ok", 200),
            ("ADMIN", "admin", "DeleteFunction", "none", "", "not_found", 404),
            ("VIEWER", "viewer", "DeleteFunction", "hello", "", "forbidden", 403),
            ("", "", "DeleteFunction", "", "", "forbidden", 403),
        ]
        assert all(entry.uid is None for entry in entries) and CONFIDENTIAL not in str(entries)
        reading = gate.services.audit.read(100, user="VIEWER")
        found = asyncio.run_coroutine_threadsafe(reading, gate.loop).result(10)
        assert [entry.action for entry in found] == ["DeleteFunction"]

    talk(tmp_path, work)


# Keys


def test_files_of_secrets(tmp_path: Path) -> None:
    """A secret that others can read is none."""
    path = tmp_path / "secret"
    key = GatewayKey(id="ABC", secret_file=str(path))
    with pytest.raises(ConfigError, match="cannot read"):
        read_keys([key])
    path.write_text(f"{CONFIDENTIAL}\n")
    for mode in (0o640, 0o604):
        path.chmod(mode)
        with pytest.raises(ConfigError, match="others can read"):
            read_keys([key])
    path.chmod(0o600)
    found = read_keys([key])["ABC"]
    assert found.secret == CONFIDENTIAL and CONFIDENTIAL not in repr(found)
    with pytest.raises(ConfigError, match="twice"):
        read_keys([key, key])
    for content in ("", "short", "two\nlines-of-it", "x" * 300, "a b c d e f"):
        path.write_text(content)
        with pytest.raises(ConfigError, match="does not hold a secret"):
            read_keys([key])
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(ConfigError, match="no file"):
        read_keys([GatewayKey(id="ABC", secret_file=str(tmp_path / "fifo"))])


# Hostile clients


def test_hostile_http(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is no HTTP, or no end of it, is refused or ended; others are served, and the log is
    not filled."""

    def work(gate: Gate) -> None:
        create(gate.client())
        bad = (400, 403, 404, 413)
        for request in (
            b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: x\r\n" * 100_000 + b"\r\n",
            b"\x16\x03\x01 no HTTP\r\n\r\n",
            f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n".encode(),
            f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n".encode(),
            b"GET /2015-03-31/functions/%ff%00 HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET //// HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET http://x/2015-03-31/functions HTTP/1.1\r\nHost: x\r\n\r\n",
            b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
        ):
            try:
                answer = raw(gate, request)
            except OSError:
                continue  # it was ended before all of it was sent
            assert not answer or int(answer.split()[1]) in bad, (request[:60], answer[:200])
            assert b"Traceback" not in answer
        assert gate.client().invoke(FunctionName="hello")["StatusCode"] == 200

    talk(tmp_path, work)
    assert "Traceback" not in caplog.text


def test_bodies_without_end(tmp_path: Path) -> None:
    """In chunks, by somebody who has a signature for another body: no more than may be is held."""

    def work(gate: Gate) -> None:
        create(gate.client())
        headers = gate.signed("POST", PATH, b"1")

        def chunks() -> Iterator[bytes]:
            for _ in range(100):
                yield b"x" * (1 << 20)

        connection = HTTPConnection(*gate.address, timeout=10)
        try:
            connection.request("POST", PATH, body=chunks(), headers=headers, encode_chunked=True)
        except ConnectionError:
            pass  # it was told, and the connection ended
        else:
            assert connection.getresponse().status == 413
        finally:
            connection.close()
        assert gate.client().invoke(FunctionName="hello")["StatusCode"] == 200

    talk(tmp_path, work)


def test_bodies_that_do_not_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are waited for, but not for ever, and they do not keep others out."""
    monkeypatch.setattr(bodies.Bodies.__init__, "__defaults__", (bodies._TOGETHER, 0.05))
    monkeypatch.setattr(bodies, "_PER_MIB", 0.0)

    def work(gate: Gate) -> None:
        create(gate.client())
        headers = gate.signed("POST", PATH, b"12") | {"Content-Length": "2"}
        with sent(gate, "POST", PATH, b"1", headers) as response:
            assert told(response) == (408, "RequestTimeoutException")

    talk(tmp_path, work)


def test_large_bodies_have_a_bound_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past it a client is told to come again, also one whose key nobody knows yet."""
    monkeypatch.setattr(bodies.Bodies.__init__, "__defaults__", (1000, 5.0))

    def work(gate: Gate) -> None:
        create(gate.client())
        status, code, message = refusal(
            gate.client().invoke, FunctionName="hello", Payload=b"1" * 1001
        )
        assert (status, code) == (429, "TooManyRequestsException") and "large" in message
        for _ in range(5):
            assert gate.client().invoke(FunctionName="hello", Payload=b"1" * 900)

    talk(tmp_path, work)


def test_a_client_that_waits_for_continue(tmp_path: Path) -> None:
    """curl does with large bodies."""

    def work(gate: Gate) -> None:
        create(gate.client())
        signed = gate.signed("POST", PATH, b"12")
        head = f"POST {PATH} HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in signed.items())
        with socket.create_connection(gate.address, timeout=10) as connection:
            connection.sendall(f"{head}Connection: close\r\n\r\n".encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
            connection.sendall(b"12")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")

    talk(tmp_path, work)
