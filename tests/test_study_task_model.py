"""Notebook 11 on models that were trained elsewhere, at a size of seconds: folders as their libraries write them, and no hub."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from texts import byte_level, pretrained, tiny_study
from tokenizers import Tokenizer, models, pre_tokenizers

from sae_lib import ioi, residual
from sae_lib.activations import ActivationStream
from sae_lib.errors import StudyError
from sae_lib.study import identification, identification_figures, task_model
from sae_lib.study.identification import CODINGS
from sae_lib.study.profiles import PAPER, PROFILES, SMOKE, IdentificationSizes, PretrainedSizes

pytestmark = pytest.mark.usefixtures("one_thread")
EOT, KNOWN = 1, 40  # the tokenizers know so many of the names


@pytest.fixture(scope="module")
def tokenizer():
    words = [" and", *(f" {word}" for word in (*ioi.PLACES, *ioi.THINGS)), *(
        frame for kind in ioi.SENTENCES.values() for frames in kind for frame in frames), *(f" {word}" for word in ioi.OPENINGS)]
    return byte_level(words * 3 + [f" {name}" for name in ioi.NAMES[:KNOWN]] * 30, 900)


@pytest.fixture(scope="module", params=["gpt_neox", "gpt2"])
def folder(request, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    pretrained(request.param, 912, 48, bos_token_id=EOT, eos_token_id=EOT, initializer_range=0.3).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Gives a study on a model in a folder."""
    deep = replace(SMOKE.deep, dictionary=replace(SMOKE.deep.dictionary, batch_size=128, resample_inputs=256))
    sets = IdentificationSizes(prompts=6, sentences=4, sentences_of_many=6, exchanges=2, dev_exchanges=2, growth=((3, 1),),
                               layers=(1,), l1=(1.0, 0.5, 0.0), thresholds=(-2.0, 0.0, 2), most=5)
    make = tiny_study(tmp_path, monkeypatch, n_ctx=48, deep=deep, identification=sets, component_sample=64,
                      pretrained=PretrainedSizes(n_tokens=20_000, n_ctx=40, n_activations=1280, held_out_contexts=20))

    def on(folder, mode="auto", **sizes):
        tiny = PROFILES["tiny"]
        monkeypatch.setitem(PROFILES, "tiny", replace(tiny, pretrained=replace(tiny.pretrained, model=str(folder), **sizes)))
        return make(mode)

    return on


def test_it_goes_the_whole_way(folder, study):
    made = study(folder)
    task = task_model.of(made)
    assert task is task_model.of(made) and not residual.is_own(task.model)
    assert list(task.names) == ["all"] and set(ioi.NAMES[:KNOWN]) <= set(task.exchanged) < set(ioi.NAMES)
    accuracy = identification.accuracy(made)
    assert accuracy.names.tolist() == ["all"] * 3 and accuracy.sentences.tolist() == list(ioi.SENTENCES) == list(task.sentences)
    choice = identification.layer_choice(made)
    after = identification.chosen_layer(choice)
    one, many, growth, sparse, meaning = (f(made, after) for f in (
        identification.one_exchange, identification.many_exchanges, identification.growth, identification.coefficients,
        identification.meaning))
    assert set(one.coding) == set(CODINGS) and len(many) == 4 and len(growth) == 2
    assert all(np.isfinite(kl).all() and kl[0] > 0 and edit[0] == 0 for kl, edit in zip(one.kl, one.edit, strict=True))
    assert set(sparse.l1) == {1.0, 0.5, 0.0}
    sae = task.dictionary(after)
    assert (sae.config.d_in, sae.config.d_sae, sae.config.hook_name) == (16, 64, "blocks.1.hook_resid_pre")
    assert not torch.equal(sae.W_enc, task.dictionary(after, 0.5).W_enc)
    assert meaning.table.base.isin(ioi.name_ids(task.tokenizer, task.exchanged).values()).all()
    at = identification.where(made).set_index(["role", "after"]).left
    assert at["indirect object", 0] == pytest.approx(0, abs=1e-3) and at["last token", 2] == pytest.approx(0, abs=1e-3)
    assert at["subject", 0] == pytest.approx(1, abs=1e-3)
    figure = identification_figures.accuracy_figure(accuracy, task.sentences)
    assert list(figure.layout.xaxis.ticktext) == list(task.sentences.values())
    loaded = study(folder, "load")
    assert identification.one_exchange(loaded, after).equals(one) and identification.accuracy(loaded).equals(accuracy)


def test_another_recipe_or_model_is_asked_anew(folder, study):
    accuracy = identification.accuracy(study(folder))
    assert identification.accuracy(study(folder, "load")).equals(accuracy)
    with pytest.raises(StudyError, match="no ioi_accuracy"):
        identification.accuracy(study(folder, "load", l1_coefficient=3.0))


def test_prompts_begin_with_the_models_own_token_and_are_answered_as_its_library_does(folder, study):
    task = task_model.of(study(folder))
    asked = task.prompts(task.exchanged, "held out", 6, seed=0)
    assert (asked.tokens[:, 0] == EOT).all() and asked.abba.sum() == 3 and asked.tokens.shape[1] <= 40
    for row, last, indirect, subject, _ in zip(*asked, strict=True):
        assert (row[last + 1:] == EOT).all() and (row == indirect).sum() == 1 and (row == subject).sum() == 2
        assert task.tokenizer.decode(row[1:last + 1].tolist()).endswith(" to")
    kind = type(task.model.original_model)
    original = kind.from_pretrained(folder).eval()
    logits = torch.stack([original(row[None, :last + 1]).logits[0, -1]
                          for row, last in zip(asked.tokens, asked.last.tolist(), strict=True)])
    found = ioi.answers(task.model, asked)
    margin = logits.gather(1, asked.indirect[:, None]) - logits.gather(1, asked.subject[:, None])
    np.testing.assert_allclose(found.margin, margin[:, 0].detach(), atol=1e-3, rtol=1e-3)
    assert found.first.tolist() == (logits.argmax(1) == asked.indirect).tolist()


def test_made_up_text_is_counted_without_what_pads_it(folder, study):
    task = task_model.of(study(folder))
    text, skip = task.text(12), task.skip(1)
    assert text.shape[0] == 12 and (text[:, 0] == EOT).all() and skip.mask(text)[text == EOT].all()
    assert not torch.equal(text, task.prompts(task.exchanged, "train", 12, 0).tokens)


def test_names_of_a_tokenizer(tokenizer):
    found = ioi.name_ids(tokenizer, ioi.NAMES)
    assert set(ioi.NAMES[:KNOWN]) <= set(found) and len(found) < len(ioi.NAMES)
    assert all(tokenizer.encode(f" and {name}, who").ids.count(token) == 1 for name, token in found.items())
    words = Tokenizer(models.WordLevel({"and": 0, "Alice": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert ioi.name_ids(words, ("Alice", "Bob", "Zoe")) == {"Alice": 1}  # and none that is only unknown
    cut = next(name for name in ioi.NAMES if name not in found)
    with pytest.raises(StudyError, match=f"^{cut}: not one token each in this tokenizer; leave these names out.$"):
        ioi.prompts(tokenizer, ("Adam", "Alan", cut), "dev", 2, 0)
    with pytest.raises(StudyError, match="Next to no sentence of the task fits in a context of 4 tokens"):
        ioi.prompts(tokenizer, ("Adam", "Alan", "Alice"), "dev", 2, 0, n_ctx=4)


def test_what_does_not_fit_is_said_in_one_sentence(folder, study, tmp_path):
    bare, nameless = tmp_path / "bare", tmp_path / "nameless"
    for copy in (bare, nameless):
        shutil.copytree(folder, copy)
    (bare / "tokenizer.json").unlink()
    byte_level(["letters and numbers"], 280).save(str(nameless / "tokenizer.json"))
    for place, words in ((bare, "no tokenizer.json"), (tmp_path / "nowhere", "There is no folder"),
                         (nameless, "0 of the study's names are one token, and 9 are needed")):
        with pytest.raises(StudyError, match=words) as error:
            identification.accuracy(study(place))
        assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_a_model_of_the_hub_is_asked_by_the_paper_profile_alone():
    named = {name: profile.pretrained.model for name, profile in PROFILES.items()}
    assert named == {"smoke": "", "workshop": "", "paper": "hf:EleutherAI/pythia-410m-deduped"}
    assert PAPER.pretrained.l1_coefficient in PAPER.identification.l1 and 0.0 in PAPER.identification.l1
    assert [l1 / 1024 for l1 in PAPER.identification.l1] == pytest.approx([1e-3, 3e-4, 1e-4, 0])


def test_the_studys_own_begins_with_end_of_text():
    assert task_model.WithNames.begin == ActivationStream.END_OF_TEXT
    assert list(task_model.WithNames.sentences) == list(task_model.Pretrained.sentences) == list(ioi.SENTENCES)
