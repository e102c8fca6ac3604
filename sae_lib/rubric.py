"""People's ratings of units: the 14-point rubric, one file of ratings, and how far raters agree (B12).

What is rated is one activation interval of one unit. Raters get features, neurons and control units in a shuffled order under
codes that say nothing; the ratings file holds the codes, and only whoever has the list of items can put the kinds back.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from sae_lib.errors import StudyError
from sae_lib.seeds import numpy_generator

MAX_TOTAL = 14


class Question(NamedTuple):
    """An item of the rubric, answered by a whole number from 0 to `most`."""

    name: str
    most: int
    text: str


RUBRIC = (
    Question("confidence", 3, "How sure are you of an interpretation of these examples?"),
    Question("activations", 5, "How consistently do the strongest tokens fit that interpretation?"),
    Question("logits", 3, "How consistently do the tokens made more likely fit it?"),
    Question("separation", 1, "If some of these do not fit: are they set apart from the fitting ones by their size?"),
    Question("specificity", 3, "How specific is the interpretation?"),
)


class Item(NamedTuple):
    """One interval of one unit, under the code that raters see."""

    code: str
    kind: str
    unit: int
    interval: str


class Rating(NamedTuple):
    """One rater's answers for one item."""

    rater: str
    code: str
    confidence: int
    activations: int
    logits: int
    separation: int
    specificity: int
    time: str

    @property
    def total(self) -> int:
        """0 to 14; separation counts only where not all logits fit, so that the two share three points."""
        return self.confidence + self.activations + self.logits + self.separation + self.specificity


def rating(rater: str, code: str, answers: Mapping[str, int]) -> Rating:
    """A checked rating, stamped with the time. Raises StudyError for a missing or impossible answer or an empty name."""
    if not rater.strip():
        raise StudyError("A rating needs its rater's name; enter yours.")
    names = [question.name for question in RUBRIC]
    if set(answers) != set(names):
        raise StudyError(f"A rating answers {', '.join(names)}, and this one {', '.join(sorted(answers))}; answer these.")
    for question in RUBRIC:
        answer = answers[question.name]
        if type(answer) is not int or not 0 <= answer <= question.most:
            raise StudyError(f"{question.name} is rated by a whole number from 0 to {question.most}, not {answer!r}.")
    if answers["separation"] and answers["logits"] == 3:
        raise StudyError("Separation is asked only where some logits do not fit; set it to 0, or logits below 3.")
    return Rating(rater.strip(), code, **answers, time=datetime.now(UTC).isoformat(timespec="seconds"))


def blinded(units: Iterable[tuple[str, int, str]], seed: int = 0) -> list[Item]:
    """(kind, unit, interval) in shuffled order, each under a code that does not tell them."""
    listed = list(dict.fromkeys(units))
    codes = [hashlib.sha256(f"{seed}/{kind}/{unit}/{interval}".encode()).hexdigest()[:10] for kind, unit, interval in listed]
    order = numpy_generator(seed, "blinded order").permutation(len(listed))
    return [Item(codes[i], *listed[i]) for i in order]


# --- the ratings file ------------------------------------------------------------------------------------------------

def append(path: Path, new: Rating) -> None:
    """Add a rating to a JSON-lines file, in one write: raters may share the file, and a crash costs one line at most."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(new._asdict(), ensure_ascii=False) + "\n"
    with path.open("ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line  # after a half-written line
        file.write(line.encode())


def read(path: Path) -> list[Rating]:
    """All ratings, of several by one rater for one item the last; lines that are not whole are skipped, no file is none."""
    if not path.exists():
        return []
    latest: dict[tuple[str, str], Rating] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = Rating(**json.loads(line))
        except (ValueError, TypeError):
            continue
        latest[entry.rater, entry.code] = entry
    return list(latest.values())


def ratings_table(ratings: Sequence[Rating], items: Sequence[Item]) -> pd.DataFrame:
    """One row a rating of one of the items, with its total and, the codes lifted, kind, unit and interval."""
    known = pd.DataFrame(items, columns=list(Item._fields))
    given = pd.DataFrame([entry._asdict() | {"total": entry.total} for entry in ratings], columns=[*Rating._fields, "total"])
    return given.merge(known, on="code")


def agreement(ratings: Sequence[Rating]) -> pd.DataFrame:
    """How far each two raters agree on the total: quadratic-weighted kappa and Spearman's correlation over shared items.

    Returns columns rater, other, items, kappa, spearman; nan where fewer than two items are shared or totals do not vary.
    """
    totals: dict[str, dict[str, int]] = {}
    for entry in ratings:
        totals.setdefault(entry.rater, {})[entry.code] = entry.total
    rows = []
    for rater, other in combinations(sorted(totals), 2):
        shared = sorted(totals[rater].keys() & totals[other].keys())
        x, y = ([totals[name][code] for code in shared] for name in (rater, other))
        varied = len(set(x)) > 1 and len(set(y)) > 1
        kappa = cohen_kappa_score(x, y, labels=list(range(MAX_TOTAL + 1)), weights="quadratic") if varied else float("nan")
        spearman = float(stats.spearmanr(x, y).statistic) if varied else float("nan")
        rows.append({"rater": rater, "other": other, "items": len(shared), "kappa": kappa, "spearman": spearman})
    return pd.DataFrame(rows, columns=["rater", "other", "items", "kappa", "spearman"])
