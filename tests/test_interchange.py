"""Files in the layouts of other libraries, written here as those write them, and activations computed by hand.

x = (3, 2) and b_dec = (1, -1). With b_dec subtracted the encoder's columns (1, 0), (0, 2), (1, 1) and biases (0, -1, -10) give
(2, 5, -5); without, (3, 3, -5).
"""

import json

import pytest
import torch
from safetensors.torch import save_file

from sae_lib.errors import StudyError
from sae_lib.interchange import read
from sae_lib.sae import SAE, GatedSAE, JumpReLUSAE, TopKSAE

X = torch.tensor([[3.0, 2.0]])
W_ENC, B_ENC = torch.tensor([[1.0, 0.0, 1.0], [0.0, 2.0, 1.0]]), torch.tensor([0.0, -1.0, -10.0])
W_DEC, B_DEC = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]), torch.tensor([1.0, -1.0])
LONG = W_DEC * torch.tensor([[2.0], [0.5], [1.0]])
ENCODER = {"encoder.weight": W_ENC.T.contiguous(), "encoder.bias": B_ENC}
DECODER = {"decoder.weight": W_DEC.T.contiguous()}
FOUR = {"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
GATED = {"b_gate": torch.tensor([-3.0, -3.0, -9.0]), "r_mag": torch.tensor([1.0, 2.0, 1.0]).log(),
         "b_mag": torch.tensor([0.0, -1.0, 0.0])}


def dictionary_learning(folder, dict_class, weights, **trainer):
    trainer = {"dict_class": dict_class, "activation_dim": 2, "dict_size": 3, "lr": 1e-3, "seed": 5, "lm_name": "a model",
               "submodule_name": "mlp_3"} | trainer
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 64}}))
    torch.save(weights, folder / "ae.pt")


def saelens(folder, architecture, weights, **cfg):
    cfg = {"architecture": architecture, "d_in": 2, "d_sae": 3, "dtype": "float32", "apply_b_dec_to_input": True,
           "normalize_activations": "none", "reshape_activations": "none",
           "metadata": {"sae_lens_version": "6.54.12", "l0": 2}} | cfg
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "sae_weights.safetensors")


def sparsify(folder, **cfg):
    (folder / "layers.3").mkdir()
    (folder / "config.json").write_text(json.dumps({"model": "a model", "ctx_len": 64}))
    cfg = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": 3, "k": 1, "multi_topk": False,
           "skip_connection": False, "transcode": False, "d_in": 2} | cfg
    (folder / "layers.3" / "cfg.json").write_text(json.dumps(cfg))
    save_file(ENCODER | {"W_dec": W_DEC, "b_dec": B_DEC}, folder / "layers.3" / "sae.safetensors")
    return folder / "layers.3"


def found(folder, kind, features, reconstruction):
    sae = read(folder)
    assert type(sae) is kind and sae.b_dec.tolist() == [1, -1]
    assert not any(value.requires_grad for value in sae.parameters())
    got = sae(X)
    torch.testing.assert_close(got.features, torch.tensor([features]))
    torch.testing.assert_close(got.reconstruction, torch.tensor([reconstruction]))
    # What is read here is saved in our layout, and read again.
    sae.save(folder / "again")
    torch.testing.assert_close(SAE.load(folder / "again")(X), got)
    return sae


THRESHOLD, K = {"threshold": torch.tensor(4.0)}, {"k": torch.tensor(1, dtype=torch.int)}


@pytest.mark.parametrize("dict_class, weights, kind, features, reconstruction", [
    # Its loader makes decoder rows 1 long: 2 * 2 and 0.5 * 5.
    ("AutoEncoder", ENCODER | {"decoder.weight": LONG.T.contiguous(), "bias": B_DEC}, SAE, [4.0, 2.5, 0.0], [5.0, 1.5]),
    ("AutoEncoderNew", ENCODER | DECODER | {"decoder.bias": B_DEC}, SAE, [3.0, 3.0, 0.0], [4.0, 2.0]),
    # Encodes by k, though a threshold of 1 would let 2 pass.
    ("AutoEncoderTopK", ENCODER | DECODER | K | {"b_dec": B_DEC, "threshold": torch.tensor(1.0)}, TopKSAE, [0.0, 5.0, 0.0],
     [1.0, 4.0]),
    # Encodes by the threshold, whatever k says.
    ("BatchTopKSAE", ENCODER | DECODER | THRESHOLD | {"b_dec": B_DEC, "k": torch.tensor(2, dtype=torch.int)}, JumpReLUSAE,
     [0.0, 5.0, 0.0], [1.0, 4.0]),
    ("BatchTopKSAE", ENCODER | DECODER | K | {"b_dec": B_DEC, "threshold": torch.tensor(-1.0)}, JumpReLUSAE, [2.0, 5.0, 0.0],
     [3.0, 4.0]),
    ("MatryoshkaBatchTopKSAE", FOUR | THRESHOLD | K | {"group_sizes": torch.tensor([1, 2])}, JumpReLUSAE, [0.0, 5.0, 0.0],
     [1.0, 4.0]),
    # Subtracts nothing; 3 is not above 3.
    ("JumpReluAutoEncoder", FOUR | {"threshold": torch.tensor([3.0, 2.0, 0.0])}, JumpReLUSAE, [0.0, 3.0, 0.0], [1.0, 2.0]),
    # Of (2, 6, 5) only 6 - 3 is above 0; it counts 2 * 6 - 1.
    ("GatedAutoEncoder", {"encoder.weight": ENCODER["encoder.weight"], **DECODER, "decoder_bias": B_DEC,
                          "gate_bias": GATED["b_gate"], "r_mag": GATED["r_mag"], "mag_bias": GATED["b_mag"]}, GatedSAE,
     [0.0, 11.0, 0.0], [1.0, 10.0]),
])
def test_dictionary_learning(tmp_path, dict_class, weights, kind, features, reconstruction):
    dictionary_learning(tmp_path, dict_class, weights, k=1)
    sae = found(tmp_path, kind, features, reconstruction)
    assert (sae.config.seed, sae.config.model_name, sae.config.hook_name, sae.config.context_size) == (5, "a model", "mlp_3", 64)
    assert sae.metadata == {"trainer": {"lr": 1e-3, "k": 1}}


@pytest.mark.parametrize("architecture, weights, cfg, kind, features, reconstruction", [
    ("standard", FOUR, {}, SAE, [2.0, 5.0, 0.0], [3.0, 4.0]),
    ("standard", FOUR, {"apply_b_dec_to_input": False}, SAE, [3.0, 3.0, 0.0], [4.0, 2.0]),
    ("jumprelu", FOUR | {"threshold": torch.tensor([3.0, 2.0, 0.0])}, {"apply_b_dec_to_input": False}, JumpReLUSAE,
     [0.0, 3.0, 0.0], [1.0, 2.0]),
    ("topk", FOUR, {"k": 1, "rescale_acts_by_decoder_norm": False}, TopKSAE, [0.0, 5.0, 0.0], [1.0, 4.0]),
    # 2 * 2 is more than 0.5 * 5, and its row is 1 long as well.
    ("topk", FOUR | {"W_dec": LONG}, {"k": 1, "rescale_acts_by_decoder_norm": True}, TopKSAE, [4.0, 0.0, 0.0], [5.0, -1.0]),
    ("gated", {name: FOUR[name] for name in ("W_enc", "W_dec", "b_dec")} | GATED, {}, GatedSAE, [0.0, 11.0, 0.0], [1.0, 10.0]),
    # Nothing subtracted, (3, 4, 5): gates (0, 1, -4), so again the second alone, at 2 * 4 - 1.
    ("gated", {name: FOUR[name] for name in ("W_enc", "W_dec", "b_dec")} | GATED, {"apply_b_dec_to_input": False}, GatedSAE,
     [0.0, 7.0, 0.0], [1.0, 6.0]),
])
def test_saelens(tmp_path, architecture, weights, cfg, kind, features, reconstruction):
    saelens(tmp_path, architecture, weights, **cfg)
    assert found(tmp_path, kind, features, reconstruction).metadata == {"l0": 2}


def test_sparsify(tmp_path):
    sae = found(sparsify(tmp_path), TopKSAE, [0.0, 5.0, 0.0], [1.0, 4.0])
    assert (sae.k, sae.config.model_name, sae.config.hook_name, sae.config.context_size) == (1, "a model", "layers.3", 64)


def test_sparsify_counts_its_latents_by_an_expansion_factor_where_it_does_not_say(tmp_path):
    folder = sparsify(tmp_path, num_latents=0, expansion_factor=2)
    with pytest.raises(StudyError, match=r"do not fit .* instead of .*\(2, 4\)"):  # 2 * 2, and the file has 3
        read(folder)


class Program:
    """What a pickle could run."""

    def __reduce__(self):
        return print, ("ran",)


def broken(tmp_path, change):
    dictionary_learning(tmp_path, "AutoEncoder", ENCODER | DECODER | {"bias": B_DEC})
    change(tmp_path)
    return tmp_path


@pytest.mark.parametrize("make, message", [
    (lambda p: broken(p, lambda f: torch.save({"bias": Program()}, f / "ae.pt")), "damaged"),
    (lambda p: broken(p, lambda f: (f / "ae.pt").write_bytes(b"PK")), "damaged"),
    (lambda p: broken(p, lambda f: (f / "config.json").write_text("[]")), "damaged"),
    (lambda p: broken(p, lambda f: (f / "config.json").unlink()), "lacks config.json"),
    (lambda p: broken(p, lambda f: torch.save(ENCODER, f / "ae.pt")), "damaged"),
    (lambda p: broken(p, lambda f: torch.save(ENCODER | DECODER | {"bias": torch.ones(3)}, f / "ae.pt")), "do not fit"),
    (lambda p: broken(p, lambda f: dictionary_learning(f, "IdentityDict", {})), "IdentityDict"),
    (lambda p: sparsify(p, activation="groupmax"), "activation = 'groupmax'"),
    (lambda p: sparsify(p, transcode=True), "transcode"),
    (lambda p: sparsify(p, skip_connection=True), "skip_connection"),
    (lambda p: p, "lacks cfg.json"),
])
def test_what_cannot_be_read_is_refused_in_one_sentence(tmp_path, capsys, make, message):
    with pytest.raises(StudyError, match=message) as error:
        read(make(tmp_path))
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    assert capsys.readouterr().out == ""
