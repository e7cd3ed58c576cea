"""How functions are named in requests: by name, by a part of an ARN, or by all of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from templated.api.gateway.errors import Refused, wrong
from templated.model.function import check_function_name, check_qualifier

_LONGEST = 256
_ACCOUNT = re.compile(r"[0-9]{12}")


@dataclass(frozen=True)
class Target:
    """A function, and the version or alias that is meant; None: `$LATEST`, unnamed."""

    name: str
    qualifier: str | None


@dataclass(frozen=True)
class Place:
    """The region and account that ARNs name. Functions of others are not here."""

    region: str
    account: str

    def arn(self, name: str, qualifier: str | None = None) -> str:
        """The ARN of a function, or of a version or an alias of it."""
        base = f"arn:aws:lambda:{self.region}:{self.account}:function:{name}"
        return f"{base}:{qualifier}" if qualifier else base

    def role(self) -> str:
        """What stands for the execution role where a function was given none."""
        return f"arn:aws:iam::{self.account}:role/templated"

    def target(self, text: str, qualifier: str | None = None) -> Target:
        """What a request names. Refused when it is no function's name, or one of elsewhere."""
        region, account, rest = _parts(text)
        if region not in ("", self.region):
            raise _elsewhere(f"Functions from {region!r} are not reachable in {self.region!r}")
        if account not in ("", self.account):
            raise _elsewhere(f"This is account {self.account}, not {account}")
        name, own = rest[0], rest[1] if len(rest) > 1 else None
        if own and qualifier and own != qualifier:
            raise wrong("Qualifier: the one in the function's name is another")
        chosen = own or qualifier or None
        return Target(check_function_name(name), check_qualifier(chosen) if chosen else None)


def _parts(text: str) -> tuple[str, str, list[str]]:
    """Region, account (empty where they are left out), and the name with its qualifier."""
    parts = text.split(":")
    if len(text) > _LONGEST:
        raise wrong(f"FunctionName: at most {_LONGEST} characters")
    if parts[0] == "arn":
        if len(parts) in (7, 8) and parts[2] == "lambda" and parts[5] == "function":
            return parts[3], parts[4], parts[6:]
        raise wrong(f"FunctionName: {text!r} is not the ARN of a function")
    # A function may be called `function` as well: then nothing follows.
    at = parts.index("function") if "function" in parts[:3] else -1
    if at >= 0 and 1 <= len(parts) - at - 1 <= 2:
        before = parts[:at]
        if not before or _ACCOUNT.fullmatch(before[-1]):
            return "".join(before[:-1]), "".join(before[-1:]), parts[at + 1 :]
    if len(parts) <= 2:
        return "", "", parts
    raise wrong(f"FunctionName: {text!r} is not the name or the ARN of a function")


def _elsewhere(message: str) -> Refused:
    return Refused("ResourceNotFoundException", message, status=404)
