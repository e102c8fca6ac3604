"""`python -m tests.benchmarks`: results.json, its figure, and the table on the screen; `--readme` puts it into the README.

`--quick` says only that everything runs. Nothing else should be running.
"""

import argparse
import datetime
import json
import os
import sys
import time
from pathlib import Path

import torch

from sae_lib.study import environment, paths

from . import dictionaries, figure, peers, report
from .curves import curves
from .interchange import interchange
from .measure import FULL, QUICK, Benchmark
from .model import harvest, transformer
from .protocol import FOLDER, PROCESSOR_TIME, Worker

PROJECT = FOLDER.parent.parent


def say(line: str) -> None:
    """Progress, seen at once also where the output is a file."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def inputs() -> tuple[Path | None, Path | None]:
    """The study's tokens and transformer, if a run of the study has left them."""
    tokens = sorted(paths.data().glob("artefacts/tokens/*/meta.json"))
    weights = sorted(paths.data().glob("artefacts/transformer_A/*/weights.safetensors"))
    weights += sorted(paths.data().glob("reference/transformer_A/weights.safetensors"))
    full = [path.parent for path in tokens if (path.parent / "train.tokens.bin").stat().st_size > 10_000_000]
    return (full[-1] if full else None), (weights[-1] if weights else None)


def machine(threads: int) -> dict:
    """The machine, as far as it explains speed: its processor, where it gives a name, and how it multiplies bfloat16."""
    found, capabilities = environment.machine(), torch.cpu.get_capabilities()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found["processor"] = next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        pass
    units = [name for name in ("amx_bf16", "avx512_bf16", "bf16") if capabilities.get(name)]
    return found | {"threads": threads, "bfloat16": units[0].replace("_bf16", "").upper() if units else "none"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds: to see that it works")
    parser.add_argument("--no-peers", action="store_true", help="the project's own rows alone")
    parser.add_argument("--threads", type=int, default=environment.cpus())
    parser.add_argument("--processor-time", action="store_true",
                        help="count the processor's seconds, with one thread: for a machine on which other work is running")
    parser.add_argument("--only", default="", help="some of relu, topk, wide, harvest, transformer, curves, interchange")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where results.json and the figure go")
    parser.add_argument("--readme", action="store_true", help="measure nothing: put the table of results.json into the README")
    arguments = parser.parse_args()
    if arguments.readme:
        report.into_readme(json.loads((arguments.out / "results.json").read_text()), PROJECT / "README.md")
        return 0
    if arguments.processor_time:
        arguments.threads, os.environ[PROCESSOR_TIME] = 1, "1"
    folder = paths.data() / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    python, why = (None, "The peers were not asked for.") if arguments.no_peers else peers.environment(
        folder / ".venv", folder / "install.log", say)

    def start(name: str) -> Worker:
        own = name == "project"
        return Worker(f"{name}_worker", sys.executable if own else python, arguments.threads, folder / f"{name}.log",
                      (str(PROJECT),) if own else ())

    benchmark = Benchmark(QUICK if arguments.quick else FULL, folder, start, peers=python is not None, say=say)
    if why:
        benchmark.note(why)
    parts = [*dictionaries.parts(benchmark.sizes), ("harvest", harvest), ("transformer", transformer), ("curves", curves),
             ("interchange", interchange)]
    only = set(filter(None, arguments.only.split(",")))
    began = time.monotonic()
    benchmark.run([part for name, part in parts if not only or name in only], *inputs())
    say(f"Measured in {(time.monotonic() - began) / 60:.1f} minutes.")
    result = {"machine": machine(arguments.threads), "date": datetime.date.today().isoformat(), "quick": arguments.quick,
              "processor_time": arguments.processor_time,
              "versions": environment.versions() | {"peers": peers.versions(python) if python else {}},
              "data": benchmark.data, "rows": benchmark.rows, "measurements": benchmark.measurements,
              "losses": benchmark.losses, "curves": benchmark.curves, "notes": benchmark.notes}
    name = "quick" if arguments.quick or arguments.processor_time or only else "results"
    paths.write_json(arguments.out / f"{name}.json", result)
    figure.write(result, arguments.out / f"{name}.html")
    say("\n" + "\n\n".join([report.heading(result), report.table(benchmark.rows), *benchmark.notes]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
