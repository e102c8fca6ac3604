"""The panels that notebook 04 draws for each unit: what it fires on, what it writes, and its examples in colour."""

import html
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from sae_lib import proxies
from sae_lib.evaluate import Text
from sae_lib.features import ByLevel
from sae_lib.study.figures import COLOURS
from sae_lib.study.pipeline import Study
from sae_lib.study.tables import flat
from sae_lib.study.token_html import line_html, pieces, token_html
from sae_lib.token_classes import quoted

SAMPLE_CONTEXTS = 800  # training contexts from which a proxy takes its probabilities
INSIDE, OUTSIDE = COLOURS[0], COLOURS[1]
TRUTHS = ("proxy", "proxy in place", "label")
AROUND = 12  # tokens shown before an example; half as many after it


def label(study: Study, name: str, text: Text) -> np.ndarray:
    """Whether each token, in flat order, is of a document labelled `name`; never, if the corpus has no such domain."""
    domains = study.tokens.domains
    return flat(text.domains) == (domains.index(name) if name in domains else -1)


def truths(study: Study, name: str, text: Text, in_place: bool = True) -> dict[str, np.ndarray]:
    """What is known of each token, in flat order: the proxy by the paper's rule, for a script also in place, and the label.

    Proxies are the targets of correlations: above 0 where the token is in the context.
    """
    contexts = study.contexts("train")
    sample = contexts[torch.linspace(0, len(contexts) - 1, min(SAMPLE_CONTEXTS, len(contexts))).long()]
    rules = {"proxy": False} | ({"proxy in place": True} if in_place and name in proxies.SCRIPTS else {})
    found = {rule: proxies.correlation_target(name, proxies.proxy(name, text.contexts, study.vocabulary, sample, strict).ravel())
             for rule, strict in rules.items()}
    return found | {"label": label(study, name, text)}


def _once() -> Callable[[str], dict]:
    """Gives the legend's part of a trace: traces of one name share an entry."""
    drawn = set()

    def legend(name: str) -> dict:
        first = name not in drawn
        drawn.add(name)
        return {"name": name, "legendgroup": name, "showlegend": first}

    return legend


# --- figures ---------------------------------------------------------------------------------------------------------

def correlation_figure(table: pd.DataFrame) -> go.Figure:
    """A row of panels a context, a marker a kind of unit, the paper's number as a cross. Columns of the table: context, truth,
    unit, value, low, high, paper (nan where the paper has none).
    """
    contexts, kinds, legend = list(table.context.unique()), list(table.unit.unique()), _once()
    fig = make_subplots(rows=len(contexts), cols=1, shared_xaxes=True, vertical_spacing=0.03, row_titles=contexts)
    for (context, kind), part in table.groupby(["context", "unit"], sort=False):
        at, i = {"row": contexts.index(context) + 1, "col": 1}, kinds.index(kind)
        fig.add_scatter(x=part.value, y=part.truth, mode="markers", **legend(kind), **at,
                        marker={"symbol": ("circle", "circle-open", "diamond-open")[i], "size": 11, "color": COLOURS[i]},
                        error_x={"array": part.high - part.value, "arrayminus": part.value - part.low, "thickness": 1})
        if part.paper.notna().any():
            fig.add_scatter(x=part.paper, y=part.truth, mode="markers", **legend(f"{kind} in the paper"), **at,
                            marker={"symbol": "x", "size": 9, "color": COLOURS[i]})
    fig.update_xaxes(title="Pearson correlation (test text)", row=len(contexts), col=1)
    for row, context in enumerate(contexts, start=1):
        known = set(table.truth[table.context == context])
        fig.update_yaxes(categoryorder="array", categoryarray=[truth for truth in TRUTHS[::-1] if truth in known], row=row)
    return fig.update_layout(height=150 + 125 * len(contexts))


def level_figure(units: dict[str, dict[str, ByLevel]], split_by: dict[str, str]) -> go.Figure:
    """A row a unit (its caption), three panels: its active tokens by level, the same weighted by activation, both split by the
    truth `split_by` of the unit; and the share of them that is in the context by every truth.
    """
    titles, legend = ["active tokens", "weighted by activation", "share in the context"], _once()
    fig = make_subplots(rows=len(units), cols=3, column_titles=titles, row_titles=list(units), vertical_spacing=0.25 / len(units),
                        horizontal_spacing=0.07)
    for row, (unit, by_truth) in enumerate(units.items(), start=1):
        levels = by_truth[split_by[unit]]
        middle = (levels.edges[1:] + levels.edges[:-1]) / 2
        parts = (levels.count, levels.in_context), (levels.weight, levels.weight_in_context)
        for col, (everything, inside) in enumerate(parts, start=1):
            for name, heights, colour, shape in (("in the context", inside, INSIDE, ""),
                                                 ("outside", everything - inside, OUTSIDE, "/")):
                fig.add_bar(x=middle, y=heights, width=np.diff(levels.edges), row=row, col=col, **legend(name),
                            marker={"color": colour, "pattern": {"shape": shape}, "line": {"width": 0}})
        for truth, found in by_truth.items():
            line = {"color": COLOURS[2 + TRUTHS.index(truth)], "dash": ("dot", "dash", "solid")[TRUTHS.index(truth)]}
            fig.add_scatter(x=middle, y=found.share, mode="lines+markers", connectgaps=False, **legend(f"share by {truth}"),
                            line=line, marker={"size": 4}, row=row, col=3)
        fig.update_yaxes(range=[-0.03, 1.05], tickformat=".0%", row=row, col=3)
    for col in (1, 2, 3):
        fig.update_xaxes(title="activation", row=len(units), col=col)
    below = {"orientation": "h", "y": -0.35 / len(units), "yanchor": "top"}
    return fig.update_layout(barmode="stack", height=140 + 190 * len(units), width=1000, legend=below)


def ablation_figure(table: pd.DataFrame) -> go.Figure:
    """A panel a context with an axis of its own, a row a unit: what its ablation does to tokens of the context and to others.
    Columns of the table: context, unit, tokens ("of the context" or "other"), value, low, high (nats).
    """
    contexts, units, legend = list(table.context.unique()), list(table.unit.unique())[::-1], _once()
    fig = make_subplots(rows=-(-len(contexts) // 2), cols=2, shared_yaxes=True, subplot_titles=contexts, horizontal_spacing=0.06,
                        vertical_spacing=0.2)
    kinds = {"of the context": ("tokens of the context", INSIDE, "circle", 0.13),
             "other": ("other tokens", OUTSIDE, "diamond", -0.13)}
    for (context, kind), part in table.groupby(["context", "tokens"], sort=False):
        row, col = (place + 1 for place in divmod(contexts.index(context), 2))
        name, colour, symbol, shift = kinds[kind]
        fig.add_scatter(x=part.value, y=[units.index(unit) + shift for unit in part.unit], mode="markers", row=row, col=col,
                        **legend(name),
                        marker={"color": colour, "symbol": symbol, "size": 10},
                        error_x={"array": part.high - part.value, "arrayminus": part.value - part.low, "thickness": 1.5})
    fig.update_xaxes(title="change of log-likelihood (nats)", zeroline=True, nticks=6)
    fig.update_yaxes(tickvals=list(range(len(units))), ticktext=units, range=[-0.5, len(units) - 0.5], zeroline=False)
    return fig.update_layout(height=100 + 235 * -(-len(contexts) // 2), width=1000,
                             legend={"orientation": "h", "y": -0.16, "yanchor": "top"})


class Written(NamedTuple):
    """What a unit adds to the logits."""

    weights: np.ndarray
    """[d_vocab], nan for tokens that are not used."""
    of_context: np.ndarray
    """[d_vocab] bool."""
    top: pd.DataFrame
    """From `effects.top_logits`."""


def logit_figure(units: dict[str, Written], k: int = 10) -> go.Figure:
    """A row a unit: the histogram of its logit weights, tokens of the context apart, and its k highest tokens."""
    titles, legend = ["tokens of the vocabulary", "the most raised"], _once()
    fig = make_subplots(rows=len(units), cols=2, column_widths=[0.6, 0.4], column_titles=titles, row_titles=list(units),
                        horizontal_spacing=0.2, vertical_spacing=0.2 / len(units))
    for row, unit in enumerate(units.values(), start=1):
        used = np.isfinite(unit.weights)
        edges = np.histogram_bin_edges(unit.weights[used], 50)
        for name, chosen, colour, symbol in (("other tokens", used & ~unit.of_context, OUTSIDE, "x-thin-open"),
                                             ("tokens of the context", used & unit.of_context, INSIDE, "circle")):
            counts = np.histogram(unit.weights[chosen], edges)[0].astype(float)
            fig.add_scatter(x=(edges[1:] + edges[:-1]) / 2, y=np.where(counts, counts, np.nan), mode="markers", row=row, col=1,
                            marker={"color": colour, "symbol": symbol, "size": 7}, **legend(name))
        top = unit.top.head(k)[::-1]
        colours = [INSIDE if unit.of_context[i] else OUTSIDE for i in top.index]
        fig.add_bar(x=top.weight, y=np.arange(len(top)), orientation="h", row=row, col=2, showlegend=False,
                    marker={"color": colours})
        # As tick labels, for two different tokens may look alike.
        fig.update_yaxes(tickvals=np.arange(len(top)), ticktext=[html.escape(quoted(t)) for t in top.token], row=row, col=2,
                         tickfont={"size": 11})
        fig.update_yaxes(type="log", dtick=1, title="tokens", row=row, col=1)
    for col in (1, 2):
        fig.update_xaxes(title="logit weight", row=len(units), col=col)
    below = {"orientation": "h", "y": -0.25 / len(units), "yanchor": "top"}
    return fig.update_layout(height=140 + 240 * len(units), width=1000, legend=below)


# --- examples --------------------------------------------------------------------------------------------------------

def example_html(tokens: Sequence[bytes], acts: np.ndarray, effects: np.ndarray, maximum: float) -> str:
    """One line: the darker a token, the higher its activation. Underlined is what the unit makes likelier (solid) or less so
    (dotted) by more than 0.1 nats; `effects` are those of its ablation on each token's log-likelihood.
    """
    spans = []
    for text, act, effect in zip(pieces(tokens), acts, effects, strict=True):
        width, line = min(4, 1 + abs(effect)), "solid" if effect < 0 else "dotted"
        spans.append(token_html(text, act / maximum, f"border-bottom: {width:.0f}px {line} {INSIDE}" if abs(effect) > 0.1 else "",
                                f"activation {act:.2f}, ablation {effect:+.2f} nats"))
    return line_html(spans)


def examples_page(text: Text, vocabulary: list[bytes], acts: np.ndarray, effects: np.ndarray, places: dict[str, np.ndarray],
                  maximum: float) -> str:
    """Examples of a unit under the headings of `places`, which hold token positions; `acts` and `effects` are of the whole text,
    all in flat order.
    """
    n_ctx, tokens, lines = text.contexts.shape[1], flat(text.contexts), []
    for heading, positions in places.items():
        lines.append(f"<h4>{html.escape(heading)}</h4>")
        for place in np.asarray(positions).tolist():
            start = place // n_ctx * n_ctx
            window = slice(max(start, place - AROUND), min(start + n_ctx, place + AROUND // 2))
            lines.append(example_html([vocabulary[t] for t in tokens[window]], acts[window], effects[window], maximum))
    return f'<div style="font-family: monospace; line-height: 1.7; overflow-x: auto">{"".join(lines)}</div>'
