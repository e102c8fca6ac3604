"""Runs the notebooks in order, each in a process of its own, and only those whose results are not there already."""

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from sae_lib.errors import StudyError
from sae_lib.study import environment, notebooks, paths, plan, processes
from sae_lib.study.artefacts import duration
from sae_lib.study.plan import Job, Options

# Seconds one cell may take; a training from nothing is one cell. The paper's sizes take days.
CELL_TIMEOUT = {"smoke": 1200, "workshop": 4 * 3600}
FREE_DISK = 2 << 30


class Line(NamedTuple):
    """A row of the table at the end."""

    notebook: str
    state: str
    seconds: float | None
    peak_bytes: int | None
    why: str


class _Failed(Exception):
    """A notebook that did not make what it should; the message is one sentence."""


class Run:
    """One run of the study; `go` does it."""

    def __init__(self, options: Options, say=print):
        self.options, self.say = options, say
        self.corpus = plan.corpus_of(options)
        self.jobs = plan.jobs(options)
        self.folder, self.figures = paths.runs(options.profile), paths.figures_of(options.profile)
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self.common = plan.ingredients(self.corpus)
        self.lines: list[Line] = []

    def go(self) -> int:
        """Exit status: 0 done, 1 a notebook failed, 130 interrupted. Raises StudyError for a machine that cannot."""
        if self.options.dry_run:
            return self._dry_run()
        _check_disk()
        self._warn_stale()
        busy = lambda: self.say(f"waiting for another run of the profile {self.options.profile}")
        with paths.lock(self.folder / "lock", busy):
            self.records = self._old_records()
            try:
                for job in self.jobs:
                    if not self._one(job):
                        break
                missed = self.jobs[len(self.lines):]
                self.lines += [Line(job.name, "not run", None, None, "an earlier notebook failed") for job in missed]
                self._save(self._export())
            except KeyboardInterrupt:
                self.say(f"\n{table(self.lines)}\nInterrupted; run the same command again to go on from the last checkpoint.")
                return 130
        self.say(f"\n{table(self.lines)}\nfigures: {_short(self.figures)} · notebooks and manifest: {_short(self.folder)}")
        return 1 if any(line.state == "failed" for line in self.lines) else 0

    def _dry_run(self) -> int:
        records = self._old_records()
        for job in self.jobs:
            parts = self.common | plan.own_ingredients(job, self.figures)
            why = plan.why(parts, records.get(job.name), self.options, self.figures)
            self.lines.append(Line(job.name, "would run" if why else "cached", None, None, why or "nothing changed"))
        self.say(table(self.lines))
        return 0

    def _old_records(self) -> dict[str, dict]:
        return (paths.read_json(self.folder / "manifest.json") or {}).get("notebooks", {})

    def _one(self, job: Job) -> bool:
        """Run a notebook unless it is cached; False if it failed."""
        parts = self.common | plan.own_ingredients(job, self.figures)
        why = plan.why(parts, self.records.get(job.name), self.options, self.figures)
        if why is None:
            self.lines.append(Line(job.name, "cached", None, None, "nothing changed"))
            return True
        self.say(f"{job.name}: running ({why})")
        begun, meter = time.monotonic(), {"peak": 0}
        state = "stopped"
        try:
            produced = self._execute(job, meter)
            state = "ran"
            if folder := produced.get("folder"):
                self.say(f"{job.name}: its figures and rows lie apart, in {_short(Path(folder))}")
        except _Failed as failure:
            state, produced = "failed", {"error": str(failure)}
            self.say(f"{job.name}: {failure}")
        finally:
            seconds = round(time.monotonic() - begun, 1)
            self.lines.append(Line(job.name, state, seconds, meter["peak"], why))
        record = {"state": state, "why": why, "seconds": seconds, "peak_bytes": meter["peak"], "parts": parts}
        self.records[job.name] = record | produced
        self._save("")
        return state == "ran"

    def _execute(self, job: Job, meter: dict[str, int]) -> dict:
        """Run a notebook; what it made, proven by its receipts. Raises _Failed with the reason otherwise."""
        work = self.folder / ".work" / job.name
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        source, output, result, receipts = (work / name for name in ("in.ipynb", "out.ipynb", "result.json", "receipts.jsonl"))
        paths.write_atomic(source, notebooks.serialise(job.notebook))
        paths.write_json(work / "job.json", {
            "notebook": str(source),
            "output": str(output),
            "result": str(result),
            "parameters": job.parameters,
            "cwd": str(paths.root()),
            "cell_timeout": CELL_TIMEOUT.get(self.options.profile),
        })
        final, failed, log = (self.folder / f"{job.name}{ending}" for ending in (".ipynb", ".failed.ipynb", ".log"))
        with open(log, "wb") as file:
            process = subprocess.Popen(
                processes.module("execute", str(work / "job.json")),
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env=self._environment(receipts),
            )
            try:
                self._watch(process, receipts, meter)
            finally:
                processes.kill_tree(process.pid)
                process.wait()
        outcome = paths.read_json(result) if process.returncode == 0 else None
        made = paths.receipts(receipts)
        produced = {
            # Of a notebook that keeps what it makes apart from the study's.
            "folder": next((item["folder"] for item in made if item.get("folder", str(self.figures)) != str(self.figures)), ""),
            "figures": {item["name"]: item["sha256"] for item in made if item["event"] == "figure"},
            "rows": {item["id"]: item["sha256"] for item in made if item["event"] == "row"},
            "artefacts": {item["name"]: {"key": item["key"], "source": item["source"]}
                          for item in made if item["event"] == "artefact"},
        }
        problem = self._problem(outcome, process.returncode, meter["peak"], log) or self._missing(job, produced)
        if problem and output.exists():
            os.replace(output, failed)
            problem += f" The notebook as far as it went: {_short(failed)}."
        elif not problem:
            os.replace(output, final)
            failed.unlink(missing_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        if problem:
            raise _Failed(problem)
        return produced

    def _watch(self, process: subprocess.Popen, receipts: Path, meter: dict[str, int]) -> None:
        """Wait for a notebook, keeping its peak memory and passing on what its stages say."""
        told = 0
        while True:
            ended = process.poll() is not None
            news = paths.receipts(receipts)
            for item in news[told:]:
                if item["event"] == "making":
                    resumed = " from its last checkpoint" if item["resumed"] else ""
                    self.say(f"  making {item['name']}@{item['key'][:6]}{resumed} ...")
                elif item["event"] == "artefact":
                    self.say(f"  {item['line']}")
            told = len(news)
            if ended:
                return
            meter["peak"] = max(meter["peak"], processes.memory(process.pid))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)

    def _problem(self, outcome: dict | None, status: int, peak: int, log: Path) -> str | None:
        smaller = "" if self.options.profile == "smoke" else "; try --profile smoke"
        if outcome is None:
            return f"The process that runs the notebook ended with status {status}{smaller}; its last words are in {_short(log)}."
        if outcome["state"] == "kernel":
            return f"The kernel died (probably out of memory: peak {peak / 1e9:.1f} GB){smaller}."
        if outcome["state"] == "timeout":
            return f"A cell took longer than {duration(CELL_TIMEOUT[self.options.profile])} and was stopped{smaller}."
        if outcome["state"] == "cell":
            if outcome["ename"] == "StudyError":
                return outcome["evalue"]
            last = (outcome["evalue"].strip().splitlines() or [""])[-1]
            return f"Cell In [{outcome['cell']}] raised {outcome['ename']}: {last}."
        return None

    def _missing(self, job: Job, produced: dict) -> str | None:
        figures = Path(produced["folder"] or self.figures)
        absent = [f"figure {name}" for name in job.outputs.figures
                  if name not in produced["figures"] or not (figures / f"{name}.json").exists()]
        absent += [f"scorecard row {id}" for id in job.outputs.rows if id not in produced["rows"]]
        return f"It ran to its end but did not make {', '.join(absent)}, which its code declares." if absent else None

    def _environment(self, receipts: Path) -> dict[str, str]:
        fixed = {
            "SAE_ROOT": str(paths.root()),
            "SAE_DATA": str(paths.data()),
            "SAE_FIGURES": str(self.figures),
            "SAE_RECEIPTS": str(receipts),
            "PLOTLY_RENDERER": "plotly_mimetype",
            "TQDM_DISABLE": "1",
            "PYTHONHASHSEED": "0",
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "WANDB_MODE": "disabled",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "DO_NOT_TRACK": "1",
        }
        if not self.corpus.source.startswith("hf:"):
            fixed |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        # Threads that spin while they wait take the cores from others at work, and then wait several times as long themselves.
        threads = {"OMP_NUM_THREADS": str(environment.cpus()), "OMP_WAIT_POLICY": "PASSIVE"}
        return threads | processes.environment() | fixed

    def _warn_stale(self) -> None:
        stale = {path.stem for path in notebooks.build(check=True)}
        names = [job.name for job in self.jobs if job.name in stale]
        if names:
            self.say(f"note: {', '.join(names)} in notebooks/ differs from the source in notebooks/src/, which is what runs; "
                     "`python -m sae_lib.study build` writes it anew")

    def _export(self) -> str:
        from sae_lib.study import export

        if not self.options.export:
            return "PNG export: not asked for"
        status = export.export(self.figures)
        self.say(status)
        for notebook in sorted(self.folder.glob("[0-9][0-9]_*.ipynb")):
            export.inject(notebook, self.figures)
        return status

    def _save(self, exported: str) -> None:
        options = dataclasses.asdict(self.options) | {"parameters": dict(self.options.parameters)}
        paths.write_json(self.folder / "manifest.json", {
            "run": f"{self.started}-{paths.digest([self.started, os.getpid()])[:6]}",
            "command": ["python", "-m", "sae_lib.study", *sys.argv[1:]],
            "started": self.started,
            "saved": datetime.now(UTC).isoformat(timespec="seconds"),
            "options": options,
            "git": environment.git(paths.project()),
            "machine": environment.machine(),
            "versions": environment.versions(),
            "lock_sha256": self.common["requirements.lock"],
            "corpus_fingerprint": self.common["corpus"],
            "notebooks": self.records,
            "states": {line.notebook: line.state for line in self.lines},
            "static_export": exported,
        })


def run(options: Options, say=print) -> int:
    """Run the study; see `Run.go`. Raises UsageError for a profile, notebook, parameter or corpus that does not exist."""
    return Run(options, say).go()


def table(lines: Sequence[Line]) -> str:
    """The closing table: notebook, state, seconds, peak memory, why."""
    rows = [("notebook", "state", "time", "peak memory", "why")]
    for line in lines:
        seconds = "" if line.seconds is None else duration(line.seconds)
        peak = "" if line.peak_bytes is None else f"{line.peak_bytes / 1e9:.1f} GB"
        rows.append((line.notebook, line.state, seconds, peak, line.why))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join("  ".join([*(row[i].ljust(widths[i]) for i in range(4)), row[4]]) for row in rows)


def _check_disk() -> None:
    folder = paths.data()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < FREE_DISK:
        raise StudyError(f"Only {free / 1e9:.1f} GB are free in {folder}, and the study wants {FREE_DISK / 1e9:.0f} GB: "
                         "free some space, or set SAE_DATA to a folder on another disk.")


def _short(path: Path) -> str:
    """A path as the user would type it."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
