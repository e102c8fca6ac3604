"""`python -m sae_lib.study COMMAND`: run the study, build its notebooks, export its figures, keep its reference artefacts."""

import argparse
import ast
import os
import signal
import sys
from pathlib import Path

from sae_lib.errors import StudyError
from sae_lib.study import paths


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 asked for something that is not there, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return options.action(options)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2 if type(error).__name__ == "UsageError" else 1
    except KeyboardInterrupt:
        print("Interrupted before anything was run.", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    from sae_lib.study.plan import Options
    from sae_lib.study.runner import run

    given = [_parameter(text) for text in options.parameter]
    named = {"PROFILE": options.profile, "SEED": options.seed, "CORPUS": options.corpus} | dict(given)
    if named.get("ARTEFACTS", "auto") not in ("auto", "train"):
        raise StudyError("The runner's ARTEFACTS is auto, or train with --train.")
    if not isinstance(named["SEED"], int):
        raise StudyError(f"SEED is a whole number, not '{named['SEED']}'.")
    # A terminated run stops its notebook as an interrupted one does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run(Options(
        profile=str(named["PROFILE"]),
        seed=named["SEED"],
        corpus=_absolute(str(named["CORPUS"])),
        train=options.train or named.get("ARTEFACTS") == "train",
        only=tuple(options.only),
        first=options.first,
        last=options.last,
        force=options.force,
        dry_run=options.dry_run,
        export=not options.no_export,
        parameters=tuple((name, value) for name, value in given if name not in ("PROFILE", "SEED", "CORPUS", "ARTEFACTS")),
    ))


def _parameter(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise StudyError(f"A parameter is given as -p NAME=VALUE, not '{text}'.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _absolute(corpus: str) -> str:
    """Notebooks run in the study's folder; a relative files:DIR is meant from here."""
    if corpus.startswith("files:"):
        return "files:" + os.path.abspath(os.path.expanduser(corpus.removeprefix("files:")))
    return corpus


def _build(options: argparse.Namespace) -> int:
    from sae_lib.study import notebooks

    stale = notebooks.build(check=options.check)
    for path in stale:
        print(f"{path.name}: {'differs from its source; run `python -m sae_lib.study build`' if options.check else 'written'}")
    return 1 if stale and options.check else 0


def _export(options: argparse.Namespace) -> int:
    from sae_lib.study import export

    print(export.export(Path(options.folder) if options.folder else paths.figures(), timeout=options.timeout))
    return 0


def _reference(options: argparse.Namespace) -> int:
    from sae_lib.study.artefacts import Store

    records = (paths.read_json(paths.runs("workshop") / "manifest.json") or {}).get("notebooks", {})
    used = {name: artefact["key"] for record in records.values() for name, artefact in record.get("artefacts", {}).items()}
    for name in options.names:
        if name not in used:
            choices = ", ".join(sorted(used)) or "nothing yet: run ./run_all.sh"
            raise StudyError(f"The last run of the workshop profile used no artefact '{name}': choose {choices}.")
        print(f"{name}@{used[name][:6]} copied to {Store().promote(name, used[name])}")
    return 0


def _dictionary(options: argparse.Namespace) -> int:
    from sae_lib.study import together

    together.dictionary(options.profile, options.seed, _absolute(options.corpus), options.on)
    return 0


def _replicas(options: argparse.Namespace) -> int:
    from sae_lib.study import replicas
    from sae_lib.study.pipeline import begin

    study = begin(options.profile, options.seed, "auto", _absolute(options.corpus))
    for which in options.which or replicas.REPLICAS:
        for row, value in replicas.make(study, which).items():
            print(which, row, f"{value:.4g}")
    return 0


def _readme(_: argparse.Namespace) -> int:
    from sae_lib.study import readme

    results = paths.read_json(paths.figures() / "results.json")
    if results is None:
        raise StudyError("There is no figures/results.json: run ./run_all.sh first.")
    readme.put_between(paths.project() / "README.md", readme.BEGIN, readme.END, readme.results_table(results["rows"]))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from sae_lib.study import environment

    missing = environment.unmet(paths.project(), tuple(options.extra))
    if missing and not options.quiet:
        print(f"This environment lacks {', '.join(missing)}: run ./run_all.sh, which makes one that has them.")
    elif not options.quiet:
        print("This environment has all that the study needs.")
    return 1 if missing else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run_all.sh or python -m sae_lib.study", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run the notebooks whose results are not there already")
    run.add_argument("--profile", default="workshop", help="smoke (minutes) | workshop (a laptop; the default) | paper (GPUs)")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--corpus", default="", metavar="SPEC", help="environment | files:DIR | hf:NAME[:config][:split]")
    run.add_argument("--train", action="store_true", help="train everything here instead of loading the reference artefacts")
    run.add_argument("--only", nargs="+", default=[], metavar="NN", help="these notebooks")
    run.add_argument("--from", dest="first", default="", metavar="NN", help="this notebook and those after it")
    run.add_argument("--to", dest="last", default="", metavar="NN", help="this notebook and those before it")
    run.add_argument("--force", action="store_true", help="run even what is there already")
    run.add_argument("--dry-run", action="store_true", help="say what would run, and why")
    run.add_argument("--no-export", action="store_true", help="make no PNGs")
    run.add_argument("-p", dest="parameter", action="append", default=[], metavar="NAME=VALUE", help="set a notebook's parameter")
    run.set_defaults(action=_run)

    build = commands.add_parser("build", help="write notebooks/*.ipynb from notebooks/src/*.py")
    build.add_argument("--check", action="store_true", help="only tell which differ")
    build.set_defaults(action=_build)

    export = commands.add_parser("export", help="render the figures to PNG")
    export.add_argument("folder", nargs="?", help="default: figures/")
    export.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS")
    export.set_defaults(action=_export)

    reference = commands.add_parser("reference", help="copy artefacts of the last workshop run to data/reference/")
    reference.add_argument("names", nargs="+", metavar="NAME")
    reference.set_defaults(action=_reference)

    dictionary = commands.add_parser("dictionary", help="train the main dictionary; under torchrun, in many processes together")
    dictionary.add_argument("--profile", default="workshop")
    dictionary.add_argument("--seed", type=int, default=0)
    dictionary.add_argument("--corpus", default="", metavar="SPEC")
    dictionary.add_argument("--on", default="A", choices=("A", "B", "C"), help="transformer")
    dictionary.set_defaults(action=_dictionary)

    replicas = commands.add_parser("replicas", help="train and measure two more transformers and dictionaries, for the spread")
    replicas.add_argument("which", nargs="*", metavar="WHICH", help="B (which the study has anyway) and C, unless told")
    replicas.add_argument("--profile", default="workshop")
    replicas.add_argument("--seed", type=int, default=0)
    replicas.add_argument("--corpus", default="", metavar="SPEC")
    replicas.set_defaults(action=_replicas)

    readme = commands.add_parser("readme", help="put the scorecard's headline rows into the README")
    readme.set_defaults(action=_readme)

    doctor = commands.add_parser("doctor", help="does this environment satisfy pyproject.toml?")
    doctor.add_argument("--extra", action="append", default=[], help="with this extra too")
    doctor.add_argument("--quiet", action="store_true")
    doctor.set_defaults(action=_doctor)
    return parser


if __name__ == "__main__":
    sys.exit(main())
