"""Whether a request was signed with a key of ours: AWS Signature Version 4, in its header.

botocore's own signer computes what the signature must be. This module is imported only where a
gateway listens, since botocore takes long to import.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from templated.api.gateway.errors import Refused
from templated.api.gateway.keys import Key

SERVICE = "lambda"
SKEW = timedelta(minutes=5)
_ALGORITHM = "AWS4-HMAC-SHA256"
_DATE = "X-Amz-Date"
_DIGEST = "X-Amz-Content-SHA256"
_STAMP = re.compile(r"[0-9]{8}T[0-9]{6}Z")
_FORMAT = "%Y%m%dT%H%M%SZ"
_FIELDS = {"Credential", "SignedHeaders", "Signature"}
_DAYS = 2  # around midnight, requests of both are valid
_ONCE = ("Authorization", "Host", _DATE, _DIGEST, "Content-Length")
# Headers that begin so decide on something, and have to be signed.
_PREFIX = "x-amz-"


@dataclass(frozen=True)
class Head:
    """What of a request is signed beside its body: the path is the one on the wire."""

    method: str
    path: str
    headers: Iterable[tuple[str, str]]


@dataclass(frozen=True)
class Claim:
    """Who a request says it is from, and the signature that would prove it."""

    key: Key
    signature: str
    request: AWSRequest
    body_digest: str | None
    """What the request says of its body; None: nothing beside the signature."""


class _Signer(SigV4Auth):  # type: ignore[misc]
    """botocore's, for a request that was received: it signs the headers that the client named, the
    body's digest is known, and the key of a day is made once."""

    def __init__(self, key: Key, region: str) -> None:
        super().__init__(Credentials(key.id, key.secret), SERVICE, region)
        self._start = f"AWS4{key.secret}".encode()
        self._scope = (region, SERVICE, "aws4_request")
        self._days: dict[str, bytes] = {}

    def headers_to_sign(self, request: AWSRequest) -> object:
        return request.headers

    def payload(self, request: AWSRequest) -> str:
        digest: str = request.context["digest"]
        return digest

    def signature(self, string_to_sign: str, request: AWSRequest) -> str:
        key = self._key(request.context["timestamp"][:8])
        return hmac.new(key, string_to_sign.encode(), hashlib.sha256).hexdigest()

    def _key(self, day: str) -> bytes:
        key = self._days.get(day)
        if key is None:
            key = self._start
            for part in (day, *self._scope):
                key = hmac.digest(key, part.encode(), "sha256")
            while len(self._days) >= _DAYS:
                del self._days[next(iter(self._days))]
            self._days[day] = key
        return key


class Verifier:
    """Checks requests against the keys, for one region."""

    def __init__(self, keys: Mapping[str, Key], region: str) -> None:
        self._keys = keys
        self._region = region
        self._signers = {key.id: _Signer(key, region) for key in keys.values()}

    def claim(self, head: Head, now: datetime | None = None) -> Claim:
        """Check all that can be checked before the body is there. Raises Refused."""
        headers = _by_name(head.headers)
        for name in _ONCE:
            if len(headers.get(name.lower(), ())) > 1:
                raise _incomplete(f"the header {name} is there more than once")
        fields = _authorization(headers)
        scope = fields["Credential"].split("/")
        key = self._keys.get(scope[0])
        if key is None or "x-amz-security-token" in headers:
            raise _refused(
                "UnrecognizedClientException",
                "The security token included in the request is invalid.",
            )
        stamp = _stamp(headers, now or datetime.now(UTC))
        self._check_scope(scope, stamp)
        signed = _signed(fields["SignedHeaders"], headers)
        return Claim(
            key=key,
            signature=fields["Signature"],
            request=_request(head, signed, headers, stamp),
            body_digest=next(iter(headers.get(_DIGEST.lower(), ())), None),
        )

    def _check_scope(self, scope: list[str], stamp: str) -> None:
        if len(scope) != 5 or scope[4] != "aws4_request":
            raise _incomplete("Credential is KEY/DATE/REGION/SERVICE/aws4_request")
        wanted = (
            (scope[1] == stamp[:8], f"its date is not that of {_DATE}"),
            (scope[2] == self._region, f"it should be scoped to the region {self._region!r}"),
            (scope[3] == SERVICE, f"it should be scoped to the service {SERVICE!r}"),
        )
        for right, message in wanted:
            if not right:
                raise _invalid(f"Credential: {message}.")

    def check(self, claim: Claim, digest: str) -> None:
        """Check the signature; `digest` is the SHA-256 of the body, in hex. Raises Refused."""
        if claim.body_digest is not None and claim.body_digest != digest:
            raise _invalid(f"{_DIGEST} is not the digest of the request's body.")
        signer, request = self._signers[claim.key.id], claim.request
        request.context["digest"] = digest
        try:
            canonical = signer.canonical_request(request)
            expected = signer.signature(signer.string_to_sign(request, canonical), request)
        except ValueError:  # UnicodeError is one: what is no text was not signed as text
            raise _mismatch() from None
        if not hmac.compare_digest(expected.encode(), claim.signature.encode()):
            raise _mismatch()


def _by_name(headers: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in headers:
        found.setdefault(name.lower(), []).append(value)
    return found


def _authorization(headers: Mapping[str, list[str]]) -> dict[str, str]:
    """The fields of the header; others make it wrong."""
    text = next(iter(headers.get("authorization", ())), "")
    if not text:
        raise _refused(
            "MissingAuthenticationTokenException",
            "Missing Authentication Token: requests are signed in the header Authorization.",
        )
    algorithm, _, rest = text.strip().partition(" ")
    pairs = [part.strip().partition("=") for part in rest.split(",")]
    fields = {name: value for name, _, value in pairs}
    if algorithm != _ALGORITHM or set(fields) != _FIELDS or len(pairs) != len(_FIELDS):
        wanted = ", ".join(sorted(_FIELDS))
        raise _incomplete(f"Authorization has to be {_ALGORITHM} with {wanted}")
    return fields


def _stamp(headers: Mapping[str, list[str]], now: datetime) -> str:
    stamp = next(iter(headers.get(_DATE.lower(), ())), "")
    if not _STAMP.fullmatch(stamp):
        raise _incomplete(f"{_DATE} has to be there, as in 20260131T235959Z")
    try:
        sent = datetime.strptime(stamp, _FORMAT).replace(tzinfo=UTC)
    except ValueError:
        raise _incomplete(f"{_DATE} is no time") from None
    if abs(now - sent) > SKEW:
        word = "expired" if sent < now else "not yet current"
        raise _invalid(f"Signature {word}: {stamp} is not within 5 min of {now:{_FORMAT}}.")
    return stamp


def _signed(names: str, headers: Mapping[str, list[str]]) -> list[str]:
    """The names of the headers that are signed; those that decide on something have to be."""
    signed = names.split(";")
    needed = {"host"} | {name for name in headers if name.startswith(_PREFIX)}
    missing = sorted(needed.difference(signed))
    if missing or len(set(signed)) != len(signed):
        raise _invalid(f"Headers that have to be signed once are not: {', '.join(missing)[:200]}.")
    if any(name not in headers for name in signed):
        raise _mismatch()
    return signed


def _request(
    head: Head, signed: list[str], headers: Mapping[str, list[str]], stamp: str
) -> AWSRequest:
    if not head.path.startswith("/") or "#" in head.path:
        raise _mismatch()
    request = AWSRequest(method=head.method, url=f"http://gateway{head.path}")
    for name in signed:
        for value in headers[name]:
            if not _is_text(value):
                raise _mismatch()
            request.headers[name] = value  # one more of this name
    request.context["timestamp"] = stamp
    return request


def _is_text(value: str) -> bool:
    """Whether it came as UTF-8: what botocore keeps headers in takes others for encoded ones."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refused(kind: str, message: str) -> Refused:
    return Refused(kind, message, status=403)


def _invalid(message: str) -> Refused:
    return _refused("InvalidSignatureException", message)


def _incomplete(message: str) -> Refused:
    return _refused("IncompleteSignatureException", message)


def _mismatch() -> Refused:
    return _invalid(
        "The request signature we calculated does not match the signature you provided. Check "
        "your secret access key and signing method."
    )
