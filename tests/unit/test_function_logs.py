"""The logs of functions: what is kept of them, who follows them, and what their files may do."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from templated.errors import HostError, InvalidRequest
from templated.services.functions.logs import FunctionLogs
from tests.unit.fake_daemon import run, until

pytestmark = pytest.mark.usefixtures("no_blocking_calls")


def logs(tmp_path: Path, limit: int = 1 << 16) -> FunctionLogs:
    return FunctionLogs(tmp_path / "functions", limit, delay=0.001)


async def tail(kept: FunctionLogs, name: str, lines: int) -> list[str]:
    return (await kept.tail(name, lines)).decode().splitlines()


def test_lines_of_functions_are_kept_apart(tmp_path: Path) -> None:
    async def main() -> None:
        kept = logs(tmp_path)
        for number in range(3):
            kept.append("a", f"a{number}\n".encode())
            kept.append("B_-", f"b{number}\n".encode())
        assert await tail(kept, "a", 2) == ["a1", "a2"]
        assert await tail(kept, "B_-", 100) == ["b0", "b1", "b2"]
        assert await tail(kept, "a", 0) == [] and await tail(kept, "none", 5) == []
        again = logs(tmp_path)  # the next daemon
        again.append("a", b"a3\n")
        assert await tail(again, "a", 2) == ["a2", "a3"]

    run(main())


def test_they_are_bounded_and_rotated(tmp_path: Path) -> None:
    async def main() -> None:
        kept = logs(tmp_path, 2000)
        for number in range(500):
            kept.append("a", f"line {number:04}\n".encode())
            if number % 10 == 9:
                await kept.flush()
        files = sorted((tmp_path / "functions/a").iterdir())
        assert [file.name for file in files] == ["log", "log.1"]
        assert all(0 < file.stat().st_size <= 1000 for file in files)
        assert (await tail(kept, "a", 120))[-1] == "line 0499"
        lines = await tail(kept, "a", 1000)
        assert lines == [f"line {n:04}" for n in range(500 - len(lines), 500)] and len(lines) >= 90
        kept.append("a", b"x" * 50_000 + b"\n")
        await kept.flush()
        assert all(file.stat().st_size <= 1000 for file in (tmp_path / "functions/a").iterdir())

    run(main())


def test_what_waits_is_bounded(tmp_path: Path) -> None:
    async def main() -> None:
        kept = logs(tmp_path, 2000)
        for number in range(10_000):
            kept.append("a", f"line {number:05}\n".encode())
        assert sum(map(len, kept._waiting["a"])) == kept._sizes["a"] == kept._total <= 1000
        assert (await tail(kept, "a", 1)) == ["line 09999"]
        assert kept._total == 0

    run(main())


def test_followers_read_every_line_once(tmp_path: Path) -> None:
    """Also over rotations, and lines that come in parts."""

    async def main() -> None:
        kept = logs(tmp_path, 4000)
        writer = asyncio.create_task(kept.run())
        kept.append("a", b"before 1\nbefore 2\n")
        seen: list[str] = []

        async def follow() -> None:
            async for line in kept.follow("a", 1):
                seen.extend(line.decode().splitlines())

        follower = asyncio.create_task(follow())
        await until(lambda: seen == ["before 2"])
        for number in range(200):
            kept.append("a", b"li")
            if number % 7 == 0:
                await asyncio.sleep(0.002)
            kept.append("a", f"ne {number}\n".encode())
            kept.append("b", b"another function's\n")
        await until(lambda: len(seen) == 201)
        assert seen[1:] == [f"line {number}" for number in range(200)]
        await kept.close()
        await follower
        writer.cancel()
        await asyncio.wait({writer})

    run(main())


def test_a_function_that_has_printed_nothing_yet_is_followed(tmp_path: Path) -> None:
    async def main() -> None:
        kept = logs(tmp_path)
        follower = kept.follow("a", 10)
        first = asyncio.ensure_future(anext(follower))
        await asyncio.sleep(0.01)
        kept.append("a", b"one\ntwo\n")
        await kept.flush()
        assert await first == b"one\ntwo\n"
        await kept.close()
        with pytest.raises(StopAsyncIteration):
            await anext(follower)

    run(main())


def test_nothing_reaches_a_terminal(tmp_path: Path) -> None:
    async def main() -> None:
        kept = logs(tmp_path)
        kept.append("a", b"\x1b[31mred\x07\tx\r\n\xff\n")
        assert await tail(kept, "a", 5) == [" [31mred \tx", "�"]

    run(main())


@pytest.mark.parametrize("name", ["../a", "a/b", "", ".", "..", "a" * 65, "a\0", "a\n"])
def test_names_are_no_paths(tmp_path: Path, name: str) -> None:
    async def main() -> None:
        kept = logs(tmp_path)
        with pytest.raises(InvalidRequest):
            await kept.tail(name, 5)
        with pytest.raises(InvalidRequest):
            await kept.remove(name)

    run(main())


def test_removal(tmp_path: Path) -> None:
    async def main() -> None:
        kept = logs(tmp_path)
        for name in ("a", "b", "c"):
            kept.append(name, b"x\n")
        await kept.flush()
        kept.append("a", b"y\n")
        await kept.remove("a")
        await kept.remove("a")
        assert await tail(kept, "a", 5) == [] and kept._total == 0
        await kept.prune(["b"])
        assert [place.name for place in (tmp_path / "functions").iterdir()] == ["b"]

    run(main())


def test_a_disk_that_takes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged once, and lines are taken again afterwards."""

    async def main() -> None:
        (tmp_path / "functions").write_bytes(b"no folder")
        kept = logs(tmp_path)
        for _ in range(3):
            kept.append("a", b"lost\n")
            await kept.flush()
        with pytest.raises(HostError, match="cannot read the log"):
            await tail(kept, "a", 1)
        (tmp_path / "functions").unlink()
        kept.append("a", b"kept\n")
        assert await tail(kept, "a", 5) == ["kept"]

    with caplog.at_level(logging.WARNING):
        run(main())
    assert len([r for r in caplog.records if "cannot write logs" in r.message]) == 1
