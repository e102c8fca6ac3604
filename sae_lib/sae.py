"""The sparse autoencoder (Bricken et al., App. Architecture; paper_facts B3): a dictionary and how to read it.

    f = relu((x - b_dec) @ W_enc + b_enc)        features, [batch, d_sae]
    x_hat = f @ W_dec + b_dec                    reconstruction, [batch, d_in]

Encoder and decoder are untied, every row of `W_dec` (a dictionary element) has unit norm, and the bias that is subtracted
before the encoder is the decoder's. On disk a dictionary is a folder in the SAELens layout.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sae_lib.errors import StudyError
from sae_lib.seeds import generator

Chosen = Sequence[int] | Int[np.ndarray, " kept"] | Int[Tensor, " kept"]
CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
SAELENS_FORMAT = "6.0.0"  # the version whose layout is written; readers translate anything older


@dataclass(frozen=True)
class SAEConfig:
    """Sizes of a dictionary, and which activations it reads."""

    d_in: int
    d_sae: int
    seed: int = 0
    model_name: str = "one-layer"
    hook_name: str = "blocks.0.mlp.hook_post"
    context_size: int = 256


class SAEOutput(NamedTuple):
    """What one pass through the dictionary gives."""

    features: Tensor
    """Feature activations, [batch, d_sae], none negative."""
    reconstruction: Tensor
    """Reconstructed activations, [batch, d_in]."""


class SAE(nn.Module):
    """A dictionary of `d_sae` features for activations of width `d_in`.

    Attributes:
        metadata: what is written beside the weights and read back: L0, how it was trained, ...
    """

    architecture = "standard"

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]

    def __init__(self, config: SAEConfig):
        super().__init__()
        self.config, self.metadata = config, {}
        rng = generator(config.seed, "sae-init")
        # PyTorch's default for linear layers: uniform within 1 / sqrt(inputs), weights and biases alike.
        bound = 1 / math.sqrt(config.d_in)
        W_dec = torch.empty(config.d_sae, config.d_in).uniform_(-1, 1, generator=rng)
        self.W_enc = nn.Parameter(torch.empty(config.d_in, config.d_sae).uniform_(-bound, bound, generator=rng))
        self.b_enc = nn.Parameter(torch.empty(config.d_sae).uniform_(-bound, bound, generator=rng))
        self.W_dec = nn.Parameter(W_dec / W_dec.norm(dim=1, keepdim=True))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))

    def encode(self, x: Float[Tensor, "*batch d_in"], features: Chosen | None = None) -> Float[Tensor, "*batch kept"]:
        """Activations of all features, or of those whose numbers are given, in their order: the others cost nothing."""
        weight, bias = (self.W_enc, self.b_enc) if features is None else (self.W_enc[:, features], self.b_enc[features])
        return torch.relu((x - self.b_dec) @ weight + bias)

    def decode(self, features: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """The activations that these features stand for."""
        return features @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> SAEOutput:
        features = self.encode(x)
        return SAEOutput(features, self.decode(features))

    @torch.no_grad()
    def fold_scale_(self, scale: float) -> "SAE":
        """Make a dictionary trained on `scale * x` read `x` itself.

        The ReLU is homogeneous: dividing both biases divides features and reconstruction, and the decoder keeps unit norm.
        """
        self.b_enc /= scale
        self.b_dec /= scale
        return self

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write `cfg.json` and `sae_weights.safetensors`, the layout SAELens 6 loads, each replaced in one step.

        In float16 the file is half as large; activations read from it differ in their fourth digit.
        """
        folder.mkdir(parents=True, exist_ok=True)
        cfg = {"architecture": self.architecture, "d_in": self.config.d_in, "d_sae": self.config.d_sae,
               "dtype": str(dtype).removeprefix("torch."), "device": "cpu", "apply_b_dec_to_input": True,
               "normalize_activations": "none", "reshape_activations": "none",
               "metadata": {"sae_lens_version": SAELENS_FORMAT, "model_name": self.config.model_name,
                            "hook_name": self.config.hook_name, "context_size": self.config.context_size,
                            "prepend_bos": False, "seed": self.config.seed} | self.metadata}
        weights = {name: value.detach().cpu().to(dtype).contiguous() for name, value in self.named_parameters()}
        partial = folder / f"{WEIGHTS_FILE}.partial"
        save_file(weights, partial)
        os.replace(partial, folder / WEIGHTS_FILE)
        partial = folder / f"{CONFIG_FILE}.partial"
        partial.write_text(json.dumps(cfg, indent=1))
        os.replace(partial, folder / CONFIG_FILE)

    @classmethod
    def load(cls, folder: Path) -> "SAE":
        """Read a dictionary in SAELens layout.

        Raises StudyError if the folder holds none, or one that is damaged or of another kind.
        """
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise StudyError(f"{folder} holds no dictionary, for it lacks {name}; give the folder that an SAE was saved to.")
        try:
            cfg = json.loads((folder / CONFIG_FILE).read_text())
            metadata = cfg["metadata"]
            config = SAEConfig(cfg["d_in"], cfg["d_sae"], metadata.get("seed", 0), metadata.get("model_name", ""),
                               metadata.get("hook_name", ""), metadata.get("context_size", 0))
            weights = {name: value.float() for name, value in load_file(folder / WEIGHTS_FILE).items()}
            sae = cls(config)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise StudyError(f"The dictionary in {folder} is damaged ({type(error).__name__}); delete the folder and make "
                             "it again.") from error
        expected = {"architecture": cls.architecture, "apply_b_dec_to_input": True, "normalize_activations": "none",
                    "reshape_activations": "none"}
        for key, value in expected.items():
            if cfg.get(key) != value:
                raise StudyError(f"The dictionary in {folder} has {key} = {cfg.get(key)!r} where this class reads {value!r} "
                                 "only; convert it first.")
        shapes = {name: tuple(value.shape) for name, value in sae.named_parameters()}
        found = {name: tuple(value.shape) for name, value in weights.items()}
        if shapes != found or not all(value.isfinite().all() for value in weights.values()):
            raise StudyError(f"The weights in {folder} do not fit its {CONFIG_FILE} ({found} instead of {shapes}, all "
                             "finite); delete the folder and make it again.")
        sae.load_state_dict(weights)
        sae.metadata = {key: value for key, value in metadata.items()
                        if key not in ("sae_lens_version", "model_name", "hook_name", "context_size", "prepend_bos", "seed")}
        return sae.requires_grad_(False)


def geometric_median(x: Float[Tensor, "n d_in"], tolerance: float = 1e-6, max_iterations: int = 1000) -> Float[Tensor, " d_in"]:
    """The point with the smallest summed distance to the rows, where `b_dec` starts (Bricken et al., Pre-Encoder Bias).

    Weiszfeld's iteration, until a step is shorter than `tolerance` times the mean distance.

    Raises StudyError if a row is not finite.
    """
    if not x.isfinite().all():
        raise StudyError("The activations contain values that are not finite; train the transformer again with a lower "
                         "learning rate.")
    median = x.double().mean(0)
    for _ in range(max_iterations):
        distance = torch.linalg.vector_norm(x - median.float(), dim=1).double()
        mean_distance = distance.mean()
        if mean_distance == 0:
            break
        # The floor keeps an iterate that lands on a row from being stuck there by an infinite weight.
        weight = 1 / distance.clamp_min(1e-6 * mean_distance)
        previous, median = median, (weight.float() @ x).double() / weight.float().double().sum()
        if torch.linalg.vector_norm(median - previous) <= tolerance * mean_distance:
            break
    return median.float()
