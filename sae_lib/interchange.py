"""Dictionaries on disk: reading them, whether in SAELens' layout, which is also ours, dictionary_learning's or sparsify's.

What is read has the activations that the library's own loader and `encode` would give. Where they differ from here in what is
subtracted before the encoder, or in how long a decoder row is, that is worked into the weights; where a dictionary computes
what none here does, it is refused.
"""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae_lib.errors import StudyError
from sae_lib.sae import CONFIG_FILE, SAE, WEIGHTS_FILE, GatedSAE, JumpReLUSAE, SAEConfig, TopKSAE

Weights = dict[str, Tensor]
UNREADABLE = (OSError, EOFError, SafetensorError, pickle.UnpicklingError, ValueError, KeyError, TypeError, AttributeError,
              RuntimeError)
TRAINER_KEYS = ("trainer_class", "lr", "steps", "k", "l1_penalty", "sparsity_penalty", "target_l0")


def read(folder: Path) -> SAE:
    """The dictionary in a folder of SAELens or this project (`cfg.json`, `sae_weights.safetensors`), dictionary_learning
    (`config.json`, `ae.pt`) or sparsify (`cfg.json`, `sae.safetensors`).

    Raises StudyError if there is none, if it is damaged, or if it is of a kind that is not known here.
    """
    weights_file = next((name for name in LAYOUTS if (folder / name).is_file()), WEIGHTS_FILE)
    config_file, layout = LAYOUTS[weights_file]
    for name in (config_file, weights_file):
        if not (folder / name).is_file():
            raise StudyError(f"{folder} holds no dictionary, for it lacks {name}; give the folder that an SAE was saved to.")
    try:
        cfg = json.loads((folder / config_file).read_text())
        # Of a pickle only tensors are taken: anything else could be a program.
        found = (torch.load(folder / weights_file, map_location="cpu", weights_only=True) if weights_file.endswith(".pt")
                 else load_file(folder / weights_file))
        return layout(folder, cfg, {name: value.float() for name, value in found.items()}).requires_grad_(False)
    except StudyError:
        raise
    except UNREADABLE as error:
        raise StudyError(f"The dictionary in {folder} is damaged ({type(error).__name__}); delete the folder and make or get it "
                         "again.") from error


def _filled(sae: SAE, weights: Weights, folder: Path) -> SAE:
    """A dictionary with these weights. Raises StudyError unless they are all there, of its sizes and finite."""
    shapes = {name: tuple(value.shape) for name, value in sae.named_parameters()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if shapes != found or not all(value.isfinite().all() for value in weights.values()):
        raise StudyError(f"The weights in {folder} do not fit its configuration ({found} instead of {shapes}, all finite); "
                         "delete the folder and make or get it again.")
    sae.load_state_dict(weights)
    return sae


def _refuse(folder: Path, cfg: dict, expected: dict) -> None:
    """Raises StudyError if a setting is there and not as expected."""
    for key, value in expected.items():
        if cfg.get(key, value) != value:
            raise StudyError(f"The dictionary in {folder} has {key} = {cfg[key]!r} where only {value!r} can be read; convert it "
                             "first.")


# --- SAELens ---------------------------------------------------------------------------------------------------------

def _saelens(folder: Path, cfg: dict, w: Weights) -> SAE:
    """SAELens 6: {"architecture", "d_in", "d_sae", ..., "metadata": {...}} and the weights by their names here."""
    kind, metadata = SAE.kinds.get(cfg.get("architecture")), dict(cfg["metadata"])
    if kind is None:
        raise StudyError(f"The dictionary in {folder} has architecture = {cfg.get('architecture')!r}, and only "
                         f"{', '.join(SAE.kinds)} can be read; convert it first.")
    _refuse(folder, cfg, {"normalize_activations": "none", "reshape_activations": "none"})
    own = {name: metadata.pop(name, None) for name in ("seed", "model_name", "hook_name", "context_size", "prepend_bos",
                                                       "sae_lens_version")}
    config = SAEConfig(cfg["d_in"], cfg["d_sae"], own["seed"] or 0, own["model_name"] or "", own["hook_name"] or "",
                       own["context_size"] or 0)
    sae = _filled(kind.from_settings(config, cfg), w, folder)
    if not cfg.get("apply_b_dec_to_input", True):
        sae.enter_decoder_bias_()
    if cfg.get("rescale_acts_by_decoder_norm"):
        sae.enter_decoder_norms_()
    sae.metadata = metadata
    return sae


# --- dictionary_learning ---------------------------------------------------------------------------------------------

def _dictionary_learning(folder: Path, cfg: dict, w: Weights) -> SAE:
    """A folder of trainSAE: {"trainer": {"dict_class", "activation_dim", ...}, "buffer": {...}} and a state dict."""
    trainer = cfg["trainer"]
    kind = DICT_CLASSES.get(trainer["dict_class"])
    if kind is None:
        raise StudyError(f"The dictionary in {folder} is of the class {trainer['dict_class']!r}, and only "
                         f"{', '.join(DICT_CLASSES)} can be read; convert it first.")
    config = SAEConfig(trainer["activation_dim"], trainer["dict_size"], trainer.get("seed") or 0,
                       trainer.get("lm_name") or "", trainer.get("submodule_name") or "",
                       (cfg.get("buffer") or {}).get("ctx_len") or 0)
    sae = kind(config, trainer, w, folder)
    sae.metadata = {"trainer": {key: trainer[key] for key in TRAINER_KEYS if key in trainer}}
    return sae


def _linear(w: Weights, b_dec: str) -> Weights:
    """The four weights of one that is made of two linear layers; what a decoder's layer calls its bias differs."""
    return {"W_enc": w["encoder.weight"].T, "b_enc": w["encoder.bias"], "W_dec": w["decoder.weight"].T, "b_dec": w[b_dec]}


def _auto_encoder(config: SAEConfig, _: dict, w: Weights, folder: Path) -> SAE:
    # Its loader gives decoder rows unit norm unless asked not to.
    return _filled(SAE(config), _linear(w, "bias"), folder).enter_decoder_norms_()


def _auto_encoder_new(config: SAEConfig, _: dict, w: Weights, folder: Path) -> SAE:
    return _filled(SAE(config), _linear(w, "decoder.bias"), folder).enter_decoder_bias_()


def _top_k(config: SAEConfig, trainer: dict, w: Weights, folder: Path) -> SAE:
    # It has a threshold as well, but encodes by k unless asked for it.
    return _filled(TopKSAE(config, int(w["k"] if "k" in w else trainer["k"])), _linear(w, "b_dec"), folder)


def _batch_top_k(config: SAEConfig, _: dict, w: Weights, folder: Path) -> SAE:
    threshold = w["threshold"].expand(config.d_sae)  # -1 until training has set it: then everything passes, as there
    weights = _linear(w, "b_dec") if "encoder.weight" in w else {name: w[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    return _filled(JumpReLUSAE(config), weights | {"threshold": threshold}, folder)


def _jump_relu(config: SAEConfig, _: dict, w: Weights, folder: Path) -> SAE:
    return _filled(JumpReLUSAE(config), w, folder).enter_decoder_bias_()


def _gated(config: SAEConfig, _: dict, w: Weights, folder: Path) -> SAE:
    return _filled(GatedSAE(config), {"W_enc": w["encoder.weight"].T, "W_dec": w["decoder.weight"].T, "b_dec": w["decoder_bias"],
                                      "b_gate": w["gate_bias"], "b_mag": w["mag_bias"], "r_mag": w["r_mag"]}, folder)


DICT_CLASSES: dict[str, Callable[[SAEConfig, dict, Weights, Path], SAE]] = {
    "AutoEncoder": _auto_encoder, "AutoEncoderNew": _auto_encoder_new, "AutoEncoderTopK": _top_k, "BatchTopKSAE": _batch_top_k,
    "MatryoshkaBatchTopKSAE": _batch_top_k, "JumpReluAutoEncoder": _jump_relu, "GatedAutoEncoder": _gated}


# --- sparsify --------------------------------------------------------------------------------------------------------

def _sparsify(folder: Path, cfg: dict, w: Weights) -> SAE:
    """A folder of one hook point; the run's `config.json` beside it names the model."""
    _refuse(folder, cfg, {"activation": "topk", "transcode": False, "skip_connection": False, "signed": False})
    run = folder.parent / "config.json"
    made = json.loads(run.read_text()) if run.is_file() else {}
    d_in = cfg["d_in"]
    config = SAEConfig(d_in, cfg.get("num_latents") or d_in * cfg["expansion_factor"], made.get("seed") or 0,
                       made.get("model") or "", folder.name, made.get("ctx_len") or 0)
    weights = {"W_enc": w["encoder.weight"].T, "b_enc": w["encoder.bias"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    return _filled(TopKSAE(config, int(cfg["k"])), weights, folder)


LAYOUTS: dict[str, tuple[str, Callable[[Path, dict, Weights], SAE]]] = {
    WEIGHTS_FILE: (CONFIG_FILE, _saelens), "ae.pt": ("config.json", _dictionary_learning),
    "sae.safetensors": (CONFIG_FILE, _sparsify)}
