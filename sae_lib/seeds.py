"""Random generators derived from (seed, purpose, step), so that nothing depends on global state or on call order."""

import hashlib

import numpy as np
import torch


def _entropy(seed: int, purpose: str, step: int) -> int:
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def generator(seed: int, purpose: str, step: int = 0, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator that depends only on its arguments."""
    # 63 bits: manual_seed takes a signed 64-bit integer.
    return torch.Generator(device=device).manual_seed(_entropy(seed, purpose, step) >> 1)


def numpy_generator(seed: int, purpose: str, step: int = 0) -> np.random.Generator:
    """A numpy generator that depends only on its arguments."""
    return np.random.default_rng(_entropy(seed, purpose, step))
