"""The scorecard: rows of one run, each a finding."""

import json
import math

import numpy as np
import pytest

from sae_lib.study import paths
from sae_lib.study.scorecard import COLUMNS, Scorecard, row_hashes

ROW = {
    "claim": "The dictionary recovers most of the loss",
    "paper": 0.79,
    "paper_source": "How much of the model",
    "ours": 0.86,
    "low": 0.84,
    "high": 0.88,
    "seeds": 1,
    "verdict": "reproduced",
    "caveat": "L0 differs",
}


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_DATA", str(tmp_path / "data"))
    return tmp_path / "results.json"


def test_schema(path):
    Scorecard(path, profile="workshop", corpus="environment", seed=0).row("03.loss_recovered", **ROW)
    content = json.loads(path.read_text())
    assert set(content) == {"profile", "corpus", "seed", "versions", "rows"}
    assert content["rows"] == [{"id": "03.loss_recovered"} | ROW]
    assert {"python", "torch"} <= set(content["versions"])


def test_same_id_replaces_and_order_is_by_id(path):
    card = Scorecard(path)
    for id, ours in (("03.l0", 18), ("02.b", None), ("03.l0", np.float32(12.5))):
        card.row(id, **ROW | {"ours": ours, "low": None, "high": None})
    assert card.table()[["id", "ours"]].to_dict("list")["id"] == ["02.b", "03.l0"]
    assert card.table().ours.iloc[1] == 12.5


def test_rows_rest_on_the_further_trainings_that_are_known_too(path):
    card = Scorecard(path)
    card.others = lambda row: [0.25, 0.5] if row == "03.l0" else []
    for id in ("03.l0", "03.dead_fraction"):
        card.row(id, **ROW)
    table = card.table().set_index("id")
    assert table.seeds.to_dict() == {"03.dead_fraction": 1, "03.l0": 3}
    assert table.caveat.to_dict() == {"03.dead_fraction": "L0 differs", "03.l0": "L0 differs; other trainings: 0.25, 0.5"}


def test_table_of_nothing(path):
    assert list(Scorecard(path).table().columns) == list(COLUMNS) and len(Scorecard(path).table()) == 0


@pytest.mark.parametrize("other", [{"profile": "smoke"}, {"corpus": "files:here"}, {"seed": 1}])
def test_rows_of_another_run_are_dropped_with_one_line(path, other):
    Scorecard(path).row("03.l0", **ROW)
    lines: list[str] = []
    card = Scorecard(path, log=lines.append, **other)
    assert len(card.table()) == 0
    card.row("03.dead", **ROW)
    card.row("03.live", **ROW)
    assert list(card.table().id) == ["03.dead", "03.live"]
    assert len(lines) == 1 and "dropped 1 rows" in lines[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"low": 0.9},
        {"high": 0.8},
        {"ours": math.nan},
        {"high": math.inf},
        {"ours": None},
        {"verdict": "yes"},
        {"claim": " "},
        {"seeds": -1},
    ],
)
def test_what_is_not_a_finding_is_refused(path, wrong):
    with pytest.raises((ValueError, TypeError)):
        Scorecard(path).row("03.l0", **ROW | wrong)
    assert not path.exists()


@pytest.mark.parametrize("id", ["l0", "3.l0", "03", "03.a b"])
def test_ids(path, id):
    with pytest.raises(ValueError, match="id"):
        Scorecard(path).row(id, **ROW)


def test_hashes_follow_the_rows_content(path):
    card = Scorecard(path)
    card.row("03.l0", **ROW)
    before = row_hashes(path)
    card.row("03.dead", **ROW)
    assert row_hashes(path)["03.l0"] == before["03.l0"]
    card.row("03.l0", **ROW | {"caveat": "other"})
    assert row_hashes(path)["03.l0"] != before["03.l0"]


def test_only_the_workshop_writes_to_the_committed_figures(monkeypatch):
    monkeypatch.delenv("SAE_FIGURES", raising=False)
    assert Scorecard(profile="workshop").path == paths.root() / "figures" / "results.json"
    assert paths.root() / "figures" not in Scorecard(profile="smoke").path.parents
    paths.use_profile("smoke")
    assert paths.figures() == Scorecard(profile="smoke").path.parent
    monkeypatch.delenv("SAE_FIGURES")
