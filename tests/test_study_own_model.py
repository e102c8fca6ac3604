"""Models and dictionaries from elsewhere, at a size of seconds: folders as their libraries write them, and no hub."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from safetensors.torch import save_file
from test_interchange import dictionary_learning, saelens
from texts import WORDS, byte_level, pretrained, table, tiny_study
from tokenizers import Tokenizer

from sae_lib import residual
from sae_lib.activations import Skip
from sae_lib.errors import StudyError
from sae_lib.evaluate import held_out_pass
from sae_lib.features import activation_table
from sae_lib.sae import SAE, SAEConfig
from sae_lib.study import hub_folders, notebooks, own_cards, own_model, paths
from sae_lib.study.profiles import SMOKE, OwnSizes
from sae_lib.study.scorecard import Scorecard
from sae_lib.transformer import TransformerConfig

pytestmark = pytest.mark.usefixtures("one_thread")
EOT = 1


@pytest.fixture
def study(tmp_path, monkeypatch):
    model = TransformerConfig(n_tokens=4096, d_vocab=290, n_ctx=32, n_layers=2, d_model=16, n_heads=2, d_mlp=24, batch_contexts=8)
    sizes = replace(SMOKE.deep, transformer=model,
                    dictionary=replace(SMOKE.deep.dictionary, n_activations=2560, batch_size=128, resample_inputs=256))
    own = OwnSizes(n_tokens=6000, n_ctx=32, n_activations=2560, held_out_contexts=20, prompts=4)
    return tiny_study(tmp_path, monkeypatch, n_ctx=32, deep=sizes, own=own)


@pytest.fixture(scope="module", params=["gpt_neox", "gpt2"])
def folder(request, tmp_path_factory):
    """A tiny model of another kind with its byte-level tokenizer, saved as a downloaded one would lie there."""
    folder, neox = tmp_path_factory.mktemp(request.param), request.param == "gpt_neox"
    tokenizer = byte_level(WORDS.values(), 280)
    model = pretrained(request.param, 288, 24 if neox else 64, bos_token_id=EOT if neox else None, eos_token_id=EOT)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_model_from_elsewhere_goes_the_whole_way(folder, study):
    run = study()
    own = own_model.open_model(run, str(folder))
    n_ctx = min(32, own.model.cfg.n_ctx)
    assert own.contexts.shape[1] == own.test.contexts.shape[1] == n_ctx and not residual.is_own(own.model)
    assert own.special == (0, EOT) and own.domains == ["letters", "numbers"]
    # Every document begins with the model's own token, which stands nowhere else, and the rest is its text.
    flat, begins = own.contexts.flatten(), (own.contexts.flatten() == EOT).nonzero()[:, 0]
    assert begins[0] == 0 and len(begins) > 5
    text = b"".join(own.vocabulary[t] for t in flat[1:begins[1]].tolist()).decode()
    assert set(text.split()) <= set(" ".join(WORDS.values()).split())
    assert len(own.vocabulary) == 288 and own.vocabulary[EOT] == b"" and not own.used[EOT] and own.used.any()

    lengths = own_model.norms(own)
    assert list(lengths) == [0, 1, 2] and lengths[1].shape[1] == n_ctx
    acts = residual.activations(own.model, own.validation.contexts.long(), 2)
    torch.testing.assert_close(lengths[2], acts.norm(dim=-1)[:len(lengths[2])], atol=1e-4, rtol=1e-4)
    skip = own_model.skip_for(own, lengths[1])
    counts = own_model.skipped(own, 1, skip)
    assert counts.sum() == own.test.contexts.numel()
    assert counts["special tokens"] == (own.test.contexts == EOT).sum() > 0
    loss = own_model.held_out_loss(own, seed=0, n_boot=20)
    assert loss["nats a token"].value == pytest.approx(np.log(288), abs=0.7)  # it has learned nothing
    sae = own_model.dictionary(run, own, 1, skip)
    assert sae.config.hook_name == "blocks.1.hook_resid_pre" and not own_model.doubts(own, 1, sae)
    assert torch.equal(own_model.dictionary(study("load"), own, 1, skip).W_enc, sae.W_enc)
    found = held_out_pass(own.model, own.test, sae, 1, skip)
    assert len(found.document) < own.test.contexts.numel() and found.values["l0"].mean() > 0

    units = activation_table(own.model, own.validation.contexts, sae.encode, 1, skip)
    cards = [own_cards.card(own, sae, 1, skip, units, unit) for unit in own_cards.choose(units, 3)]
    assert "<b" not in own_cards.page(cards) and own_cards.page(cards).count("<h4>") == len(cards)
    for each in cards:
        column = units[:, [each.feature]].toarray()[:, 0]
        assert column[each.places[0]] == column.max() == np.float32(each.maximum) and each.density == (column > 0).mean()
        assert np.isnan(each.effect[EOT]) and own.used[torch.from_numpy(each.raised)].all()
    tokens, at = own_cards.prompts(own.test, skip, 4, seed=0)
    steered = own_cards.steer(own, sae, 1, cards, tokens, at, (0.0, 2.0), seed=0)
    assert len(steered) == len(cards) * 2 * 2 * len(tokens)
    assert steered[steered.strength == 0].divergence.max() < 1e-5
    for figure in (own_cards.norm_figure(lengths, skip, 1), own_cards.effects_figure(own, cards),
                   own_cards.steering_figure(steered)):
        assert len(figure.data)


def always(own, token, length):
    """A dictionary of the last residual stream whose only feature is 1 everywhere and writes what raises a token."""
    logits = residual.unembed(own.model, torch.eye(16)) - residual.unembed(own.model, torch.zeros(1, 16))
    towards = logits[:, token] - logits[:, own.used].mean(1)
    sae = SAE(SAEConfig(16, 1)).requires_grad_(False)
    for value, parameter in ((0.0, sae.W_enc), (1.0, sae.b_enc), (0.0, sae.b_dec)):
        parameter.fill_(value)
    sae.W_dec.copy_(length * towards / towards.norm())
    return sae


def test_effects_have_the_sign_and_size_of_what_a_known_feature_does(own, monkeypatch):
    text = own.validation
    token = int(torch.where(own.used, torch.bincount(text.contexts[0], minlength=290), 0).argmax())  # the commonest one
    sae, skip, rows, drawn = always(own, token, 0.5), Skip(), torch.arange(own_cards.ENDS), []
    expected = lambda resid: residual.unembed(own.model, resid).softmax(-1)
    monkeypatch.setattr(own_cards, "example_html", lambda *given: drawn.append(given) or "")
    card = own_cards.card(own, sae, 2, skip, activation_table(own.model, text.contexts, sae.encode, 2, skip), 0)
    contexts, at = text.contexts[card.places // 32].long(), torch.from_numpy(card.places % 32)
    acts = residual.activations(own.model, contexts, 2)[rows, at]
    with_it, without = expected(acts), expected(acts - sae.W_dec[0])
    used = own.used.numpy()
    np.testing.assert_allclose(card.effect[used], (with_it - without).mean(0)[own.used].numpy(), atol=1e-6)
    assert token in card.raised and card.effect[token] > 0.001

    # Ablation makes the raised token less likely wherever it comes: what is drawn under a token is of its own prediction.
    pieces, active, change, maximum = drawn[-1]
    row = contexts[len(drawn) - 1]
    acts, following = residual.activations(own.model, row[None], 2)[0, :len(pieces) - 1], row[1:len(pieces), None]
    gained = (expected(acts - sae.W_dec[0]) / expected(acts)).log().gather(1, following)[:, 0].numpy()
    assert pieces == [own.vocabulary[t] for t in row[:len(pieces)].tolist()] and maximum == active[1:].min() == 1
    np.testing.assert_allclose(change[1:], np.where(row[:len(pieces) - 1] == 0, 0, gained), atol=1e-5)
    assert (row[1:len(pieces)] == token).any() and change[0] == 0 and change[row[:len(pieces)] == token].max() < 0

    tokens, place = own_cards.prompts(own.test, skip, 4, seed=0)
    steered = own_cards.steer(own, sae, 2, [card], tokens, place, (0.0, 2.0), seed=0)
    acts = residual.activations(own.model, tokens, 2)[torch.arange(len(tokens)), place]
    before, after = expected(acts), expected(acts + 2 * sae.W_dec[0])
    chosen = lambda way, strength: steered[(steered.way == way) & (steered.strength == strength)]
    for strength, probabilities in ((0.0, before), (2.0, after)):
        found = chosen(own_cards.FEATURE, strength)
        np.testing.assert_allclose(found.share, probabilities[:, card.raised].sum(1).numpy(), atol=1e-5)
        np.testing.assert_allclose(found.divergence, (before * (before / probabilities).log()).sum(1).numpy(), atol=1e-5)
    pushed, still, noise = (chosen(*which).share.to_numpy() for which in (
        (own_cards.FEATURE, 2.0), (own_cards.FEATURE, 0.0), (own_cards.RANDOM, 2.0)))
    assert (pushed > still).all() and pushed.mean() > noise.mean()


def test_another_model_leaves_the_studys_results_alone(study, capsys):
    run, drawn = study(), go.Figure(go.Bar(x=[1], y=[2]))
    models = [("models/mine", 2, ""), ("hf:a/mine", 2, ""), ("hf:b/mine", 2, "")]
    asked = [own_model.STUDYS, ("", 1, ""), *models, ("", 2, "hf:a/theirs/x")]
    for i, given in enumerate(asked):
        found = own_model.outputs(run, *given)
        found.show(drawn, "13-norms", claim=f"Model {i}", alt="A bar.")
        found.row("13.l0", "Few", None, "C", i, None, None, 1, "reproduced", "")
    assert len({own_model.outputs(run, *given).published for given in asked}) == len(asked)
    assert json.loads((paths.figures() / "index.json").read_text())["figures"]["13-norms"]["claim"] == "Model 0"
    assert run.scorecard.table().ours.tolist() == [0]
    apart = sorted((paths.runs("tiny") / "own").iterdir())
    assert [re.sub("-[0-9a-f]{6}$", "", folder.name) for folder in apart] == [
        "mine-after-2", "mine-after-2", "mine-after-2", "study-after-1", "study-after-2-x"]
    cards = [Scorecard(folder / "results.json", **run.scorecard.header).table().ours.item() for folder in apart]
    assert sorted(cards) == [1, 2, 3, 4, 5] and "figures and rows go to" in capsys.readouterr().out


def test_the_studys_parameters_are_those_of_the_notebook():
    source = next(source for source in notebooks.sources() if source.stem.startswith("13"))
    given = notebooks.parameters(notebooks.convert(source), source.stem)
    assert (given["MODEL"], given["LAYER"], given["DICTIONARY"]) == own_model.STUDYS


def test_the_studys_own_model_is_the_default(study):
    run = study()
    own = own_model.open_model(run)
    assert len(own.vocabulary) == own.model.cfg.d_vocab == 290 and own.special == (0,)
    skip = own_model.skip_for(own, own_model.norms(own)[1])
    sae = own_model.dictionary(run, own, 1, skip)
    assert sae.config.model_name == "deep_transformer" and not own_model.doubts(own, 1, sae)
    assert own_model.doubts(own, 2, sae) == [
        "The dictionary was made for 'blocks.1.hook_resid_pre', after 1 layers, and LAYER is 2."]


@pytest.fixture
def own(study):
    return own_model.open_model(study())


def weights(d_in=16, d_sae=3):
    return {"W_enc": torch.ones(d_in, d_sae), "b_enc": torch.zeros(d_sae), "W_dec": torch.eye(d_sae, d_in),
            "b_dec": torch.zeros(d_in)}


def published(folder, layout):
    """A dictionary as others publish it; returns what to ask for, and what is to be doubted of it after 1 layer."""
    folder.mkdir(parents=True)
    w = weights()
    linear = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"]}
    if layout == "saelens":
        saelens(folder, "standard", w, d_in=16,
                metadata={"model_name": "deep_transformer", "hook_name": "blocks.0.hook_resid_post"})
        return folder, []
    if layout == "dictionary_learning":
        dictionary_learning(folder, "AutoEncoder", linear | {"decoder.weight": w["W_dec"].T.contiguous(), "bias": w["b_dec"]},
                            activation_dim=16, lm_name="somebody/pythia", submodule_name="resid_post_layer_0")
        return folder, ["somebody/pythia"]
    place = folder / "layers.1"
    place.mkdir()
    (folder / "config.json").write_text(json.dumps({"model": "deep_transformer"}))
    (place / "cfg.json").write_text(json.dumps({"activation": "topk", "num_latents": 3, "k": 1, "d_in": 16}))
    save_file(linear | {"W_dec": w["W_dec"], "b_dec": w["b_dec"]}, place / "sae.safetensors")
    return place, ["'layers.1', after 2 layers"]


@pytest.mark.parametrize("layout", ["saelens", "dictionary_learning", "sparsify"])
def test_a_published_dictionary_in_each_layout(study, own, tmp_path, layout):
    place, expected = published(tmp_path / "theirs", layout)
    sae = own_model.dictionary(study(), own, 1, Skip(), str(place))
    assert sae.config.d_sae == 3
    doubts = own_model.doubts(own, 1, sae)
    assert len(doubts) == len(expected) and all(words in doubt for words, doubt in zip(expected, doubts, strict=True))
    assert held_out_pass(own.model, own.test, sae, 1, Skip()).values["l0"].max() <= 3


def test_from_the_hub_once(study, own, folder, tmp_path, monkeypatch):
    place, _ = published(tmp_path / "theirs", "sparsify")
    calls = []

    def download(repo, allow_patterns, ignore_patterns, local_dir):
        calls.append((repo, allow_patterns))
        source = folder if repo == "some/model" else place.parent
        shutil.copytree(source, local_dir if repo == "some/model" else local_dir / "run", dirs_exist_ok=True)

    monkeypatch.setattr(hub_folders, "snapshot_download", download)
    theirs = [own_model.open_model(study(), "hf:some/model") for _ in range(2)][1]
    assert theirs.model.cfg.d_model == 16 and theirs.name == "hf:some/model"
    assert SAE.load(hub_folders.dictionary_folder("hf:a/b/run/layers.1")).config.model_name == "deep_transformer"
    sae = own_model.dictionary(study(), own, 1, Skip(), "hf:a/b/run/layers.1")
    assert sae.config.hook_name == "layers.1"
    assert [repo for repo, _ in calls] == ["some/model", "a/b"]
    assert calls[1][1] == ["run/layers.1/*", "run/config.json", "config.json"]


def test_no_network(study, own, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(hub_folders, "snapshot_download", offline)
    for ask in (lambda: own_model.open_model(study(), "some/model"),
                lambda: own_model.dictionary(study(), own, 1, Skip(), "hf:a/b")):
        with pytest.raises(StudyError, match="neither a folder nor could it be downloaded") as error:
            ask()
        assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_what_does_not_fit_is_said_in_one_sentence(study, own, folder, tmp_path):
    run = study()
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "tokenizer.json").unlink()
    SAE(SAEConfig(8, 4)).save(tmp_path / "narrow")
    large = tmp_path / "large"
    shutil.copytree(folder, large)
    tokenizer = Tokenizer.from_file(str(large / "tokenizer.json"))
    tokenizer.add_tokens([f"more{i}" for i in range(20)])
    tokenizer.save(str(large / "tokenizer.json"))
    cases = [(lambda: own_model.open_model(run, "./nowhere"), "There is no folder"),
             (lambda: own_model.open_model(run, str(bare)), "no tokenizer.json"),
             (lambda: own_model.open_model(run, str(large)), "has 300 tokens and the model 288"),
             (lambda: own_model.dictionary(run, own, 1, Skip(), "nowhere"), "There is no folder"),
             (lambda: own_model.dictionary(run, own, 1, Skip(), "hf:a"), "names no repository"),
             (lambda: own_model.dictionary(run, own, 1, Skip(), str(tmp_path / "narrow")), "reads 8 numbers .* has 16"),
             (lambda: own_model.dictionary(run, own, 5, Skip()), "no residual stream after 5 layers")]
    for ask, words in cases:
        with pytest.raises(StudyError, match=words) as error:
            ask()
        assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_the_rule_for_sinks(own):
    lengths = torch.full((5, 8), 2.0)
    lengths[:, :2] = 21  # above ten times the median
    lengths[0, 5] = 50  # a single one, which the limit finds
    assert own_model.skip_for(own, lengths) == Skip((0,), 2, 20.0)
    lengths[:, 0] = 2  # only what leads counts as leading
    assert own_model.skip_for(own, lengths).first == 0


@pytest.mark.parametrize("name, after", [
    ("blocks.3.hook_resid_pre", 3), ("blocks.3.hook_resid_post", 4), ("layers.3", 4), ("gpt_neox.layers.0", 1),
    ("transformer.h.2", 3), ("resid_post_layer_3", 4), ("blocks.3.hook_mlp_out", None), ("", None)])
def test_where_a_dictionary_says_that_it_reads(name, after):
    assert own_model.layers_before(name) == after


def test_the_rule_for_cards():
    dense = np.zeros((200, 6))
    for unit, n in enumerate((0, 19, 20, 50, 100, 199)):
        dense[:n, unit] = 1
    assert own_cards.choose(table(dense), 2) == [3, 5]  # of the four that fire often enough, rarest first
    assert own_cards.choose(table(dense), 10) == [2, 3, 4, 5]
    with pytest.raises(StudyError, match="No feature fires on 20"):
        own_cards.choose(table(dense[:, :2]), 3)
