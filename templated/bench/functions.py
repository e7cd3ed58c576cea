"""The functions of a benchmark's run, which are removed at its end."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import time
import zipfile
from pathlib import Path
from typing import Any, Self

from templated.bench.session import Session
from templated.client import Client
from templated.errors import GuestError, TemplatedError, Timeout
from templated.model.function import InvokeView

# What is measured is how a request comes to a handler: this one returns what it was given.
_APP = b"def handler(event, context):\n    return event\n"
SLEEPER = b"import time\n\ndef handler(event, context):\n    time.sleep(event)\n    return event\n"
"""Another one: each request says how many seconds it takes."""
HANDLER = "app.handler"
PAYLOAD = b'{"a": 1}'  # as Python writes it
_PAUSED_WITHIN = 30.0
_POLL = 0.01


class Functions:
    """The functions of one run, which are removed at its end."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.client = Client(session.client.path, keep_alive=True)
        self._names = (f"{session.tag}-{number}" for number in itertools.count())
        self._numbers = map(str, itertools.count())
        self._made: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._made:
            with contextlib.suppress(TemplatedError):
                self.session.client.remove_function(name)
        self.client.close()

    def deploy(self, size: int = 0, app: bytes = _APP) -> str:
        """A new function whose code has about so many bytes beside its handler."""
        name = next(self._names)
        self._made.append(name)
        self.client.deploy_function(
            name,
            archive(size, app),
            handler=HANDLER,
            template=self.session.template,
            timeout="60s",
        )
        return name

    def code(self) -> Path:
        """The image of a new function's code, in the daemon's cache."""
        digest = self.client.show_function(self.deploy()).code.digest
        return Path(self.session.info().state_dir, "code", f"{digest}.img")

    def invoke(self, name: str, client: Client | None = None, **how: Any) -> InvokeView:
        """One request, which must succeed."""
        view = (client or self.client).invoke_function(name, PAYLOAD, **how)
        if view.error is not None or bytes(view.payload) != PAYLOAD:
            raise GuestError(f"{name} answered {bytes(view.payload)[:200]!r}")
        return view

    def paused(self, name: str) -> None:
        """Wait until a function's instance rests. Raises Timeout."""
        deadline = time.monotonic() + _PAUSED_WITHIN
        while not self.client.show_function(name).instances.get("paused"):
            if time.monotonic() > deadline:
                raise Timeout(f"no instance of {name} was paused within {_PAUSED_WITHIN:g} s")
            time.sleep(_POLL)

    def gone(self, name: str) -> None:
        """Wait until a function has no instance. Raises Timeout."""
        deadline = time.monotonic() + _PAUSED_WITHIN
        while any(self.client.show_function(name).instances.values()):
            if time.monotonic() > deadline:
                raise Timeout(f"an instance of {name} does not end")
            time.sleep(_POLL)

    def fresh(self, name: str) -> str:
        """A version with the same code that had no request yet: nothing is kept ready for it."""
        self.client.deploy_function(name, env={"VERSION": next(self._numbers)})
        return self.client.publish_function(name).version


def archive(size: int = 0, app: bytes = _APP) -> bytes:
    """Code, as it is deployed; bytes that are no code have it as large as is wanted."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as made:
        made.writestr("app.py", app)
        if size:
            made.writestr("data", os.urandom(size))
    return content.getvalue()
