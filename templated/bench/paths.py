"""`bench paths`: cold, direct and the floor in turn, so that noise hits all of them alike."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from templated.bench.floor import Floor, floor
from templated.bench.stats import medians, summarize
from templated.cli.client import Client
from templated.errors import BuildError, HostError
from templated.services.generations import Generation, read_manifest

Progress = Callable[[str], None]
Row = dict[str, float]


class Bench:
    """Measures against a running daemon; every clone it makes, it removes."""

    def __init__(self, client: Client, template: str, progress: Progress) -> None:
        self._client = client
        self._template = template
        self._progress = progress
        self._tag = f"bench-{secrets.token_hex(3)}"

    def paths(self, n: int, n_cold: int, n_cli: int, memory: str | None) -> dict[str, Any]:
        """All figures of one run, in milliseconds."""
        generation = self.generation(self._template)
        rows: dict[str, list[Row]] = {"floor": [], "direct": [], "cold": []}
        with floor(generation, generation.manifest.qemu.path) as bare:
            self._rounds(rows, bare, n, n_cold)
        report = self._report(rows)
        if n_cli:
            report["cli"] = self._cli(n_cli)
        if memory:
            report["memory"] = self._memory(memory, n)
        return report

    def _rounds(self, rows: dict[str, list[Row]], bare: Floor, n: int, n_cold: int) -> None:
        bare.once()
        self.start("direct")
        every = max(1, n // n_cold) if n_cold else 0
        for i in range(n):
            self._progress(f"round {i + 1} of {n}")
            # Which of the two goes first alternates, in case one leaves something warm.
            for what in ("floor", "direct") if i % 2 else ("direct", "floor"):
                rows[what].append(bare.once() if what == "floor" else self.start("direct"))
            if every and i % every == 0 and len(rows["cold"]) < n_cold:
                rows["cold"].append(self.start("cold"))

    def start(self, path: str, template: str | None = None) -> Row:
        """Start a clone on a path, remove it again, and return its phases and `total`."""
        name = f"{self._tag}-{path}"
        body = {"name": name, "template": template or self._template, "path": path}
        clone = self._client.post("clones", body=body)
        self._client.delete("clones", name)
        return {**clone["phases_ms"], "total": clone["total_ms"]}

    def _report(self, rows: dict[str, list[Row]]) -> dict[str, Any]:
        report: dict[str, Any] = {"template": self._template, "unit": "ms", "paths": {}}
        for what, samples in rows.items():
            if samples:
                summary = summarize([row["total"] for row in samples]).as_dict()
                phases = medians([{k: v for k, v in r.items() if k != "total"} for r in samples])
                report["paths"][what] = {**summary, "phases_p50": phases}
        paths = report["paths"]
        direct = paths["direct"]["p50"]
        ratios = {"direct_to_floor": round(direct / paths["floor"]["p50"], 3)}
        pairs = zip(rows["direct"], rows["floor"], strict=True)
        paired = sorted(d["total"] / f["total"] for d, f in pairs)
        ratios["direct_to_floor_paired_p50"] = round(summarize(paired).p50, 3)
        if "cold" in paths:
            ratios["cold_to_direct"] = round(paths["cold"]["p50"] / direct, 1)
        report["ratios"] = ratios
        return report

    def _cli(self, n: int) -> dict[str, Any]:
        """What `templated clone` adds to the daemon's total_ms, as a whole process."""
        added = []
        for i in range(n):
            self._progress(f"command line {i + 1} of {n}")
            name = f"{self._tag}-cli"
            command = [sys.executable, "-m", "templated", "clone", name]
            command += [
                "--template",
                self._template,
                "-o",
                "json",
                "--socket",
                self._client.path,
            ]
            begin = time.perf_counter()
            done = subprocess.run(command, capture_output=True, timeout=120, check=False)
            wall = (time.perf_counter() - begin) * 1000
            if done.returncode != 0:
                raise HostError(f"templated clone failed: {done.stderr.decode().strip()}")
            added.append(wall - json.loads(done.stdout)["total_ms"])
            self._client.delete("clones", name)
        return summarize(added).as_dict()

    def _memory(self, memory: str, n: int) -> dict[str, Any]:
        """`restore` of the same template with more memory, in turn with its own."""
        name = f"{self._tag}-memory"
        spec = self._client.get("templates", self._template)["spec"]
        own = spec["machine"]["memory"]
        spec = {**spec, "name": name, "machine": {**spec["machine"], "memory": memory}}
        self._progress(f"building the same template with {memory}")
        self._build(name, spec)
        samples: dict[str, list[float]] = {own: [], memory: []}
        try:
            for i in range(n):
                self._progress(f"memory {i + 1} of {n}")
                samples[own].append(self.start("direct")["restore"])
                samples[memory].append(self.start("direct", name)["restore"])
        finally:
            self._client.delete("templates", name)
        summaries = {size: summarize(values).as_dict() for size, values in samples.items()}
        ratio = round(summaries[memory]["p50"] / summaries[own]["p50"], 3)
        return {"restore": summaries, "ratio": ratio}

    def _build(self, name: str, spec: dict[str, Any]) -> None:
        # JSON is YAML.
        body = {"spec": json.dumps(spec), "source": "the benchmark's template"}
        operation = self._client.post("templates", name, "build", body=body)
        with self._client.request("GET", "operations", operation["id"], "events") as answer:
            for event in answer.objects():
                if event["type"] == "end" and event["state"] != "done":
                    raise BuildError(f"{name}: {event['error']['message']}")

    def generation(self, template: str) -> Generation:
        """The active generation's files, which the floor restores from by itself."""
        active = self._client.get("templates", template)["active"]
        info = self._client.get("info")
        directory = Path(info["state_dir"]) / "generations" / template / str(active)
        try:
            manifest = read_manifest(directory)
        except HostError as error:
            raise HostError(
                error.message,
                hint="the bench reads the daemon's files: run it as its user",
            ) from error
        return Generation(manifest, directory, Path(info["shm_dir"]) / template / str(active))
