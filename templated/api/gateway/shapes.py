"""What requests hold: the fields that functions have here, and those that Lambda has beside them.

A field that means something there and nothing here is refused by its name, unless it holds what
says the same as leaving it out. Nothing that a client asks for is ignored.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from msgspec import Meta, Struct, field

from templated.api.gateway.errors import wrong
from templated.model.function import DeployRequest, Runtime, Told

TEMPLATE_TAG = "templated:template"
"""The tag that chooses the template of a new function."""
_Text = Annotated[str, Meta(max_length=256)]
_Timeout = Annotated[int, Meta(ge=1, le=900)]
_Memory = Annotated[int, Meta(ge=128, le=32768)]
# What says no more than leaving the field out.
_NEUTRAL: dict[str, Any] = {
    "PackageType": "Zip",
    "Architectures": ["x86_64"],
    "TracingConfig": {"Mode": "PassThrough"},
    "SnapStart": {"ApplyOn": "None"},
    "LoggingConfig": {"LogFormat": "Text"},
    "S3ObjectStorageMode": "COPY",
}


class Environment(Struct, frozen=True, forbid_unknown_fields=True, rename="pascal"):
    """The variables of a function."""

    variables: dict[str, str] = {}


class _Elsewhere(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="pascal"):
    """Fields that functions have in Lambda alone."""

    package_type: Any = None
    vpc_config: Any = None
    dead_letter_config: Any = None
    kms_key_arn: Any = field(default=None, name="KMSKeyArn")
    tracing_config: Any = None
    layers: Any = None
    file_system_configs: Any = None
    code_signing_config_arn: Any = None
    image_config: Any = None
    architectures: Any = None
    ephemeral_storage: Any = None
    snap_start: Any = None
    logging_config: Any = None
    tenancy_config: Any = None
    capacity_provider_config: Any = None
    durable_config: Any = None
    runtime_config: Any = None
    accelerator_config: Any = None
    publish_to: Any = None


NOT_OF_FUNCTIONS = _Elsewhere.__struct_fields__


class Configuration(_Elsewhere, frozen=True, kw_only=True, rename="pascal"):
    """Settings of a function; what is None stays as it is."""

    runtime: str | None = None
    role: Annotated[str, Meta(max_length=512)] | None = None
    handler: str | None = None
    description: _Text | None = None
    timeout: _Timeout | None = None
    memory_size: _Memory | None = None
    environment: Environment | None = None

    def deploy(self, template: str | None = None) -> DeployRequest:
        """As what the registry takes. Raises Refused."""
        # Checked by the registry, with all that it checks of what comes by other ways.
        return DeployRequest(
            handler=self.handler,
            template=template,
            runtime=runtime_of(self.runtime),
            env=None if self.environment is None else self.environment.variables,
            timeout=None if self.timeout is None else f"{self.timeout}s",
            description=self.description,
            told=Told(role=self.role or "", runtime=self.runtime or ""),
        )


class UpdateConfiguration(Configuration, frozen=True, kw_only=True, rename="pascal"):
    """The body of UpdateFunctionConfiguration."""

    revision_id: str | None = None


class Code(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="pascal"):
    """Where the code is: in the request. The other ways are refused."""

    zip_file: bytes | None = None
    s3_bucket: Any = None
    s3_key: Any = None
    s3_object_version: Any = None
    s3_object_storage_mode: Any = None
    image_uri: Any = None
    source_kms_key_arn: Any = field(default=None, name="SourceKMSKeyArn")


NOT_OF_CODE = tuple(name for name in Code.__struct_fields__ if name != "zip_file")
NOT_OF_UPDATES = (*NOT_OF_CODE, "architectures", "publish_to")


class CreateFunction(Configuration, frozen=True, kw_only=True, rename="pascal"):
    """The body of CreateFunction."""

    function_name: str
    code: Code
    publish: bool = False
    tags: dict[str, str] = {}

    def template(self) -> str | None:
        """The template that a tag chooses. Raises Refused for any other tag: none is kept."""
        for name in self.tags:
            if name != TEMPLATE_TAG:
                raise wrong(f"Tags: {name!r} is not kept; {TEMPLATE_TAG} alone means something")
        return self.tags.get(TEMPLATE_TAG)


class UpdateCode(Code, frozen=True, kw_only=True, rename="pascal"):
    """The body of UpdateFunctionCode."""

    architectures: Any = None
    publish: bool = False
    publish_to: Any = None
    dry_run: bool = False
    revision_id: str | None = None


class PublishVersion(Struct, frozen=True, forbid_unknown_fields=True, rename="pascal"):
    """The body of PublishVersion."""

    code_sha256: str | None = field(default=None, name="CodeSha256")
    description: _Text | None = None
    revision_id: str | None = None
    publish_to: Any = None


class Routing(Struct, frozen=True, forbid_unknown_fields=True, rename="pascal"):
    """How much of an alias's requests another version gets."""

    additional_version_weights: dict[str, float] | None = None


class UpdateAlias(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="pascal"):
    """The body of UpdateAlias; what is None stays as it is."""

    function_version: str | None = None
    description: _Text | None = None
    routing_config: Routing | None = None
    revision_id: str | None = None


class CreateAlias(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="pascal"):
    """The body of CreateAlias."""

    name: str
    function_version: str
    description: _Text | None = None
    routing_config: Routing | None = None


class Concurrency(Struct, frozen=True, forbid_unknown_fields=True, rename="pascal"):
    """The body of PutFunctionConcurrency."""

    reserved_concurrent_executions: Annotated[int, Meta(ge=0, le=10000)]


class Provision(Struct, frozen=True, forbid_unknown_fields=True, rename="pascal"):
    """The body of PutProvisionedConcurrencyConfig."""

    provisioned_concurrent_executions: Annotated[int, Meta(ge=1, le=10000)]


def refuse(wanted: Struct, attributes: Iterable[str]) -> None:
    """Raise Refused, naming the field, when one of these fields says something."""
    names = dict(zip(wanted.__struct_fields__, wanted.__struct_encode_fields__, strict=True))
    for attribute in attributes:
        value, name = getattr(wanted, attribute), names[attribute]
        if not _empty(value) and value != _NEUTRAL.get(name):
            raise wrong(f"{name} is not supported here")


def _empty(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_empty(one) for one in value.values())
    return value is None or value is False or value in ("", [])


def runtime_of(name: str | None) -> Runtime | None:
    """What runs a handler of this runtime of Lambda's. Raises Refused for one that is not here."""
    if name is None:
        return None
    if name.startswith("python3."):
        return Runtime.PYTHON
    if name == "provided" or name.startswith("provided."):
        return Runtime.PROVIDED
    raise wrong(f"Runtime: {name[:70]!r} is not here; python3.x and provided are")
