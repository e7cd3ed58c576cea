"""What the host and the agent agree on. The host imports this too.

A request `{"id", "cmd", ...}` is one line; so is its reply `{"id", "ok": true, "result"}` or
`{"id", "ok": false, "error": {"code", "message"}}`.
"""

from __future__ import annotations

import json
import struct

TYPE_CHECKING = False  # a module less in every guest
if TYPE_CHECKING:
    from typing import Any

VERSION = 1
PORT = "templated.agent.0"
MAX_LINE = 1 << 20
CHUNK = 1 << 16
PAGE = 4096

PACKED = struct.Struct("<1s72sd6s4s1s4s64s128s32s36s36s256s384s")
"""What `identify` is given, in hex, so that next to nothing is left to do with it: a step; struct
rand_pool_info with 64 bytes; the clock in seconds; MAC, address, length of the prefix, gateway
(zeros for none); host name; and what goes into FILES. Texts are filled up with spaces."""
SEEN = struct.Struct("<6s4s4sd")
"""What it answers, in hex: MAC, address, netmask and clock in seconds as the kernel says; then, a
line each, host name, machine-id, boot_id and UUID."""
IDENTIFY, CLAIM, REHEARSAL = b"i", b"c", b"r"
STEPS = {IDENTIFY: "identify", CLAIM: "claim"}
"""All of an identity; its name, the time and entropy only, for a guest that has the rest; the same
without hooks, after which the guest may be paused."""
MAX_PAYLOAD = 6 << 20
WHOLE, PART = 1 << 16, 3 << 16
"""Bytes: what a payload of a function may have to go into its message; and a part of a larger one,
of which all come before it."""
QUICK = b',"cmd":"identify","packed":"'
QUICK_DATA = -2 * PACKED.size - len(b'"}')
QUICK_HEAD = QUICK_DATA - len(QUICK)

join = b"".join
_DECODER, _ENCODER = json.JSONDecoder(), json.JSONEncoder()
scan = _DECODER.scan_once  # type: ignore[attr-defined]
_PARTS = (
    _ENCODER.default,
    json.encoder.encode_basestring_ascii,
    None,
    ":",
    ",",
    False,
    False,
    True,
)


# Both without what json does around the same code in C each time, which takes longer than that.


def encode(value: object) -> str:
    """JSON without spaces, in ASCII. Raises TypeError for what it cannot hold."""
    return "".join(json.encoder.c_make_encoder(None, *_PARTS)(value, 0))  # type: ignore[attr-defined]


def decode(text: str) -> Any:
    """What JSON says. Raises ValueError, and RecursionError."""
    try:
        value, end = scan(text, 0)
    except StopIteration:  # it begins with a space, or with nothing that is JSON
        return _DECODER.decode(text)
    return value if end == len(text) else _DECODER.decode(text)


class Refused(Exception):
    """A request that cannot be done; becomes an error reply."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
