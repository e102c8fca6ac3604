"""Features that hand over to each other (Bricken et al., "Finite State Automata"; paper_facts B18).

Feature i leads to feature j if i raises the logits of tokens on which j fires. The paper looked at such pairs and gives no
number; here an edge i -> j has to hold three times:

- by weight: over the tokens that j fires on, weighted by how strongly, i's logit weights average `weight` standard deviations
  above their mean over the vocabulary;
- by permutation: shuffled over tokens of about the same frequency, i's weights would seldom reach as high an average. The test
  corrects for the number of pairs (Benjamini-Hochberg);
- by observation: in real text j fires right after i in at least `share` of the cases, `lift` times as often as after any token.

Pairs are chosen for the test by observation alone, of which the shuffled weights know nothing, so that the choice does not
spoil it. What it refutes is that i's weights ignore what the tokens are: features that raise one token of a script tend to raise
its others, so a small p does not say by itself that i and j belong together; weight and observation are there for that.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int
from scipy.sparse import csc_array, csr_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import false_discovery_control
from torch import Tensor

from sae_lib.activations import ActivationStream
from sae_lib.compare import live_units, select_tokens
from sae_lib.errors import StudyError
from sae_lib.evaluate import Text
from sae_lib.seeds import numpy_generator

# --- edges -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EdgeCriterion:
    """When one unit leads to another; see the head of this file. The numbers are this study's, the paper has none."""

    weight: float = 1.0  # standard deviations of the first unit's logit weights
    share: float = 0.1  # of the tokens the first unit fires on
    lift: float = 5.0  # that share over the share of all tokens
    level: float = 0.01  # expected share of false edges among those found, after Benjamini-Hochberg
    n_permutations: int = 2000
    n_strata: int = 5  # groups of tokens of about the same frequency, within which weights are shuffled
    min_fired: int = 20  # tokens that either unit fires on
    min_count: int = 5  # a rarer token's weights were hardly trained; it is left out


def continues(text: Text) -> Bool[np.ndarray, " n_tokens"]:
    """Flat tokens whose next one belongs to the same context and document, and neither is end-of-text."""
    inside = text.contexts != ActivationStream.END_OF_TEXT
    found = torch.zeros_like(inside)
    found[:, :-1] = inside[:, :-1] & inside[:, 1:] & (text.documents[:, :-1] == text.documents[:, 1:])
    return found.flatten().numpy()


def hand_overs(table: csc_array, text: Text, criterion: EdgeCriterion) -> pd.DataFrame:
    """Pairs of units of which the second fires right after the first as often as the criterion's `share` and `lift` ask.

    Columns: source, target, times (the target fired on the token after one that the source fired on), share (times over the
    source's firings), lift (share over the target's share of all tokens that come after another).

    Raises StudyError if the table is not of this text.
    """
    if table.shape[0] != text.contexts.numel():
        raise StudyError(f"The table is over {table.shape[0]} tokens and the text has {text.contexts.numel()}; make the table "
                         "from the same text.")
    now = continues(text)
    fires = csc_array((np.ones(table.nnz, dtype=np.float32), table.indices, table.indptr), shape=table.shape)
    before, after = select_tokens(fires, now), select_tokens(fires, np.roll(now, 1))
    base = np.diff(after.indptr) / max(1, now.sum())
    live = live_units(table, criterion.min_fired)
    rows, chunk = after.tocsr(), 512
    found = []
    for start in range(0, table.shape[1], chunk):
        part = before[:, start:start + chunk]
        times = (part.T @ rows).tocoo()
        source, target = times.row + start, times.col
        share = times.data / np.diff(before.indptr)[source]
        lift = share / base[target]
        kept = (share >= criterion.share) & (lift >= criterion.lift) & live[source] & live[target]
        found.append(pd.DataFrame({"source": source, "target": target, "times": times.data.astype(np.int64), "share": share,
                                   "lift": lift})[kept])
    return pd.concat(found).astype({"source": np.int64, "target": np.int64}).sort_values(["source", "target"], ignore_index=True)


def token_profiles(table: csc_array, contexts: Int[Tensor, "n_contexts n_ctx"],
                   used: Bool[np.ndarray, " d_vocab"]) -> Float32[Tensor, "n_units n_used"]:
    """For each unit, how its activation is spread over the `used` tokens of the vocabulary; a row adds up to 1, or is 0."""
    tokens = contexts.flatten().numpy()
    is_token = csc_array((np.ones(len(tokens), dtype=np.float32), tokens, np.arange(len(tokens) + 1)),
                         shape=(len(used), len(tokens)))
    total = torch.from_numpy((is_token @ table).toarray().T[:, used].astype(np.float32))
    return total / total.sum(1, keepdim=True).clamp_min(1e-30)


def _shuffles(counts: np.ndarray, criterion: EdgeCriterion, seed: int) -> Int[Tensor, "n_used n_permutations_plus_1"]:
    """Orders of the used tokens, one a column: first as they are, then shuffled within tokens of like frequency."""
    rng = numpy_generator(seed, "automata")
    orders = np.tile(np.arange(len(counts))[:, None], (1, criterion.n_permutations + 1))
    for stratum in np.array_split(np.argsort(counts, kind="stable"), criterion.n_strata):
        orders[stratum, 1:] = rng.permuted(orders[stratum, 1:], axis=0)
    return torch.from_numpy(orders.astype(np.int32))


@torch.no_grad()
def find_edges(table: csc_array, text: Text, logit_weights: Float[Tensor, "n_units d_vocab"],
               criterion: EdgeCriterion = EdgeCriterion(), seed: int = 0) -> pd.DataFrame:
    """Edges i -> j between the units of a table, by the criterion.

    `logit_weights` are the units'; tokens of weight nan are left out, as are end-of-text and tokens that come fewer than
    `min_count` times. Columns: source, target, times, share, lift (of `hand_overs`), weight (in standard deviations of the
    source's weights over the vocabulary), p (of the permutations, at least 1 / (n_permutations + 1)), q (p after
    Benjamini-Hochberg over all observed pairs; one of too small a weight counts as p = 1, which errs on the safe side).

    Raises StudyError if the table is not of this text or no token is used.
    """
    pairs = hand_overs(table, text, criterion)
    counts = torch.bincount(text.contexts.flatten(), minlength=logit_weights.shape[1]).numpy()
    used = (counts >= criterion.min_count) & ~logit_weights.isnan().any(0).numpy()
    used[ActivationStream.END_OF_TEXT] = False
    if not used.any():
        raise StudyError(f"No token comes {criterion.min_count} times in the text; use more text.")
    profiles = token_profiles(table, text.contexts, used)
    v = logit_weights[:, torch.from_numpy(used)].float()
    v = (v - v.mean(1, keepdim=True)) / v.std(1, correction=0, keepdim=True).clamp_min(1e-30)
    source, target = pairs[["source", "target"]].to_numpy(dtype=np.int64).T
    weight, p = np.zeros(len(pairs)), np.ones(len(pairs))
    for start in range(0, len(pairs), 1024):
        part = slice(start, start + 1024)
        weight[part] = (v[source[part]] * profiles[target[part]]).sum(1).numpy()
    tested = np.flatnonzero((weight >= criterion.weight) & profiles.any(1).numpy()[target])
    orders = _shuffles(counts[used], criterion, seed)
    for j in np.unique(target[tested]):
        rows = tested[target[tested] == j]
        on = profiles[j].nonzero()[:, 0]
        # A unit fires on few tokens: only these tokens' weights are shuffled, those of all sources at once.
        averages = F.embedding_bag(orders[on].T, v[source[rows]].T.contiguous(), mode="sum",
                                   per_sample_weights=profiles[j][on].repeat(orders.shape[1], 1)).T
        # The first order is the true one; equal averages may differ by rounding.
        p[rows] = (averages >= averages[:, :1] - 1e-5).double().mean(1).numpy()
    q = false_discovery_control(p) if len(p) else p
    edges = pairs.assign(weight=weight, p=p, q=q)
    return edges[(edges.weight >= criterion.weight) & (edges.q <= criterion.level)].reset_index(drop=True)


# --- automata --------------------------------------------------------------------------------------------------------


def _cycles(follow: dict[int, list[int]], max_states: int) -> Iterator[tuple[int, ...]]:
    """Simple cycles of at most so many states, each once, from its smallest state on."""
    paths = [(state,) for state in follow]
    while paths:
        path = paths.pop()
        for state in follow[path[-1]]:
            if state == path[0]:
                yield path
            elif state > path[0] and state not in path and len(path) < max_states:
                paths.append((*path, state))


def find_automata(edges: pd.DataFrame, max_states: int = 4, fan_out: int = 5) -> pd.DataFrame:
    """Sets of 1 to `max_states` units that lead back to themselves: self-loops and cycles of edges.

    A cycle takes each state's `fan_out` strongest edges to other states of its strongly connected component (those that can be
    reached from each other), for a component of many units alike has more cycles than anyone can read. Cycles of the same
    states count once, with the strongest.

    A row an automaton: states (in the order of the cycle), n_states, share (the least, over the cycle's edges, of the share of
    times that the target fires next), lift and weight (likewise), component, component_size. For each number of states
    the automata with the greatest share come first, and `first` is True for those that share no state with a better one.
    """
    source, target = edges[["source", "target"]].to_numpy(dtype=np.int64).T
    n = 1 + max(source.max(initial=0), target.max(initial=0))
    graph = csr_array((np.ones(len(edges)), (source, target)), shape=(n, n))
    _, component = connected_components(graph, connection="strong")
    sizes = np.bincount(component)
    inside = edges[component[source] == component[target]]
    loops = inside[inside.source == inside.target]
    others = inside[inside.source != inside.target].sort_values("share", ascending=False, kind="stable")
    others = others.groupby("source").head(fan_out)
    follow = {int(state): [] for state in inside.source.unique()}
    for i, j in pd.concat([loops, others])[["source", "target"]].to_numpy().tolist():
        follow[i].append(j)
    strength = {(int(row.source), int(row.target)): (row.share, row.lift, row.weight) for row in inside.itertuples()}
    rows = []
    for states in _cycles(follow, max_states):
        share, lift, weight = (min(values) for values in zip(*(
            strength[edge] for edge in zip(states, (*states[1:], states[0]), strict=True)), strict=True))
        rows.append((states, len(states), share, lift, weight, component[states[0]], sizes[component[states[0]]]))
    columns = ["states", "n_states", "share", "lift", "weight", "component", "component_size"]
    found = pd.DataFrame(rows, columns=columns).sort_values(["n_states", "share", "states"], ascending=[True, False, True])
    found = found[~found.states.map(frozenset).duplicated()].reset_index(drop=True)
    seen: dict[int, set[int]] = {}
    first = []
    for states in found.states:
        taken = seen.setdefault(len(states), set())
        first.append(taken.isdisjoint(states))
        taken.update(states if first[-1] else ())
    return found.assign(first=np.array(first, dtype=bool))
