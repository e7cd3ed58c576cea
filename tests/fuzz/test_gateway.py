"""The gateway: whoever sends what, the answer is one of Lambda's, and never a fault."""

from __future__ import annotations

import json
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import strategies as st

from templated.api.gateway.errors import Refused
from templated.api.gateway.keys import read_keys
from templated.api.gateway.signature import Head, Verifier
from templated.api.gateway.table import OPERATIONS
from tests.fuzz import SECONDS
from tests.fuzz.cases import fuzz
from tests.fuzz.values import JSON, SCALARS, TEXTS, mutated
from tests.unit.lambda_client import KEYS, REGION, Gate, create, talk

# Bytes of a request's first line, above which it is not read.
_LINE = 8000
_NAMES = st.one_of(
    st.sampled_from(["hello", "hello:1", "hello:live", "live", "1", "$LATEST", "x:y:z", "..", ""]),
    st.sampled_from([f"arn:aws:lambda:{REGION}:000000000000:function:hello"]),
    TEXTS,
)
_FIELDS = st.sampled_from(
    [
        *("FunctionName", "Runtime", "Role", "Handler", "Code", "Timeout", "MemorySize"),
        *("Environment", "Tags", "Publish", "PublishTo", "Layers", "VpcConfig", "Architectures"),
        *("RevisionId", "DryRun", "CodeSha256", "Description", "Name", "FunctionVersion"),
        *("RoutingConfig", "ReservedConcurrentExecutions", "SnapStart", "LoggingConfig"),
    ]
)
_VALUES = st.one_of(
    SCALARS,
    JSON,
    st.sampled_from(
        [
            *("python3.12", "provided", "app.handler", "eA==", "1", "2", "$LATEST", 1, 7, True),
            {"ZipFile": "eA=="},
            {"Variables": {"A": "b"}},
            {"AdditionalVersionWeights": {"2": 0.5}},
        ]
    ),
)
_BODIES = st.dictionaries(_FIELDS, _VALUES, max_size=6)
_HEADERS = st.dictionaries(
    st.sampled_from(
        ["X-Amz-Invocation-Type", "X-Amz-Log-Type", "X-Amz-Client-Context", "X-Amzn-Trace-Id"]
    ),
    st.sampled_from(["Event", "DryRun", "RequestResponse", "Tail", "None", "x", "Root=1"]),
    max_size=2,
)
_QUERIES = st.dictionaries(
    st.sampled_from(["Qualifier", "Marker", "MaxItems", "FunctionVersion", "MasterRegion"]),
    st.one_of(st.sampled_from(["1", "live", "ALL", "$LATEST", "50", "-1"]), TEXTS),
    max_size=2,
)
_SIGNED = (
    b"AWS4-HMAC-SHA256 Credential=ADMIN/20260101/us-east-1/lambda/aws4_request, "
    b"SignedHeaders=host;x-amz-date, Signature=" + b"0" * 64
)
_HEADS = st.tuples(
    TEXTS,
    st.lists(st.tuples(st.sampled_from(["Host", "X-Amz-Date", "x-amz-x", ""]), TEXTS), max_size=3),
    mutated(st.just(_SIGNED)),
)


def _asked(connection: HTTPConnection, gate: Gate, case: tuple[Any, ...]) -> None:
    operation, names, query, headers, body = case
    parts = iter(names)
    path = "/" + "/".join(
        _quoted(next(parts)) if part == "*" else part for part in operation.path.split("/")
    )
    path += "?" + "&".join(f"{name}={_quoted(value)}" for name, value in sorted(query.items()))
    content = json.dumps(body).encode()
    signed = gate.signed(operation.method, path.rstrip("?"), content, headers=headers)
    connection.request(operation.method, path.rstrip("?"), content, signed)
    answer = connection.getresponse()
    told = answer.read()
    if len(path) > _LINE:
        assert answer.status in (400, 404), (answer.status, told)
        return
    kind = answer.headers["x-amzn-ErrorType"]
    assert answer.status < 500 and answer.status != 403, (path, answer.status, kind, told)
    assert (answer.status >= 400) == (kind is not None), (path, answer.status, told)
    if kind:
        error = json.loads(told)
        assert "\n" not in (error.get("message") or error["Message"])


def _quoted(text: str) -> str:
    # Dots are parts of paths for clients, who leave them out before they sign.
    return quote(text.encode(errors="replace"), safe="").replace(".", "%2E")


def test_signed_requests(tmp_path: Path) -> None:
    """Of an admin, with fields, names and queries that mean something, and that do not."""
    cases = st.tuples(
        st.sampled_from(OPERATIONS), st.tuples(_NAMES, _NAMES), _QUERIES, _HEADERS, _BODIES
    )

    def work(gate: Gate) -> None:
        create(gate.client(), Publish=True)
        connection = HTTPConnection(*gate.address, timeout=20)

        def case(value: tuple[Any, ...]) -> None:
            try:
                _asked(connection, gate, value)
            except HTTPException:
                connection.close()
                raise

        try:
            fuzz("signed requests of the gateway", cases, case)
        finally:
            connection.close()

    talk(tmp_path, work, within=SECONDS + 80)


def test_signatures() -> None:
    """None that was made up is taken, and none is a fault."""
    verifier = Verifier(read_keys(KEYS), REGION)

    def case(value: tuple[str, list[tuple[str, str]], bytes]) -> None:
        path, headers, signed = value
        text = signed.decode(errors="surrogateescape")
        head = Head("GET", f"/{path}", [*headers, ("Authorization", text)])
        with pytest.raises(Refused) as caught:
            verifier.check(verifier.claim(head), "0" * 64)
        assert caught.value.status == 403

    fuzz("signatures", _HEADS, case)
