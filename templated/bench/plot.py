"""Pictures of the reports, by matplotlib, which is imported here and nowhere else."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from templated.errors import HostError, InvalidRequest
from templated.model.clone import Phase

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".svg", ".png")
# A bar this many times as long as the median one would make the others too short to see.
_LONG = 3.0
_DECADE = 10.0


def check(path: Path) -> None:
    """Raise before any work what would hinder the picture after it."""
    if path.suffix not in SUFFIXES:
        raise InvalidRequest(
            f"{path.name} is neither an SVG nor a PNG",
            hint="end its name with .svg or .png",
        )
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InvalidRequest(f"cannot write {path}", hint="name a file in a folder of your own")
    if importlib.util.find_spec("matplotlib") is None:
        raise HostError("--plot needs matplotlib", hint="pip install 'templated[plot]'")


def draw(report: dict[str, Any], path: Path) -> None:
    """Write a picture of a report; its suffix says in which format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    if report["kind"] == "density":
        _growth(left, report)
        _idle(right, report)
    elif report["kind"] == "burst":
        _sorted_requests(left, report)
        _distribution(right, {f"{report['n']} at once": report["samples_ms"]})
    else:
        _phases(left, report["paths"])
        _distribution(right, {name: row["samples_ms"] for name, row in report["paths"].items()})
    figure.suptitle(f"templated bench {report['kind']}, template {report['template']}")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})


def _phases(axes: Axes, paths: dict[str, Any]) -> None:
    """A bar per path: the p50 of its phases, one on the other."""
    names = list(paths)
    p50 = [paths[name]["p50"] for name in names]
    middle = sorted(p50)[len(p50) // 2]
    limit = 1.35 * max(value for value in p50 if value <= _LONG * middle)
    known = {phase for name in names for phase in paths[name]["phases_p50"]}
    phases = [phase for phase in map(str, Phase) if phase in known]
    begin = [0.0] * len(names)
    for number, phase in enumerate(phases):
        widths = [paths[name]["phases_p50"].get(phase, 0.0) for name in names]
        axes.barh(names, widths, left=begin, label=phase, color=f"C{number % 10}")
        begin = [at + width for at, width in zip(begin, widths, strict=True)]
    for name, end, value in zip(names, begin, p50, strict=True):
        cut = " →" if end > limit else ""
        at = 0.7 * limit if end > limit else end
        axes.annotate(f" {value:.4g} ms{cut}", (at, name), va="center")
    axes.set_xlim(0, limit)
    axes.invert_yaxis()
    axes.set_xlabel("ms, median of each phase")
    axes.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=4)


def _distribution(axes: Axes, samples: dict[str, list[float]]) -> None:
    """The share of starts that had ended, over the time in milliseconds."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for name, values in samples.items():
        axes.ecdf(values, label=name)
    spread = [value for values in samples.values() for value in values]
    if max(spread) > _DECADE * min(spread):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(left=0)
    axes.set_xlabel("ms")
    axes.set_ylabel("share of starts")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _sorted_requests(axes: Axes, report: dict[str, Any]) -> None:
    axes.bar(range(1, report["n"] + 1), sorted(report["samples_ms"]))
    axes.set_xlabel("requests, by when they were answered")
    axes.set_ylabel("ms")


def _growth(axes: Axes, report: dict[str, Any]) -> None:
    axes.plot(range(1, report["n"] + 1), report["samples_ms"], ".", label="start")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("clones on the host")
    axes.set_ylabel("ms to start the next one")


def _idle(axes: Axes, report: dict[str, Any]) -> None:
    points = report["growth"]
    axes.plot([p["k"] for p in points], [p["pss_mib"] for p in points], "o-")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("idle clones")
    axes.set_ylabel("MiB, sum of PSS")
