"""Edits along one direction by hand, and what they promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import scrambled

from sae_lib import effects, residual
from sae_lib.erasure import damage, leace, logits_at, part_of_the_way, project_out, silence
from sae_lib.errors import StudyError
from sae_lib.sae import SAE, GatedSAE, SAEConfig
from sae_lib.seeds import generator
from sae_lib.transformer import TransformerConfig

CONFIG = TransformerConfig(n_tokens=1, d_vocab=40, n_ctx=12, n_layers=2, d_model=16, n_heads=2, d_mlp=24)


def small(w, d, bias=0.0) -> SAE:
    """A dictionary of one feature that reads `w` and writes `d`."""
    sae = SAE(SAEConfig(len(w), 1)).requires_grad_(False)
    sae.W_enc.copy_(torch.tensor(w)[:, None])
    sae.W_dec.copy_(torch.tensor(d)[None])
    sae.b_enc.fill_(bias)
    sae.b_dec.zero_()
    return sae


def test_less_than_rank_one_by_hand():
    sae = small([2.0, 1.0], [1.0, 0.0], -1.0)
    x = torch.tensor([[3.0, 1.0], [0.0, 0.5]])  # f = 2*3 + 1 - 1 = 6, and relu(-0.5) = 0
    assert sae.encode(x, [0]).tolist() == [[6.0], [0.0]]
    assert silence(sae, 0)(x).tolist() == [[0.0, 1.0], [0.0, 0.5]]  # 3 - 6 / 2
    assert effects.pin(sae, 0, 0.0)(x).tolist() == [[-3.0, 1.0], [0.0, 0.5]]  # 3 - 6
    assert project_out(torch.tensor([5.0, 0.0]), torch.tensor([1.0, 7.0]))(x).tolist() == [[1.0, 1.0], [1.0, 0.5]]


def test_in_a_tied_dictionary_both_ablations_are_one():
    sae, x = small([0.6, 0.8], [0.6, 0.8], -0.3), torch.randn(20, 2, generator=generator(0, "x"))
    torch.testing.assert_close(silence(sae, 0)(x), effects.pin(sae, 0, 0.0)(x))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_it_ends_where_the_feature_stops(seed):
    sae = SAE(SAEConfig(8, 24)).requires_grad_(False)
    sae.W_enc.add_(0.2 * torch.randn(8, 24, generator=generator(seed, "w")))
    sae.b_dec.normal_(generator=generator(seed, "b"))
    x = torch.randn(30, 8, generator=generator(seed, "x"))
    for feature in range(24):
        if float(sae.W_enc[:, feature] @ sae.W_dec[feature]) <= 0.1:
            continue
        before, edited = sae.encode(x, [feature]), silence(sae, feature)(x)
        assert sae.encode(edited, [feature]).max() < 1e-4  # off,
        moved = (edited - x).norm(dim=1)
        assert (moved[before[:, 0] == 0] == 0).all()  # untouched where it was off,
        barely = x + 0.98 * (edited - x)
        active = before[:, 0] > 1e-3
        assert (sae.encode(barely, [feature])[active] > 0).all()  # and no further than needed


def test_features_that_cannot_be_silenced():
    with pytest.raises(StudyError, match="reads nothing of its own direction"):
        silence(small([0.0, 1.0], [1.0, 0.0]), 0)
    with pytest.raises(StudyError, match="no feature 1"):
        silence(small([1.0, 0.0], [1.0, 0.0]), 1)
    with pytest.raises(StudyError, match="gated dictionary"):
        silence(GatedSAE(SAEConfig(2, 1)), 0)


def test_leace_leaves_no_correlation_and_moves_least():
    rng = generator(0, "leace")
    concept = torch.rand(4000, generator=rng) < 0.3
    acts = torch.randn(4000, 6, generator=rng) @ torch.randn(6, 6, generator=rng)
    acts = acts + concept[:, None] * torch.randn(6, generator=rng)
    erased, label = leace(acts, concept)(acts), concept.float() - concept.float().mean()
    assert ((erased - erased.mean(0)).T @ label / 4000).abs().max() < 1e-4
    # Projecting out the difference of means also erases the concept, with a greater change.
    direction = acts[concept].mean(0) - acts[~concept].mean(0)
    projected = project_out(direction, acts.mean(0))(acts)
    assert ((projected - projected.mean(0)).T @ label / 4000).abs().max() < 1e-4
    assert (erased - acts).square().sum() < (projected - acts).square().sum()


def test_leace_of_white_activations_is_the_projection():
    acts = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    found = leace(acts, acts[:, 0] > 0)(acts)
    torch.testing.assert_close(found, project_out(torch.tensor([1.0, 0.0]), torch.zeros(2))(acts), atol=1e-5, rtol=0)
    with pytest.raises(StudyError, match="everywhere or nowhere"):
        leace(acts, torch.ones(4, dtype=torch.bool))


def test_damage_equals_two_runs_of_the_bridge():
    model, tokens = scrambled(CONFIG), torch.randint(1, 40, (5, 12), generator=generator(0, "tokens"))
    push = 2 * torch.randn(16, generator=generator(0, "push"))

    def edit(x):
        return x + (x[..., :1] > 0) * push

    hook = [(residual.hook_name(model, 1), lambda acts, hook: edit(acts))]
    clean, changed = model(tokens).log_softmax(-1), model.run_with_hooks(tokens, fwd_hooks=hook).log_softmax(-1)
    found = damage(model, tokens, 1, {"edit": edit, "half": part_of_the_way(edit, 0.5)})
    half, found = found["half"], found["edit"]
    torch.testing.assert_close(found.divergence, (clean.exp() * (clean - changed)).sum(-1), atol=1e-4, rtol=1e-3)
    change = (changed - clean)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(found.likelihood[:, :-1], change, atol=1e-4, rtol=1e-3)
    assert (found.likelihood[:, -1] == 0).all()
    moved = residual.activations(model, tokens, 1)[..., 0] > 0
    torch.testing.assert_close(found.norm, moved * push.norm(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(half.norm, found.norm / 2, atol=1e-4, rtol=1e-4)

    at = torch.tensor([0, 3, 11, 5, 7])
    for which, expected in ((None, clean), (edit, changed)):
        torch.testing.assert_close(logits_at(model, tokens, 1, which, at).log_softmax(-1), expected[torch.arange(5), at],
                                   atol=1e-4, rtol=1e-4)
