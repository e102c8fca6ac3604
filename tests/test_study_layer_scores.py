"""Scores by layer, at a size of seconds."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from texts import tiny_study

from sae_lib.study import deep, layer_scores
from sae_lib.study.profiles import SMOKE
from sae_lib.study.scores import differences, summary
from sae_lib.transformer import TransformerConfig

DRAWS = {"seed": 0, "n_boot": 50}


@pytest.fixture
def study(tmp_path, monkeypatch):
    model = TransformerConfig(n_tokens=8192, d_vocab=290, n_ctx=64, n_layers=2, d_model=16, n_heads=2, d_mlp=24, batch_contexts=8)
    sizes = replace(SMOKE.deep, transformer=model,
                    dictionary=replace(SMOKE.deep.dictionary, n_activations=2560, batch_size=128, resample_inputs=256))
    return tiny_study(tmp_path, monkeypatch, n_ctx=64, deep=sizes, scored_units=6, component_sample=512)


def test_the_k_largest_of_each_row():
    values = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 0.0, 5.0, 4.0]])
    assert layer_scores.top_k(values, 2).tolist() == [[3.0, 0.0, 2.0, 0.0], [0.0, 0.0, 5.0, 4.0]]
    assert torch.equal(layer_scores.top_k(values, 9), values)


def test_every_kind_reads_the_residual_stream_and_nothing_is_negative(study):
    made = study()
    acts = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    for name in layer_scores.KINDS:
        kind = layer_scores.kind(made, name, 1)
        some = kind.encode(acts, torch.tensor([3, 0]))
        assert some.shape == (20, 2) and (some >= 0).all(), name
        assert kind.n_units == (64 if name == "feature" else 16)
        assert torch.equal(some[:, [1, 0]], kind.encode(acts, torch.tensor([0, 3])))
    # Keeping the k largest of a row leaves no row with more.
    k = max(1, round(float(deep.dictionary(made, 1).model.metadata["l0"])))
    kept = layer_scores.kind(made, "top_k_pca", 1).encode(acts, torch.arange(16))
    full = layer_scores.kind(made, "pca", 1).encode(acts, torch.arange(16))
    assert ((kept > 0).sum(1) <= k).all() and torch.equal(kept[kept > 0], full[kept > 0])


def test_all_kinds_of_all_layers_are_scored_once(study):
    made = study()
    found = layer_scores.scores(made)
    assert set(found["after"]) == {1, 2} and set(found.kind) == set(layer_scores.KINDS)
    assert found.groupby(["after", "kind"]).apply(lambda part: (part.dropped == "").sum(), include_groups=False).max() <= 6
    pd.testing.assert_frame_equal(layer_scores.scores(study("load")), found)
    of_layer = layer_scores.of_layer(found, 2)
    table = summary(of_layer, "top_random", np.mean, **DRAWS)
    assert list(table.index) == list(layer_scores.KINDS)
    assert set(differences(of_layer, "top_random", statistic=np.mean, **DRAWS).index) <= set(layer_scores.KINDS) - {"feature"}
