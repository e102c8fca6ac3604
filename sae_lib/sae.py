"""The sparse autoencoder (Bricken et al., App. Architecture; paper_facts B3): a dictionary and how to read it.

    f = relu((x - b_dec) @ W_enc + b_enc)        features, [batch, d_sae]
    x_hat = f @ W_dec + b_dec                    reconstruction, [batch, d_in]

Encoder and decoder are untied, every row of `W_dec` (a dictionary element) has unit norm, and the bias that is subtracted
before the encoder is the decoder's. Three later kinds differ in what they put in the place of the ReLU: TopK keeps the k largest
of a row, JumpReLU what is above a threshold, and a gated dictionary decides by one number and measures by another. BatchTopK and
Matryoshka dictionaries are JumpReLU ones once they are trained. On disk a dictionary is a folder in the SAELens layout.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
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

    This class is the paper's own kind, and what the others inherit. Whatever reads features does so by `encode`.

    Attributes:
        metadata: what is written beside the weights and read back: L0, how it was trained, ...
    """

    architecture = "standard"
    kinds: ClassVar[dict[str, type["SAE"]]] = {}

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

    def __init_subclass__(cls) -> None:
        SAE.kinds[cls.architecture] = cls

    def encode(self, x: Float[Tensor, "*batch d_in"], features: Chosen | None = None) -> Float[Tensor, "*batch kept"]:
        """Activations of all features, or of those whose numbers are given, in their order: the others cost nothing."""
        chosen = slice(None) if features is None else features
        return self.activate((x - self.b_dec) @ self.W_enc[:, chosen], chosen)

    def activate(self, projected: Float[Tensor, "*batch kept"], chosen: Chosen | slice) -> Float[Tensor, "*batch kept"]:
        """Activations of chosen features from what their encoder columns give, without a bias."""
        return torch.relu(projected + self.b_enc[chosen])

    def decode(self, features: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """The activations that these features stand for."""
        return features @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> SAEOutput:
        features = self.encode(x)
        return SAEOutput(features, self.decode(features))

    def _in_units_of_features(self) -> list[Tensor]:
        """What is added to pre-activations or compared with them."""
        return [self.b_enc]

    @torch.no_grad()
    def fold_scale_(self, scale: float) -> "SAE":
        """Make a dictionary trained on `scale * x` read `x` itself.

        Activations are homogeneous: dividing all biases divides features and reconstruction, and the decoder keeps unit norm.
        """
        for value in (*self._in_units_of_features(), self.b_dec):
            value /= scale
        return self

    @torch.no_grad()
    def correct_(self, gain: Float[Tensor, " d_sae"], shift: Float[Tensor, " d_in"]) -> "SAE":
        """Multiply each feature's activation, and add to every reconstruction; the same features are active."""
        # The bias is also subtracted before the encoder, where the shift must not show.
        self._enter_bias(shift @ self.W_enc)
        for value in (*self._in_units_of_features(), self.W_enc):
            value.mul_(gain)
        self.b_dec.add_(shift)
        return self

    def _enter_bias(self, change: Float[Tensor, " d_sae"]) -> None:
        self.b_enc.add_(change)

    @torch.no_grad()
    def enter_decoder_bias_(self) -> "SAE":
        """Give a dictionary whose encoder was made for `x` the same activations although `b_dec` is subtracted here."""
        self._enter_bias(self.b_dec @ self.W_enc)
        return self

    @torch.no_grad()
    def enter_decoder_norms_(self) -> "SAE":
        """Measure activations in units of decoder rows, which become 1 long; the reconstruction stays."""
        norms = self.W_dec.norm(dim=1).clamp(min=1e-8)
        for value in (*self._in_units_of_features(), self.W_enc):
            value.mul_(norms)
        self.W_dec.div_(norms[:, None])
        return self

    def settings(self) -> dict:
        """What `cfg.json` says of this kind only."""
        return {}

    @classmethod
    def from_settings(cls, config: SAEConfig, cfg: dict) -> "SAE":  # noqa: ARG003
        """An untrained dictionary as `cfg.json` has it."""
        return cls(config)

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write `cfg.json` and `sae_weights.safetensors`, the layout SAELens 6 loads, each replaced in one step.

        In float16 the file is half as large; activations read from it differ in their fourth digit.
        """
        folder.mkdir(parents=True, exist_ok=True)
        cfg = {"architecture": self.architecture, "d_in": self.config.d_in, "d_sae": self.config.d_sae,
               "dtype": str(dtype).removeprefix("torch."), "device": "cpu", "apply_b_dec_to_input": True,
               "normalize_activations": "none", "reshape_activations": "none", **self.settings(),
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

    @staticmethod
    def load(folder: Path) -> "SAE":
        """Read a dictionary of whatever kind, in SAELens layout or another's; see `interchange.read`."""
        from sae_lib import interchange  # imports this file

        return interchange.read(folder)


SAE.kinds[SAE.architecture] = SAE


class TopKSAE(SAE):
    """Keeps the `k` largest activations of a row (Gao et al. 2024, Scaling and evaluating sparse autoencoders).

    Encoder columns begin as the dictionary rows, without a bias.
    """

    architecture = "topk"

    def __init__(self, config: SAEConfig, k: int):
        super().__init__(config)
        if not 0 < k <= config.d_sae:
            raise StudyError(f"A dictionary of {config.d_sae} features cannot keep {k} of them; give a k from 1 to "
                             f"{config.d_sae}.")
        self.k = k
        with torch.no_grad():
            self.W_enc.copy_(self.W_dec.T)
            self.b_enc.zero_()

    def encode(self, x: Float[Tensor, "*batch d_in"], features: Chosen | None = None) -> Float[Tensor, "*batch kept"]:
        """Activations of all features, or of those whose numbers are given; it takes all of them to know either."""
        found = super().encode(x)
        largest = found.topk(self.k, dim=-1)
        kept = torch.zeros_like(found).scatter_(-1, largest.indices, largest.values)
        return kept if features is None else kept[..., features]

    def correct_(self, gain: Float[Tensor, " d_sae"], shift: Float[Tensor, " d_in"]) -> "SAE":  # noqa: ARG002
        """Raises StudyError: other activations would be the k largest."""
        raise StudyError("A TopK dictionary's activations cannot be multiplied without changing which are kept; no penalty has "
                         "shrunk them, so leave them as they are.")

    def settings(self) -> dict:
        return {"k": self.k, "rescale_acts_by_decoder_norm": False}

    @classmethod
    def from_settings(cls, config: SAEConfig, cfg: dict) -> "SAE":
        return cls(config, int(cfg["k"]))


class JumpReLUSAE(SAE):
    """Passes on what is above each feature's `threshold` (Rajamanoharan et al. 2024, Jumping Ahead)."""

    architecture = "jumprelu"
    threshold: Float[Tensor, " d_sae"]

    def __init__(self, config: SAEConfig, threshold: float = 0.0):
        super().__init__(config)
        self.threshold = nn.Parameter(torch.full((config.d_sae,), threshold))

    def activate(self, projected: Float[Tensor, "*batch kept"], chosen: Chosen | slice) -> Float[Tensor, "*batch kept"]:
        before = projected + self.b_enc[chosen]
        return torch.relu(before) * (before > self.threshold[chosen])

    def _in_units_of_features(self) -> list[Tensor]:
        return [self.b_enc, self.threshold]


class GatedSAE(SAE):
    """Decides by one number which features are active and measures them by another, with one encoder matrix for both
    (Rajamanoharan et al. 2024, Improving Dictionary Learning with Gated SAEs).

        f = (p + b_gate > 0) * relu(exp(r_mag) * p + b_mag)    for p = (x - b_dec) @ W_enc
    """

    architecture = "gated"
    b_gate: Float[Tensor, " d_sae"]
    r_mag: Float[Tensor, " d_sae"]
    b_mag: Float[Tensor, " d_sae"]

    def __init__(self, config: SAEConfig):
        super().__init__(config)
        self.b_gate = nn.Parameter(self.b_enc.detach())
        self.b_mag, self.r_mag = nn.Parameter(self.b_enc.detach().clone()), nn.Parameter(torch.zeros(config.d_sae))
        del self.b_enc

    def activate(self, projected: Float[Tensor, "*batch kept"], chosen: Chosen | slice) -> Float[Tensor, "*batch kept"]:
        magnitude = torch.relu(projected * self.r_mag[chosen].exp() + self.b_mag[chosen])
        return magnitude * (projected + self.b_gate[chosen] > 0)

    def _in_units_of_features(self) -> list[Tensor]:
        return [self.b_gate, self.b_mag]

    def _enter_bias(self, change: Float[Tensor, " d_sae"]) -> None:
        self.b_gate.add_(change)
        self.b_mag.add_(change * self.r_mag.exp())
