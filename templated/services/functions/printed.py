"""What a function prints during a request: into its log by whole lines, and the end of it kept."""

from __future__ import annotations

from typing import Protocol

from templated.drivers.guest import Output

KEPT = 4096
"""Bytes of a request's log that its caller may see."""
_LONGEST_LINE = 16 << 10


class Prints(Protocol):
    """The logs of functions."""

    def append(self, function: str, data: bytes) -> None:
        """Add lines to a function's log."""


class Printed:
    """Takes the output as it comes, in parts of lines; both streams are kept apart until then."""

    __slots__ = ("_function", "_last", "_logs", "_parts")

    def __init__(self, logs: Prints, function: str) -> None:
        self._logs = logs
        self._function = function
        self._parts: dict[str, bytes] = {}
        self._last = b""

    def take(self, output: Output) -> None:
        """Take a piece of output."""
        data = self._parts.pop(output.stream, b"") + output.data
        end = data.rfind(b"\n") + 1
        whole, part = data[:end], data[end:]
        if len(part) > _LONGEST_LINE:
            whole, part = whole + part + b"\n", b""
        if part:
            self._parts[output.stream] = part
        if whole:
            self._keep(whole)

    def line(self, text: str) -> None:
        """Add a line of our own."""
        self._keep(text.encode(errors="replace") + b"\n")

    def end(self) -> None:
        """No more output comes: a line without an end has ended."""
        for part in self._parts.values():
            self._keep(part + b"\n")
        self._parts.clear()

    @property
    def last(self) -> bytes:
        """The last bytes, at most `KEPT`."""
        return self._last

    def _keep(self, data: bytes) -> None:
        self._logs.append(self._function, data)
        self._last = (self._last + data[-KEPT:])[-KEPT:]
