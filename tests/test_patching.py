"""Patching in a model small enough to know what must come out."""

import numpy as np
import pytest
import torch
from texts import pretrained, scrambled

from sae_lib import patching, residual
from sae_lib.baselines import Projection, pca
from sae_lib.errors import StudyError
from sae_lib.transformer import TransformerConfig, load_pretrained

CONFIG = TransformerConfig(n_tokens=1, d_vocab=30, n_ctx=8, n_layers=2, d_model=8, n_heads=2, d_mlp=12)
AFTER = 1


@pytest.fixture(scope="module")
def model():
    return scrambled(CONFIG)


@pytest.fixture(scope="module")
def runs(model):
    base = torch.randint(1, 30, (5, 8), generator=torch.Generator().manual_seed(0))
    target = base.clone()
    target[:, 2] = (target[:, 2] + 7) % 29 + 1
    return patching.pair(model, base, target, torch.tensor([7, 7, 6, 5, 7]), AFTER)


def test_nothing_patched_is_the_base_and_everything_is_the_target(model, runs):
    coding = patching.of_dimensions(8)
    found = patching.patch(model, runs, coding, AFTER, np.arange(8), most=8)
    assert found.divergence.shape == found.edit.shape == (5, 9)
    log_z = torch.log_softmax(residual.unembed(model, residual.go_on(model, runs.base, AFTER)), -1)
    log_z = log_z[torch.arange(5), runs.last]
    expected = torch.nn.functional.kl_div(runs.log_y, log_z, log_target=True, reduction="none").sum(1)
    np.testing.assert_allclose(found.divergence[:, 0], expected, rtol=1e-4)
    np.testing.assert_allclose(found.divergence[:, -1], 0, atol=1e-5)
    np.testing.assert_allclose(found.edit[:, 0], 0)
    n = runs.last + 1
    whole = [(runs.target - runs.base)[i, :n[i]].norm(dim=-1).mean() for i in range(5)]
    np.testing.assert_allclose(found.edit[:, -1], whole, rtol=1e-5)


def test_codings_rebuild_the_same_change(runs):
    """A whole rotation, its pairs and the basis all say everything."""
    sample = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    rotation = pca(sample, 8)
    change = runs.target - runs.base
    for coding in (patching.of_dimensions(8), patching.of_rotation(rotation), patching.of_pairs(rotation)):
        made = (coding.codes(runs.target) - coding.codes(runs.base)) @ coding.directions
        torch.testing.assert_close(made, change, atol=1e-4, rtol=1e-4)
    pairs = patching.of_pairs(rotation).codes(runs.base)
    assert (pairs >= 0).all() and ((pairs[..., :8] > 0) & (pairs[..., 8:] > 0)).sum() == 0


def test_the_direction_that_does_it_all_comes_first(model, runs):
    """Directions are given that split the change: one holds all of it, one nothing, others do not exist in it."""
    change = (runs.target - runs.base)[:, 2].mean(0)
    first = change / change.norm()
    basis = torch.linalg.qr(torch.cat([first[:, None], torch.randn(8, 7, generator=torch.Generator().manual_seed(2))], 1))[0].T
    one = Projection(basis.T.contiguous(), basis.contiguous(), torch.zeros(8))
    # Only along the first do base and target differ now.
    flat = runs._replace(target=runs.base + ((runs.target - runs.base) @ basis[0])[..., None] * basis[0])
    flat = flat._replace(log_y=patching._log_probabilities(model, flat.target, runs.last, AFTER))
    coding = patching.of_rotation(one)
    ordered = patching.order(model, flat, coding, AFTER, (1e-4, 1e-2), seed=0)
    assert ordered[0] == 0
    found = patching.patch(model, flat, coding, AFTER, ordered, most=1)
    np.testing.assert_allclose(found.divergence[:, 1], 0, atol=1e-4)
    assert found.divergence[:, 0].mean() > 1e-3


def test_directions_that_never_change_are_not_ordered(model, runs):
    same = runs._replace(target=runs.base)
    assert len(patching.order(model, same, patching.of_dimensions(8), AFTER, (1e-3,), 0)) == 0


def test_every_changed_direction_is_ordered_once_and_again_alike(model, runs):
    ordered = patching.order(model, runs, patching.of_dimensions(8), AFTER, (1e-3, 1e-2, 1e-1), 0)
    assert sorted(ordered.tolist()) == list(range(8))
    assert (patching.order(model, runs, patching.of_dimensions(8), AFTER, (1e-3, 1e-2, 1e-1), 0) == ordered).all()
    # Those that are kept to the end are needed more than those dropped first.
    kl = patching.patch(model, runs, patching.of_dimensions(8), AFTER, ordered, 4).divergence.mean(0)
    worst = patching.patch(model, runs, patching.of_dimensions(8), AFTER, ordered[::-1].copy(), 4).divergence.mean(0)
    assert kl[4] < worst[4]


@pytest.fixture(scope="module", params=["gpt_neox", "gpt2"])
def elsewhere(request, tmp_path_factory):
    """A tiny model of another kind through the bridge, and as its own library runs it: logits after each prompt, with the stream
    that one layer reads put in by a hook.
    """
    folder, rng = tmp_path_factory.mktemp(request.param), torch.Generator().manual_seed(3)
    model = pretrained(request.param, 30, 12, 3, initializer_range=0.5).requires_grad_(False)
    for value in model.parameters():
        value.add_(0.3 * torch.randn(value.shape, generator=rng))
    model.save_pretrained(folder)
    layer = (model.gpt_neox.layers if request.param == "gpt_neox" else model.transformer.h)[AFTER]

    def logits(tokens, last, put=None):
        read = []

        def hook(_, args):
            read.append(args[0])
            return args if put is None else (put, *args[1:])

        handle = layer.register_forward_pre_hook(hook)
        found = model(tokens).logits[torch.arange(len(tokens)), last]
        handle.remove()
        return read[0], torch.log_softmax(found, -1)

    return load_pretrained(str(folder)), logits


def test_a_model_from_elsewhere_is_patched_as_its_own_library_would(elsewhere, monkeypatch):
    model, logits = elsewhere
    base = torch.randint(1, 30, (5, 9), generator=torch.Generator().manual_seed(0))
    target, last = base.clone(), torch.tensor([8, 8, 6, 5, 7])
    target[:, 2] = (target[:, 2] + 7) % 29 + 1
    for row, end in enumerate(last.tolist()):  # what pads the end is never seen
        base[row, end + 1:], target[row, end + 1:] = 0, 0
    runs = patching.pair(model, base, target, last, AFTER)
    (from_base, _), (from_target, log_y) = logits(base, last), logits(target, last)
    torch.testing.assert_close(runs.base, from_base, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(runs.target, from_target, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(runs.log_y, log_y, atol=1e-4, rtol=1e-4)

    def divergences(_model, _runs, resid, _after):
        log_z = logits(base, last, resid)[1]
        return (log_z.exp() * (log_z - log_y)).sum(-1)

    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))[0]
    coding = patching.of_rotation(Projection(rotation, rotation.T.contiguous(), torch.zeros(16)))
    thresholds = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    ordered = patching.order(model, runs, coding, AFTER, thresholds, seed=0)
    found = patching.patch(model, runs, coding, AFTER, ordered, most=4)
    for k in range(5):
        directions = rotation.T[ordered[:k]]
        edited = from_base + (from_target - from_base) @ directions.T @ directions
        np.testing.assert_allclose(found.divergence[:, k], divergences(None, None, edited, None), atol=1e-4, rtol=1e-3)
    assert found.divergence[:, 0].mean() > 0.02  # far above what is tolerated
    monkeypatch.setattr(patching, "divergences", divergences)
    assert patching.order(model, runs, coding, AFTER, thresholds, seed=0).tolist() == ordered.tolist()


def test_sentences_of_other_lengths(model):
    with pytest.raises(StudyError, match="make both of the same sentences"):
        patching.pair(model, torch.ones(2, 5, dtype=torch.long), torch.ones(2, 6, dtype=torch.long), torch.tensor([4, 4]), 1)
