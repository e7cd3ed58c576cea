"""GetAccountSettings: bounds, and what of them is used."""

from __future__ import annotations

from aiohttp import web

from templated.api.gateway.call import Call, json_answer
from templated.api.gateway.functions import MAX_ZIP, all_versions
from templated.model.function import MAX_CODE
from templated.model.units import size_bytes


async def account_settings(call: Call) -> web.Response:
    """The bounds of this daemon."""
    config, registry = call.desk.config, call.desk.functions.registry
    names = registry.names()
    versions = [version for name in names for version in all_versions(call, name)]
    code = {version.code.digest: version.code.bytes for version in versions}
    most = config.functions.concurrency
    reserved = sum(registry.reserved(name) or 0 for name in names)
    return json_answer(
        {
            "AccountLimit": {
                "TotalCodeSize": size_bytes(config.code.cache_size),
                "CodeSizeUnzipped": MAX_CODE,
                "CodeSizeZipped": MAX_ZIP,
                "ConcurrentExecutions": most,
                "UnreservedConcurrentExecutions": max(0, most - reserved),
            },
            "AccountUsage": {"TotalCodeSize": sum(code.values()), "FunctionCount": len(names)},
        }
    )
