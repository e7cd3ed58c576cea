"""The operations that there are, and which of them a path means."""

from __future__ import annotations

from urllib.parse import unquote

from templated.api.gateway import functions as f
from templated.api.gateway import provisioned as p
from templated.api.gateway import versions as v
from templated.api.gateway.account import account_settings
from templated.api.gateway.call import Operation
from templated.api.gateway.errors import Refused
from templated.api.gateway.invoke import invoke
from templated.model.access import Role
from templated.model.function import MAX_PAYLOAD

# Bytes of a request with 50 MiB of zip in base64, as Lambda has it.
_MAX_CODE = 70_167_211
_ALL = "2015-03-31/functions"
_ONE = f"{_ALL}/*"
_PROVISIONED = "2019-09-30/functions/*/provisioned-concurrency"
_ALIAS = f"{_ONE}/aliases/*"
# Where the names are in a path.
_NAMES = (2, 4)
_VIEWER, _OPERATOR, _ADMIN = Role.VIEWER, Role.OPERATOR, Role.ADMIN

OPERATIONS = (
    Operation("CreateFunction", "POST", _ALL, f.create_function, _ADMIN, limit=_MAX_CODE),
    Operation("UpdateFunctionCode", "PUT", f"{_ONE}/code", f.update_code, _ADMIN, limit=_MAX_CODE),
    Operation(
        *("UpdateFunctionConfiguration", "PUT", f"{_ONE}/configuration"),
        f.update_configuration,
        _ADMIN,
    ),
    Operation("GetFunction", "GET", _ONE, f.get_function, _VIEWER),
    Operation(
        *("GetFunctionConfiguration", "GET", f"{_ONE}/configuration"),
        f.get_configuration,
        _VIEWER,
    ),
    Operation(
        *("GetFunctionCodeSigningConfig", "GET", "2020-06-30/functions/*/code-signing-config"),
        f.code_signing,
        _VIEWER,
    ),
    Operation("ListFunctions", "GET", _ALL, f.list_functions, _VIEWER),
    Operation("DeleteFunction", "DELETE", _ONE, f.delete_function, _ADMIN),
    Operation("PublishVersion", "POST", f"{_ONE}/versions", v.publish_version, _ADMIN),
    Operation("ListVersionsByFunction", "GET", f"{_ONE}/versions", v.list_versions, _VIEWER),
    Operation("CreateAlias", "POST", f"{_ONE}/aliases", v.create_alias, _ADMIN),
    Operation("UpdateAlias", "PUT", _ALIAS, v.update_alias, _ADMIN),
    Operation("GetAlias", "GET", _ALIAS, v.get_alias, _VIEWER),
    Operation("ListAliases", "GET", f"{_ONE}/aliases", v.list_aliases, _VIEWER),
    Operation("DeleteAlias", "DELETE", _ALIAS, v.delete_alias, _ADMIN),
    Operation(
        *("Invoke", "POST", f"{_ONE}/invocations", invoke, _OPERATOR),
        limit=MAX_PAYLOAD,
        action="InvokeFunction",
    ),
    Operation(
        *("PutFunctionConcurrency", "PUT", "2017-10-31/functions/*/concurrency"),
        v.put_concurrency,
        _ADMIN,
    ),
    Operation(
        *("GetFunctionConcurrency", "GET", "2019-09-30/functions/*/concurrency"),
        v.get_concurrency,
        _VIEWER,
    ),
    Operation(
        *("DeleteFunctionConcurrency", "DELETE", "2017-10-31/functions/*/concurrency"),
        v.delete_concurrency,
        _ADMIN,
    ),
    Operation(*("PutProvisionedConcurrencyConfig", "PUT", _PROVISIONED, p.put_provisioned, _ADMIN)),
    # ListProvisionedConcurrencyConfigs has the same place, with List=ALL.
    Operation(
        *("GetProvisionedConcurrencyConfig", "GET", _PROVISIONED, p.get_provisioned, _VIEWER)
    ),
    Operation(
        *("DeleteProvisionedConcurrencyConfig", "DELETE", _PROVISIONED, p.delete_provisioned),
        _ADMIN,
    ),
    Operation(
        "GetAccountSettings", "GET", "2016-08-19/account-settings", account_settings, _VIEWER
    ),
)
_BY_PLACE = {(o.method, o.path): o for o in OPERATIONS}


def find(method: str, path: str) -> tuple[Operation, tuple[str, ...]]:
    """The operation, and the names in the path. Raises Refused for what is not there."""
    parts = path.strip("/").split("/")
    names = tuple(unquote(parts[at]) for at in _NAMES if at < len(parts))
    shape = "/".join("*" if at in _NAMES else part for at, part in enumerate(parts))
    operation = _BY_PLACE.get((method, shape))
    if operation is None:
        raise Refused(
            "UnknownOperationException",
            f"There is no operation {method} {path[:200]} here.",
            status=404,
        )
    return operation, names
