"""What features of a reader's own model are: cards of some, chosen by a rule, and what adding them does."""

import html
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from scipy.sparse import csc_array
from torch import Tensor

from sae_lib import effects, residual
from sae_lib.activations import Skip
from sae_lib.errors import StudyError
from sae_lib.evaluate import Text
from sae_lib.features import ENDS, column, densities
from sae_lib.sae import SAE
from sae_lib.seeds import generator, numpy_generator
from sae_lib.study import diagrams
from sae_lib.study.figures import COLOURS
from sae_lib.study.own_model import Own
from sae_lib.study.panels import AROUND, example_html
from sae_lib.study.tables import flat

SHOWN = 6  # examples of a card
RAISED = 10  # tokens that a feature raises most
LEAST, MOST = 8, 64  # tokens of a prompt
FEATURE, RANDOM = "the feature", "a random direction"


class Card(NamedTuple):
    """One feature on the validation text."""

    feature: int
    density: float
    maximum: float
    places: np.ndarray
    """Its strongest tokens in flat order, strongest first."""
    effect: np.ndarray
    """[d_vocab] what it adds to the probability of each next token at those places, on average; nan for unused ones."""
    lines: list[str]
    """Its strongest examples as HTML."""
    domain: str
    domain_share: float
    """The commonest domain of its strongest tokens, and how many of them are of it."""

    @property
    def raised(self) -> np.ndarray:
        """Ids of the tokens that it raises most."""
        return np.argsort(-np.nan_to_num(self.effect, nan=-np.inf), kind="stable")[:RAISED]


def choose(table: csc_array, n: int) -> list[int]:
    """The rule: of the features that fire on 20 tokens or more, those at even steps from the rarest to the commonest.

    Raises StudyError if none fires as often.
    """
    density, often = densities(table), np.flatnonzero(np.diff(table.indptr) >= ENDS)
    if not len(often):
        raise StudyError(f"No feature fires on {ENDS} tokens or more of this text; take a dictionary of this model and layer.")
    ranked = often[np.argsort(density[often], kind="stable")]
    at = (np.arange(n) + 0.5) / n * len(ranked)
    return ranked[np.unique(at.astype(int))].tolist()


def card(own: Own, sae: SAE, after: int, skip: Skip, table: csc_array, feature: int) -> Card:
    """What a feature fires on in the validation text, whose unit table this is, and what taking it out there changes."""
    text, n_ctx = own.validation, own.validation.contexts.shape[1]
    where, values = column(table, feature)
    places = where[np.argsort(-values, kind="stable")[:ENDS]]
    contexts, at = text.contexts[places // n_ctx].long(), torch.from_numpy(places % n_ctx).long()
    edits = {"with": None, "without": skip.sparing(contexts, effects.pin(sae, feature, 0.0))}
    expected = residual.next_token_log_probabilities(own.model, contexts, at, edits, after)
    effect = (expected["with"].exp() - expected["without"].exp()).mean(0).masked_fill(~own.used, torch.nan).numpy()
    domains = flat(text.domains)[places]
    most = int(np.bincount(domains).argmax())
    maximum = float(values.max())
    return Card(feature, len(where) / table.shape[0], maximum, places, effect,
                _lines(own, sae, after, skip, feature, contexts[:SHOWN], at[:SHOWN].tolist(), maximum), own.domains[most],
                float((domains == most).mean()))


def _lines(own: Own, sae: SAE, after: int, skip: Skip, feature: int, contexts: Tensor, at: list[int],
           maximum: float) -> list[str]:
    acts = residual.activations(own.model, contexts, after)
    active = sae.encode(acts, [feature])[..., 0].masked_fill(skip.mask(contexts, acts), 0).double().numpy()
    edits = {"with": None, "without": skip.sparing(contexts, effects.pin(sae, feature, 0.0))}
    losses = residual.losses(own.model, contexts, edits, after)
    change = torch.nn.functional.pad(losses["with"] - losses["without"], (1, 0)).numpy()  # of the first nothing is predicted
    lines = []
    for row, place in enumerate(at):
        window = slice(max(0, place - AROUND), place + AROUND // 2)
        pieces = [own.vocabulary[t] for t in contexts[row, window].tolist()]
        lines.append(example_html(pieces, active[row, window], change[row, window], maximum))
    return lines


def page(cards: list[Card]) -> str:
    """The cards as HTML."""
    parts = []
    for each in cards:
        parts.append(f"<h4>feature {each.feature}: on {each.density:.2%} of tokens, at most {each.maximum:.2f}; of its "
                     f"{len(each.places)} strongest {each.domain_share:.0%} are of {html.escape(each.domain)}</h4>"
                     + "".join(each.lines))
    return f'<div style="font-family: monospace; line-height: 1.7; overflow-x: auto">{"".join(parts)}</div>'


def spelled(own: Own, tokens: np.ndarray) -> list[str]:
    """Tokens as labels of a figure."""
    return [diagrams.escaped(diagrams.spelled(own.vocabulary[t])) for t in tokens.tolist()]


# --- steering --------------------------------------------------------------------------------------------------------

def prompts(text: Text, skip: Skip, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Beginnings of at most `n` contexts, and in each the place of its last token, no two of which are of one document.

    Raises StudyError if contexts are too short or there are fewer than two.
    """
    length = min(MOST, text.contexts.shape[1])
    if length <= LEAST:
        raise StudyError(f"Contexts of {length} tokens are too short for prompts of {LEAST}; use longer ones.")
    rng, chosen, seen = numpy_generator(seed, "prompts"), [], set()
    at = rng.integers(LEAST, length, len(text.contexts))
    plain = ~skip.mask(text.contexts.long())
    for row in rng.permutation(len(at)).tolist():
        document = int(text.documents[row, at[row]])
        if plain[row, at[row]] and document not in seen and len(chosen) < n:
            seen.add(document)
            chosen.append(row)
    if len(chosen) < 2:
        raise StudyError("There are fewer than two documents to take prompts from; give a corpus with more held-out text.")
    return text.contexts[chosen, :length].long(), torch.from_numpy(at[chosen]).long()


def steer(own: Own, sae: SAE, after: int, cards: list[Card], tokens: Tensor, at: Tensor, strengths: tuple[float, ...],
          seed: int) -> pd.DataFrame:
    """Add a feature's direction to the residual stream at the last token of each prompt, or as much of a random direction.

    `strengths` are in units of the feature's maximum. Columns: feature, way, strength, prompt; share: probability of the ten
    tokens that the feature raised on its own examples; divergence: from what the model expects unsteered, KL in nats.
    """
    rows, frames = torch.arange(len(tokens)), []

    def adding(step: Tensor):
        def edit(resid: Tensor) -> Tensor:
            edited = resid.clone()
            edited[rows, at] += step
            return edited

        return edit

    for each in cards:
        direction = sae.W_dec[each.feature]
        noise = torch.randn(direction.shape, generator=generator(seed, "steering control", each.feature))
        ways = {FEATURE: direction, RANDOM: noise / noise.norm() * direction.norm()}
        edits = {(way, s): adding(s * each.maximum * step) for way, step in ways.items() for s in strengths}
        named = {f"{way}/{s}": edit for (way, s), edit in edits.items()}
        found = residual.next_token_log_probabilities(own.model, tokens, at, {"unsteered": None} | named, after)
        clean = found.pop("unsteered")
        for (way, strength), expected in zip(edits, found.values(), strict=True):
            frames.append(pd.DataFrame({
                "feature": each.feature, "way": way, "strength": strength, "prompt": rows.numpy(),
                "share": expected[:, each.raised].exp().sum(1).numpy(),
                "divergence": (clean.exp() * (clean - expected)).sum(1).clamp_min(0).numpy()}))
    return pd.concat(frames, ignore_index=True)


# --- figures ---------------------------------------------------------------------------------------------------------

def norm_figure(lengths: dict[int, Tensor], skip: Skip, after: int) -> go.Figure:
    """Median length of the residual stream by position, a line a number of layers, the dictionary's in black."""
    fig = go.Figure()
    for i, (layers, length) in enumerate(lengths.items()):
        colour = "#000000" if layers == after else COLOURS[i % 6]
        fig.add_scatter(x=np.arange(length.shape[1]), y=length.median(0).values.numpy(), mode="lines+markers",
                        name=f"after {layers}" + (" (read here)" if layers == after else ""), marker={"size": 3},
                        line={"color": colour, "width": 3 if layers == after else 1.5})
    fig.add_hline(y=skip.above, line_dash="dash", line_color="#777777", annotation_text="longer is a sink, left out",
                  annotation_position="bottom right")
    ticks = [10.0 ** power * step for power in range(-2, 6) for step in (1, 3)]
    fig.update_xaxes(title="position in the context")
    fig.update_yaxes(title="median length (log scale)", type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    return fig.update_layout(legend_title="layers")


def effects_figure(own: Own, cards: list[Card]) -> go.Figure:
    """A panel a feature: the tokens that it raises most on its own strongest examples."""
    columns = min(3, len(cards))
    fig = make_subplots(rows=-(-len(cards) // columns), cols=columns, horizontal_spacing=0.13, vertical_spacing=0.13,
                        subplot_titles=[f"{each.feature}: {html.escape(each.domain)} {each.domain_share:.0%}" for each in cards])
    for i, each in enumerate(cards):
        row, col = (place + 1 for place in divmod(i, columns))
        order = each.raised[::-1]
        fig.add_bar(x=np.nan_to_num(each.effect[order]), y=np.arange(len(order)), orientation="h", showlegend=False,
                    marker={"color": COLOURS[0]}, row=row, col=col)
        # As tick labels, for two different tokens may look alike.
        fig.update_yaxes(tickvals=np.arange(len(order)), ticktext=spelled(own, order), tickfont={"size": 11}, row=row,
                         col=col)
    fig.update_xaxes(tickformat=".1%", nticks=4)
    for col in range(1, columns + 1):
        fig.update_xaxes(title="probability added", row=-(-len(cards) // columns), col=col)
    return fig.update_layout(height=120 + 270 * -(-len(cards) // columns), width=1000)


def steering_figure(table: pd.DataFrame) -> go.Figure:
    """Probability of the features' own tokens and the price in divergence by strength: each feature thin, their mean thick."""
    titles = ["probability of its ten tokens", "change of all expectations"]
    fig = make_subplots(cols=2, horizontal_spacing=0.12, subplot_titles=titles)
    for col, measure in enumerate(("share", "divergence"), start=1):
        for way, colour, dash in ((FEATURE, COLOURS[0], "solid"), (RANDOM, COLOURS[1], "dash")):
            part = table[table.way == way]
            for _, one in part.groupby("feature"):
                mean = one.groupby("strength")[measure].mean()
                fig.add_scatter(x=mean.index, y=mean, mode="lines", line={"color": colour, "width": 1, "dash": dash},
                                opacity=0.45, showlegend=False, row=1, col=col)
            mean = part.groupby("strength")[measure].mean()
            fig.add_scatter(x=mean.index, y=mean, mode="lines+markers", name=way, showlegend=col == 1,
                            line={"color": colour, "width": 3, "dash": dash}, row=1, col=col)
    fig.update_xaxes(title="strength, in units of the feature's maximum")
    fig.update_yaxes(tickformat=".0%", rangemode="tozero", row=1, col=1)
    fig.update_yaxes(title="KL divergence (nats)", rangemode="tozero", row=1, col=2)
    return fig.update_layout(legend={"orientation": "h", "y": -0.2}, width=1000)
