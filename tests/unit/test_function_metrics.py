"""The metrics of functions: their names are fixed, and they go away with what they are of."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from templated.services.reports.function_metrics import FunctionMetrics
from tests.unit.fake_instances import version


def shown(registry: CollectorRegistry) -> list[str]:
    return [line for line in generate_latest(registry).decode().splitlines() if line[0] != "#"]


def test_names_and_zeros() -> None:
    registry = CollectorRegistry()
    metrics = FunctionMetrics(registry)
    metrics.expect(version("f", 3))
    metrics.count(lambda: {("f", "3", "idle"): 2}, lambda: {("f", "3"): 1})
    lines = shown(registry)
    of_version = 'function="f",version="3"'
    for outcome in ("ok", "error", "timeout", "failed"):
        labels = f'function="f",outcome="{outcome}",version="3"'
        assert f"templated_invocations_total{{{labels}}} 0.0" in lines
    for reason in ("queue", "concurrency", "reserved", "max"):
        labels = f'function="f",reason="{reason}"'
        assert f"templated_function_throttles_total{{{labels}}} 0.0" in lines
    for start in ("warm", "pool", "direct"):
        labels = f'function="f",start="{start}"'
        assert f"templated_invocation_seconds_count{{{labels}}} 0.0" in lines
    for phase in ("route", "start", "attach", "init", "run"):
        labels = f'function="f",phase="{phase}"'
        assert f"templated_invocation_phase_seconds_count{{{labels}}} 0.0" in lines
    assert f"templated_function_cold_starts_total{{{of_version}}} 0.0" in lines
    metrics.count_crews(lambda: {("f", "3"): 2}, lambda: {("f", "3"): 0})
    lines = shown(registry)
    assert f"templated_function_aim{{{of_version}}} 2.0" in lines
    assert f"templated_function_start_failures{{{of_version}}} 0.0" in lines
    for outcome in ("ok", "failed"):
        labels = f'function="f",outcome="{outcome}",version="3"'
        assert f"templated_function_starts_ahead_total{{{labels}}} 0.0" in lines
    assert 'templated_instances{function="f",state="idle",version="3"} 2.0' in lines
    assert f"templated_function_concurrency{{{of_version}}} 1.0" in lines
    assert 'templated_code_cache_requests_total{layer="l2",outcome="error"} 0.0' in lines
    assert "templated_code_cache_bytes 0.0" in lines
    assert "templated_code_attach_seconds_count 0.0" in lines


def test_series_go_with_what_they_are_of() -> None:
    registry = CollectorRegistry()
    metrics = FunctionMetrics(registry)
    kept = metrics.expect(version("f", 3))
    for other in (version("f"), version("g", 3)):
        metrics.expect(other)
    metrics.forget("f", "3")
    lines = shown(registry)
    assert not [line for line in lines if 'function="f"' in line and 'version="3"' in line]
    assert [line for line in lines if 'function="f"' in line and 'version="$LATEST"' in line]
    assert [line for line in lines if 'function="g"' in line and 'version="3"' in line]
    kept.answered("ok", "warm", {"run": 1.0}, 2.0)  # a request that still ran
    metrics.forget("f")
    lines = shown(registry)
    assert not [line for line in lines if 'function="f"' in line]
    assert [line for line in lines if 'function="g"' in line]
    kept.failed()
    assert not [line for line in shown(registry) if 'function="f"' in line]
