"""sparsify, as its SparseCoder saves and loads: https://github.com/EleutherAI/sparsify."""

import contextlib
import sys
from pathlib import Path

import torch
from torch import Tensor

from .exchange import D_IN, D_SAE, K, answer, fill
from .protocol import serve

with contextlib.redirect_stdout(sys.stderr):  # it says that there is no Triton, and stdout is for answers
    from sparsify import SparseCoder, SparseCoderConfig

KINDS = {"num_latents": {"num_latents": D_SAE}, "expansion_factor": {"expansion_factor": D_SAE // D_IN}}


def write(folder: str) -> dict:
    """Dictionaries as sparsify saves them, and what they give when it has read them again."""
    names = []
    for name, how in KINDS.items():
        names.append(f"{name}/layers.3")
        path = Path(folder) / names[-1]
        fill(SparseCoder(D_IN, SparseCoderConfig(k=K, **how))).save_to_disk(path)
        coder = SparseCoder.load_from_disk(path)

        def encode(x: Tensor, coder: SparseCoder = coder) -> Tensor:
            found = coder.encode(x)
            return torch.zeros(len(x), D_SAE).scatter_(1, found.top_indices, found.top_acts)

        def decode(features: Tensor, coder: SparseCoder = coder) -> Tensor:
            return coder.decode(*features.topk(K))

        answer(path, encode, decode)
    return {"names": names}


if __name__ == "__main__":
    serve({"write": write})
