"""What is wrong with a field is said in words."""

from __future__ import annotations

import msgspec
import pytest

from templated.api.errors import decoded
from templated.errors import InvalidRequest
from templated.model.function import Alias, DeployRequest
from templated.model.mistakes import explained


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"timeout": "1h"}, "timeout is not a time", "as 30s, 2m or 250ms, at most 900s"),
        ({"env": {"1": "x"}}, "a key of env is not the name of a variable", "a letter, then"),
        ({"handler": "a b"}, "handler is not a handler", "as app.handler"),
        ({"template": "A"}, "template is not the name of a template", "of a-z"),
        ({"timeout": 3}, "Expected `str | null`, got `int` - at `$.timeout`", "openapi"),
    ],
)
def test_fields(settings: dict[str, object], message: str, hint: str) -> None:
    """One line that names the field, and how it should be."""
    with pytest.raises(InvalidRequest) as caught:
        decoded(msgspec.json.encode(settings), DeployRequest, "settings")
    assert caught.value.message == f"settings: {message}"
    assert hint in caught.value.hint


def test_an_alias() -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert({"function": "f", "name": "3", "versions": {}}, Alias)
    message, hint = explained(caught.value)
    assert message == "name is not the name of an alias" and "digits alone" in hint
