import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csc_array
from texts import scrambled

from sae_lib import effects
from sae_lib.effects import (
    CONTEXTS,
    ablation_effects,
    add,
    attribution,
    character_share,
    fluency,
    in_characters,
    inside,
    logit_weights,
    mean_effect,
    pin,
    pin_neuron,
    top_logits,
)
from sae_lib.errors import StudyError
from sae_lib.sae import SAE, SAEConfig
from sae_lib.seeds import generator
from sae_lib.transformer import TransformerConfig, mlp_activations, parameters

TINY = TransformerConfig(n_tokens=1, d_vocab=50, n_ctx=16, d_model=16, n_heads=2, d_mlp=24)


@pytest.fixture
def model():
    return scrambled(TINY)


@pytest.fixture
def sae():
    return SAE(SAEConfig(d_in=24, d_sae=40)).requires_grad_(False)


def tokens(n, length=16):
    return torch.randint(1, 50, (n, length), generator=generator(0, "test-tokens"))


# --- logits ----------------------------------------------------------------------------------------------------------

def test_logit_weights_equal_the_formula_written_out():
    for n_layers in (1, 2):
        model = scrambled(replace(TINY, n_layers=n_layers))
        p, directions = parameters(model), torch.randn(3, 24, generator=generator(0, "test"))
        w_down, scale, unembed = p[f"layers.{n_layers - 1}.mlp.fc_out.weight"], p["ln_out.weight"], p["head.weight"]
        expected = torch.zeros(3, 50)
        for i, direction in enumerate(directions):
            written = [sum(direction[k] * w_down[m, k] for k in range(24)) for m in range(16)]
            mean = sum(written) / 16
            for token in range(50):
                expected[i, token] = sum((written[m] - mean) * scale[m] * unembed[token, m] for m in range(16))
            expected[i] -= expected[i].sort().values[24]
        torch.testing.assert_close(logit_weights(model, directions), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logit_weights(model, directions @ w_down.T, of_residual=True), expected, atol=1e-5, rtol=1e-4)


def test_logit_weights_are_what_the_bridge_does_when_the_norm_is_frozen(model):
    """With the standard deviation of the clean run, a step along the direction changes the logits by step / deviation."""
    direction, step, text = torch.randn(24, generator=generator(0, "test")), 0.5, tokens(2)
    clean, cache = model.run_with_cache(text)
    scale, p, seen = cache["ln_final.hook_scale"], parameters(model), {}

    def frozen(_, hook):
        return (seen["x"] - seen["x"].mean(-1, keepdim=True)) / scale * p["ln_out.weight"] + p["ln_out.bias"]

    hooks = [(TINY.hook_name, lambda acts, hook: add(direction, step)(acts)),
             ("ln_final.hook_in", lambda x, hook: seen.update(x=x)), ("ln_final.hook_out", frozen)]
    change = (model.run_with_hooks(text, fwd_hooks=hooks) - clean) * scale / step
    change -= change.median(-1, keepdim=True).values
    expected = logit_weights(model, direction[None])[0].expand_as(change)
    torch.testing.assert_close(change, expected, atol=2e-4, rtol=1e-3)


def test_the_median_is_zero_over_used_tokens_and_the_others_are_nan(model):
    used = torch.arange(50) >= 9
    weights, everything = logit_weights(model, torch.eye(24), used), logit_weights(model, torch.eye(24))
    assert weights[:, :9].isnan().all()
    assert (weights[:, 9:].median(1).values == 0).all()
    assert (everything.median(1).values == 0).all()
    torch.testing.assert_close((weights - everything)[:, 9:].diff(dim=1), torch.zeros(24, 40), atol=1e-5, rtol=0)
    with pytest.raises(StudyError, match="No token"):
        logit_weights(model, torch.eye(24), used & ~used)


def test_top_logits_by_hand():
    table = top_logits(torch.tensor([0.5, math.nan, -2.0, 3.0, 0.0, -1.0]), [b"a", b"b", b"c", b"\xd8", b"e", b"f"], 2)
    assert table.index.tolist() == [3, 0, 5, 2]
    assert table.token.tolist() == [b"\xd8", b"a", b"f", b"c"]
    assert table.weight.tolist() == [3, 0.5, -1, -2]
    few = top_logits(torch.tensor([0.5, math.nan, -2.0]), [b"a", b"b", b"c"], 2)
    assert few.token.tolist() == [b"a", b"c"]


def test_attribution_by_hand():
    # Two contexts of four tokens; token 0 is end-of-text.
    text = torch.tensor([3, 1, 0, 2, 1, 1, 2, 3])
    activations = np.array([[1, 0], [2, 0], [4, 5], [8, 6], [0, 7], [0, 9], [3, 0], [3, 3]], np.float32)
    weights = torch.tensor([[9, 10, 20, 30], [9, -1, math.nan, -3]])
    result = attribution(csc_array(activations), weights, text, 4)
    expected = np.zeros((8, 2))
    expected[0, 0] = 1 * 10  # 3 is followed by 1
    expected[4, 1] = 7 * -1  # 1 by 1; token 5 is followed by 2, whose weight is nan
    expected[6, 0] = 3 * 30  # 2 by 3
    assert (type(result), result.dtype, result.nnz) == (csc_array, np.float32, 3)
    np.testing.assert_array_equal(result.toarray(), expected)


def test_attribution_leaves_its_table_alone_and_refuses_sizes_that_do_not_fit():
    table = csc_array(np.ones((4, 2), np.float32))
    attribution(table, torch.ones(2, 3), torch.tensor([1, 0, 2, 1]), 2)
    assert table.nnz == 8
    for weights, n_ctx in ((torch.ones(3, 3), 2), (torch.ones(2, 3), 3)):
        with pytest.raises(StudyError, match="does not fit"):
            attribution(table, weights, torch.tensor([1, 0, 2, 1]), n_ctx)


# --- edits -----------------------------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=20)
@given(st.floats(-3, 10))
def test_pin_moves_along_the_feature_only_and_by_what_is_missing(value):
    sae = SAE(SAEConfig(d_in=24, d_sae=40))
    acts = 3 * torch.rand(5, 2, 24, generator=generator(0, "test"))
    f = sae.encode(acts)[..., 7]
    moved = pin(sae, 7, value)(acts) - acts
    torch.testing.assert_close(moved, (value - f)[..., None] * sae.W_dec[7], atol=1e-5, rtol=1e-4)


def test_pinning_at_the_value_it_has_changes_nothing(sae):
    acts = 3 * torch.rand(1, 1, 24, generator=generator(0, "test"))
    feature = int(sae.encode(acts).flatten().argmax())
    value = sae.encode(acts)[0, 0, feature].item()
    assert value > 0.1
    torch.testing.assert_close(pin(sae, feature, value)(acts), acts)
    silent = int(sae.encode(acts).flatten().argmin())
    assert torch.equal(pin(sae, silent, 0.0)(acts), acts)


def test_pin_sets_the_feature_and_keeps_the_error_of_the_dictionary():
    """With orthonormal features, a pinned one has the value, the others stay, and so does what is not rebuilt."""
    sae = SAE(SAEConfig(d_in=24, d_sae=10)).requires_grad_(False)
    sae.W_dec.copy_(torch.eye(24)[:10])
    sae.W_enc.copy_(sae.W_dec.T), sae.b_enc.zero_(), sae.b_dec.zero_()
    acts = torch.rand(3, 4, 24, generator=generator(0, "test"))
    edited = pin(sae, 2, 5.0)(acts)
    before, after = sae(acts), sae(edited)
    assert torch.allclose(after.features[..., 2], torch.tensor(5.0))
    torch.testing.assert_close(after.features[..., 3:], before.features[..., 3:])
    torch.testing.assert_close(edited - after.reconstruction, acts - before.reconstruction)


def test_neurons_are_pinned_and_directions_added_on_a_copy():
    acts = torch.rand(2, 3, 4, generator=generator(0, "test"))
    before, edited = acts.clone(), pin_neuron(1, 7.0)(acts)
    assert (edited[..., 1] == 7).all()
    assert torch.equal(edited[..., [0, 2, 3]], acts[..., [0, 2, 3]])
    torch.testing.assert_close(add(torch.tensor([1.0, 0, 0, -2]), 3.0)(acts), acts + torch.tensor([3.0, 0, 0, -6]))
    assert torch.equal(acts, before)


def test_units_that_do_not_exist_are_refused(sae):
    for feature in (40, -1):
        with pytest.raises(StudyError, match="no feature"):
            pin(sae, feature, 1.0)
    with pytest.raises(StudyError, match="no neuron 24"):
        pin_neuron(24, 1.0)(torch.zeros(1, 1, 24))


# --- what edits do ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n_layers", [1, 2])
def test_ablation_effects_equal_hooks_on_the_bridge(n_layers, sae):
    model, text = scrambled(replace(TINY, n_layers=n_layers)), tokens(70)  # more than one batch
    for edit in (pin(sae, 3, 0.0), pin_neuron(5, 0.0), add(torch.ones(24), 0.5)):
        name = f"blocks.{n_layers - 1}.mlp.hook_post"
        hooked = model.run_with_hooks(text, fwd_hooks=[(name, lambda acts, hook, edit=edit: edit(acts))])
        difference = (hooked.log_softmax(-1) - model(text).log_softmax(-1))[:, :-1]
        expected = difference.gather(-1, text[:, 1:, None])[..., 0]
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(ablation_effects(model, text, edit), expected, atol=1e-5, rtol=1e-4)


def test_where_a_unit_is_silent_its_ablation_has_no_effect(model, sae):
    text = tokens(20).int()
    acts = mlp_activations(model, text)[:, :-1]
    for active, edit in ((sae.encode(acts)[..., 3] > 1e-4, pin(sae, 3, 0.0)), (acts[..., 5] > 0, pin_neuron(5, 0.0))):
        assert active.any() and not active.all()
        found = ablation_effects(model, text, edit)
        assert (found[~active].abs() < 1e-4).all()
        assert (found[active] != 0).float().mean() > 0.9


def test_only_edited_positions_are_worked_on(model, monkeypatch):
    """The edit sees whole contexts, the unembedding only what the edit changed."""
    text, rows = tokens(3), []

    def edit(acts):
        edited = acts.clone()
        edited[1, 4] += 1
        edited[2, 15] += 1  # the last position predicts nothing
        return edited

    inner = effects.logits
    monkeypatch.setattr(effects, "logits", lambda p, layer, resid, acts: rows.append(len(acts)) or inner(p, layer, resid, acts))
    found = ablation_effects(model, text, edit)
    assert found.nonzero().tolist() == [[1, 4]]
    assert rows == [1, 1]


# --- what was sampled ------------------------------------------------------------------------------------------------

def test_fluency_by_hand(model):
    samples = torch.tensor([[1, 2, 3, 3, 3, 3], [4, 5, 6, 7, 8, 9]])
    logs = model(samples).log_softmax(-1)
    result = fluency(model, samples, 2)
    expected = [sum(logs[i, j, samples[i, j + 1]].item() for j in range(1, 5)) / 4 for i in range(2)]
    assert result.log_likelihood.tolist() == pytest.approx(expected, abs=1e-5)
    assert result.distinct.tolist() == [0.25, 1.0]
    for length in (0, 6):
        with pytest.raises(StudyError, match="prompt"):
            fluency(model, samples, length)


def in_context(name, text):
    return "".join(c for c, hit in zip(text, CONTEXTS[name](text), strict=True) if hit)


def test_base64_is_found_and_words_names_hex_and_rulers_are_not():
    run = "iVBORw0KGgoAAAANSUhEUgAA"
    assert in_context("base64", f"data: {run}== and") == run + "=="
    assert in_context("base64", f"{run[:15]} {run[:16]}") == run[:16]
    for other in ("internationalization", "TransformerBridgeConfig", "d41d8cd98f00b204e9800998ecf8427e", "=" * 40, "ACGT" * 10,
                  "usr/lib/python3/site", "1234567890123456", "/" * 40, "a1B2c3 " * 5):
        assert in_context("base64", other) == "", other


def test_scripts_and_bases_are_found():
    assert in_context("arabic", "a مرحبا، b שלום") == "مرحبا،"
    assert in_context("hebrew", "a مرحبا b שלום") == "שלום"
    assert in_context("dna", "ACGTACGTACGTACGT CAT acgtacgtacgtacgtac") == "ACGTACGTACGTACGTacgtacgtacgtacgtac"
    for test in CONTEXTS.values():
        assert not test("\ufffd" * 20).any()


def test_character_shares_by_hand():
    letters = inside("[ab]")
    share = lambda *texts: character_share(list(texts), letters, n_boot=50).value
    assert share(b"abxx", b"aaaa") == pytest.approx(6 / 8)
    assert share(b"a b", b"b\na") == 1  # one white-space character between two of the context
    assert share(b"a  b", b" a x") == pytest.approx(3 / 8)
    assert share("aé".encode()[:-1], b"aa") == pytest.approx(3 / 4)  # a letter cut in two is one U+FFFD
    assert share(b"", b"ab", b"xx") == 1 / 2
    for too_few in ([b"a"], [b"a", b""], []):
        with pytest.raises(StudyError, match="at least two samples"):
            character_share(too_few, letters)


def test_tokens_in_characters_of_a_context_by_hand():
    vocabulary = [b"", b"ab", b"x", "é".encode()[:1], "é".encode()[1:], b"xa", "€xx".encode(), "😀".encode()]
    contexts = torch.tensor([[1, 2, 0, 3, 4, 5], [3, 1, 4, 6, 7, 2]], dtype=torch.int32)
    # "xa" is half inside; a letter cut in two is in if its other half is there; of "€xx" three bytes of five are the sign.
    assert in_characters(contexts, vocabulary, inside("[abé€😀]")).tolist() == [
        [True, False, False, True, True, True], [False, True, False, True, True, False]]
    runs = in_characters(torch.tensor([[1, 1, 0, 1, 2, 1], [1, 0, 1, 2, 1, 1]]), vocabulary, inside("(?:ab){2}"))
    assert runs.tolist() == [[True, True, False, False, False, False], [False, False, False, False, True, True]]


def test_character_shares_have_an_interval_over_samples():
    assert character_share([b"ax"] * 30, inside("a"), n_boot=100) == (0.5, 0.5, 0.5)
    mixed = character_share([b"aa", b"xx"] * 30, inside("a"), n_boot=200)
    assert 0.3 < mixed.low < 0.45 < mixed.value < 0.55 < mixed.high < 0.7


def test_the_mean_effect_by_hand():
    effects, chosen = np.array([-1.0, 5, -3, -8], np.float32), np.array([True, False, True, True])
    one = mean_effect(effects, chosen, np.array([0, 0, 1, 1]), n_boot=50)
    assert one.value == -4
    assert (one.low, one.high) == (-5.5, -1)  # only the second document, only the first
    assert math.isnan(mean_effect(effects, chosen & ~chosen, np.array([0, 0, 1, 1]), n_boot=5).value)
