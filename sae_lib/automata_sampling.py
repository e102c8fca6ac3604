"""Whether automata hold when the model itself writes, and the units to compare them with.

An automaton is found in real text and in logit weights. It holds if the model, left to write on after one of its states, keeps
going from state to state. Most of that could be had for less: a feature of a context fires often wherever the context goes on.
Three rates stand against it: how often the states fire in all text, how often they do in these documents, and how long units
stay that fire as often in the same documents but are not linked.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float64
from scipy.sparse import csc_array, csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from sae_lib.activations import ActivationStream
from sae_lib.automata import continues
from sae_lib.compare import live_units, select_tokens
from sae_lib.errors import StudyError
from sae_lib.evaluate import Text
from sae_lib.metrics import Interval, bootstrap_interval
from sae_lib.seeds import numpy_generator
from sae_lib.transformer import Transformer, mlp_activations, sample


def their_documents(table: csc_array, text: Text, states: Sequence[int]) -> Bool[np.ndarray, " n_tokens"]:
    """Flat tokens of the documents in which one of the states fires."""
    documents = text.documents.flatten().numpy()
    return np.isin(documents, documents[table[:, list(states)].indices])


def unlinked(states: Sequence[int], edges: pd.DataFrame, table: csc_array, text: Text, min_fired: int = 20) -> tuple[int, ...]:
    """A sceptic's control: for each state the unit that fires most nearly as often in the same documents, but is not linked.

    It fires on at least `min_fired` tokens and is not of the states' strongly connected component; no edge leads from it to
    itself, and none from or to a state or another unit of the control. Raises StudyError if no unit is left.
    """
    source, target = edges[["source", "target"]].to_numpy(dtype=np.int64).T
    n, units = table.shape[1], list(states)
    _, component = connected_components(csr_array((np.ones(len(edges)), (source, target)), shape=(n, n)), connection="strong")
    fired = np.diff(select_tokens(table, their_documents(table, text, states)).indptr)
    free = live_units(table, min_fired) & ~np.isin(component, component[units])
    free[source[source == target]] = False
    chosen: list[int] = []
    for state in units:
        taken = [*units, *chosen]
        free[[*taken, *target[np.isin(source, taken)], *source[np.isin(target, taken)]]] = False
        if not free.any():
            raise StudyError(f"No unit is left to compare the states {units} with; use more held-out text.")
        chosen.append(int(np.where(free, np.abs(fired - fired[state]), np.inf).argmin()))
    return tuple(chosen)


class Verification(NamedTuple):
    """Whether an automaton holds when the model itself writes."""

    stay: Interval
    """Of the sampled tokens that come after one on which a state fires, the share on which a state fires; a bootstrap over
    the documents of the prompts."""
    base_rate: float
    """Share of the tokens of real text on which a state fires."""
    document_rate: float
    """The same in the documents that prompts may come from."""
    text_stay: float
    """The stay of the real text: of the tokens after one on which a state fires, the share on which a state fires."""
    hand_over: Float64[np.ndarray, "n_states n_states"]
    """Of the sampled tokens after one on which state i fires, the share on which j fires; nan if i never fired."""
    state_rates: Float64[np.ndarray, " n_states"]
    """Share of the tokens of real text on which each state fires."""
    n_prompts: int


def prompts(table: csc_array, text: Text, states: Sequence[int], where: Bool[np.ndarray, " n_tokens"], n_prompts: int = 40,
            n_tokens: int = 12, seed: int = 0) -> list[tuple[int, int]]:
    """(context, position) of tokens on which a state fires: about as many for each state, from as many documents as there are.
    They are among the flat tokens `where`; none is end-of-text, and `n_tokens` fit in the context after each."""
    n_ctx, documents, rng = text.contexts.shape[1], text.documents.flatten().numpy(), numpy_generator(seed, "prompts")
    inside = (text.contexts != ActivationStream.END_OF_TEXT).flatten().numpy() & where
    found = []
    for state, share in zip(states, np.array_split(np.arange(n_prompts), len(states)), strict=True):
        tokens = rng.permutation(table.indices[table.indptr[state]:table.indptr[state + 1]])
        tokens = tokens[inside[tokens] & (tokens % n_ctx + n_tokens < n_ctx)]
        _, first = np.unique(documents[tokens], return_index=True)
        found += [divmod(int(token), n_ctx) for token in tokens[np.sort(first)[:len(share)]]]
    return found


@torch.no_grad()
def verify(model: Transformer, encode: Callable[[Tensor], Tensor], states: Sequence[int], table: csc_array, text: Text,
           where: Bool[np.ndarray, " n_tokens"] | None = None, seed: int = 0, n_prompts: int = 40, n_tokens: int = 12,
           n_samples: int = 4, n_boot: int = 1000) -> Verification:
    """Let the model write on after tokens of real text on which a state fires, and see whether the states keep firing.

    Prompts are contexts cut after such a token, at random, at most one a document for each state; `n_samples` continuations of
    `n_tokens` are drawn from each, unsteered, at temperature 1. Counted are all sampled tokens before an end-of-text whose
    previous token fires a state. `encode` maps MLP activations to unit activations; `table` is of the same units on `text`.
    Prompts end among the flat tokens `where`, as a rule in all documents in which a state fires.

    Raises StudyError if the prompts come from fewer than two documents.
    """
    where = their_documents(table, text, states) if where is None else where
    chosen, units = prompts(table, text, states, where, n_prompts, n_tokens, seed), list(states)
    seeds = numpy_generator(seed, "verify").integers(2**31, size=len(chosen)).tolist()
    sums, times = [], []
    for (context, position), sample_seed in zip(chosen, seeds, strict=True):
        tokens = sample(model, text.contexts[context, :position + 1], n_tokens, sample_seed, n_samples)
        keep = torch.arange(position, position + n_tokens + 1).expand(n_samples, -1)
        fires = encode(mlp_activations(model, tokens, keep).flatten(0, 1))[:, units].unflatten(0, (n_samples, -1)) > 0
        goes_on = (tokens[:, position + 1:] != ActivationStream.END_OF_TEXT).cumprod(1).bool()
        now, following = (value[goes_on].double() for value in (fires[:, :-1], fires[:, 1:]))
        sums.append([((now.amax(1) > 0) & (following.amax(1) > 0)).sum().item(), now.amax(1).sum().item()])
        times.append(torch.cat([now.T @ following, now.sum(0)[:, None]], 1).numpy())
    documents = [int(text.documents[context, position]) for context, position in chosen]
    if len(set(documents)) < 2:
        raise StudyError(f"The states {units} fire in {len(set(documents))} documents where {n_tokens} tokens can follow; "
                         "two are needed, so use more held-out text.")
    stay = bootstrap_interval(pd.DataFrame(sums).groupby(documents).sum().to_numpy(), lambda t: t[..., 0] / t[..., 1],
                              n_boot=n_boot, seed=seed)
    total = np.sum(times, axis=0)
    inside = (text.contexts != ActivationStream.END_OF_TEXT).flatten().numpy()
    real = table[:, units].toarray() > 0
    any_state, now = real.any(1), real.any(1) & continues(text)
    text_stay = np.roll(any_state, -1)[now].sum() / max(1, now.sum())
    with np.errstate(invalid="ignore"):
        hand_over = total[:, :-1] / total[:, -1:]
    base, there = (float(any_state[part].mean()) for part in (inside, inside & where))
    return Verification(stay, base, there, float(text_stay), hand_over, real[inside].mean(0), len(chosen))
