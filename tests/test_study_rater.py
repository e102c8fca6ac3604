import numpy as np
import pytest

from sae_lib import rubric
from sae_lib.errors import StudyError
from sae_lib.study.rater import Rater, Session, Shown, item_html

VOCABULARY = [b"<b>", b" two", b"\n", b"\xd8"]
ANSWERS = {"confidence": 2, "activations": 4, "logits": 1, "separation": 1, "specificity": 0}


@pytest.fixture
def items():
    return rubric.blinded([("feature", 11, "Top Activations"), ("neuron", 12, "Top Activations"), ("random", 13, "top")])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ratings.jsonl"


def show(item):
    return Shown(np.array([[0, 1, 2]]), np.array([[9, 0, 3]]), [1, 3])


def test_an_item_shows_examples_and_logits(items):
    shown = item_html(show(items[0]), VOCABULARY)
    assert shown.count("<span") == 5 and "<b>" not in shown
    first, _, third, *logits = shown.split("<span")[1:]
    assert "1.00)" in first and "level 9" in first and "0.33)" in third and "↵" in third
    assert "&#x27; two&#x27;" in logits[0] and "b&#x27;\\xd8&#x27;" in logits[1]


def test_a_session_goes_through_the_items_and_resumes(items, path):
    session = Session(items, path, "ann")
    session.save(ANSWERS)
    session.skip()
    assert session.current == items[2] and session.progress == "1 of 3 rated"
    resumed = Session(items, path, " ann ")
    assert resumed.open == items[1:] and Session(items, path, "ben").open == items
    resumed.save(ANSWERS), resumed.save(ANSWERS), resumed.save(ANSWERS)
    assert resumed.current is None and len(rubric.read(path)) == 3


def test_an_impossible_answer_stays_and_writes_nothing(items, path):
    session = Session(items, path, "ann")
    with pytest.raises(StudyError):
        session.save(ANSWERS | {"logits": 3})
    assert session.current == items[0] and not path.exists()


def test_the_widget_saves_explains_and_ends(items, path):
    rater = Rater(items, show, VOCABULARY, path, "ann")
    assert not any(word in rater.examples.value for word in ("feature", "neuron", "random", "11", "12", "13"))
    rater.sliders["separation"].value, rater.sliders["logits"].value = 1, 3
    rater.save()
    assert "Separation" in rater.message.value and not path.exists()
    for n in range(3):
        rater.sliders["confidence"].value, rater.sliders["logits"].value, rater.sliders["separation"].value = n, 0, 0
        rater.save()
        assert rater.message.value == f"{n + 1} of 3 rated" and rater.sliders["confidence"].value == 0
    assert [entry.confidence for entry in rubric.read(path)] == [0, 1, 2]
    assert "Thank you" in rater.examples.value
    rater.save(), rater.skip()
    assert len(rubric.read(path)) == 3


def test_the_widget_waits_for_a_name_and_starts_anew_with_another(items, path):
    rater = Rater(items, show, VOCABULARY, path)
    assert "name" in rater.examples.value and "Made more likely" not in rater.examples.value
    rater.save()
    assert "name" in rater.message.value and not path.exists()
    rater.name.value = "ann"
    assert "Made more likely" in rater.examples.value
    rater.save()
    rater.name.value = "ben"
    assert rater.message.value == "0 of 3 rated" and [entry.rater for entry in rubric.read(path)] == ["ann"]
