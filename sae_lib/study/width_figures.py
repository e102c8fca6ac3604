"""What notebook 08 draws: how many features contexts have, a family from width to width, its members' classes, and the map."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from scipy.sparse import csr_array

from sae_lib.study.diagrams import escaped, in_every_font, spelled, token_list
from sae_lib.study.figures import COLOURS
from sae_lib.study.token_html import pieces
from sae_lib.study.widths import CLASSES, RULES, Width

SHOWN = 24  # members of a family that are drawn at one width: those that fire most
SYMBOLS = ("star", "diamond", "circle", "square")
COLUMN = 340  # pixels between two widths of a family
LABEL = 0.66  # the part of it that the labels of the last width take
BEFORE = 14  # characters shown before a feature's strongest token


def context_counts(widths: Sequence[Width], rule: str) -> pd.DataFrame:
    """A row a context, a column a width: how many features are for the context by a rule."""
    return pd.DataFrame({each.name: each.contexts[each.contexts.rule == rule].set_index("context")["count"].astype(int)
                         for each in widths})


def counts_figure(widths: Sequence[Width], first: str) -> go.Figure:
    """A row a context, `first` on top and the others by their greatest count; a panel a rule, a column a width: how many features
    of the width are for the context."""
    counts = {rule: context_counts(widths, rule) for rule in RULES}
    order = counts[RULES[-1]].max(axis=1).sort_values(ascending=False, kind="stable").index
    order = [first, *(name for name in order if name != first)]
    titles = ["half of all tokens it fires on<br>are labelled so", "half of the tokens it fires on strongly<br>are such text"]
    fig = make_subplots(cols=2, shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=titles)
    for col, rule in enumerate(RULES, start=1):
        z = counts[rule].loc[order]
        fig.add_heatmap(z=np.log1p(z), x=z.columns, y=order, text=z, texttemplate="%{text}", row=1, col=col, zmin=0,
                        zmax=np.log1p(max(1, *(part.to_numpy().max() for part in counts.values()))), colorscale="Blues",
                        showscale=False, hoverinfo="x+y+text", xgap=2, ygap=1)
    fig.update_xaxes(type="category", title="width")
    fig.update_yaxes(type="category", autorange="reversed", dtick=1)
    return fig.update_layout(height=220 + 20 * len(order), width=820, margin={"t": 130})


def links_figure(steps: Sequence[str], children: Sequence[np.ndarray], by_luck: Sequence[np.ndarray]) -> go.Figure:
    """A panel a step from one width to the next: how many features of the wider dictionary a live feature leads to, beside what
    luck gives. One array of counts a step."""
    edges, names = [0, 1, 2, 3, 6, 11, 31, np.inf], ["0", "1", "2", "3–5", "6–10", "11–30", "over 30"]
    fig = make_subplots(cols=len(steps), shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=list(steps))
    for name, colour, shape, counts in (("on the same text", COLOURS[0], "", children), ("by luck", COLOURS[1], "/", by_luck)):
        for col, count in enumerate(counts, start=1):
            share = np.histogram(count, edges)[0] / max(1, len(count))
            fig.add_bar(x=names, y=share, name=name, legendgroup=name, showlegend=col == 1, row=1, col=col,
                        marker={"color": colour, "pattern": {"shape": shape}})
    fig.update_xaxes(type="category", title="features that one leads to")
    fig.update_yaxes(tickformat=".0%", range=[0, 1])
    fig.update_yaxes(title="live features of the narrower", col=1)
    return fig.update_layout(barmode="group", legend={"orientation": "h", "y": -0.18, "yanchor": "top"})


class Family(NamedTuple):
    """The features of a context at every width, and the links between them."""

    context: str
    rule: str
    nodes: pd.DataFrame
    """A row a feature: width (its place), unit, fired, specific (to the context, on text that did not choose it), examples (of
    tokens), CLASSES."""
    edges: pd.DataFrame
    """Columns start and end (rows of `nodes`) and cosine."""
    counts: list[int]
    """Specific features at each width."""


def family(widths: Sequence[Width], links: Sequence[csr_array], context: str, rule: str) -> Family:
    """The features that are specific to a context by a rule; at a width without any, the one that correlates best with it."""
    parts = []
    for place, each in enumerate(widths):
        found = each.members[(each.members.context == context) & (each.members.rule == rule)]
        found = found[found.specific if found.specific.any() else found.unit == each.of_context(context, rule).best]
        parts.append(found.assign(width=place).sort_values("fired", ascending=False))
    nodes = pd.concat(parts, ignore_index=True).reindex(columns=["width", "unit", "fired", "specific", "examples", *CLASSES])
    edges = []
    for place, level in enumerate(links):
        start, end = (nodes[nodes.width == at] for at in (place, place + 1))
        between = level[start.unit.to_numpy()][:, end.unit.to_numpy()].tocoo()
        edges += zip(start.index[between.row], end.index[between.col], between.data.tolist(), strict=True)
    counts = [int(nodes.specific[nodes.width == place].sum()) for place in range(len(widths))]
    return Family(context, rule, nodes, pd.DataFrame(edges, columns=["start", "end", "cosine"]), counts)


def _spell(ids: np.ndarray, vocabulary: Sequence[bytes], width: int) -> str:
    return token_list([vocabulary[t] for t in ids if t >= 0], width)


def _example(ids: Sequence[int], vocabulary: Sequence[bytes]) -> str:
    """The text up to a feature's strongest token, which is bold."""
    *before, last = (piece.replace("\n", "↵").replace("\t", "→") for piece in pieces(vocabulary[t] for t in ids))
    text = "".join(before)
    shown = "…" * (len(text) > BEFORE) + text[-BEFORE:]
    return f"<span style='color:#666666'>\u2068{escaped(shown)}<b>{escaped(last)}</b>\u2069</span>"


def _label(ids: np.ndarray, examples: Sequence[Sequence[int]], vocabulary: Sequence[bytes]) -> str:
    """What stands beside a marker: the tokens it fires on and its strongest example, or, where the font of an image may lack the
    letters, more of the tokens, by the names of their letters."""
    strongest = examples[:1]
    if all(in_every_font("".join(pieces(vocabulary[t] for t in text))) for text in strongest):
        return "  ".join([_spell(ids, vocabulary, 18), *(_example(text, vocabulary) for text in strongest)])
    return token_list([vocabulary[t] for t in ids if t >= 0], 44, spelled)


def _placed(found: Family) -> pd.DataFrame:
    """The nodes that are drawn, with their place from 0 (top) to 1: near those that they are linked to at the width before."""
    shown = found.nodes.groupby("width", sort=True).head(SHOWN).copy()
    shown["y"] = 0.5
    for place, part in shown.groupby("width"):
        before = found.edges[found.edges.end.isin(part.index) & found.edges.start.isin(shown.index)] if place else found.edges[:0]
        wanted = before.assign(y=before.start.map(shown.y)).groupby("end").y.mean().reindex(part.index).fillna(1.0)
        order = part.index[np.lexsort([-part.fired, wanted])]
        shown.loc[order, "y"] = (np.arange(len(order)) + 0.5) / len(order)
    return shown


def family_figure(found: Family, widths: Sequence[Width], vocabulary: Sequence[bytes]) -> go.Figure:
    """A column a width, a marker a feature with the tokens it fires on and its strongest example; the thicker a line, the higher
    the masked cosine."""
    shown, fig = _placed(found), go.Figure()
    for edge in found.edges.itertuples():
        if {edge.start, edge.end} <= set(shown.index):
            ends = shown.loc[[edge.start, edge.end]]
            fig.add_scatter(x=ends.width, y=ends.y, mode="lines", hoverinfo="skip", showlegend=False,
                            line={"color": "#B5B5B5", "width": 0.5 + 6 * max(0.0, edge.cosine - 0.4)})
    for specific, colour, name in ((True, COLOURS[0], f"for {found.context}"),
                                   (False, "#FFFFFF", "does not meet the rule, but correlates best")):
        part = shown[shown.specific == specific]
        tokens = [_spell(widths[at].fires_on[unit], vocabulary, 18) for at, unit in zip(part.width, part.unit, strict=True)]
        texts = [[_example(ids, vocabulary) for ids in examples] for examples in part.examples]
        hover = ["<br>".join([f"feature {unit}, fires on {fired:,} tokens: {label}", *own])
                 for unit, fired, label, own in zip(part.unit, part.fired, tokens, texts, strict=True)]
        marker = {"color": colour, "line": {"color": COLOURS[0], "width": 1.5}, "size": 7 + 3 * np.log10(1 + part.fired),
                  "opacity": 1}
        fig.add_scatter(x=part.width, y=part.y, mode="markers", name=name, hovertext=hover, hoverinfo="text", marker=marker)
        # On white, for links of other features pass behind.
        for x, y, unit, examples in zip(part.width, part.y, part.unit, part.examples, strict=True):
            fig.add_annotation(x=x, y=y, xshift=13, text=_label(widths[x].fires_on[unit], examples, vocabulary), showarrow=False,
                               xanchor="left", borderpad=1, bgcolor="rgba(255,255,255,0.85)", font={"size": 11})
    n = shown.width.value_counts().max()
    names = [f"{each.name}: {count}" for each, count in zip(widths, found.counts, strict=True)]
    fig.update_xaxes(tickvals=list(range(len(widths))), ticktext=names, range=[-0.12, len(widths) - 1 + LABEL], showgrid=False,
                     zeroline=False)
    fig.update_yaxes(visible=False, range=[1.02, -0.02])
    height = 210 + 24 * max(int(n), 4)
    return fig.update_layout(height=height, width=max(700, 60 + COLUMN * len(widths)),
                             legend={"orientation": "h", "y": -40 / (height - 150), "yanchor": "top"})


def members_figure(found: Family, widths: Sequence[Width]) -> go.Figure:
    """A row a feature, a column a class of tokens: the share of its activations within the context that are on tokens
    of the class, above or below the share of such tokens in the context."""
    base = widths[-1].of_context(found.context, found.rule)[list(CLASSES)].astype(float).fillna(0.0)
    part = found.nodes.groupby("width", sort=True).head(SHOWN)
    names = [f"{widths[at].name} / {unit}" for at, unit in zip(part.width, part.unit, strict=True)]
    shares = part[list(CLASSES)].fillna(0.0).to_numpy(float)  # a feature silent in the context has no activations to share out
    columns = [f"{name.replace(' ', '<br>', 1)}<br>({base[name]:.0%})" for name in CLASSES]
    fig = go.Figure(go.Heatmap(z=shares - base.to_numpy(), x=columns, y=names, zmin=-1, zmax=1, colorscale="RdBu_r", text=shares,
                               texttemplate="%{text:.0%}", hoverinfo="x+y+text",
                               colorbar={"title": "above<br>its share", "tickformat": "+.0%", "dtick": 1}))
    fig.update_yaxes(autorange="reversed", type="category", title="width / feature")
    title = "share of activations on … (in brackets: share of the context's tokens)"
    fig.update_xaxes(side="bottom", tickangle=0, tickfont={"size": 11}, title=title)
    return fig.update_layout(height=260 + 24 * len(names), width=1000)


def map_figure(places: pd.DataFrame, widths: Sequence[Width], contexts: Sequence[str], vocabulary: Sequence[bytes],
               shown_first: str, at_least: float = 0.3) -> go.Figure:
    """The map: a marker a feature, its colour and shape its width. The menu marks the features whose correlation with a context
    is `at_least` so high; hovering shows what a feature fires on and what it raises."""
    fig, marked = go.Figure(), []
    for at, each in enumerate(widths):
        part = places[places.dictionary == at]
        own = each.features.iloc[part.unit]
        hover = [f"{each.name} / {unit}<br>fires on {_spell(each.fires_on[unit], vocabulary, 20)}"
                 f"<br>raises {_spell(each.raises[unit], vocabulary, 14)}"
                 + (f"<br>{contexts[i]} {r:.2f}" if r >= 0.1 else "")
                 for unit, i, r in zip(part.unit, own.context, own.pearson, strict=True)]
        # The wider, the more of them there are: smaller and fainter.
        rank = min(at, 2)
        marker = {"symbol": SYMBOLS[at % 4], "color": COLOURS[at], "size": 9 - 2.5 * rank, "opacity": 0.9 - 0.25 * rank}
        fig.add_scattergl(x=part.x.round(3), y=part.y.round(3), mode="markers", name=each.name, hovertext=hover, hoverinfo="text",
                          marker=marker)
        marked.append(part[["x", "y"]].assign(context=own.context.to_numpy(), pearson=own.pearson.to_numpy()))
    strong = pd.concat(marked)
    strong = strong[strong.pearson >= at_least]
    ring = {"symbol": "circle-open", "size": 17, "color": "#000000", "line": {"width": 1.5}}
    for i, name in enumerate(contexts):
        part = strong[strong.context == i]
        fig.add_scattergl(x=part.x.round(3), y=part.y.round(3), mode="markers", name=f"{name} ({len(part)})",
                          visible=name == shown_first, hoverinfo="skip", marker=ring)
    rings = list(range(len(widths), len(fig.data)))
    choose = lambda wanted: [{"visible": [name == wanted for name in contexts]}, rings]  # widths hidden by the legend stay hidden
    buttons = [{"label": name, "method": "restyle", "args": choose(name)} for name in ("(none)", *contexts)]
    menu = {"buttons": buttons, "active": 1 + list(contexts).index(shown_first), "x": 1.01, "xanchor": "left", "y": 0.8,
            "yanchor": "top"}
    axis = {"showticklabels": False, "ticks": "", "showgrid": False, "zeroline": False}
    return fig.update_layout(updatemenus=[menu], height=760, width=1000, xaxis=axis, yaxis=axis, hovermode="closest")
