"""Follows the move of requests to a new $LATEST."""

from __future__ import annotations

import time
from typing import Any

from templated.cli.options import Settings
from templated.client import requests

_INTERVAL = 0.2


def follow_deploy(settings: Settings, view: dict[str, Any]) -> dict[str, Any]:
    """Wait until requests go to what was deployed, and say how far that is; the view of then.

    The daemon bounds it. Ctrl-C ends the wait alone.
    """
    name, shown = view["name"], None
    try:
        while (update := view["update"]) is not None and not update["done"]:
            ready = f"{update['ready']} of {update['wanted']}"
            if ready != shown:
                settings.note(f"{name}: {ready} instances of the new code are ready")
                shown = ready
            time.sleep(_INTERVAL)
            view = settings.client().json(requests.show_function(name))
    except KeyboardInterrupt:
        settings.note(f"{name} is deployed; requests go to it as soon as instances are ready")
        raise
    if shown is not None:
        settings.note(f"{name}: requests go to the new code")
    if update is not None and update["problem"]:
        settings.note(f"warning: requests go to the new code of {name}, but {update['problem']}")
    return view
