"""A rehearsal of functions: load and invoke, by the code that real ones go through, and undone."""

from __future__ import annotations

import time

from .events import event_of, order_of
from .functions import EMPTY, Functions
from .http import Connection
from .wire import Refused, decode, encode, join

TYPE_CHECKING = False  # a module less in every guest
if TYPE_CHECKING:
    from typing import Any

ROUNDS, SECONDS = 2, 60.0
LOAD = encode(
    {
        "id": 1,
        "uuid": "",
        "runtime": "python",
        # Of the placeholder that a machine without a function has as its code.
        "handler": "templated_rehearsal.handler",
        "env": {"AWS_LAMBDA_FUNCTION_NAME": "rehearsal", "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "128"},
        "timeout": SECONDS,
    }
)
INVOKE = encode(
    {
        "id": 1,
        "request": "00000000-0000-0000-0000-000000000000",
        "arn": "arn:aws:lambda:local:000000000000:function:rehearsal",
        "deadline": 1 << 40,
        "trace": "Root=1-00000000-000000000000000000000000",
        "time": 0.5,
        "payload": '{"rehearsal": true}',
    }
)
"""As they come, so that reading and writing what has such numbers is rehearsed, too."""


class Rehearsed(Functions):
    """Functions of a machine that is frozen, or kept warm, after it has done all of it before."""

    rounds = 0
    """How many are still to come; 0 when none is under way."""
    _forgets = False

    def rehearse(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """Do what `load` and `invoke` do with what is on the disk, ROUNDS times, and undo it.

        Under TCG that makes the first real ones several times faster.
        """
        self.require_empty()
        if self.process is None:
            self.start_resident()
        self.own(request)
        self.rounds = ROUNDS
        self._begin()
        return None

    def require_empty(self) -> None:
        """Raise Refused unless a function can be loaded."""
        super().require_empty()
        if self.rounds:
            raise Refused("not_ready", "a rehearsal is under way")

    def _begin(self) -> None:
        request = decode(LOAD)
        try:
            self.start(None, order_of(request), request["timeout"], self._on_loaded)
        except BaseException:
            self.rounds = 0
            raise

    def _on_loaded(self, result: dict[str, Any]) -> None:
        if "failed" in result:
            self._fail_rehearsal(result["payload"])
            return
        encode({"id": 1, "ok": True, "result": result})
        request = decode(INVOKE)
        payload = request["payload"].encode()
        event = join((event_of(request, len(payload)), payload))
        self.give(request["request"].encode(), event, self._on_told)

    def _on_told(self, result: dict[str, Any]) -> None:
        if "error" in result:
            self._fail_rehearsal(result["payload"])
            return
        encode({"id": 1, "ok": True, "result": result})
        self._forgets = True
        self.wait_until(time.monotonic() + SECONDS)

    def on_next(self, connection: Connection) -> None:
        """A runtime asks for a request, or is told to forget all that it has loaded."""
        if self._forgets:
            connection.answer(410)
        else:
            super().on_next(connection)

    def on_waiting(self, connection: Connection) -> None:
        """The resident runtime waits for an order: it has loaded nothing, or forgotten it."""
        if self._forgets:
            self._forgets = False
            self.state = EMPTY
            self.finish({})
            try:
                self.detach()
                self.rounds -= 1
                if self.rounds:
                    self._begin()
            except (OSError, Refused) as error:
                self._fail_rehearsal(str(error))
            else:
                if not self.rounds:
                    self.reply({})
        super().on_waiting(connection)

    def _fail_rehearsal(self, why: str) -> None:
        """A machine on which it fails takes no function: what it has loaded may still be there."""
        self.rounds, self._forgets = 0, False
        self.refuse_request("rehearsal", f"the rehearsal of a function failed: {why}")

    def output(self, name: str, data: bytes) -> None:
        """Take what was printed; a rehearsal is no news."""
        if not self.rounds:
            super().output(name, data)

    def on_end(self, how: str) -> None:
        """The runtime has ended."""
        forgets, self._forgets = self._forgets, False
        super().on_end(how)
        if forgets:
            self.finish({})
            self._fail_rehearsal(f"the runtime ended: {how}")

    def expire(self) -> None:
        """The start, or the end of a rehearsal, takes too long."""
        if self._forgets:
            self.finish({})
            self._fail_rehearsal(f"not forgotten in {SECONDS:g} s")
        else:
            super().expire()
