"""What checks from outside rely on: routes, OpenAPI, metric names, error shape."""

from __future__ import annotations

import msgspec
from aiohttp import web
from openapi_spec_validator import validate
from prometheus_client import generate_latest

from templated import errors
from templated.api.errors import STATUS, ErrorAnswer
from templated.api.openapi import document
from templated.api.routes import ROUTES
from templated.cli import exit_codes
from templated.services.reports.metrics import START_BUCKETS, Metrics


def test_openapi_is_valid_and_agrees_with_the_routes() -> None:
    """Every route is in the document, and the document has no other."""
    described = document(ROUTES)
    validate(described)
    app = web.Application()
    for route in ROUTES:
        app.router.add_route(route.method, route.path, route.handler)
    served = {
        (r.method.lower(), r.resource.canonical)
        for r in app.router.routes()
        if r.resource is not None and r.method != "HEAD"
    }
    documented = {(m, path) for path, methods in described["paths"].items() for m in methods}
    assert served == documented


def test_every_error_code_has_a_status_and_an_exit_code() -> None:
    """No error of the tree falls through to a default by accident."""
    codes = {
        kind.code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.TemplatedError)
    }
    assert codes - {"daemon_unavailable"} <= set(STATUS)
    assert all(exit_codes.for_error(code) != exit_codes.OK for code in codes)


def test_error_shape() -> None:
    """code, message, hint; nothing else."""
    answer = ErrorAnswer("conflict", "what", "how")
    assert answer.status == 409
    assert isinstance(answer.body, bytes)
    decoded = msgspec.json.decode(answer.body)
    assert decoded == {"error": {"code": "conflict", "message": "what", "hint": "how"}}


def test_metric_names() -> None:
    """The names, labels and buckets that dashboards use."""
    metrics = Metrics()
    metrics.observe_start("t", "direct", {"spawn": 40.0}, 120.0)
    metrics.failures.labels("t", "timeout").inc()
    metrics.count_clones(lambda: {("t", "running"): 1})
    metrics.build_seconds.labels("t", "boot").observe(1)
    metrics.generation_info.labels("t", "g", "tcg", "7.2").set(1)
    metrics.probe_seconds.labels("t", "agent").observe(1)
    text = generate_latest(metrics.registry).decode()
    for line in (
        'templated_clone_seconds_bucket{le="0.15",path="direct",template="t"} 1.0',
        'templated_clone_phase_seconds_count{path="direct",phase="spawn",template="t"} 1.0',
        'templated_clone_failures_total{reason="timeout",template="t"} 1.0',
        'templated_clones{state="running",template="t"} 1.0',
        'templated_template_build_seconds_count{phase="boot",template="t"} 1.0',
        'templated_probe_seconds_count{probe="agent",template="t"} 1.0',
    ):
        assert line in text
    for name in (
        "templated_template_generation_info{",
        "templated_build_info{",
        "process_open_fds",
    ):
        assert name in text
    expected = ".001 .0025 .005 .01 .025 .05 .075 .1 .15 .25 .5 1 2.5 5 10 30"
    assert list(START_BUCKETS) == [float(bucket) for bucket in expected.split()]
