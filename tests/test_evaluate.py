import numpy as np
import pytest
import torch

from sae_lib.activations import Skip
from sae_lib.evaluate import (
    Detectors,
    LabelCorrelations,
    Text,
    best_detectors,
    count_won,
    held_out_pass,
    label_correlations,
    mean_activation,
)
from sae_lib.sae import SAE, SAEConfig
from sae_lib.transformer import TransformerConfig, build, mlp_activations, parameters, token_losses

TINY = TransformerConfig(n_tokens=1, d_vocab=50, n_ctx=16, d_model=16, n_heads=2, d_mlp=24)


@pytest.fixture
def model():
    model = build(TINY)
    with torch.no_grad():
        for value in parameters(model).values():
            value.add_(0.3 * torch.randn_like(value))
    return model.requires_grad_(False)


@pytest.fixture
def text():
    contexts = torch.randint(1, 50, (70, 16))
    contexts[:, 5] = 0
    documents = torch.arange(70)[:, None].expand(-1, 16) // 2
    return Text(contexts, documents, (contexts > 25).long())


@pytest.fixture
def perfect():
    """A dictionary that rebuilds its non-negative input exactly: one feature a neuron."""
    sae = SAE(SAEConfig(d_in=24, d_sae=24))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(24)), sae.W_dec.copy_(torch.eye(24)), sae.b_enc.zero_(), sae.b_dec.zero_()
    return sae


def test_a_perfect_dictionary_recovers_everything(model, text, perfect):
    held_out = held_out_pass(model, text, perfect)
    assert held_out.loss_recovered("zero", n_boot=20).value == pytest.approx(1, abs=1e-5)
    assert held_out.explained_variance(n_boot=20).value == pytest.approx(1, abs=1e-6)
    acts = mlp_activations(model, text.contexts)[:, :-1][text.contexts[:, :-1] != 0]
    assert held_out.average("l0", n_boot=20).value == pytest.approx((acts > 0).float().sum(1).mean().item())
    assert torch.equal(held_out.fired, (acts > 0).sum(0))


def test_a_dictionary_that_says_half_has_gain_two(model, text, perfect):
    assert held_out_pass(model, text, perfect).gain(n_boot=20).value == pytest.approx(1, abs=1e-6)
    with torch.no_grad():
        perfect.W_enc.mul_(0.5)
        perfect.b_dec.fill_(-3.0)  # below all activations, so that every feature stays active
    assert held_out_pass(model, text, perfect).gain(n_boot=20).value == pytest.approx(2, abs=1e-5)


def test_what_is_known_of_the_text_from_another_dictionary_is_not_measured_again(model, text, perfect):
    other, whole = SAE(SAEConfig(d_in=24, d_sae=48)), held_out_pass(model, text, perfect)
    found = held_out_pass(model, text, perfect, known=held_out_pass(model, text, other))
    assert torch.equal(found.fired, whole.fired) and torch.equal(found.document, whole.document)
    assert found.values.keys() == whole.values.keys()
    for name, value in whole.values.items():
        assert torch.equal(found.values[name], value), name


def test_skipped_positions_are_neither_edited_nor_counted(model, text, perfect):
    """Of a dictionary and of what it is compared with alike: with everything skipped but one position nothing else changes."""
    limit = mlp_activations(model, text.contexts).norm(dim=-1).quantile(0.5).item()
    skip = Skip((0,), first=3, above=limit)
    acts = mlp_activations(model, text.contexts)
    skipped = skip.mask(text.contexts, acts)
    found = held_out_pass(model, text, perfect, skip=skip)
    assert len(found.document) == (~skipped[:, :-1]).sum()
    zeroed = token_losses(model, text.contexts, {"zero": lambda x: torch.where(skipped[..., None], x, 0.0)})["zero"]
    torch.testing.assert_close(found.values["zero"], zeroed[~skipped[:, :-1]])
    mean = acts[~skipped].mean(0)
    torch.testing.assert_close(mean_activation(model, text, skip=skip), mean, atol=1e-5, rtol=1e-4)
    counted = acts[:, :-1][~skipped[:, :-1]]
    torch.testing.assert_close(found.values["spread"], (counted - mean).square().sum(-1), atol=1e-3, rtol=1e-3)
    assert torch.equal(found.fired, (counted > 0).sum(0))


def test_a_dictionary_that_says_nothing_recovers_nothing(model, text, perfect):
    with torch.no_grad():
        perfect.W_dec.zero_()
    held_out = held_out_pass(model, text, perfect)
    assert held_out.loss_recovered("zero", n_boot=20).value == pytest.approx(0, abs=1e-5)


def test_a_dictionary_that_says_the_mean_explains_no_variance(model, text, perfect):
    with torch.no_grad():
        perfect.W_dec.zero_()
        perfect.b_dec.copy_(mlp_activations(model, text.contexts).mean((0, 1)))
        held_out = held_out_pass(model, text, perfect)
    assert held_out.explained_variance(n_boot=20).value == pytest.approx(0, abs=1e-5)
    assert held_out.loss_recovered("mean", n_boot=20).value == pytest.approx(0, abs=1e-4)


def test_end_of_text_and_the_last_token_are_left_out_everywhere(model, text, perfect):
    held_out = held_out_pass(model, text, perfect)
    assert {len(v) for v in held_out.values.values()} == {len(held_out.document)} == {70 * 14}
    clean = token_losses(model, text.contexts, {"clean": None})["clean"]
    keep = [i for i in range(15) if i != 5]
    torch.testing.assert_close(held_out.values["clean"].mean(), clean[:, keep].mean())


def test_document_sums_by_hand(model, text):
    held_out = held_out_pass(model, text)
    sums = held_out.document_sums("clean")
    assert sums.shape == (35, 2)
    assert (sums[:, 1] == 28).all()
    assert sums[3, 0] == pytest.approx(held_out.values["clean"][held_out.document == 3].double().sum().item())


def test_label_correlations_of_neurons_and_features_equal_numpy(model, text, perfect):
    acts = mlp_activations(model, text.contexts).flatten(0, 1).numpy()
    with np.errstate(invalid="ignore"):
        expected = np.nan_to_num([np.corrcoef(a, text.domains.flatten() == 1)[0, 1] for a in acts.T])
    for sae in (None, perfect):
        np.testing.assert_allclose(label_correlations(model, sae, text, 2)[:, 1], expected, atol=1e-5)


def test_detectors_are_chosen_on_one_text_and_measured_on_another(model, text):
    other = Text(text.contexts.flip(0), text.documents, text.domains.flip(0))
    found = best_detectors(model, None, text, other, [0, 1])
    correlations = label_correlations(model, None, other, 2)
    assert torch.equal(found.unit, label_correlations(model, None, text, 2).argmax(0))
    np.testing.assert_allclose(found.pearson(), correlations[found.unit, [0, 1]], atol=1e-5)


def test_contexts_won_by_a_margin():
    def detectors(correlation):
        # Documents of four tokens in which unit and label agree, or do not: pearson 1 or 0.
        agree, differ = [4, 2, 2, 2, 2, 2], [4, 2, 2, 2, 2, 1]
        sums = np.array([[agree if c else differ for c in correlation]] * 3, float)
        return Detectors(torch.tensor([0, 0]), sums.transpose(0, 2, 1))

    won = count_won(detectors([1, 1]), detectors([0, 1]), 0.3, n_boot=20)
    assert won == (1, 1, 1)


def test_correlations_equal_numpy_in_any_batching():
    acts, labels = torch.rand(300, 5).relu(), torch.randint(0, 3, (300,))
    acts[:, 4] = 0
    expected = np.array([[np.corrcoef(acts[:, u], labels == c)[0, 1] for c in range(3)] for u in range(4)])
    for size in (300, 7):
        correlations = LabelCorrelations(5, 4)
        for a, c in zip(acts.split(size), labels.split(size), strict=True):
            correlations.update(a, c)
        np.testing.assert_allclose(correlations.pearson()[:4, :3], expected, atol=1e-5)
        assert (correlations.pearson()[4] == 0).all()  # never fires
        assert (correlations.pearson()[:, 3] == 0).all()  # never occurs


def test_a_perfect_detector_has_correlation_one_and_a_shared_one_less():
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    correlations = LabelCorrelations(2, 3)
    correlations.update(torch.stack([(labels == 1).float() * 7, (labels >= 1).float()], 1), labels)
    torch.testing.assert_close(correlations.pearson()[:, 1], torch.tensor([1.0, 0.5]))


def test_text_is_taken_from_everywhere():
    contexts = torch.arange(10)[:, None].expand(-1, 2)
    text = Text(contexts, contexts, contexts)
    assert text.spread(4).contexts[:, 0].tolist() == [0, 3, 6, 9]
    assert len(text.spread(99).contexts) == 10
