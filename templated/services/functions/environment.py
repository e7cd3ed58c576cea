"""The environment of a function's runtime: what Lambda sets, and what the user does."""

from __future__ import annotations

from templated.model.function import Runtime, Version

TASK_ROOT = "/var/task"
"""Where the guest has the code."""
_RUNTIMES = {Runtime.PYTHON: "AWS_Lambda_python", Runtime.PROVIDED: ""}


def environment(version: Version, instance: str, region: str, memory: int | None) -> dict[str, str]:
    """All variables but AWS_LAMBDA_RUNTIME_API, which the guest knows; `memory` is in MiB.

    The user's come over the defaults, and under what Lambda reserves.
    """
    settings = version.settings
    defaults = {
        "LANG": "en_US.UTF-8",
        "TZ": ":UTC",
        "PATH": "/usr/local/bin:/usr/bin:/bin:/opt/bin",
        "LD_LIBRARY_PATH": f"{TASK_ROOT}:{TASK_ROOT}/lib",
    }
    reserved = {
        "_HANDLER": settings.handler,
        "LAMBDA_TASK_ROOT": TASK_ROOT,
        "AWS_REGION": region,
        "AWS_DEFAULT_REGION": region,
        "AWS_EXECUTION_ENV": _RUNTIMES[settings.runtime],
        "AWS_LAMBDA_FUNCTION_NAME": version.function,
        "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "" if memory is None else str(memory),
        "AWS_LAMBDA_FUNCTION_VERSION": version.label,
        "AWS_LAMBDA_INITIALIZATION_TYPE": "on-demand",
        "AWS_LAMBDA_LOG_GROUP_NAME": f"/aws/lambda/{version.function}",
        "AWS_LAMBDA_LOG_STREAM_NAME": instance,
    }
    return {**defaults, **settings.env, **{k: v for k, v in reserved.items() if v}}
