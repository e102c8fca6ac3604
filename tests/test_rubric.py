import json

import pytest

from sae_lib.errors import StudyError
from sae_lib.rubric import MAX_TOTAL, RUBRIC, agreement, append, blinded, rating, ratings_table, read

FULL = {"confidence": 3, "activations": 5, "logits": 3, "separation": 0, "specificity": 3}


def answers(total):
    """Answers that add up to `total`."""
    found = dict.fromkeys(FULL, 0)
    for name, most in FULL.items():
        found[name] = min(most, total)
        total -= found[name]
    return found


def test_fourteen_points():
    assert rating("a", "x", FULL).total == MAX_TOTAL == 14
    assert rating("a", "x", dict.fromkeys(FULL, 0)).total == 0
    assert rating("a", "x", FULL | {"logits": 2, "separation": 1}).total == 14
    assert [question.most for question in RUBRIC] == [3, 5, 3, 1, 3]


@pytest.mark.parametrize("change, reason", [
    ({"confidence": 4}, "0 to 3"), ({"activations": -1}, "0 to 5"), ({"logits": 1.5}, "whole number"),
    ({"specificity": True}, "whole number"), ({"separation": 1}, "some logits do not fit"), ({"beauty": 1}, "answers"),
])
def test_impossible_answers(change, reason):
    with pytest.raises(StudyError, match=reason):
        rating("a", "x", FULL | change)


def test_a_nameless_rater_and_a_missing_answer():
    with pytest.raises(StudyError, match="name"):
        rating(" ", "x", FULL)
    with pytest.raises(StudyError, match="answers"):
        rating("a", "x", {"confidence": 1})


def test_ratings_survive_a_half_written_last_line(tmp_path):
    path = tmp_path / "new" / "ratings.jsonl"
    assert read(path) == []
    first, second = rating("ann", "x", FULL), rating("بن", "y", answers(4))
    append(path, first)
    with path.open("ab") as file:
        file.write(b'{"rater": "b' + b"\xd8")
    assert read(path) == [first]
    append(path, second)
    assert read(path) == [first, second]
    assert len(path.read_bytes().splitlines()) == 3 and json.loads(path.read_bytes().splitlines()[2])["rater"] == "بن"


def test_the_last_rating_of_an_item_counts(tmp_path):
    path = tmp_path / "ratings.jsonl"
    for total in (3, 9):
        append(path, rating("ann", "x", answers(total)))
    append(path, rating("ben", "x", answers(5)))
    assert [entry.total for entry in read(path)] == [9, 5]


def test_blinded_items_are_shuffled_and_tell_nothing():
    units = [(kind, unit, "Top Activations") for kind in ("feature", "neuron", "random") for unit in range(20)]
    items = blinded([*units, units[0]], seed=1)
    assert sorted(item[1:] for item in items) == sorted(units)
    assert items == blinded(units, seed=1) != blinded(units, seed=2)
    kinds = [item.kind for item in items]
    assert sum(a != b for a, b in zip(kinds, kinds[1:], strict=False)) > 20
    assert len({item.code for item in items}) == 60 and all(set(item.code) <= set("0123456789abcdef") for item in items)


def test_ratings_and_items_come_together_again():
    items = blinded([("feature", 3, "Top Activations"), ("neuron", 3, "Top Activations")])
    table = ratings_table([rating("ann", item.code, answers(12 if item.kind == "feature" else 1)) for item in items], items)
    assert table.set_index("kind").total.to_dict() == {"feature": 12, "neuron": 1}
    assert ratings_table([], items).empty


def test_agreement_by_hand():
    def ratings(name, totals):
        return [rating(name, f"item {i}", answers(total)) for i, total in enumerate(totals)]

    # Totals 0, 14, 7 against 0, 14, 8: quadratic-weighted kappa = 1 - n * sum d^2 / sum over all pairs of (x_i - y_j)^2.
    pairs = agreement(ratings("ann", [0, 14, 7]) + ratings("ben", [0, 14, 8, 2]) + ratings("cyd", [5]))
    kappa = 1 - 3 * 1 / sum((x - y) ** 2 for x in (0, 14, 7) for y in (0, 14, 8))
    row = pairs.iloc[0]
    assert (row.rater, row.other, row["items"]) == ("ann", "ben", 3)
    assert row.kappa == pytest.approx(kappa) and row.spearman == pytest.approx(1)
    assert pairs.iloc[1:].kappa.isna().all() and len(pairs) == 3
