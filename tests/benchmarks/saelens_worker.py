"""SAELens, as its SAETrainer trains: https://decoderesearch.github.io/SAELens/ (training_saes)."""

from pathlib import Path

import numpy as np
import sae_lens
import torch
from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from .exchange import D_IN, D_SAE, THRESHOLD, K, answer, fill
from .protocol import serve
from .trainings import Training, Trainings


class SAELens(Training):
    def __init__(self, pool: np.ndarray, batch_size: int, d_sae: int, lr: float, warmup: int, scale: float,
                 l1_coefficient: float | None = None, k: int | None = None, autocast: bool = False, compiled: bool = False,
                 sparse: bool = False):
        torch.manual_seed(0)
        sizes = {"d_in": pool.shape[1], "d_sae": d_sae, "device": "cpu", "dtype": "float32", "apply_b_dec_to_input": True}
        if k is None:
            sae = StandardTrainingSAE(StandardTrainingSAEConfig(
                **sizes, l1_coefficient=l1_coefficient, normalize_activations="expected_average_only_in"))
        else:
            sae = TopKTrainingSAE(TopKTrainingSAEConfig(
                **sizes, k=k, use_sparse_activations=sparse, normalize_activations="expected_average_only_in"))
        if compiled:  # its option compile_sae
            sae.training_forward_pass = torch.compile(sae.training_forward_pass, backend="inductor")
        config = SAETrainerConfig(total_training_samples=10 ** 9, train_batch_size_samples=batch_size, lr=lr, lr_end=lr,
                                  lr_warm_up_steps=warmup, device="cpu", autocast=autocast)
        self.trainer = SAETrainer(config, sae, data_provider=iter(()))
        # The same sqrt(d_in) over the mean norm that its trainer estimates before the first step.
        self.scale = self.trainer.activation_scaler.scaling_factor = scale

    def step(self, x: Tensor) -> None:
        # What `fit` does in each turn of its loop, but for the progress bar and checkpoints.
        self.trainer.maybe_reset_sparsity()
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    def loss(self, x: Tensor) -> float:
        trainer = self.trainer
        with trainer.autocast_if_enabled:
            return trainer.sae.training_forward_pass(TrainStepInput(
                sae_in=trainer.activation_scaler(x), dead_neuron_mask=trainer.dead_neurons, n_training_steps=0,
                coefficients=trainer.get_coefficients(), is_logging_step=False)).loss.item()

    def weights(self) -> dict[str, Tensor]:
        return {name: getattr(self.trainer.sae, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}


# --- dictionaries on disk ----------------------------------------------------------------------------------------------

TOP_K, TRAINED = {"k": K}, {"l1_coefficient": 1.0}
KINDS = {"standard": ("StandardSAE", {}), "standard_bias_not_subtracted": ("StandardSAE", {"apply_b_dec_to_input": False}),
         "topk": ("TopKSAE", TOP_K), "topk_rescaled": ("TopKSAE", TOP_K | {"rescale_acts_by_decoder_norm": True}),
         "jumprelu": ("JumpReLUSAE", {}), "jumprelu_bias_not_subtracted": ("JumpReLUSAE", {"apply_b_dec_to_input": False}),
         "gated": ("GatedSAE", {}), "gated_bias_not_subtracted": ("GatedSAE", {"apply_b_dec_to_input": False}),
         "standard_trained": ("StandardTrainingSAE", TRAINED), "gated_trained": ("GatedTrainingSAE", TRAINED),
         "jumprelu_trained": ("JumpReLUTrainingSAE", {}), "topk_trained": ("TopKTrainingSAE", TOP_K),
         "batchtopk_trained": ("BatchTopKTrainingSAE", TOP_K),
         "matryoshka_trained": ("MatryoshkaBatchTopKTrainingSAE", TOP_K | {"matryoshka_widths": [D_SAE // 4, D_SAE // 2]})}


def write(folder: str) -> dict:
    """A dictionary of each kind, as SAELens saves it, and what it gives when SAELens has read it again."""
    for name, (class_name, how) in KINDS.items():
        config = getattr(sae_lens, f"{class_name}Config")(d_in=D_IN, d_sae=D_SAE, **how)
        sae = fill(getattr(sae_lens, class_name)(config))
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(THRESHOLD)
        path = Path(folder) / name
        (sae.save_inference_model if "Training" in class_name else sae.save_model)(path)
        read(str(path))
    return {"names": list(KINDS)}


def read(folder: str) -> dict:
    sae = sae_lens.SAE.load_from_disk(folder)
    answer(Path(folder), sae.encode, sae.decode)
    return {}


if __name__ == "__main__":
    serve(Trainings(SAELens).operations() | {"write": write, "read": read})
