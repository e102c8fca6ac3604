"""The README's table of results: what it says of a row, and what may be replaced."""

import json

import pytest

from sae_lib.errors import StudyError
from sae_lib.study import paths, readme


def row(id_, ours, low, high, paper, verdict="reproduced", caveat=""):
    return {"id": id_, "claim": f"claim of {id_}", "paper": paper, "ours": ours, "low": low, "high": high, "verdict": verdict,
            "caveat": caveat}


def test_headline_rows_in_the_readmes_order_with_interval_trainings_and_verdict():
    rows = [row("08.live.32x", 15400.0, 15300.2, 15450.0, "figure only"),
            row("03.l0", 18.416, 18.2, 18.6, 4.9, "partly", "held out; other trainings: 19.2, 17.9"),
            row("99.other", 1.0, None, None, None, "not"), row("06.pin.arabic.share", 0.92, None, None, None)]
    assert readme.results_table(rows).splitlines()[2:] == [
        "| claim of 03.l0 | 4.9 | 18.4 (18.2 to 18.6) | 19.2, 17.9 | partly |",
        "| claim of 06.pin.arabic.share | no number | 0.92 |  | reproduced |",
        "| claim of 08.live.32x | figure only | 15,400 (15,300 to 15,450) |  | reproduced |",
        "", "Of 4 rows in all: 2 reproduced, 1 partly, 1 not."]


def test_only_what_stands_between_the_markers_is_replaced(tmp_path):
    file = tmp_path / "README.md"
    file.write_text("before <a> old <b> after")
    readme.put_between(file, "<a>", "<b>", "new")
    assert file.read_text() == "before <a>\nnew\n<b> after"
    with pytest.raises(StudyError, match="put the lines '<c>' and '<b>'"):
        readme.put_between(file, "<c>", "<b>", "")


def test_every_row_that_the_readme_shows_is_one_that_the_study_makes():
    made = {row["id"] for row in json.loads((paths.project() / "figures" / "results.json").read_text())["rows"]}
    assert set(readme.SHOWN) <= made
    text = (paths.project() / "README.md").read_text(encoding="utf-8")
    assert text.count(readme.BEGIN) == text.count(readme.END) == 1
