"""From the name of a handler to the handler, and the words for what fails."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable
from typing import Any

Handler = Callable[[Any, Any], Any]


class LoadError(Exception):
    """The handler cannot be had. `kind` is the name that Lambda has for that."""

    def __init__(self, kind: str, message: str, trace: list[str]) -> None:
        super().__init__(message)
        self.kind, self.trace = kind, trace


def load(name: str) -> Handler:
    """The function that `MODULE.FUNCTION` names; a module may be `package/module`.

    Raises LoadError, and what the module raises itself.
    """
    module_name, dot, function = name.rpartition(".")
    if not dot or not module_name or not function:
        raise LoadError(
            "Runtime.MalformedHandlerName", f"Bad handler {name!r}: not MODULE.FUNCTION", []
        )
    module_name = module_name.replace("/", ".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        message = f"Unable to import module '{module_name}': {error}"
        raise LoadError("Runtime.ImportModuleError", message, stack(error)) from error
    except SyntaxError as error:
        where = f'  File "{error.filename}" Line {error.lineno}\n    {error.text}'
        message = f"Syntax error in module '{module_name}': {error}"
        raise LoadError("Runtime.UserCodeSyntaxError", message, [where]) from error
    handler = getattr(module, function, None)
    if not callable(handler):
        message = f"Handler '{function}' missing on module '{module_name}'"
        raise LoadError("Runtime.HandlerNotFound", message, [])
    return handler  # type: ignore[no-any-return]


def stack(error: BaseException) -> list[str]:
    """Where it was raised, without the frames of this runtime and of the import system."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = __file__.rpartition("/")[0]
    return traceback.format_list(
        [
            frame
            for frame in frames
            if not frame.filename.startswith((ours, "<frozen importlib"))
            and not frame.filename.endswith("/importlib/__init__.py")
        ]
    )


def report(kind: str, message: str, trace: list[str]) -> None:
    """Tell the function's log of a failure, as Lambda does."""
    lines = [f"[ERROR] {kind}: {message}\n"]
    if trace:
        lines += ["Traceback (most recent call last):\n", *trace]
    sys.stderr.write("".join(lines))
    sys.stderr.flush()
