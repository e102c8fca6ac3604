"""What notebook 11 draws: accuracy, where the name is, and what is left of the KL as directions are patched."""

import html
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lib.study import identification_numbers as numbers
from sae_lib.study.diagrams import escaped
from sae_lib.study.figures import COLOURS
from sae_lib.study.identification import CODINGS, FEATURES, ROLES
from sae_lib.study.token_html import line_html, pieces, token_html

COLOUR = dict(zip(CODINGS, (COLOURS[0], COLOURS[1], COLOURS[5], COLOURS[2], COLOURS[3], "#777777"), strict=True))
DASH = dict(zip(CODINGS, ("solid", "solid", "dash", "dot", "dashdot", "dot"), strict=True))
ALPHA = 0.15  # of bands
TICKS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]


def accuracy_figure(table: pd.DataFrame, sentences: Mapping[str, str]) -> go.Figure:
    """A group a kind of sentences, of which each is given in words, a marker a kind of names; hollow: the share whose likeliest
    token is the indirect object.
    """
    fig, kinds = go.Figure(), list(table.sentences.unique())
    for i, (names, part) in enumerate(table.groupby("names", sort=False)):
        for j, (column, said) in enumerate((("right", "likelier than the subject"), ("first", "likeliest of all tokens"))):
            fig.add_scatter(
                x=[kinds.index(kind) + 0.2 * (i - 0.5) + 0.06 * (j - 0.5) for kind in part.sentences], y=part[column],
                mode="markers", name=f"{names} names: {said}", error_y={"array": part[f"{column}_high"] - part[column],
                                                        "arrayminus": part[column] - part[f"{column}_low"]},
                marker={"color": COLOURS[i], "size": 11, "symbol": ("circle", "circle-open")[j]})
    fig.add_hline(y=0.95, line={"dash": "dot", "color": "#444444"}, annotation_text="95 %", annotation_position="bottom left")
    fig.update_xaxes(tickvals=list(range(len(kinds))), ticktext=[sentences[kind] for kind in kinds], title="ways to say it")
    fig.update_yaxes(title="share of prompts", tickformat=".0%", rangemode="tozero")
    return fig.update_layout(legend={"orientation": "h", "y": -0.22, "yanchor": "top"}, height=560)


def where_figure(table: pd.DataFrame) -> go.Figure:
    """Rows positions, columns layers: the share of the KL that patching everything there takes away."""
    roles, layers = [role for role in ROLES if role in set(table.role)], sorted(table.after.unique())
    left = table.pivot_table(index="role", columns="after", values="left").loc[roles[::-1], layers].to_numpy()
    gone = np.clip(1 - left, 0, 1)
    fig = go.Figure(go.Heatmap(z=gone, x=[str(after) for after in layers], y=roles[::-1], zmin=0, zmax=1, colorscale="Viridis",
                               text=[[f"{value:.0%}" for value in row] for row in gone], texttemplate="%{text}",
                               colorbar={"title": "KL<br>removed", "tickformat": ".0%"}))
    return fig.update_layout(xaxis={"title": "layers before the patch (0: embeddings)", "type": "category"}, height=420)


def curves_figure(parts: dict[str, pd.DataFrame], most: int) -> go.Figure:
    """A panel a kind of sets: the share of the KL left against patched directions, mean and middle 80 % over sets."""
    fig = make_subplots(cols=len(parts), shared_yaxes=True, horizontal_spacing=0.05, subplot_titles=list(parts))
    for col, sets in enumerate(parts.values(), start=1):
        for coding in [name for name in CODINGS if name in set(sets.coding)]:
            found = numbers.left_by_directions(sets[sets.coding == coding], most)
            _band(fig, np.arange(most + 1), found, coding, col)
        fig.update_xaxes(title="patched directions", row=1, col=col)
    return _left_axis(fig)


def edits_figure(parts: dict[str, pd.DataFrame]) -> go.Figure:
    """The same against the edit's mean norm at a position: the least that is left with an edit of at most that size."""
    fig = make_subplots(cols=len(parts), shared_yaxes=True, horizontal_spacing=0.05, subplot_titles=list(parts))
    for col, sets in enumerate(parts.values(), start=1):
        grid = np.linspace(0, max(max(edit) for edit in sets.edit), 120)
        for coding in [name for name in CODINGS if name in set(sets.coding)]:
            part = sets[sets.coding == coding]
            found = numbers.left_by_edit(part, grid)
            found[:, grid > max(max(edit) for edit in part.edit)] = np.nan
            _band(fig, grid, found, coding, col)
        fig.update_xaxes(title="size of the edit (mean norm at a position)", row=1, col=col)
    return _left_axis(fig)


def _band(fig: go.Figure, x: np.ndarray, found: np.ndarray, coding: str, col: int) -> None:
    colour, at = COLOUR[coding], {"row": 1, "col": col, "legendgroup": coding}
    if len(found) > 1:
        known = np.isfinite(found).all(0)
        low, high, x_of = *np.quantile(found[:, known], [0.1, 0.9], axis=0), x[known]
        fill = "rgba({}, {}, {}, {})".format(*(int(colour[i:i + 2], 16) for i in (1, 3, 5)), ALPHA)
        fig.add_scatter(x=np.append(x_of, x_of[::-1]), y=np.append(high, low[::-1]), fill="toself", fillcolor=fill,
                        line={"width": 0}, hoverinfo="skip", showlegend=False, **at)
    fig.add_scatter(x=x, y=found.mean(0), mode="lines", name=coding, showlegend=col == 1, **at,
                    line={"color": colour, "width": 2.5, "dash": DASH[coding]})


def _left_axis(fig: go.Figure) -> go.Figure:
    fig.add_hline(y=0.5, line={"dash": "dot", "color": "#444444"})
    fig.update_yaxes(tickformat=".0%", range=[-0.02, 1.1])
    fig.update_yaxes(title="KL that is left", row=1, col=1)
    return fig.update_layout(width=1000, height=540, legend={"orientation": "h", "y": -0.18, "yanchor": "top"})


def growth_figure(sets: pd.DataFrame, d_model: int) -> go.Figure:
    """Directions for half of the KL against the exchanges that share an order; a dot a set, a line through the means."""
    fig = go.Figure()
    for coding in [name for name in CODINGS if name in set(sets.coding)]:
        part = sets[sets.coding == coding].dropna(subset="half")
        fig.add_scatter(x=part.exchanges, y=part.half, mode="markers", showlegend=False, hoverinfo="skip",
                        marker={"color": COLOUR[coding], "size": 7, "opacity": 0.5})
        mean = part.groupby("exchanges").half.mean()
        fig.add_scatter(x=mean.index, y=mean, mode="lines+markers", name=coding, line={"color": COLOUR[coding]},
                        marker={"size": 10, "symbol": "circle" if coding == FEATURES else "diamond"})
    ends = [sets.exchanges.min(), sets.exchanges.max()]
    fig.add_scatter(x=ends, y=[d_model] * 2, mode="lines", name="dimensions", line={"dash": "dot", "color": "#444444"})
    fig.update_xaxes(type="log", tickvals=sorted(sets.exchanges.unique()), title="exchanges of names that share one order")
    return fig.update_yaxes(type="log", title="directions for half of the KL", tickvals=TICKS,
                            range=[-0.1, np.log10(1.3 * d_model)]).update_layout(height=540)


def layers_figure(sets: pd.DataFrame, chosen: int) -> go.Figure:
    """Directions for half of the KL after each layer: a dot an exchange, a marker the mean."""
    fig, layers = go.Figure(), sorted(sets.after.unique())
    for i, coding in enumerate(name for name in CODINGS if name in set(sets.coding)):
        part, shift = sets[sets.coding == coding].dropna(subset="half"), 0.16 * (i - 0.5)
        place = [layers.index(after) + shift for after in part.after]
        fig.add_scatter(x=place, y=part.half, mode="markers", marker={"color": COLOUR[coding], "size": 6, "opacity": 0.4},
                        showlegend=False)
        mean = part.groupby("after").half.mean()
        fig.add_scatter(x=[layers.index(after) + shift for after in mean.index], y=mean, mode="markers+text", name=coding,
                        marker={"color": COLOUR[coding], "size": 13, "symbol": ("circle", "diamond")[i % 2]},
                        text=[f"{value:.1f}" for value in mean], textposition="middle left" if i == 0 else "middle right")
    said = [f"after {after}" + (" (chosen)" if after == chosen else "") for after in layers]
    fig.update_xaxes(tickvals=list(range(len(layers))), ticktext=said, range=[-0.6, len(layers) - 0.4], title="layers")
    return fig.update_yaxes(title="directions for half of the KL", type="log", tickvals=TICKS).update_layout(height=500)


def coefficients_figure(sets: pd.DataFrame) -> go.Figure:
    """Two panels against the L1 coefficient: directions for half of the KL, and the least KL that patching reaches."""
    titles = ["directions for half of the KL", "the least KL that is left"]
    fig = make_subplots(cols=2, horizontal_spacing=0.12, subplot_titles=titles)
    order = sorted(sets.l1.unique())
    least = sets.assign(least=[min(kl) / max(kl[0], 1e-12) for kl in sets.kl])
    for col, (column, axis) in enumerate((("half", "directions"), ("least", "share of the KL")), start=1):
        part = least.dropna(subset=column)
        fig.add_scatter(x=[order.index(l1) for l1 in part.l1], y=part[column], mode="markers", showlegend=False, row=1, col=col,
                        marker={"color": COLOURS[0], "size": 7, "opacity": 0.5})
        mean = part.groupby("l1")[column].mean()
        fig.add_scatter(x=[order.index(l1) for l1 in mean.index], y=mean, mode="lines+markers", showlegend=False, row=1, col=col,
                        line={"color": COLOURS[0]}, marker={"size": 11})
        fig.update_yaxes(title=axis, rangemode="tozero", row=1, col=col)
    fig.update_yaxes(tickformat=".0%", row=1, col=2)
    fig.update_xaxes(tickvals=list(range(len(order))), ticktext=[f"{l1:g}" for l1 in order], title="L1 coefficient")
    return fig.update_layout(width=1000, height=460)


def first_features_figure(table: pd.DataFrame, labels: Sequence[str], exchanges: Sequence[str]) -> go.Figure:
    """A row an exchange, a mark for each of its first features: what is left once it is patched; beside it what it fires on."""
    fig, repeats = go.Figure(), list(table.repeat.unique())[::-1]
    table = table.assign(label=[escaped(label) for label in labels], exchange=list(exchanges))
    for rank, part in table.groupby("rank"):
        place, y = (rank - 1) % 3, [repeats.index(repeat) for repeat in part.repeat]
        fig.add_scatter(x=part.left, y=y, mode="markers+text", name=f"number {rank}", text=part.label,
                        textposition=("top center", "bottom center", "top center")[place],
                        textfont={"size": 10, "color": COLOURS[place]},
                        marker={"size": 11, "color": COLOURS[place], "symbol": ("circle", "diamond", "square")[place]})
    names = table.drop_duplicates("repeat").set_index("repeat").exchange
    fig.update_yaxes(tickvals=list(range(len(repeats))), ticktext=[escaped(names[repeat]) for repeat in repeats],
                     range=[-0.7, len(repeats) - 0.3])
    fig.update_xaxes(title="KL that is left once it, and those before it, are patched<br>(beside a mark: the name in whose "
                           "sentences most of the feature's activation is, and how much of it)", tickformat=".0%")
    below = {"orientation": "h", "y": -90 / (90 + 62 * len(repeats)), "yanchor": "top"}
    return fig.update_layout(height=170 + 62 * len(repeats), width=1000, legend=below)


def examples_html(heading: str, examples: Sequence[tuple[list[int], list[float]]], vocabulary: Sequence[bytes]) -> str:
    """Lines of text under a heading, the darker a token, the higher the feature's activation."""
    lines, top = [], max((max(acts) for _, acts in examples), default=1.0) or 1.0
    for tokens, acts in examples:
        texts = pieces(vocabulary[token] for token in tokens)
        spans = (token_html(text, act / top, title=f"{act:.2f}") for text, act in zip(texts, acts, strict=True))
        lines.append(line_html(spans))
    return f"<h4>{html.escape(heading)}</h4>" + "".join(lines)
