"""`templated bench scaling`: the trace's reader, the rule, the rivals, and what we reach."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from templated.bench.scaling import measure
from templated.bench.scaling.cost import measure_cost
from templated.bench.scaling.hybrid import Hybrid, Setting
from templated.bench.scaling.replay import Outcome, replay, replay_scaler, total
from templated.bench.scaling.rivals import Clamp, Fixed, Knative, oracle
from templated.bench.scaling.trace import Row, Trace, read
from templated.cli import exit_codes
from templated.cli.main import main
from templated.errors import InvalidRequest
from templated.scaling import Policy

# Prices: less memory, and about as much as a fixed keep-alive of ten minutes holds.
LESS, MORE = 0.04, 0.007
TRACE = Path(__file__).parents[1] / "data" / "azure2019-60apps.csv"
SMALL = "app,memory_mb,m0001,m0002,m0003\na,128,1,0,2\nb,256,0,0,1\n"
AZURE = "HashOwner,HashApp,HashFunction,Trigger,1,2,3\no,a,f,http,0,1,120\no,a,g,timer,1,1,1\n"


@pytest.fixture(scope="module")
def trace() -> Trace:
    return read(TRACE)


@pytest.fixture(scope="module")
def ours(trace: Trace) -> dict[float, list[Outcome]]:
    """By price: an outcome for each application."""
    return {price: replay_scaler(trace, Policy(price=price)) for price in (LESS, MORE)}


def needs(*minutes: int, name: str = "a") -> Row:
    return Row(name, 128.0, minutes)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """One application each five minutes, one at random times, one with two levels."""
    path = tmp_path / "small.csv"
    rows = {
        "timer": [int(minute % 5 == 0) for minute in range(60)],
        "random": [int(minute * minute % 17 == 4) for minute in range(60)],
        "busy": [1 + minute // 7 % 2 for minute in range(60)],
    }
    lines = [["app", "memory_mb", *(f"m{minute:04d}" for minute in range(1, 61))]]
    lines += [[name, "128", *map(str, row)] for name, row in rows.items()]
    path.write_text("".join(",".join(line) + "\n" for line in lines))
    return path


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "t.csv"
    path.write_text(text)
    return path


def test_reads_needs(tmp_path: Path) -> None:
    found = read(written(tmp_path, SMALL))
    assert found.rows == (Row("a", 128.0, (1, 0, 2)), Row("b", 256.0, (0, 0, 1)))
    assert (found.minutes, found.needed) == (3, 4)
    assert len(read(written(tmp_path, SMALL), first=1).rows) == 1


def test_reads_invocations_of_the_azure_trace(tmp_path: Path) -> None:
    found = read(written(tmp_path, AZURE))
    assert [row.name for row in found.rows] == ["o/a/f", "o/a/g"]
    assert found.rows[0].needs == (0, 1, 2), "120 of one second in a minute: two at once"
    assert read(written(tmp_path, AZURE), duration=30).rows[0].needs == (0, 1, 60)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "t.csv:1: the header is of no known format"),
        ("a,b\n1,2\n", "t.csv:1: the header is of no known format"),
        ("app,memory_mb\na,1\n", "t.csv:1: the header names no minutes"),
        ("app,memory_mb,m0001\n", "t.csv has no functions"),
        (SMALL.replace("m0002", "m0004"), "t.csv:1: a gap: 'm0004' stands where m0002 should"),
        (AZURE.replace(",2,3", ",3,4"), "t.csv:1: a gap: '3' stands where 2 should"),
        (SMALL + "c,128,1,0\n", "t.csv:4: 4 fields instead of 5"),
        (SMALL + "c,128,1,0,1,1\n", "t.csv:4: 6 fields instead of 5"),
        (SMALL + "c,128,1,,1\n", "t.csv:4: minute 2 is empty"),
        (SMALL + "c,128,1,-3,1\n", "t.csv:4: minute 2 is negative: -3"),
        (SMALL + "c,128,1,1.5,1\n", "t.csv:4: minute 2 is '1.5'"),
        (SMALL + "c,128,1,x\x1b,1\n", "t.csv:4: minute 2 is 'x\\x1b'"),
        (SMALL + "c,128,1,99999999,1\n", "t.csv:4: minute 2 is '99999999'"),
        (SMALL + "c,128,1,\u0663,1\n", "t.csv:4: minute 2 is '\u0663'"),
        (SMALL + "a,128,1,0,1\n", "t.csv:4: 'a' is there twice"),
        (SMALL + ",128,1,0,1\n", "t.csv:4: '' is no name"),
        (SMALL + "c,-5,1,0,1\n", "t.csv:4: memory_mb is '-5'"),
        (SMALL + "c,nan,1,0,1\n", "t.csv:4: memory_mb is 'nan'"),
        (SMALL + "\n", "t.csv:4: 0 fields instead of 5"),
        (SMALL + '"c,128,1,0,1\n', "t.csv is no CSV: unexpected end of data"),
    ],
)
def test_what_is_wrong_with_a_trace(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(written(tmp_path, text))
    assert caught.value.message == error


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"cannot read .*: No such file"):
        read(tmp_path / "missing.csv")
    with pytest.raises(InvalidRequest, match=r"cannot read .*: Is a directory"):
        read(tmp_path)
    (tmp_path / "t.csv").write_bytes(b"app,memory_mb,m0001\n\xff,1,1\n")
    with pytest.raises(InvalidRequest, match=r"t\.csv is no CSV: 'utf-8' codec"):
        read(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("minutes", "cold", "held", "gb"),
    [
        (1, 5717, 29879, 4716),
        (5, 1446, 42501, 6709),
        (10, 582, 46319, 7312),
        (30, 251, 52343, 8251),
        (60, 170, 58255, 9176),
    ],
)
def test_baselines_are_exact(trace: Trace, minutes: int, cold: int, held: int, gb: int) -> None:
    """As published with the trace."""
    found = total(replay(trace.rows, lambda: Fixed(minutes)))
    assert (found.cold, found.held, round(found.gib)) == (cold, held, gb)


def test_the_trace(trace: Trace) -> None:
    assert (len(trace.rows), trace.minutes, trace.needed) == (60, 1440, 24176)
    assert round(sum(sum(row.needs) * row.mib for row in trace.rows) / 1024) == 3853


def test_the_rule() -> None:
    """Two at once, one of them again while both are kept, then none, then too late."""
    found = total(replay([needs(2, 1, 0, 0, 0, 1)], lambda: Fixed(2)))
    assert (found.cold, found.held) == (3, 2 + 2 + 2 + 1 + 0 + 1)
    assert (found.active, found.active_cold) == (2, 1)
    assert found.warm == 50


def test_knative() -> None:
    """Mean over its window; in a panic nothing goes."""
    keeper = Knative(3)
    ready = []
    for minute, need in enumerate((0, 4, 0, 0, 0, 0)):
        ready.append(keeper.ready(minute))
        keeper.saw(minute, need)
    assert ready == [0, 0, 4, 4, 4, 0]


def test_clamp() -> None:
    keeper = Clamp(2)
    ready = []
    for minute, need in enumerate((1, 3, 1, 1, 0, 0, 0)):
        ready.append(keeper.ready(minute))
        keeper.saw(minute, need)
    assert ready == [0, 1, 3, 3, 2, 2, 0]


def test_hybrid_comes_back_before_the_head_of_its_histogram() -> None:
    keeper = Hybrid(Setting(2, 0.05, 0.99))
    ready = []
    for minute in range(60):
        ready.append(keeper.ready(minute))
        keeper.saw(minute, int(minute % 10 == 0))
    assert ready[1:4] == [1, 1, 0], "the fixed time, while it has seen nothing"
    assert ready[51:60] == [0, 0, 0, 0, 0, 0, 0, 0, 1], "a margin of 10 % before its time"
    assert ready[50] == 1


def test_the_oracle_bridges_the_shortest_first() -> None:
    points = oracle([needs(1, 0, 1, 0, 0, 0, 1), needs(2, 2, 0, 0, 0, 0, 0)])
    assert [(gap, p.cold, p.held) for gap, p in points] == [(0, 5, 7), (1, 4, 8), (3, 3, 11)]


def test_nobody_beats_the_oracle_without_starting_ahead(trace: Trace) -> None:
    points = [outcome for _, outcome in oracle(trace.rows)]
    for minutes in (1, 10, 60):
        fixed = total(replay(trace.rows, lambda m=minutes: Fixed(m)))  # type: ignore[misc]
        assert min(p.cold for p in points if p.held <= fixed.held) <= fixed.cold


def test_goals(ours: dict[float, list[Outcome]]) -> None:
    """Fixed keep-alive of ten minutes: 582 cold starts with 46,319 instance-minutes."""
    less, more = total(ours[LESS]), total(ours[MORE])
    assert (less.held <= 35_000, less.cold <= 275) == (True, True), "of 38,000 and 582"
    assert (more.held <= 46_319, more.cold <= 175) == (True, True), "of 46,319 and 260"
    assert more.warm >= 99.8, "of 99 % of active functions' starts"
    assert less.warm >= 99.6


def test_each_half_does_better_than_fixed_keep_alive(
    trace: Trace, ours: dict[float, list[Outcome]]
) -> None:
    fixed = replay(trace.rows, lambda: Fixed(10))
    for start in (0, 1):
        half, than = total(ours[LESS][start::2]), total(fixed[start::2])
        assert half.cold <= 0.55 * than.cold
        assert half.held <= than.held


def test_below_the_hybrid_histogram_at_every_budget(
    trace: Trace, ours: dict[float, list[Outcome]]
) -> None:
    """Two prices do for that, against all of its settings."""
    hybrid = [total(replay(trace.rows, lambda s=s: Hybrid(s))) for s in measure.SETTINGS]  # type: ignore[misc]
    sums = [total(outcomes) for outcomes in ours.values()]
    for budget in range(35_000, 58_001, 100):
        theirs = min((p.cold for p in hybrid if p.held <= budget), default=10**6)
        assert min(p.cold for p in sums if p.held <= budget) < theirs, budget


def test_memory_weighs_when_asked(small: Path) -> None:
    trace = read(small)
    rows = tuple(Row(row.name, 4096.0, row.needs) for row in trace.rows)
    policy = Policy(price=0.1)
    plain = total(replay_scaler(Trace("t", rows), policy))
    heavy = total(replay_scaler(Trace("t", rows), policy, by_memory=True))
    assert heavy.held < plain.held


def test_table_by_memory(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--trace", small, "--by-memory")
    assert code == exit_codes.OK
    lines = out.splitlines()
    assert lines[0].endswith(" GiB-minutes needed")
    assert lines[2].split() == ["held", "templated", "fixed", "knative", "clamp", "hybrid"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["bench", "scaling", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_report(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "p.svg"
    code, out, _ = run(capsys, "--trace", small, "-o", "json", "--plot", picture)
    assert code == exit_codes.OK
    report: dict[str, Any] = json.loads(out)
    assert (report["functions"], report["minutes"]) == (3, 60)
    assert set(report["curves"]) == {"templated", "fixed", "knative", "hybrid", "clamp", "oracle"}
    for row in report["table"]:
        assert set(row) == {"budget", *report["curves"]}
    assert [choice["on"] for choice in report["chosen"]] == [
        "first, third, ...",
        "second, fourth, ...",
    ]
    assert ET.parse(picture).getroot().tag.endswith("svg")  # noqa: S314 - we made it


def test_tables(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--trace", small)
    assert code == exit_codes.OK
    lines = out.splitlines()
    assert lines[0].startswith("trace small.csv: 3 functions, 60 minutes, ")
    assert lines[2].split() == [
        "held",
        "templated",
        "fixed",
        "knative",
        "clamp",
        "hybrid",
        "oracle",
    ]
    assert any(line.startswith("chosen on the first, third, ...") for line in lines)


def test_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of the test's own: what is counted, and not how long it takes."""
    ticks = itertools.count()
    found = measure_cost(lambda _: None, (2, 4), lambda: next(ticks) / 1000)
    assert [row["functions"] for row in found["rows"]] == [2, 4]
    assert found["rows"][0]["round_ms"] == pytest.approx(1.0)
    assert found["growth"] == pytest.approx(0.5)


def test_cost_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("templated.bench.scaling.cost.COUNTS", (1, 2))
    monkeypatch.setattr("templated.bench.scaling.cost.measure_cost.__defaults__", ((1, 2), float))
    code, out, _ = run(capsys, "--cost")
    assert code == exit_codes.OK
    assert "CPU of one round each second:" in out


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), "nothing to measure"),
        (("--trace", "/nowhere.csv"), "cannot read /nowhere.csv: No such file or directory"),
        (("--cost", "--plot", "p.txt"), "p.txt is neither an SVG nor a PNG"),
    ],
)
def test_refused(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], error: str
) -> None:
    code, out, err = run(capsys, *arguments)
    assert code != exit_codes.OK
    assert out == ""
    assert error in err.splitlines()[0]


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == exit_codes.OK
    assert "templated bench scaling --trace azure2019-60apps.csv" in out
