"""Activations of the transformer's MLP as training data for dictionaries (Bricken et al., App. Dataset; B2).

A chunk of contexts is run through the model, some tokens of each are kept, and the rows of the whole chunk are shuffled, so
that a batch mixes thousands of contexts. What a batch holds depends on (seed, step) alone: training resumes anywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lib.errors import StudyError
from sae_lib.kernels import in_parallel
from sae_lib.precision import low_precision
from sae_lib.seeds import generator
from sae_lib.transformer import Transformer, mlp_activations, parameters

HARVEST_CONTEXTS = 16  # contexts that one thread runs at once: their attention stays in its cache


@dataclass(frozen=True)
class StreamConfig:
    """How activations are drawn. 250 tokens a context is the paper's number."""

    tokens_per_context: int = 250
    chunk_contexts: int = 2048
    seed: int = 0


class ActivationStream:
    """Shuffled batches of MLP activations, harvested chunk by chunk as training consumes them.

    Within a pass over the text no row comes twice. `END_OF_TEXT` positions are drawn last and so, in practice, never.
    """

    END_OF_TEXT = 0

    def __init__(self, model: Transformer, contexts: Int[Tensor, "n_contexts n_ctx"], batch_size: int, config: StreamConfig):
        self.model, self.contexts, self.batch_size, self.config = model, contexts, batch_size, config
        self.n_ctx = contexts.shape[1]
        self.kept = min(config.tokens_per_context, self.n_ctx)
        self.chunk_contexts = min(config.chunk_contexts, len(contexts))
        self.chunks_per_pass = len(contexts) // max(1, self.chunk_contexts)
        self.batches_per_chunk = self.chunk_contexts * self.kept // batch_size
        self.dtype = low_precision()
        self.parameters = {name: p.detach().to(self.dtype) for name, p in parameters(model).items()}
        if not self.batches_per_chunk:
            raise StudyError(f"{len(contexts)} contexts give fewer activations than one batch of {batch_size}; use "
                             "more text or a smaller batch.")

    @property
    def d_in(self) -> int:
        return self.model.cfg.d_mlp

    @property
    def activations_per_pass(self) -> int:
        return self.chunks_per_pass * self.batches_per_chunk * self.batch_size

    def batches(self, start_step: int = 0) -> Iterator[Float[Tensor, "batch d_in"]]:
        """Endless batches, beginning with that of step `start_step`."""
        chunk, first = divmod(start_step, self.batches_per_chunk)
        while True:
            rows = self._chunk(chunk)
            order = torch.randperm(len(rows), generator=generator(self.config.seed, "shuffle-rows", chunk))
            for i in range(first, self.batches_per_chunk):
                yield rows[order[i * self.batch_size:(i + 1) * self.batch_size]]
            chunk, first = chunk + 1, 0

    def sample(self, n: int, purpose: str = "sample", step: int = 0) -> Float[Tensor, "n d_in"]:
        """`n` rows from random contexts, in float32: for the scale, the geometric median and resampling."""
        rng = generator(self.config.seed, purpose, step)
        n_contexts = min(len(self.contexts), -(-n // self.kept))
        rows = self._harvest(torch.randperm(len(self.contexts), generator=rng)[:n_contexts], rng)
        return rows[torch.randperm(len(rows), generator=rng)[:n]].float()

    def _chunk(self, chunk: int) -> Float[Tensor, "rows d_in"]:
        epoch, position = divmod(chunk, self.chunks_per_pass)
        order = torch.randperm(len(self.contexts), generator=generator(self.config.seed, "harvest-order", epoch))
        chosen = order[position * self.chunk_contexts:(position + 1) * self.chunk_contexts]
        return self._harvest(chosen, generator(self.config.seed, "harvest-tokens", chunk))

    def _harvest(self, chosen: Int[Tensor, " n"], rng: torch.Generator) -> Float[Tensor, "rows d_in"]:
        rows = torch.empty(len(chosen), self.kept, self.d_in, dtype=self.dtype)
        # Drawn here, in order, since the threads below run in any.
        keys = torch.rand(len(chosen), self.n_ctx, generator=rng)

        def run(start: int) -> None:
            few = slice(start, start + HARVEST_CONTEXTS)
            tokens = self.contexts[chosen[few]].long()
            keep = keys[few].masked_fill(tokens == self.END_OF_TEXT, 2.0).topk(self.kept, largest=False).indices
            rows[few] = mlp_activations(self.model, tokens, keep, self.parameters)

        in_parallel(run, [(start,) for start in range(0, len(chosen), HARVEST_CONTEXTS)])
        return rows.flatten(0, 1)
