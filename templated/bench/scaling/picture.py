"""Draws the report of `bench scaling`, by matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from templated.bench.scaling.show import held_key

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLES = {"templated": "o-", "oracle": "k--"}
# Instance-minutes in multiples of what is needed: beyond that nobody saves anything.
_WIDEST = 2.6


def draw(report: dict[str, Any], path: Path) -> None:
    """Write a picture: cold starts over the memory held, and what deciding costs."""
    from matplotlib.figure import Figure

    parts = [
        (part, name) for name, part in (("curves", _curves), ("cost", _cost)) if name in report
    ]
    figure = Figure(figsize=(1.5 + 6.5 * len(parts), 5), layout="constrained")
    for axes, (part, _) in zip(
        figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True
    ):
        part(axes, report)
    figure.suptitle(
        "templated bench scaling" + (f", {report['trace']}" if "trace" in report else "")
    )
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})


def _curves(axes: Axes, report: dict[str, Any]) -> None:
    """The best that each does with each amount of memory."""
    key = held_key(report)
    for name, points in report["curves"].items():
        front = _front(points, key)
        held, cold = [p[key] for p in front], [p["cold"] for p in front]
        axes.plot(held, cold, _STYLES.get(name, ".-"), label=name, linewidth=1.2, markersize=4)
    axes.axvline(report["needed"], color="grey", linewidth=0.8, label="needed, no more")
    axes.set_xlim(0.95 * report["needed"], _WIDEST * report["needed"])
    axes.set_yscale("log")
    axes.set_xlabel(f"{report['unit']} held")
    axes.set_ylabel("cold starts")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")


def _front(points: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Without the settings that another one beats in both."""
    front: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda p: (p[key], p["cold"])):
        if not front or point["cold"] < front[-1]["cold"]:
            front.append(point)
    return front


def _cost(axes: Axes, report: dict[str, Any]) -> None:
    rows = report["cost"]["rows"]
    functions = [row["functions"] for row in rows]
    for key, label in (
        ("core_percent", "memory in plenty"),
        ("short_core_percent", "memory short"),
    ):
        axes.plot(functions, [row[key] for row in rows], "o-", label=label)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("functions")
    axes.set_ylabel("% of a core, one round each second")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
