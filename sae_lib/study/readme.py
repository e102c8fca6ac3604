"""The scorecard's headline rows as a table in the README."""

from pathlib import Path

from sae_lib.errors import StudyError
from sae_lib.study.paths import write_atomic
from sae_lib.study.scorecard import OTHERS

BEGIN, END = "<!-- results: python -m sae_lib.study readme -->", "<!-- end of results -->"
# Rows that the README shows, where a run has them.
SHOWN = ("01.mmcs", "02.superposition.contexts", "03.loss_recovered", "03.l0", "03.dead_fraction",
         *(f"04.pearson.{name}.{kind}" for name in ("arabic", "hebrew", "dna", "base64") for kind in ("feature", "neuron")),
         "05.score.activation.feature", "05.score.activation.ica", "05.score.activation.neuron", "05.score.activation.pca",
         "05.score.activation.random_direction", "05.score.activation.random_weights", "06.pin.arabic.share",
         "06.pin.base64.share", "07.median.feature", "07.median.neuron", "08.family.base64.1x", "08.family.base64.8x",
         "08.family.base64.32x", "08.live.32x", "09.automata", "10.best.loss_recovered", "10.best.l0", "11.accuracy",
         "11.half_kl", "11.edit.over_pca", "11.half_kl.many", "11.edit.many",
         "12.perplexity.2", "12.score.1", "12.apostrophe.sign", "12.parenthesis.open", "12.tree.first.apostrophe")


def results_table(rows: list[dict]) -> str:
    """The headline rows of a results.json: finding, the paper's number, ours with its interval, other trainings', verdict."""
    by_id = {row["id"]: row for row in rows}
    lines = ["| finding | paper | here (95 % interval) | other trainings | |", "|---|---|---|---|---|"]
    for row in (by_id[id_] for id_ in SHOWN if id_ in by_id):
        paper = _number(row["paper"]) if isinstance(row["paper"], float) else row["paper"] or "no number"
        interval = "" if row["low"] is None else f" ({_number(row['low'])} to {_number(row['high'])})"
        others = row["caveat"].partition(OTHERS)[2]
        lines.append(f"| {row['claim']} | {paper} | {_number(row['ours'])}{interval} | {others} | {row['verdict']} |")
    counts = [f"{n} {verdict}" for verdict in ("reproduced", "partly", "not")
              if (n := sum(row["verdict"] == verdict for row in rows))]
    return "\n".join([*lines, "", f"Of {len(rows)} rows in all: {', '.join(counts)}."])


def put_between(readme: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two markers.

    Raises StudyError if the markers are not there.
    """
    before, found, rest = readme.read_text(encoding="utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise StudyError(f"{readme.name} has no place for the table; put the lines '{begin}' and '{end}' where it is to stand.")
    write_atomic(readme, f"{before}{begin}\n{text}\n{end}{after}")


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
