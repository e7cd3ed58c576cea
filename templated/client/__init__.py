"""The client of the API: typed, for programs that wait and for those on asyncio.

    from templated.client import AsyncClient, Client

    with Client() as client:
        clone = client.create_clone("fn-123")
        print(clone.identity.ip, clone.total_ms)
        for frame in client.exec_in_clone("fn-123", ["uname", "-a"]):
            print(frame.stream, frame.content(), frame.exit_code)
        client.remove_clone("fn-123")

    async def watch() -> None:
        async with AsyncClient() as client:
            async for event in client.events(follow=True):
                print(event.type, event.subject)

Both have one method for each route, which `requests` describes; answers are the structs of
`templated.model`. `Client` is built on http.client, `AsyncClient` on aiohttp.

Every method raises a TemplatedError and nothing else: RemoteError for an error that the daemon
reports, DaemonUnavailable when nothing answers or the connection ends too early, Timeout. The
request may have been carried out or not then: check, for instance by `list_clones`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from templated.client.blocking import Client
from templated.model.socket import default_socket

if TYPE_CHECKING:
    from templated.client.asynchronous import AsyncClient

__all__ = ["AsyncClient", "Client", "default_socket"]


def __getattr__(name: str) -> Any:
    """AsyncClient, imported when first used: aiohttp takes longer than all the rest."""
    if name != "AsyncClient":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from templated.client.asynchronous import AsyncClient

    return AsyncClient
