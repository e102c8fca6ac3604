"""The scorecard: every finding's number beside the paper's, in figures/results.json."""

import math
import re
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Literal

import pandas as pd

from sae_lib.study import environment, paths

COLUMNS = ("id", "claim", "paper", "paper_source", "ours", "low", "high", "seeds", "verdict", "caveat")
VERDICTS = ("reproduced", "partly", "not")
OTHERS = "other trainings: "  # what stands in a caveat after this are their values


class Scorecard:
    """The rows of one profile, corpus and seed. Rows of another run in the same file are dropped, never mixed in."""

    def __init__(
        self,
        path: Path | None = None,
        *,
        profile: str = "workshop",
        corpus: str = "environment",
        seed: int = 0,
        log: Callable[[str], object] = print,
    ):
        self.path = path or paths.figures_of(profile) / "results.json"
        self.header = {"profile": profile, "corpus": corpus, "seed": seed}
        self.log = log
        self.others: Callable[[str], Sequence[float]] = lambda _: ()  # what further trainings gave for a row

    def row(
        self,
        id: str,
        claim: str,
        paper: str | Real | None,
        paper_source: str,
        ours: Real | None,
        low: Real | None,
        high: Real | None,
        seeds: int,
        verdict: Literal["reproduced", "partly", "not"],
        caveat: str,
    ) -> None:
        """Add a finding, or replace the one with this id.

        paper: the paper's number, or "figure only"; low, high: the interval around ours; seeds: how many trainings it rests on,
        to which those that `others` knows of are added.
        Raises ValueError for a row that is not a finding: a number that is not finite, an interval that misses it, no claim.
        """
        ours, low, high = (None if number is None else float(number) for number in (ours, low, high))
        paper = float(paper) if isinstance(paper, Real) else paper
        if others := [float(value) for value in self.others(id)]:
            seeds += len(others)
            caveat = "; ".join(filter(None, [caveat, OTHERS + ", ".join(f"{value:.3g}" for value in others)]))
        problem = _problem(id, claim, ours, low, high, seeds, verdict)
        if problem:
            raise ValueError(f"Scorecard row {id}: {problem}")
        entry = dict(zip(COLUMNS, (id, claim, paper, paper_source, ours, low, high, seeds, verdict, caveat), strict=True))
        with paths.lock(paths.data() / "locks" / "scorecard"):
            rows = {row["id"]: row for row in self._rows(say=True)} | {id: entry}
            paths.write_json(self.path, self.header | {"versions": environment.versions(),
                                                       "rows": [rows[key] for key in sorted(rows)]})
        paths.receipt("row", id=id, sha256=paths.digest(entry))

    def table(self) -> pd.DataFrame:
        """One row a finding, sorted by id; empty columns if there is none yet."""
        return pd.DataFrame(self._rows(), columns=list(COLUMNS))

    def _rows(self, say: bool = False) -> list[dict]:
        content = paths.read_json(self.path)
        if content is None:
            return []
        old = {key: content.get(key) for key in self.header}
        if old == self.header:
            return content["rows"]
        if say:
            dropped = f"{len(content['rows'])} rows of another run ({_spell(old)})"
            self.log(f"scorecard: dropped {dropped}; this is {_spell(self.header)}")
        return []


def row_hashes(path: Path) -> dict[str, str]:
    """{id: hash of the row} of a results.json, for telling whether a row is still what a run wrote."""
    return {row["id"]: paths.digest(row) for row in (paths.read_json(path) or {}).get("rows", [])}


def _problem(
    id: str, claim: str, ours: float | None, low: float | None, high: float | None, seeds: int, verdict: str
) -> str | None:
    if not re.fullmatch(r"\d\d(\.[\w-]+)+", id):
        return "an id is the notebook's number and dotted names, as in 03.loss_recovered"
    if not claim.strip():
        return "there is no claim"
    if any(number is not None and not math.isfinite(number) for number in (ours, low, high)):
        return "numbers are finite, or None"
    if ours is None and (low, high) != (None, None):
        return "an interval needs the number it is around"
    if low is not None and low > ours or high is not None and high < ours:
        return f"the interval [{low}, {high}] does not hold {ours}"
    if seeds < 0:
        return "seeds is a count"
    if verdict not in VERDICTS:
        return f"the verdict is one of {', '.join(VERDICTS)}"
    return None


def _spell(header: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in header.items())
