"""The deeper model and its dictionaries, at a size of seconds."""

from dataclasses import replace

import pytest
import torch
from texts import tiny_study

from sae_lib.errors import StudyError
from sae_lib.study import deep
from sae_lib.study.profiles import SMOKE
from sae_lib.transformer import TransformerConfig


@pytest.fixture
def study(tmp_path, monkeypatch):
    model = TransformerConfig(n_tokens=4096, d_vocab=290, n_ctx=32, n_layers=2, d_model=16, n_heads=2, d_mlp=24, batch_contexts=8)
    sizes = replace(SMOKE.deep, transformer=model,
                    dictionary=replace(SMOKE.deep.dictionary, n_activations=2560, batch_size=128, resample_inputs=256))
    return tiny_study(tmp_path, monkeypatch, n_ctx=32, deep=sizes)


def test_made_once_and_loaded_after(study):
    made = study()
    with pytest.raises(StudyError, match="ARTEFACTS is \"load\""):
        deep.transformer(study("load"))
    dictionaries = [deep.dictionary(made, after) for after in range(3)]
    assert deep.transformer(made).model.cfg.n_layers == 2
    assert [d.model.config.hook_name for d in dictionaries] == ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre",
                                                                 "blocks.1.hook_resid_post"]
    assert dictionaries[0].model.config.d_sae == 64 and dictionaries[0].model.config.d_in == 16
    loaded = study("load")
    assert torch.equal(deep.dictionary(loaded, 1).model.W_enc, dictionaries[1].model.W_enc)


def test_another_coefficient_is_another_dictionary(study):
    made = study()
    plain, dense = deep.dictionary(made, 1), deep.dictionary(made, 1, l1_coefficient=0.0)
    assert plain.artefact.key != dense.artefact.key
    assert dense.log.l0.iloc[-1] > plain.log.l0.iloc[-1]
