"""Activations of the transformer, of its MLP unless told, as training data for dictionaries (Bricken et al., App. Dataset; B2).

A chunk of contexts is run through the model, some tokens of each are kept, and the rows of the whole chunk are shuffled, so
that a batch mixes thousands of contexts. What a batch holds depends on (seed, step) alone: training resumes anywhere. Of several
processes that train together each harvests some of the contexts and has their rows of every batch, so all of them together have
the batch that one alone would have, and no activation travels between them. On a GPU the chunk stays in its memory, and nothing
waits for it between one batch and the next.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lib import residual
from sae_lib.distributed import ALONE, Processes
from sae_lib.errors import StudyError
from sae_lib.kernels import in_parallel
from sae_lib.precision import low_precision
from sae_lib.seeds import generator
from sae_lib.transformer import Transformer, parameters

HARVEST_CONTEXTS = 16  # contexts that one thread runs at once: their attention stays in its cache
GPU_CONTEXTS = 128  # contexts that a GPU runs at once


@dataclass(frozen=True)
class StreamConfig:
    """How activations are drawn. 250 tokens a context is the paper's number."""

    tokens_per_context: int = 250
    chunk_contexts: int = 2048
    seed: int = 0


class Skip(NamedTuple):
    """Positions that are neither trained on nor counted. Models that were trained elsewhere have more of them than the study's:
    special tokens of their own, and *sinks*, first positions above all, whose activations are tens of times longer than others.
    """

    tokens: tuple[int, ...] = (0,)
    """Ids of special tokens; the study's own models have end-of-text."""
    first: int = 0
    """So many positions at the start of every context."""
    above: float = math.inf
    """Activations longer than this."""

    def mask(self, tokens: Int[Tensor, "batch pos"],
             acts: Float[Tensor, "batch pos d_in"] | None = None) -> Bool[Tensor, "batch pos"]:
        """Whether each position is skipped; without activations only by its token and its place."""
        found = torch.isin(tokens, torch.tensor(self.tokens, device=tokens.device))
        found[:, :self.first] = True
        return found if acts is None or math.isinf(self.above) else found | (acts.float().norm(dim=-1) > self.above)

    def sparing(self, tokens: Int[Tensor, "batch pos"], edit: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The edit of activations [batch, pos, d_in] that leaves skipped positions of these contexts as they are."""
        return lambda acts: torch.where(self.mask(tokens, acts)[..., None], acts, edit(acts))


class ActivationStream:
    """Shuffled batches of activations, harvested chunk by chunk as training consumes them: of the last layer's MLP, or of the
    residual stream `after` so many layers.

    Within a pass over the text no row comes twice. Positions to skip are drawn last and so, in practice, never.
    """

    END_OF_TEXT = 0

    def __init__(self, model: Transformer, contexts: Int[Tensor, "n_contexts n_ctx"], batch_size: int, config: StreamConfig,
                 processes: Processes = ALONE, device: torch.device | str = "cpu", after: int | None = None,
                 skip: Skip = Skip()):
        self.model, self.contexts, self.batch_size, self.config = model, contexts, batch_size, config
        self.after, self.skip = after, skip
        self.n_ctx = contexts.shape[1]
        self.kept = min(config.tokens_per_context, self.n_ctx)
        self.chunk_contexts = min(config.chunk_contexts, len(contexts))
        self.chunks_per_pass = len(contexts) // max(1, self.chunk_contexts)
        self.batches_per_chunk = self.chunk_contexts * self.kept // batch_size
        self.device, self.dtype = torch.device(device), low_precision(device)
        own = parameters(model) if residual.is_own(model) else {}  # others run as they are
        self.parameters = {name: p.detach().to(self.device, self.dtype) for name, p in own.items()}
        if not self.batches_per_chunk:
            raise StudyError(f"{len(contexts)} contexts give fewer activations than one batch of {batch_size}; use "
                             "more text or a smaller batch.")
        # Whole runs of the model, so that products are of the same shapes, and give the same bits, however many share them.
        runs = -(-self.chunk_contexts // HARVEST_CONTEXTS)
        if processes.count > runs:
            raise StudyError(f"A chunk of {self.chunk_contexts} contexts is too small for {processes.count} processes; use at "
                             f"most {runs}, or larger chunks.")
        owner = torch.arange(self.chunk_contexts) // HARVEST_CONTEXTS % processes.count
        self.mine = (owner == processes.rank).nonzero()[:, 0]

    @property
    def d_in(self) -> int:
        return residual.width(self.model, self.after)

    @property
    def rows_held(self) -> int:
        """Activations in memory at once."""
        return len(self.mine) * self.kept

    @property
    def activations_per_pass(self) -> int:
        return self.chunks_per_pass * self.batches_per_chunk * self.batch_size

    def batches(self, start_step: int = 0) -> Iterator[Float[Tensor, "batch d_in"]]:
        """Endless batches, beginning with that of step `start_step`; of each, this process's rows: all, if it is alone."""
        chunk, first = divmod(start_step, self.batches_per_chunk)
        n = self.chunk_contexts * self.kept
        held = torch.full((self.chunk_contexts, self.kept), -1)  # where each row of the chunk is among those held here
        held[self.mine] = torch.arange(len(self.mine) * self.kept).view(-1, self.kept)
        while True:
            rows = self._chunk(chunk)
            order = held.flatten()[torch.randperm(n, generator=generator(self.config.seed, "shuffle-rows", chunk))]
            order = order[:self.batches_per_chunk * self.batch_size]
            sizes = (order >= 0).view(-1, self.batch_size).sum(1).tolist()
            # To the device in one go: no batch is to wait for its own.
            for batch in order[order >= 0].to(self.device).split(sizes)[first:]:
                yield rows[batch]
            del rows  # before the next are harvested: two chunks would take twice the memory
            chunk, first = chunk + 1, 0

    def sample(self, n: int, purpose: str = "sample", step: int = 0) -> Float[Tensor, "n d_in"]:
        """`n` rows from random contexts, in float32 and the processor's memory: for the scale, the geometric median and
        resampling.
        """
        rng = generator(self.config.seed, purpose, step)
        n_contexts = min(len(self.contexts), -(-n // self.kept))
        chosen = torch.randperm(len(self.contexts), generator=rng)[:n_contexts]
        rows = self._harvest(chosen, self._keys(n_contexts, rng))
        return rows[torch.randperm(len(rows), generator=rng)[:n].to(self.device)].float().cpu()

    def _chunk(self, chunk: int) -> Float[Tensor, "rows d_in"]:
        epoch, position = divmod(chunk, self.chunks_per_pass)
        order = torch.randperm(len(self.contexts), generator=generator(self.config.seed, "harvest-order", epoch))
        chosen = order[position * self.chunk_contexts:(position + 1) * self.chunk_contexts]
        keys = self._keys(len(chosen), generator(self.config.seed, "harvest-tokens", chunk))
        return self._harvest(chosen[self.mine], keys[self.mine])

    def _keys(self, n: int, rng: torch.Generator) -> Float[Tensor, "n n_ctx"]:
        """Of each context the tokens with the smallest are kept."""
        return torch.rand(n, self.n_ctx, generator=rng)

    def _harvest(self, chosen: Int[Tensor, " n"], keys: Float[Tensor, "n n_ctx"]) -> Float[Tensor, "rows d_in"]:
        rows = torch.empty(len(chosen), self.kept, self.d_in, dtype=self.dtype, device=self.device)
        tokens, keys = self.contexts[chosen].to(self.device), keys.to(self.device)
        at_once = HARVEST_CONTEXTS if self.device.type == "cpu" else GPU_CONTEXTS

        def run(start: int) -> None:
            few = slice(start, start + at_once)
            wanted = lambda skipped: keys[few].masked_fill(skipped, 2.0).topk(self.kept, largest=False).indices
            harvest = lambda keep=None: residual.activations(self.model, tokens[few].long(), self.after, keep, self.parameters)
            if math.isinf(self.skip.above):  # what is not kept then need not be computed to the end
                rows[few] = harvest(wanted(self.skip.mask(tokens[few])))
            else:
                acts = harvest()
                keep = wanted(self.skip.mask(tokens[few], acts))
                rows[few] = acts.gather(1, keep[..., None].expand(-1, -1, acts.shape[-1])).to(self.dtype)

        in_parallel(run, [(start,) for start in range(0, len(chosen), at_once)])
        return rows.flatten(0, 1)


class Harvest:
    """Activations kept in memory, so that several dictionaries train on the same rows in the same order. After the last row comes
    the first again.

    `seed` is that of what a training draws besides: the inputs that features are born along, and resampled to.
    """

    def __init__(self, rows: Float[Tensor, "n d_in"], batch_size: int, seed: int = 0):
        """Raises StudyError if there are fewer rows than a batch has."""
        if len(rows) < batch_size:
            raise StudyError(f"{len(rows)} activations are fewer than one batch of {batch_size}; keep more, or use a smaller "
                             "batch.")
        self.rows, self.batch_size, self.seed = rows, batch_size, seed

    @classmethod
    def of(cls, stream: ActivationStream, n: int, seed: int = 0) -> "Harvest":
        """The first `n` activations of a stream, as far as they fill batches, in its order."""
        rows = torch.empty(n // stream.batch_size * stream.batch_size, stream.d_in, dtype=stream.dtype, device=stream.device)
        for place, batch in zip(rows.split(stream.batch_size), stream.batches(), strict=False):
            place.copy_(batch)
        return cls(rows, stream.batch_size, seed)

    def reseeded(self, seed: int) -> "Harvest":
        """The same rows for a training of another seed."""
        return Harvest(self.rows, self.batch_size, seed)

    def batches(self, start_step: int = 0) -> Iterator[Float[Tensor, "batch d_in"]]:
        """Endless batches, beginning with that of step `start_step`."""
        per_pass = len(self.rows) // self.batch_size
        for step in count(start_step):
            first = step % per_pass * self.batch_size
            yield self.rows[first:first + self.batch_size]

    def sample(self, n: int, purpose: str = "sample", step: int = 0) -> Float[Tensor, "n d_in"]:
        """At most `n` random rows, in float32 and the processor's memory."""
        chosen = torch.randperm(len(self.rows), generator=generator(self.seed, purpose, step))[:n]
        return self.rows[chosen.to(self.rows.device)].float().cpu()
