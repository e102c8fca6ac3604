"""The whole study at a size of seconds, on a small folder of text."""

from dataclasses import replace

import pytest
import torch
from texts import tiny_study

from sae_lib.errors import StudyError
from sae_lib.evaluate import held_out_pass
from sae_lib.study import pipeline, replicas, together
from sae_lib.study.profiles import SMOKE
from sae_lib.transformer import parameters


@pytest.fixture
def study(tmp_path, monkeypatch):
    train = replace(SMOKE.dictionary, n_activations=2560, batch_size=128, resample_inputs=256)
    return tiny_study(tmp_path, monkeypatch, n_ctx=32, dictionary=train, sweep=replace(train, l1_coefficient=1.0),
                      sweep_l1=(1.0, 3.0), correction_activations=512)


def test_everything_is_made_once_and_loaded_after(study):
    made = study()
    with pytest.raises(StudyError, match="ARTEFACTS is \"load\""):
        study("load").dictionary()
    detectors, won = made.superposition()
    sweep = made.sparsity_sweep()
    made.corrected_dictionary()
    loaded = study("load")
    assert set(detectors.context) == {"letters", "numbers"}
    assert won.low <= won.value <= won.high
    assert sweep.l1.tolist() == [1.0, 3.0, 1.0] and sweep.born.tolist() == ["rare", "rare", "as in the paper"]
    assert sweep.l0.iloc[1] < sweep.l0.iloc[0]
    assert loaded.superposition()[0].equals(detectors)
    assert torch.equal(loaded.dictionary().model.W_enc, made.dictionary().model.W_enc)
    assert torch.equal(loaded.corrected_dictionary().W_enc, made.corrected_dictionary().W_enc)
    assert loaded.dictionary().log.activations.iloc[-1] == 2560


def test_the_command_for_many_processes_makes_what_notebooks_load(study):
    together.dictionary("tiny", 0, "")
    assert study("load").dictionary().log.activations.iloc[-1] == 2560


def test_held_out_text_carries_its_documents_and_domains(study):
    made = study()
    text = made.held_out("test", whole=True)
    assert text.contexts.shape == text.documents.shape == text.domains.shape
    names = [made.tokens.domains[i] for i in text.domains.flatten().tolist()]
    decoded = made.tokens.tokenizer.decode_batch([[i] for i in text.contexts.flatten().tolist()])
    # The letter p is in the words of one domain only, w in those of the other.
    for letter, domain in (("p", "letters"), ("w", "numbers")):
        assert {name for name, piece in zip(names, decoded, strict=True) if letter in piece} == {domain}


def test_twins_differ_and_the_control_is_shuffled(study):
    made = study()
    a, b, control = (made.transformer(which).model for which in ("A", "B", "random"))
    weight = lambda model: parameters(model)["head.weight"]
    assert not torch.equal(weight(a), weight(b))
    assert torch.equal(weight(a).flatten().sort().values, weight(control).flatten().sort().values)
    assert not torch.equal(weight(made.transformer("C").model), weight(a))
    with pytest.raises(StudyError, match="ask for A, B, C or random"):
        made.transformer("D")


def test_further_trainings_are_measured_as_the_first(study):
    """Every headline number but that of universality, for which the text is too little here."""
    made = study()
    values = replicas.headline(made, "B")
    assert set(values) == {row for row in replicas.ROWS if not row.startswith("07")}
    found = held_out_pass(made.transformer("B").model, made.held_out("test"), made.dictionary("B").model)
    assert values["03.l0"] == found.average("l0", seed=0, n_boot=2).value > 0
    assert values["03.loss_recovered"] != replicas.headline(made, "A")["03.loss_recovered"]


def test_further_trainings_are_known_once_they_are_made(study, monkeypatch):
    """Before, nothing is known, and nothing is trained to find out."""
    made = study()
    assert replicas.known(made, "03.l0") == [] == replicas.known(made, "02.no.such.row")
    monkeypatch.setattr(replicas, "headline", lambda _, which: {"03.l0": {"B": 1.0, "C": 2.0}[which]})
    monkeypatch.setattr(replicas, "universality", lambda *_: {"07.median.feature": 0.5})
    assert replicas.make(made, "B") == {"03.l0": 1.0} and replicas.known(made, "03.l0") == [1.0]
    assert replicas.make(made, "C") == {"03.l0": 2.0, "07.median.feature": 0.5}
    assert replicas.known(made, "03.l0") == [1.0, 2.0]
    assert replicas.known(study("load"), "07.median.feature") == [0.5]


def test_unknown_profiles_are_named():
    with pytest.raises(StudyError, match="choose one of smoke, workshop, paper"):
        pipeline.Study("huge")
