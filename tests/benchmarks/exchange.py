"""What the workers share when dictionaries pass between libraries: weights at random, and what a reader makes of activations."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

D_IN, D_SAE, K, ROWS = 24, 96, 8, 512
SPREAD = 0.2  # of every weight: activations are then about 1
THRESHOLD = 0.5
ANSWER = "answer.npz"


def activations() -> Tensor:
    """The activations that everyone encodes."""
    return torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def fill(module: nn.Module) -> nn.Module:
    """Other values everywhere, so that nothing that is forgotten can hide: a bias of 0, a decoder row 1 long."""
    rng = torch.Generator().manual_seed(1)
    for name, value in module.named_parameters():
        value.copy_(torch.randn(value.shape, generator=rng) * SPREAD)
        if name == "threshold":
            value.abs_()
    return module


@torch.no_grad()
def answer(folder: Path, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor]) -> None:
    """Store what a dictionary that was read from a folder gives."""
    features = encode(activations())
    np.savez(folder / ANSWER, features=features.numpy(), reconstruction=decode(features).numpy())


def answered(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(folder / ANSWER) as found:
        return found["features"], found["reconstruction"]
