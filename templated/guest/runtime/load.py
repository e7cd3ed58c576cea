"""From the name of a handler to the handler, and the words for what fails."""

from __future__ import annotations

import _imp
import importlib
import marshal
import os
import sys
import traceback
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, SourceFileLoader
from importlib.util import MAGIC_NUMBER, module_from_spec
from types import CodeType, ModuleType
from typing import Any

BEFORE = ("", *EXTENSION_SUFFIXES)
"""What would be imported before NAME.py, behind its name: a package, and modules in C."""
CACHED = f".{sys.implementation.cache_tag}.pyc"
UNCHECKED = MAGIC_NUMBER + b"\1\0\0\0"
Handler = Callable[[Any, Any], Any]


class LoadError(Exception):
    """The handler cannot be had. `kind` is the name that Lambda has for that."""

    def __init__(self, kind: str, message: str, trace: list[str]) -> None:
        super().__init__(message)
        self.kind, self.trace = kind, trace


def load(name: str, root: str) -> Handler:
    """The function that `MODULE.FUNCTION` names; a module may be `package/module`. `root` is the
    folder of the code, and the first of sys.path.

    Raises LoadError, and what the module raises itself.
    """
    module_name, dot, function = name.rpartition(".")
    if not dot or not module_name or not function:
        raise LoadError(
            "Runtime.MalformedHandlerName", f"Bad handler {name!r}: not MODULE.FUNCTION", []
        )
    module_name = module_name.replace("/", ".")
    try:
        module = plain(module_name, root) or importlib.import_module(module_name)
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


def plain(name: str, root: str) -> ModuleType | None:
    """Import NAME.py of `root` as importlib would, in a third of the code: where nothing has been
    translated yet, code is what a first request waits for. None when it is not as plain as that.

    Raises what the module raises, and leaves nothing of it then.
    """
    path = f"{root}/{name}.py"
    known = name in sys.modules or name in sys.builtin_module_names or _imp.is_frozen(name)
    if known or "." in name or not os.access(path, os.R_OK):
        return None
    for suffix in BEFORE:
        if os.access(f"{root}/{name}{suffix}", os.F_OK):
            return None
    loader = Loader(name, path)
    spec = ModuleSpec(name, loader, origin=path)
    spec.has_location, spec.cached = True, f"{root}/__pycache__/{name}{CACHED}"
    module = sys.modules[name] = module_from_spec(spec)
    try:
        loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return sys.modules.get(name, module)  # some put another one in their place


class Loader(SourceFileLoader):
    """The usual one, with a shorter way to the code."""

    def get_code(self, fullname: str) -> CodeType | None:
        """What was compiled to be taken as it is (PEP 552), or the source, compiled."""
        folder, _, name = self.path.rpartition("/")
        cached = f"{folder}/__pycache__/{name[:-3]}{CACHED}"
        if not os.access(cached, os.R_OK):
            return compile(_content(self.path), self.path, "exec", dont_inherit=True)
        content = _content(cached)
        if not content.startswith(UNCHECKED):
            return super().get_code(fullname)
        code = marshal.loads(content[16:])  # noqa: S302 - it is run anyway
        _imp._fix_co_filename(code, self.path)  # type: ignore[attr-defined]
        return code  # type: ignore[no-any-return]


def _content(path: str) -> bytes:
    descriptor, pieces = os.open(path, os.O_RDONLY | os.O_CLOEXEC), []
    try:
        while piece := os.read(descriptor, 1 << 16):
            pieces.append(piece)
    finally:
        os.close(descriptor)
    return b"".join(pieces)


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
