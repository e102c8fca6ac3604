"""What each unit does (Bricken et al., Feature Downstream Effects, Feature Ablations, Pinned Feature Sampling; B10).

A direction of the MLP activations adds to the logits; taking a feature out changes what the model expects next; holding it at
its maximum changes what the model writes. Every intervention is an edit of the last layer's MLP activations. It adds a multiple
of a direction and leaves the rest of the activations, the dictionary's error included, as it is. Nothing after that layer mixes
positions, so an edit at a position shows in that position's prediction alone.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer
from scipy.sparse import csc_array
from torch import Tensor

from sae_lib.activations import HARVEST_CONTEXTS, ActivationStream
from sae_lib.errors import StudyError
from sae_lib.metrics import Interval, bootstrap_interval
from sae_lib.proxies import SCRIPTS, Vocabulary
from sae_lib.sae import SAE
from sae_lib.transformer import MlpEdit, Transformer, before_last_mlp, logits, mlp_post, parameters, token_losses

LOGIT_ROWS = 256  # positions whose logits are in memory together

# --- logits ----------------------------------------------------------------------------------------------------------


def used_tokens(tokens: Integer[np.ndarray, " n"], vocabulary: Vocabulary, at_least: int) -> Bool[Tensor, " d_vocab"]:
    """Tokens that are text, not special, and occur so often in the training text that their logits were trained."""
    is_text = np.array([bool(token) for token in vocabulary])
    return torch.from_numpy((np.bincount(tokens, minlength=len(vocabulary)) >= at_least) & is_text)


@torch.no_grad()
def logit_weights(model: Transformer, directions: Float[Tensor, "n d_in"], used: Bool[Tensor, " d_vocab"] | None = None,
                  of_residual: bool = False) -> Float[Tensor, "n d_vocab"]:
    """What each direction adds to each token's logit: d W_down pi L W_unembed, each row shifted to median 0 (B10).

    Directions are of the last layer's MLP activations; or `of_residual`, of the stream they are written to: no W_down then. Of
    a stream that further layers read this is what reaches the logits past them.

    pi takes the mean out and L is the last LayerNorm's weight; its division by the standard deviation is left out, for it
    depends on the context. A dictionary's directions are the rows of `W_dec`, the neurons' those of the identity. Tokens that
    are not `used`, because they hardly occur, have weights that training never set: they get nan and no part in the median.
    Of an even number of tokens the median is the lower of the middle two.

    Raises StudyError if no token is used.
    """
    p = parameters(model)
    written = directions if of_residual else directions @ p[f"layers.{model.cfg.n_layers - 1}.mlp.fc_out.weight"].T
    centred = written - written.mean(1, keepdim=True)
    weights = (centred * p["ln_out.weight"]) @ p["head.weight"].T
    if used is not None:
        if not used.any():
            raise StudyError("No token of the vocabulary is marked as used; count the tokens on more text.")
        weights.masked_fill_(~used, torch.nan)
    return weights.sub_(weights.nanmedian(1, keepdim=True).values)


def top_logits(weights: Float[Tensor, " d_vocab"], vocabulary: Vocabulary, k: int = 10) -> pd.DataFrame:
    """The k tokens with the highest and the k with the lowest logit weight, from high to low; those with nan are left out.

    Columns token (bytes) and weight; the index holds the token ids. No token comes twice, however small the vocabulary.
    """
    ranked = pd.Series(weights.numpy(), name="weight").dropna().sort_values(ascending=False, kind="stable")
    rank = np.arange(len(ranked))
    ends = ranked[(rank < k) | (rank >= len(ranked) - k)].to_frame()
    ends.insert(0, "token", [vocabulary[i] for i in ends.index])
    return ends.rename_axis("id")


def attribution(table: csc_array, weights: Float[Tensor, "n_units d_vocab"], tokens: Int[Tensor, " n_tokens"],
                n_ctx: int) -> csc_array:
    """Attribution vectors f_i(t_j) v_{i, t_{j+1}}: activation times logit weight of the token that really follows (B11).

    `table` is a unit table [n_tokens, n_units] of `tokens` in flat order, contexts of `n_ctx` tokens one after another;
    `weights` come from `logit_weights`. The result has the table's shape. There is no entry where the context ends, at and
    before end-of-text, and where the weight is nan or 0.

    Raises StudyError if the sizes do not fit.
    """
    if table.shape != (len(tokens), len(weights)) or len(tokens) % n_ctx:
        raise StudyError(f"A table of shape {table.shape} does not fit {len(tokens)} tokens in contexts of {n_ctx} and the logit "
                         f"weights of {len(weights)} units; make all three from the same text and units.")
    current, nothing = tokens.numpy(), ActivationStream.END_OF_TEXT
    following = np.append(current[1:], nothing)
    following[n_ctx - 1::n_ctx] = nothing
    following[current == nothing] = nothing
    of_entry = following[table.indices]
    unit = np.repeat(np.arange(len(weights)), np.diff(table.indptr))
    weight = np.where(of_entry == nothing, 0, np.nan_to_num(weights.numpy()[unit, of_entry]))
    result = csc_array((table.data * weight, table.indices.copy(), table.indptr.copy()), shape=table.shape)
    result.eliminate_zeros()
    return result


# --- edits of the MLP activations [batch, pos, d_mlp] ----------------------------------------------------------------

def _check(index: int, n: int, what: str) -> None:
    if not 0 <= index < n:
        raise StudyError(f"There is no {what} {index}; give a number from 0 to {n - 1}.")


def pin(sae: SAE, feature: int, value: float) -> MlpEdit:
    """Hold a feature at a value: x + (value - f_i(x)) d_i. With 0 it is ablated, as in the paper's Feature Ablations.

    The activations are not rebuilt from features, so what the dictionary misses stays in them. They may become negative.

    Raises StudyError if the dictionary has no such feature.
    """
    _check(feature, len(sae.W_dec), "feature")
    return lambda acts: acts + (value - sae.encode(acts, [feature])) * sae.W_dec[feature]


def pin_neuron(neuron: int, value: float) -> MlpEdit:
    """Hold a neuron at a value; with 0 it is ablated. The edit raises StudyError if there is no such neuron."""
    def edit(acts: Tensor) -> Tensor:
        _check(neuron, acts.shape[-1], "neuron")
        edited = acts.clone()
        edited[..., neuron] = value
        return edited

    return edit


def add(direction: Float[Tensor, " d_mlp"], strength: float) -> MlpEdit:
    """Additive steering: x + strength * direction, whatever is active. A direction of another length than 1 is not rescaled."""
    return lambda acts: acts + strength * direction


# --- what edits do ---------------------------------------------------------------------------------------------------

@torch.no_grad()
def ablation_effects(model: Transformer, contexts: Int[Tensor, "n_contexts n_ctx"],
                     edit: MlpEdit) -> Float[Tensor, "n_contexts n_ctx-1"]:
    """Change of each next token's log-likelihood, in nats, when the MLP activations are edited on every token (B10).

    `pin(sae, feature, 0)` ablates a feature and `pin_neuron(neuron, 0)` a neuron. Below zero: what was ablated had made the
    token likelier. Column j belongs to the edit at token j and the prediction of token j + 1. Logits are computed only where
    the edit changes something, so a rare feature costs little more than the attention; elsewhere the effect is exactly 0.
    """
    p, cfg = parameters(model), model.cfg
    last = f"layers.{cfg.n_layers - 1}"
    effects = torch.zeros(contexts.shape[0], contexts.shape[1] - 1)
    for tokens, found in zip(contexts.long().split(HARVEST_CONTEXTS), effects.split(HARVEST_CONTEXTS), strict=True):
        resid = before_last_mlp(p, tokens, cfg.n_heads, cfg.n_layers)
        acts = mlp_post(p, last, resid)
        edited = edit(acts)
        for rows in (edited != acts).any(-1)[:, :-1].nonzero().split(LOGIT_ROWS):
            at = rows.unbind(1)
            following = tokens[at[0], at[1] + 1]
            clean, changed = (F.cross_entropy(logits(p, last, resid[at], values[at]), following, reduction="none")
                              for values in (acts, edited))
            found[at] = clean - changed
    return effects


def mean_effect(effects: Float[np.ndarray, " n"], chosen: Bool[np.ndarray, " n"], documents: Int[np.ndarray, " n"],
                **draws: int) -> Interval:
    """Mean effect on the chosen predictions, with a bootstrap over documents (`draws`: its seed and n_boot); nan if there are
    none.
    """
    _, index = np.unique(documents, return_inverse=True)
    sums = np.stack([np.bincount(index, effects * chosen), np.bincount(index, chosen)], axis=1)
    with np.errstate(invalid="ignore"):  # a draw of documents may hold none
        return bootstrap_interval(sums, lambda t: t[..., 0] / t[..., 1], **draws)


# --- what was sampled ------------------------------------------------------------------------------------------------

class Fluency(NamedTuple):
    """How much like the model's own text each sample is; the prompt is not counted."""

    log_likelihood: Float[Tensor, " n_samples"]
    """Mean log-likelihood of a sampled token under the unsteered model, in nats."""
    distinct: Float[Tensor, " n_samples"]
    """Different tokens per token: low where a sample repeats itself. Longer samples have less, so compare equal lengths."""


def fluency(model: Transformer, samples: Int[Tensor, "n_samples length"], prompt_length: int) -> Fluency:
    """What steering cost: samples that the unsteered model finds unlikely, or that go round in circles.

    Raises StudyError unless there is a prompt and something after it.
    """
    if not 0 < prompt_length < samples.shape[1]:
        raise StudyError(f"Samples of {samples.shape[1]} tokens cannot have a prompt of {prompt_length}; give its true length.")
    losses = token_losses(model, samples.long(), {"clean": None})["clean"][:, prompt_length - 1:]
    sampled = samples[:, prompt_length:]
    distinct = torch.tensor([len(row.unique()) for row in sampled]) / sampled.shape[1]
    return Fluency(-losses.mean(1), distinct)


CharacterTest = Callable[[str], Bool[np.ndarray, " characters"]]


def inside(pattern: str) -> CharacterTest:
    """The characters that lie inside a match of a regular expression."""
    compiled = re.compile(pattern)

    def test(text: str) -> Bool[np.ndarray, " characters"]:
        is_inside = np.zeros(len(text), dtype=bool)
        for match in compiled.finditer(text):
            is_inside[slice(*match.span())] = True
        return is_inside

    return test


_BASE64 = "[A-Za-z0-9+/]"
CONTEXTS: dict[str, CharacterTest] = {
    **{script: inside("[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in blocks) + "]")
       for script, blocks in SCRIPTS.items()},
    # Words and names in CamelCase have no digit, hexadecimal numbers and paths seldom both cases, rulers are of "=".
    "base64": inside(f"(?<!{_BASE64})(?={_BASE64}*[A-Z])(?={_BASE64}*[a-z])(?={_BASE64}*[0-9]){_BASE64}{{16,}}={{0,2}}"),
    "dna": inside("[ACGT]{16,}|[acgt]{16,}"),
}
"""Characters of contexts, by the names of the corpus's domains: of a script's Unicode blocks; of runs of 16 or more without a
space of the base64 alphabet, with at least one capital, one small letter and one digit, and padding at the end only; of runs of
16 or more bases, all capitals or all small."""


def in_characters(contexts: Int[Tensor, "n_contexts n_ctx"], vocabulary: Vocabulary,
                  is_context: CharacterTest) -> Bool[np.ndarray, "n_contexts n_ctx"]:
    """Whether at least half of the bytes of each token are of characters that are in a context.

    No string of characters reaches over an end-of-text, or from one row of `contexts` to the next.
    """
    pieces = [token or b"\n" for token in vocabulary] + [b"\n"]
    stream = np.pad(contexts.numpy().astype(np.int64), ((0, 0), (0, 1)), constant_values=len(vocabulary)).ravel()
    text = b"".join(pieces[t] for t in stream).decode("utf-8", errors="surrogateescape")  # each stray byte is a character
    codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), "<u4")
    n_bytes = np.where((codes >= 0xDC80) & (codes <= 0xDCFF), 1, 1 + np.searchsorted([0x80, 0x800, 0x10000], codes, "right"))
    size = np.array([len(piece) for piece in pieces])[stream]
    part = np.add.reduceat(np.repeat(is_context(text), n_bytes), np.cumsum(size) - size, dtype=np.int64)
    return (2 * part >= size).reshape(len(contexts), -1)[:, :-1]


def character_share(texts: list[bytes], is_context: CharacterTest, **draws: int) -> Interval:
    """Share of all sampled characters that are in a context, with a bootstrap over samples.

    `texts` are the samples without their prompt, `draws` the seed and n_boot of `bootstrap_interval`. One white-space character
    between two characters of the context belongs to it, or no text with words could reach 1; more do not. Bytes that are no
    UTF-8, such as a letter cut in two where a sample begins or ends, become U+FFFD: they count as sampled, and in no context.

    Raises StudyError if fewer than two samples have any text.
    """
    decoded = [raw.decode("utf-8", errors="replace") for raw in texts if raw]
    if len(decoded) < 2:
        raise StudyError("A share needs at least two samples with text in them; draw more, or longer ones.")
    counts = np.zeros((len(decoded), 2))
    for i, text in enumerate(decoded):
        found = is_context(text).copy()
        space = np.array([c.isspace() for c in text], dtype=bool)
        found[1:-1] |= space[1:-1] & found[:-2] & found[2:]
        counts[i] = found.sum(), len(text)
    return bootstrap_interval(counts, lambda t: t[..., 0] / t[..., 1], **draws)
