"""dictionary_learning, as its trainSAE trains: https://github.com/saprmarks/dictionary_learning (README, Training).

On a CPU trainSAE does not autocast, so float32 is all there is. Its activation buffer imports an old nnsight, which cannot be
installed beside SAELens; nothing measured here uses it, so an empty module takes its place.
"""

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from .exchange import D_IN, D_SAE, THRESHOLD, K, answer, fill
from .protocol import serve
from .trainings import Training, Trainings

nnsight = ModuleType("nnsight")
nnsight.LanguageModel = object
sys.modules.setdefault("nnsight", nnsight)

from dictionary_learning.dictionary import (  # noqa: E402
    AutoEncoder,
    AutoEncoderNew,
    GatedAutoEncoder,
    JumpReluAutoEncoder,
)
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.standard import StandardTrainer  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer  # noqa: E402

STEPS = 10 ** 6  # more than any run here makes: its schedule has no decay unless asked


class DictionaryLearning(Training):
    def __init__(self, pool: np.ndarray, batch_size: int, d_sae: int, lr: float, warmup: int, scale: float,
                 l1_coefficient: float | None = None, k: int | None = None):
        self.scale, self.done = scale, 0
        shared = {"steps": STEPS, "activation_dim": pool.shape[1], "dict_size": d_sae, "layer": 0, "lm_name": "one-layer",
                  "lr": lr, "warmup_steps": warmup, "seed": 0, "device": "cpu"}
        if k is None:
            self.trainer = StandardTrainer(**shared, l1_penalty=l1_coefficient, sparsity_warmup_steps=None)
        else:
            self.trainer = TopKTrainer(**shared, k=k)

    def step(self, x: Tensor) -> None:
        self.trainer.update(self.done, x * self.scale)
        self.done += 1

    def weights(self) -> dict[str, Tensor]:
        ae = self.trainer.ae
        b_dec = ae.b_dec if isinstance(self.trainer, TopKTrainer) else ae.bias
        return {"W_enc": ae.encoder.weight.T, "b_enc": ae.encoder.bias, "W_dec": ae.decoder.weight.T, "b_dec": b_dec}

    def loss(self, x: Tensor) -> float:
        return self.trainer.loss(x * self.scale, step=0).item()


# --- dictionaries on disk ----------------------------------------------------------------------------------------------

KINDS = {AutoEncoder: {}, AutoEncoderNew: {}, GatedAutoEncoder: {}, JumpReluAutoEncoder: {}, AutoEncoderTopK: {"k": K},
         BatchTopKSAE: {"k": K}, MatryoshkaBatchTopKSAE: {"k": K, "group_sizes": [D_SAE // 4, D_SAE // 4, D_SAE // 2]}}


def write(folder: str) -> dict:
    """A dictionary of each class, as trainSAE saves it, and what it gives when its class has read it again."""
    for kind, how in KINDS.items():
        path = Path(folder) / kind.__name__
        path.mkdir(parents=True)
        made = fill(kind(D_IN, D_SAE, **how))
        if "k" in how:
            made.threshold.fill_(THRESHOLD)
        torch.save(made.state_dict(), path / "ae.pt")
        trainer = {"dict_class": kind.__name__, "activation_dim": D_IN, "dict_size": D_SAE, "lm_name": "one-layer", "seed": 0}
        (path / "config.json").write_text(json.dumps({"trainer": trainer | how, "buffer": {"ctx_len": 256}}))
        read = kind.from_pretrained(path / "ae.pt")
        answer(path, read.encode, read.decode)
    return {"names": [kind.__name__ for kind in KINDS]}


if __name__ == "__main__":
    serve(Trainings(DictionaryLearning).operations() | {"write": write})
