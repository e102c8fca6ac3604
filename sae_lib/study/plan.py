"""What a run is to do: which notebooks, with which parameters, and why each one must run or need not."""

import dataclasses
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sae_lib.errors import StudyError
from sae_lib.study import environment, notebooks, paths

# Files of study/ that change no result.
_MACHINERY = {"runner.py", "plan.py", "processes.py", "execute.py", "export.py", "notebooks.py", "__main__.py"}


class UsageError(StudyError):
    """A command line that asks for something that is not there; exit status 2."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run and how, as the command line gives it."""

    profile: str = "workshop"
    seed: int = 0
    corpus: str = ""
    train: bool = False
    only: tuple[str, ...] = ()
    first: str = ""
    last: str = ""
    force: bool = False
    dry_run: bool = False
    export: bool = True
    parameters: tuple[tuple[str, object], ...] = ()


class Job(NamedTuple):
    """One notebook of a run."""

    name: str
    notebook: dict
    outputs: notebooks.Outputs
    parameters: dict[str, object]


def load_profiles() -> dict:
    """The profiles by name; imported late because they pull in torch."""
    from sae_lib.study.profiles import PROFILES

    return PROFILES


def corpus_fingerprint(corpus: Any) -> str:
    """What the text depends on; imported late as well."""
    from sae_lib.corpus import fingerprint

    return fingerprint(corpus)


def corpus_of(options: Options) -> Any:
    """The CorpusConfig of a run. Raises UsageError for an unknown profile."""
    profiles = load_profiles()
    if options.profile not in profiles:
        raise _unknown("profile", options.profile, profiles)
    corpus = profiles[options.profile].corpus
    return dataclasses.replace(corpus, source=options.corpus) if options.corpus else corpus


def jobs(options: Options) -> list[Job]:
    """The notebooks to run, in order. Raises UsageError for a notebook or parameter that does not exist."""
    selected, known = [], set()
    for source in _selected(options):
        notebook = notebooks.convert(source)
        names = notebooks.parameters(notebook, source.stem)
        values = {"PROFILE": options.profile, "SEED": options.seed, "ARTEFACTS": "train" if options.train else "auto"}
        if options.corpus:
            values["CORPUS"] = options.corpus
        values |= {name: value for name, value in options.parameters if name in names}
        known |= names.keys()
        selected.append(Job(source.stem, notebook, notebooks.declared_outputs(notebook), values))
    for name, _ in options.parameters:
        if name not in known:
            raise _unknown("parameter", name, sorted(known))
    return selected


def ingredients(corpus: Any) -> dict[str, Any]:
    """Hashes of what every notebook's results depend on. Raises UsageError for a corpus that cannot be read."""
    library = paths.project() / "sae_lib"
    files = {path.relative_to(library).as_posix(): path for path in sorted(library.rglob("*.py"))}
    try:
        fingerprint = corpus_fingerprint(corpus)
    except StudyError as error:
        raise UsageError(str(error)) from error
    return {
        "library": {name: paths.sha256(path)[:12] for name, path in files.items() if path.name not in _MACHINERY},
        "requirements.lock": environment.lock_hash(paths.project()),
        "corpus": fingerprint,
    }


def own_ingredients(job: Job, figures: Path) -> dict[str, Any]:
    """Hashes of what one notebook's results depend on beside the common ones. Its text may be edited freely."""
    code = [text for _, _, text in notebooks.code_cells(job.notebook)]
    # Where the artefacts come from changes no key; `why` looks at what was really used.
    parameters = {name: value for name, value in job.parameters.items() if name != "ARTEFACTS"}
    parts: dict[str, Any] = {"code": paths.digest(code), "parameters": parameters}
    if notebooks.reads_scorecard(job.notebook):
        parts["scorecard"] = {id: row for id, row in _row_hashes(figures).items() if id[:2] != job.name[:2]}
    return parts


def why(parts: dict, record: dict | None, options: Options, figures: Path) -> str | None:
    """Why a notebook must run, or None if what it made is still there and nothing that it depends on has changed."""
    if options.force:
        return "--force"
    if record is None:
        return "first run"
    if record["state"] != "ran":
        return "failed last time"
    changed = [name for name in sorted(parts.keys() | record["parts"].keys()) if parts.get(name) != record["parts"].get(name)]
    if "library" in changed:
        new, old = parts["library"], record["parts"]["library"]
        files = sorted(name for name in new.keys() | old.keys() if new.get(name) != old.get(name))
        changed[changed.index("library")] = files[0] + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    if changed:
        return f"{', '.join(changed)} changed"
    if options.train and any(artefact["source"] == "reference" for artefact in record["artefacts"].values()):
        return "--train, and it used reference artefacts"
    return _lost(record, Path(record.get("folder") or figures))


def _lost(record: dict, figures: Path) -> str | None:
    rows = _row_hashes(figures)
    for name, expected in record["figures"].items():
        path = figures / f"{name}.json"
        if not path.exists() or paths.sha256(path) != expected or not path.with_suffix(".html").exists():
            return f"figure {name} is missing or changed"
    for id, expected in record["rows"].items():
        if rows.get(id) != expected:
            return f"scorecard row {id} is missing or changed"
    return None


def _row_hashes(figures: Path) -> dict[str, str]:
    from sae_lib.study.scorecard import row_hashes

    return row_hashes(figures / "results.json")


def _selected(options: Options) -> list[Path]:
    found = {source.stem: source for source in notebooks.sources()}
    if not found:
        raise StudyError(f"There are no notebooks in {paths.root() / 'notebooks' / 'src'}: run this in a whole checkout.")
    names = list(found)
    if options.only:
        return [found[name] for name in sorted({_resolve(wanted, names) for wanted in options.only})]
    first = _resolve(options.first, names) if options.first else names[0]
    last = _resolve(options.last, names) if options.last else names[-1]
    if first > last:
        raise UsageError(f"No notebook lies from {options.first} to {options.last}: give --from the smaller number.")
    chosen = [name for name in names if first <= name <= last]
    # The entrance tells what all the others found, so it is run last.
    return [found[name] for name in sorted(chosen, key=lambda name: (name.startswith("00"), name))]


def _resolve(wanted: str, names: list[str]) -> str:
    for name in names:
        if wanted == name or wanted.zfill(2) == name[:2]:
            return name
    raise _unknown("notebook", wanted, [name[:2] for name in names], names)


def _unknown(kind: str, wanted: str, choices: Iterable[str], similar: Iterable[str] = ()) -> UsageError:
    close = difflib.get_close_matches(wanted, [*choices, *similar], n=1, cutoff=0.5)
    meant = f" (did you mean '{close[0]}'?)" if close else ""
    return UsageError(f"There is no {kind} '{wanted}'{meant}: choose one of {', '.join(choices)}.")
