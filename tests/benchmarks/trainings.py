"""What every worker does with a dictionary that is being trained: step it, clock it, hand over its weights."""

import os
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from .protocol import clock

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


class Training(ABC):
    """A dictionary in training; `step` is one whole step as the library that it belongs to makes it."""

    scale: float  # it is trained on `scale * x`

    @abstractmethod
    def step(self, x: Tensor) -> None:
        """One step on unscaled activations [batch, d_in], float32."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """`W_enc` [d_in, d_sae], `b_enc`, `W_dec` [d_sae, d_in], `b_dec`, all as trained on scaled activations; the library's own
        memory, so that what is written here is trained on."""

    @abstractmethod
    def loss(self, x: Tensor) -> float:
        """What a step on unscaled activations [batch, d_in] would make smaller, as the library computes it; changes nothing."""


class Trainings:
    """The trainings of a worker by name, and where in the activations each is."""

    def __init__(self, make):
        self._make, self._trainings, self._at, self._pools = make, {}, {}, {}

    def operations(self) -> dict:
        return {"new": self.new, "steps": self.steps, "export": self.export, "loss": self.loss, "drop": self.drop,
                "drop_all": self.drop_all}

    def new(self, name: str, data: str, batch_size: int, **how: object) -> dict:
        pool = self._pools.setdefault(data, np.load(data, mmap_mode="r"))
        began = clock()
        training = self._make(pool=pool, batch_size=batch_size, **how)
        self._trainings[name], self._at[name] = (training, pool, batch_size), 0
        return {"scale": training.scale, "seconds": clock() - began}

    def steps(self, name: str, steps: int | None = None, seconds: float | None = None, **how: object) -> dict:
        """So many steps, or as many as begin within so much time; fetching a batch is not on the clock."""
        training, pool, batch_size = self._trainings[name]
        times: list[float] = []
        while len(times) < steps if steps is not None else sum(times) < seconds:
            x = self._batch(pool, self._at[name], batch_size)
            self._at[name] += 1
            began = clock()
            training.step(x, **how)
            times.append(clock() - began)
        return {"times": times, "step": self._at[name], "l0": getattr(training, "l0", None)}

    @staticmethod
    def _batch(pool: np.ndarray, index: int, batch_size: int) -> Tensor:
        """The rows are stored in random order; each pass over them starts elsewhere, so that batches are not the same again."""
        per_pass = len(pool) // batch_size - 1
        epoch, position = divmod(index, per_pass)
        first = position * batch_size + epoch * 997 % batch_size
        return torch.from_numpy(pool[first:first + batch_size].astype(np.float32))

    def export(self, name: str, path: str) -> dict:
        training = self._trainings[name][0]
        np.savez(path, scale=training.scale, **{key: value.detach().float().numpy() for key, value in training.weights().items()})
        return {}

    def loss(self, name: str, path: str) -> dict:
        """The loss on the first batch with the weights that `export` wrote, in units of the unscaled activations squared.

        A ReLU's features follow a change of scale if both biases do.
        """
        training, pool, batch_size = self._trainings[name]
        given = {key: torch.from_numpy(value) for key, value in np.load(path).items()}
        with torch.no_grad():
            for key, own in training.weights().items():
                own.copy_(given[key] * (training.scale / given["scale"] if key.startswith("b_") else 1.0))
        return {"loss": training.loss(self._batch(pool, 0, batch_size)) / training.scale ** 2}

    def drop(self, name: str) -> dict:
        del self._trainings[name], self._at[name]
        return {}

    def drop_all(self) -> dict:
        """Begin with nothing; also the first question, which shows that the worker is there."""
        self._trainings.clear()
        return {}
