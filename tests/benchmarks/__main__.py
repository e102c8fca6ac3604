"""`python -m tests.benchmarks`: the table, results.json, results.md and the figure.

About 20 minutes on two cores; `--quick` takes two or three and says only that everything runs. Nothing else should be running.
"""

import argparse
import datetime
import sys
from pathlib import Path

from sae_lib.study import environment, paths

from . import figure, peers
from .arithmetic import table
from .measure import FULL, QUICK, Benchmark
from .protocol import FOLDER, Worker

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


def processor() -> str:
    """What the machine calls its processor, where it says so."""
    try:
        names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds: to see that it works")
    parser.add_argument("--no-peers", action="store_true", help="the project's own rows alone")
    parser.add_argument("--threads", type=int, default=environment.cpus())
    parser.add_argument("--out", type=Path, default=FOLDER, help="where results.json, results.md and the figure go")
    arguments = parser.parse_args()
    folder = paths.data() / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    python, why = (None, "The peers were not asked for.") if arguments.no_peers else peers.environment(
        folder / ".venv", folder / "install.log", say)
    if why:
        say(why)

    def start(name: str) -> Worker:
        own = name == "project"
        return Worker(f"{name}_worker", sys.executable if own else python, arguments.threads, folder / f"{name}.log",
                      (str(PROJECT),) if own else ())

    benchmark = Benchmark(QUICK if arguments.quick else FULL, folder, start, peers=python is not None, say=say)
    benchmark.notes += [why] if why else []
    benchmark.run(*inputs())
    features = environment.machine() | {"processor": processor() or environment.machine()["processor"],
                                        "threads": arguments.threads}
    result = {"machine": features, "date": datetime.date.today().isoformat(), "quick": arguments.quick,
              "versions": environment.versions() | {"peers": peers.versions(python) if python else {}},
              "data": benchmark.data, "rows": benchmark.rows, "measurements": benchmark.measurements,
              "curves": benchmark.curves, "notes": benchmark.notes}
    name = "quick" if arguments.quick else "results"
    paths.write_json(arguments.out / f"{name}.json", result)
    text = heading(result) + table(benchmark.rows) + "\n" + "".join(f"\n{note}\n" for note in benchmark.notes)
    paths.write_atomic(arguments.out / f"{name}.md", text)
    figure.write(result, arguments.out / f"{name}.html")
    say("\n" + text)
    return 0


def heading(result: dict) -> str:
    """One paragraph: machine, date, versions, data."""
    machine, versions = result["machine"], result["versions"]
    with_peers = ", ".join(f"{name} {version}" for name, version in versions["peers"].items())
    return (f"{machine['processor']}, {machine['threads']} threads, {machine['ram_gb']} GB, {result['date']}"
            f"{', quick mode' if result['quick'] else ''}. Project: torch {versions['torch']}. "
            f"Peers: {with_peers or 'none'}. Activations: {result['data'].get('source', 'none')}.\n\n")


if __name__ == "__main__":
    sys.exit(main())
