"""What is sent to a function: JSON of a bounded size."""

from __future__ import annotations

import msgspec

from templated.errors import InvalidRequest
from templated.model.function import MAX_PAYLOAD


def check_payload(payload: bytes) -> bytes:
    """Return `payload`, `{}` for an empty one. InvalidRequest when it is too large or not JSON."""
    if len(payload) > MAX_PAYLOAD:
        raise InvalidRequest(f"the payload is larger than {MAX_PAYLOAD >> 20} MiB")
    if not payload.strip():
        return b"{}"
    try:
        payload.decode()
        msgspec.json.decode(payload, type=msgspec.Raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the payload is not JSON: {error}", hint="as in {}") from None
    except RecursionError:
        raise InvalidRequest("the payload is nested too deeply") from None
    return payload
