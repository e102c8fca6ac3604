"""Causes of a feature: in a model that passes its residual stream on, by hand; in another, against the bridge."""

import numpy as np
import pytest
import torch
from texts import make_text, scrambled, table

from sae_lib import residual
from sae_lib.causal_tree import Effects, Layers, _alike, causes, effects, grow, strong_places, together, weight_guess
from sae_lib.errors import StudyError
from sae_lib.features import activation_table
from sae_lib.sae import SAE, SAEConfig
from sae_lib.seeds import generator
from sae_lib.transformer import TransformerConfig, build, parameters

CONFIG = TransformerConfig(n_tokens=1, d_vocab=40, n_ctx=10, n_layers=2, d_model=16, n_heads=2, d_mlp=24)


def layers_of(model, n_contexts=60) -> Layers:
    text = make_text(torch.randint(1, 40, (n_contexts, 10), generator=generator(0, "tokens")))
    dictionaries = {after: SAE(SAEConfig(16, 32, seed=after)).requires_grad_(False) for after in range(3)}
    tables = {after: activation_table(model, text.contexts, sae.encode, after) for after, sae in dictionaries.items()}
    return Layers(model, dictionaries, tables, text)


@pytest.fixture(scope="module")
def layers():
    return layers_of(scrambled(CONFIG))


@pytest.fixture(scope="module")
def passing():
    """Layers that add nothing to the residual stream: a feature's cause is what is read of it in the same place."""
    model = build(CONFIG).eval().requires_grad_(False)
    for name, value in parameters(model).items():
        if ".attn.o." in name or ".fc_out." in name:
            value.zero_()
        if "embed" in name or "pos" in name:
            value.mul_(50)  # of the size of the dictionaries' thresholds
    return layers_of(model)


def strongest(layers, after):
    return int(np.diff(layers.tables[after].indptr).argmax())


def test_strong_places_by_hand():
    documents = np.repeat(np.arange(4), 3)
    acts = table(np.array([[8, 9, 0, 4, 0, 5, 10, 0, 0, 4.9, 0, 1.0]]).T)
    found = strong_places(acts, 0, documents, 10, 0)
    assert sorted(documents[found].tolist()) == [0, 1, 2] and {5, 6} < set(found.tolist()) and found.min() in (0, 1)
    assert len(strong_places(acts, 0, documents, 2, 0)) == 2
    assert (strong_places(acts, 0, documents, 10, 0) == found).all()
    assert not len(strong_places(table(np.zeros((12, 1))), 0, documents, 10, 0))


def test_in_a_model_that_passes_on_the_share_is_a_product_of_weights(passing):
    feature = strongest(passing, 1)
    places = strong_places(passing.tables[1], feature, passing.text.documents.flatten().numpy(), 6, 0)
    found = effects(passing, 1, feature, places)
    target, before = passing.dictionaries[1], passing.dictionaries[0]
    resid = residual.activations(passing.model, passing.text.contexts, 0).flatten(0, 1)[places]
    codes, clean = before.encode(resid), target.encode(resid, [feature])
    read = before.W_dec @ target.W_enc[:, feature]
    expected = 1 - torch.relu(clean - codes * read) / clean
    torch.testing.assert_close(torch.from_numpy(found.lost), expected, atol=1e-4, rtol=1e-3)
    group = [3, 8, 20]
    joint = 1 - torch.relu(clean - (codes * read)[:, group].sum(1, keepdim=True)) / clean
    torch.testing.assert_close(torch.from_numpy(together(passing, 1, feature, places, group)), joint[:, 0], atol=1e-4, rtol=1e-3)


def test_effects_equal_ablations_through_the_bridge(layers):
    feature, after = strongest(layers, 2), 2
    places = layers.tables[2].indices[layers.tables[2].indptr[feature]:][:3]
    found = effects(layers, after, feature, places, candidates=[0, 5, 7, 9])
    for i, place in enumerate(places.tolist()):
        tokens, position = layers.text.contexts[place // 10][None], place % 10
        clean = layers.dictionaries[2].encode(residual.activations(layers.model, tokens, 2)[0, position])[feature]
        for unit in (0, 5, 7, 9):
            def ablate(acts, hook, unit=unit):
                return acts - layers.dictionaries[1].encode(acts, [unit]) * layers.dictionaries[1].W_dec[unit]

            cache = {}
            layers.model.run_with_hooks(tokens, fwd_hooks=[
                (residual.hook_name(layers.model, 1), ablate),
                (residual.hook_name(layers.model, 2), lambda acts, hook, cache=cache: cache.update(end=acts))])
            changed = layers.dictionaries[2].encode(cache["end"][0, position])[feature]
            assert found.lost[i, unit] == pytest.approx(float(1 - changed / clean), abs=1e-3)
        codes = layers.dictionaries[1].encode(residual.activations(layers.model, tokens, 1)[0, :position + 1])
        assert (found.active[i] == (codes > 0).any(0).numpy()).all()
        np.testing.assert_allclose(found.here[i], codes[-1], atol=1e-5)
    assert not np.delete(found.lost, [0, 5, 7, 9], axis=1).any()


def test_causes_are_measured_where_they_were_not_ranked(layers):
    feature = strongest(layers, 2)
    found = causes(layers, 2, feature, 3, n_places=8, n_boot=50)
    assert found.table.kind.tolist() == ["cause"] * 3 + ["alike"] * 3 + ["together"]
    assert len(found.ranking.lost) == 8
    ranked = found.table.ranked[:3].to_numpy()
    assert (np.diff(ranked) <= 0).all() and np.isclose(ranked[0], found.ranking.mean.max())
    assert found.table.feature[:6].is_unique
    known = found.table.dropna(subset="value")
    assert ((known.low <= known.value + 1e-6) & (known.value <= known.high + 1e-6)).all()
    again = causes(layers, 2, feature, 3, n_places=8, n_boot=50)
    assert again.table.equals(found.table)


def test_features_alike_are_as_often_active_at_the_place_and_then_as_strongly():
    here = np.array([[5.0, 4.0, 9.0, 0.0, 0.0, 0.1], [5.0, 4.0, 9.0, 3.0, 0.0, 0.1], [5.0, 4.0, 9.0, 0.0, 0.0, 0.0]])
    everywhere = Effects(np.zeros_like(here), np.ones(here.shape, dtype=bool), here)
    drawn = {tuple(_alike(everywhere, np.array([0]), np.random.default_rng(seed)).tolist()) for seed in range(30)}
    assert drawn == {(1,), (2,), (5,)}  # at all three places, as strong; stronger; at two of them: not what is active elsewhere
    for seed in range(9):
        assert len({0, 1, *_alike(everywhere, np.array([0, 1]), np.random.default_rng(seed)).tolist()}) == 4  # each but once


def test_the_tree_has_its_branches_down_to_the_first_dictionary(layers):
    feature = strongest(layers, 2)
    tree = grow(layers, 2, feature, (2, 1), n_places=5, n_boot=20)
    assert (tree.node == np.arange(len(tree))).all()
    assert tree[tree.parent == 0].kind.tolist() == ["cause"] * 2 + ["alike"] * 2 + ["together"]
    assert set(tree[tree.parent > 0].after) <= {0}
    assert set(tree.parent[tree.parent > 0]) <= set(tree.node[(tree.kind == "cause") & (tree.after == 1)])


def test_a_feature_that_is_hardly_ever_strong(layers):
    empty = layers._replace(tables={2: table(np.zeros((600, 32)))})
    with pytest.raises(StudyError, match="strongly active in 0 documents"):
        causes(empty, 2, 0, 2)
    with pytest.raises(StudyError, match="too few"):
        grow(empty, 2, 0, (2, 1))


def test_nothing_comes_before_the_first_dictionary(layers):
    with pytest.raises(StudyError, match="no dictionary after -1 layers"):
        causes(layers, 0, strongest(layers, 0), 2)
    tree = grow(layers, 1, strongest(layers, 1), (1, 1, 1), n_places=5, n_boot=20)
    assert set(tree.after[tree.parent >= 0]) == {0}


def test_guesses_from_weights():
    before, target = SAE(SAEConfig(4, 4)).requires_grad_(False), SAE(SAEConfig(4, 1)).requires_grad_(False)
    before.W_dec.copy_(torch.eye(4))
    target.W_enc.copy_(torch.tensor([[4.0], [3.0], [2.0], [-9.0]]))
    target.W_dec.copy_(torch.tensor([[1.0, 2.0, 3.0, 0.0]]))
    ranking = Effects(np.array([[0.9, 0.5, 0.1, 0.0]], np.float32), np.array([[True, True, True, False]]), np.zeros((1, 4)))
    assert weight_guess(before, target, 0, ranking) == (pytest.approx(1), pytest.approx(-1), True)
    assert weight_guess(before, target, 0, ranking._replace(lost=-ranking.lost)) == (pytest.approx(-1), pytest.approx(1), False)
