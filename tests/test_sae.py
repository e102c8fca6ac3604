"""The dictionary itself: what it computes, where its bias starts, and what is on disk."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_lib.errors import StudyError
from sae_lib.sae import SAE, SAEConfig


def random_sae(d_in=6, d_sae=10):
    """Non-zero parameters everywhere, so that a bias that is forgotten cannot hide."""
    sae, rng = SAE(SAEConfig(d_in, d_sae, model_name="m", hook_name="h", context_size=7)), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape, generator=rng))
    sae.metadata = {"l0": 3.5, "training": {"lr": 1e-3}}
    return sae.requires_grad_(False)


def test_forward_of_a_literal_dictionary():
    sae = SAE(SAEConfig(2, 3)).requires_grad_(False)
    sae.W_enc.copy_(torch.tensor([[1.0, 0.0, 1.0], [0.0, 2.0, 1.0]]))
    sae.b_enc.copy_(torch.tensor([0.0, -1.0, -10.0]))
    sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
    sae.b_dec.copy_(torch.tensor([1.0, -1.0]))
    features, x_hat = sae(torch.tensor([[3.0, 2.0]]))
    # x - b_dec = (2, 3); pre = (2, 6, 5) + (0, -1, -10); x_hat = (2, 5) + b_dec.
    assert features.tolist() == [[2.0, 5.0, 0.0]]
    assert x_hat.tolist() == [[3.0, 4.0]]
    assert sae.encode(torch.tensor([[3.0, 2.0]]), [2, 0]).tolist() == [[0.0, 2.0]]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_some_features_are_columns_of_all(kind):
    sae, x = random_sae(), torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(sae.encode(x, kind([7, 0, 7])), sae.encode(x)[..., [7, 0, 7]])


def test_initialisation_is_kaiming_uniform_with_unit_rows_and_depends_on_the_seed_alone():
    sae = SAE(SAEConfig(64, 1000, seed=1))
    bound = 1 / 8
    assert 0.99 * bound < sae.W_enc.abs().max() <= bound
    assert sae.W_enc.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.01)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(1000))
    torch.rand(5)
    assert torch.equal(sae.W_enc, SAE(SAEConfig(64, 1000, seed=1)).W_enc)
    assert not torch.equal(sae.W_enc, SAE(SAEConfig(64, 1000, seed=2)).W_enc)
    # Untied: encoder and decoder are drawn apart.
    cosine = torch.cosine_similarity(sae.W_enc.T, sae.W_dec, dim=1)
    assert cosine.abs().mean() < 0.2


def test_folding_the_scale_gives_the_same_dictionary_for_unscaled_activations():
    sae, x, scale = random_sae(), torch.randn(50, 6, generator=torch.Generator().manual_seed(4)), 2.7
    features, x_hat = sae(scale * x)
    W_dec = sae.W_dec.clone()
    folded_features, folded_x_hat = sae.fold_scale_(scale)(x)
    torch.testing.assert_close(folded_features * scale, features)
    torch.testing.assert_close(folded_x_hat * scale, x_hat)
    assert torch.equal(sae.W_dec, W_dec)


def test_files_have_the_saelens_layout_and_can_be_read_without_this_library(tmp_path):
    sae, x = random_sae(), torch.randn(5, 6, generator=torch.Generator().manual_seed(4))
    sae.save(tmp_path)
    cfg, w = json.loads((tmp_path / "cfg.json").read_text()), load_file(tmp_path / "sae_weights.safetensors")
    assert {k: tuple(v.shape) for k, v in w.items()} == {"W_enc": (6, 10), "b_enc": (10,), "W_dec": (10, 6), "b_dec": (6,)}
    metadata = cfg.pop("metadata")
    assert cfg == {"architecture": "standard", "d_in": 6, "d_sae": 10, "dtype": "float32", "device": "cpu",
                   "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"}
    assert metadata["sae_lens_version"] == "6.0.0" and metadata["l0"] == 3.5
    assert (metadata["hook_name"], metadata["model_name"], metadata["context_size"]) == ("h", "m", 7)
    features = torch.relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    torch.testing.assert_close(sae(x).reconstruction, features @ w["W_dec"] + w["b_dec"])


def test_what_is_saved_is_what_is_loaded(tmp_path):
    sae = random_sae()
    sae.save(tmp_path)
    loaded = SAE.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), loaded.parameters(), strict=True))
    assert loaded.metadata == sae.metadata
    assert loaded.config == sae.config
    assert {f.name for f in tmp_path.iterdir()} == {"cfg.json", "sae_weights.safetensors"}


def test_half_precision_halves_the_file_and_is_read_as_float32(tmp_path):
    sae = random_sae()
    sae.save(tmp_path, torch.float16)
    loaded = SAE.load(tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["dtype"] == "float16"
    stored = load_file(tmp_path / "sae_weights.safetensors")
    for (name, value), read in zip(sae.named_parameters(), loaded.parameters(), strict=True):
        assert stored[name].dtype == torch.float16 and read.dtype == torch.float32
        assert torch.equal(read, value.half().float())


def rewrite(folder, **changes):
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg | changes))


def truncate(folder):
    weights = folder / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def put(folder, name, value):
    weights = load_file(folder / "sae_weights.safetensors")
    save_file(weights | {name: value}, folder / "sae_weights.safetensors")


@pytest.mark.parametrize("harm, message", [
    (lambda f: (f / "cfg.json").unlink(), "lacks cfg.json"),
    (lambda f: (f / "sae_weights.safetensors").unlink(), "lacks sae_weights.safetensors"),
    (lambda f: (f / "cfg.json").write_text("{"), "damaged"),
    (lambda f: (f / "cfg.json").write_text("[]"), "damaged"),
    (lambda f: (f / "cfg.json").write_bytes(b"\xff\xfe\x00"), "damaged"),
    (lambda f: rewrite(f, metadata=None), "damaged"),
    (lambda f: rewrite(f, d_in="six"), "damaged"),
    (truncate, "damaged"),
    (lambda f: rewrite(f, architecture="transcoder"), "architecture = 'transcoder'"),
    (lambda f: rewrite(f, architecture=["standard"]), "damaged"),
    (lambda f: rewrite(f, normalize_activations="layer_norm"), "normalize_activations"),
    (lambda f: rewrite(f, d_sae=11), "do not fit"),
    (lambda f: put(f, "threshold", torch.ones(10)), "do not fit"),
    (lambda f: put(f, "b_dec", torch.full((6,), float("nan"))), "do not fit"),
])
def test_a_broken_folder_is_refused_in_one_sentence(tmp_path, harm, message):
    random_sae().save(tmp_path)
    harm(tmp_path)
    with pytest.raises(StudyError, match=message) as error:
        SAE.load(tmp_path)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
