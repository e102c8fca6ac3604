"""Everything that training a dictionary changes; what a checkpoint holds. Its tensors are where the training runs."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sae_lib.errors import StudyError
from sae_lib.recipe import TrainConfig
from sae_lib.variants import AnyParameters, Standard

CUT_RATE = 0.05  # share of a batch in the running average of BatchTopK's smallest activation
VALUES = ("scale", "step", "l0", "sums", "log", "cut", "control")


@dataclass
class TrainState:
    """Weights, Adam's moments and what is counted. Numbers may be behind the tensors until a step is `settle`d."""

    p: AnyParameters
    m: AnyParameters
    v: AnyParameters
    age: Int[Tensor, " d_sae"]  # updates of each feature since it was made or resampled
    last_fired: Int[Tensor, " d_sae"]  # step at which each feature was last active
    scale: float
    step: int
    l0: float  # mean number of active features in the last batch
    sums: list[float]  # squared error, L1, active features and rows since the last line of the log
    log: list[dict]
    cut: float = 0.0  # running average of the smallest activation that BatchTopK lets through
    control: float = 0.0  # what steers JumpReLU's penalty
    broken: int = 0  # first step after which the loss or a weight was no longer finite; such a state is never saved

    def dead(self, window: int) -> Bool[Tensor, " d_sae"]:
        """Features that were active in none of the last `window` steps."""
        return self.last_fired <= self.step - window

    def parts(self) -> tuple[dict[str, Tensor], dict]:
        """All of it, as named tensors and as values that JSON can hold."""
        tensors = {f"{group}/{name}": value for group in ("p", "m", "v")
                   for name, value in getattr(self, group)._asdict().items()}
        tensors |= {"age": self.age, "last_fired": self.last_fired}
        return tensors, {name: getattr(self, name) for name in VALUES}

    @staticmethod
    def of_parts(rule: Standard, tensors: dict[str, Tensor], values: dict, device: torch.device | str = "cpu") -> "TrainState":
        """The state with these parts, on a device."""
        tensors = {name: value.to(device) for name, value in tensors.items()}
        groups = {g: rule.kind(*(tensors[f"{g}/{name}"] for name in rule.kind._fields)) for g in ("p", "m", "v")}
        known = {name: values[name] for name in VALUES if name in values}  # older checkpoints lack the last two
        return TrainState(**groups, age=tensors["age"], last_fired=tensors["last_fired"], **known)


def check_rows(rows: int, config: TrainConfig) -> None:
    """Raises StudyError if a batch does not have as many rows as its training is for."""
    if rows != config.batch_size:
        raise StudyError(f"A batch has {rows} rows instead of {config.batch_size}; give the activations and the training one "
                         "batch size.")
