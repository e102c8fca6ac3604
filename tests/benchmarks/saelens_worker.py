"""SAELens, as its SAETrainer trains: https://decoderesearch.github.io/SAELens/ (training_saes)."""

import numpy as np
import torch
from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

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


if __name__ == "__main__":
    serve(Trainings(SAELens).operations())
