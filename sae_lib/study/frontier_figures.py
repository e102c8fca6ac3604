"""What notebook 10 draws: fronts, leads, shrinkage, targets, widths, explanations, and the broken training runs."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lib import fronts
from sae_lib.study.faults import HEALTHY, Broken
from sae_lib.study.figures import COLOURS
from sae_lib.study.frontier import Frontier
from sae_lib.study.kinds import KINDS

L0_TICKS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
_COLOUR = dict(zip(KINDS, (COLOURS[6], COLOURS[5], COLOURS[1], COLOURS[0], COLOURS[4], COLOURS[2], COLOURS[3]), strict=True))
_SYMBOL = dict(zip(KINDS, ("x", "square", "diamond", "circle", "triangle-up", "star", "triangle-down"), strict=True))
FLOOR = {"l0": 0.01}  # of logarithmic axes, for what falls to nothing
_BELOW = {"orientation": "h", "y": -0.16, "yanchor": "top"}

_NARROW = {kind: name.replace("L1, ", "L1,<br>").replace("paper's ", "paper's<br>") for kind, name in KINDS.items()}


def _look(kind: str, size: float = 9) -> dict:
    return {"marker": {"color": _COLOUR[kind], "symbol": _SYMBOL[kind], "size": size},
            "line": {"color": _COLOUR[kind], "dash": "dash" if kind == "paper" else "solid"}}


def _bars(table: pd.DataFrame) -> dict:
    return {"array": table.high - table.value, "arrayminus": table.value - table.low, "thickness": 1}


def rates_figure(table: pd.DataFrame) -> go.Figure:
    """A line a kind: what it minimises against the learning rate, over its own smallest."""
    fig = go.Figure()
    for kind, part in table.groupby("kind", sort=False):
        fig.add_scatter(x=part.lr, y=part.objective / part.objective.min(), mode="lines+markers", name=KINDS[kind], **_look(kind))
    rates = sorted(table.lr.unique())
    fig.update_xaxes(type="log", title="learning rate", tickvals=rates, ticktext=[f"{lr:g}" for lr in rates])
    fig.update_yaxes(title="objective, over the kind's best", tickformat=".2f")
    return fig.update_layout(legend=_BELOW)


def front_figure(found: Frontier, measure: str, title: str, **draws: int) -> go.Figure:
    """Fidelity against L0: a line a kind through its front, a marker with its interval for each dictionary of the main width and
    the first seed, and small open ones for the other seeds."""
    fig, table = go.Figure(), found.table
    main, first = table.expansion.mode()[0], table.seed.min()
    for kind, name in KINDS.items():
        rows = found.which(kind=kind, expansion=main)
        if not len(rows):
            continue
        l0, fidelity = (found.each(rows, of, **draws) for of in ("l0", measure))
        ours = table.seed[rows] == first
        line = fronts.front(l0.value[ours].to_numpy(), fidelity.value[ours].to_numpy())
        look = _look(kind)
        fig.add_scatter(x=line.l0, y=line.fidelity, mode="lines", line=look["line"], legendgroup=kind, hoverinfo="skip",
                        showlegend=False)
        fig.add_scatter(x=l0.value[ours], y=fidelity.value[ours], error_y=_bars(fidelity[ours]), mode="markers", name=name,
                        legendgroup=kind, marker=look["marker"], line=look["line"])
        others = {"color": _COLOUR[kind], "symbol": f"{_SYMBOL[kind]}-open", "size": 7}
        fig.add_scatter(x=l0.value[~ours], y=fidelity.value[~ours], mode="markers", marker=others, name=f"{name}, other seeds",
                        legendgroup=kind, showlegend=False)
    fig.update_xaxes(type="log", title="active features per token (L0)", tickvals=L0_TICKS)
    fig.update_yaxes(title=title, tickformat=".0%")
    return fig.update_layout(legend=_BELOW, height=620)


def lead_figure(leads: pd.DataFrame) -> go.Figure:
    """A row a kind: by how much its front is above others' at least. Columns: kind, over (the other), value, low, high."""
    fig, kinds = go.Figure(), list(dict.fromkeys(leads.kind))
    for i, (other, own) in enumerate(leads.groupby("over", sort=False)):
        place = np.array([kinds.index(kind) for kind in own.kind])
        fig.add_scatter(x=own.value, y=place + 0.24 * i - 0.12, mode="markers", name=f"over {KINDS[other]}", error_x=_bars(own),
                        marker={"symbol": ("circle", "diamond-open")[i % 2], "size": 11, "color": COLOURS[i]})
    fig.add_vline(x=0, line_dash="dot")
    fig.update_xaxes(title="loss recovered above the other's, at equal L0, where the difference is least", tickformat="+.0%")
    fig.update_yaxes(tickvals=list(range(len(kinds))), ticktext=[KINDS[kind] for kind in kinds], range=[len(kinds) - 0.5, -0.5],
                     zeroline=False)
    return fig.update_layout(legend=_BELOW)


def gain_figure(table: pd.DataFrame) -> go.Figure:
    """A column a kind: the gain of all features together for each seed, and the quartiles of features' own gains. Columns of the
    table: kind, value, low, high, gains."""
    fig, kinds = go.Figure(), list(dict.fromkeys(table.kind))
    place = np.array([kinds.index(kind) for kind in table.kind])
    offset = table.groupby("kind").cumcount().to_numpy() * 0.1 - 0.25
    known = table.gains.notna().to_numpy()
    lower, middle, upper = np.array(table.gains[known].tolist()).reshape(-1, 3).T
    fig.add_scatter(x=place + offset, y=table.value, error_y=_bars(table), mode="markers", name="all features by one factor",
                    marker={"size": 9, "color": COLOURS[0]})
    fig.add_scatter(x=(place + offset + 0.4)[known], y=middle, mode="markers", name="each feature alone: median and quartiles",
                    error_y={"array": upper - middle, "arrayminus": middle - lower, "thickness": 1},
                    marker={"size": 8, "color": COLOURS[1], "symbol": "diamond-open"})
    fig.add_hline(y=1, line_dash="dot")
    fig.update_xaxes(tickvals=list(range(len(kinds))), ticktext=[_NARROW[kind] for kind in kinds], zeroline=False)
    fig.update_yaxes(title="factor that would suit (1: nothing shrunk)")
    return fig.update_layout(legend=_BELOW)


def target_figure(table: pd.DataFrame) -> go.Figure:
    """Left, L0 on held-out text against its target, with the band of 10 %; right, L0 over its target as training goes on.
    Columns: control (the target), value, low, high, steps, l0_curve."""
    fig = make_subplots(cols=2, horizontal_spacing=0.12, subplot_titles=["on held-out text", "in training"])
    ends = np.array([table.control.min() * 0.8, table.control.max() * 1.25])
    for factor, dash in ((0.9, "dot"), (1.0, "dash"), (1.1, "dot")):
        fig.add_scatter(x=ends, y=ends * factor, mode="lines", line={"color": "#777777", "dash": dash, "width": 1},
                        showlegend=False, hoverinfo="skip", row=1, col=1)
    fig.add_scatter(x=table.control, y=table.value, error_y=_bars(table), mode="markers", showlegend=False, row=1, col=1,
                    marker={"size": 10, "color": COLOURS[0]})
    for colour, (target, part) in zip(COLOURS, table.groupby("control"), strict=False):
        run = part.iloc[0]
        fig.add_scatter(x=run.steps, y=np.array(run.l0_curve) / target, mode="lines", name=f"target {target:g}",
                        line={"color": colour}, row=1, col=2)
    fig.add_hline(y=1, line_dash="dash", line_width=1, row=1, col=2)
    ticks = sorted(table.control.unique())
    fig.update_xaxes(type="log", title="target L0", tickvals=ticks, row=1, col=1)
    fig.update_yaxes(type="log", title="L0 (dotted: 10 % off)", tickvals=ticks, row=1, col=1)
    fig.update_xaxes(title="step", row=1, col=2)
    fig.update_yaxes(type="log", title="L0 over its target", tickvals=[0.5, 0.7, 1, 1.5, 2, 5, 10, 50], row=1, col=2)
    return fig.update_layout(legend=_BELOW)


def alive_figure(table: pd.DataFrame) -> go.Figure:
    """Bars of dead and of ultralow features by kind, the mean over seeds, with a mark for each seed's sum. Columns: kind, dead,
    ultralow."""
    fig, means = go.Figure(), table.groupby("kind", sort=False)[["dead", "ultralow"]].mean()
    names = [_NARROW[kind] for kind in means.index]
    for column, name, colour, shape in (("dead", "never fire", COLOURS[0], ""), ("ultralow", "ultralow", COLOURS[1], "/")):
        fig.add_bar(x=names, y=means[column], name=name, marker={"color": colour, "pattern": {"shape": shape}})
    fig.add_scatter(x=[_NARROW[kind] for kind in table.kind], y=table.dead + table.ultralow, mode="markers", name="each seed",
                    marker={"color": "#000000", "symbol": "line-ew-open", "size": 12})
    fig.update_yaxes(title="share of the features", tickformat=".0%", rangemode="tozero")
    fig.update_xaxes(tickangle=0)
    return fig.update_layout(barmode="stack", legend=_BELOW)


def width_figure(table: pd.DataFrame) -> go.Figure:
    """Two panels, loss recovered and L0 against width, a line a kind. Columns: kind, expansion, recovered, low, high, l0."""
    fig = make_subplots(cols=2, horizontal_spacing=0.12, subplot_titles=["loss recovered", "active features per token (L0)"])
    for kind, part in table.groupby("kind", sort=False):
        ends = {"array": part.high - part.recovered, "arrayminus": part.recovered - part.low, "thickness": 1}
        shared = {"x": part.expansion, "mode": "lines+markers", "name": KINDS[kind], "legendgroup": kind} | _look(kind)
        fig.add_scatter(y=part.recovered, error_y=ends, **shared, row=1, col=1)
        fig.add_scatter(y=part.l0, **shared, showlegend=False, row=1, col=2)
    ticks = sorted(table.expansion.unique())
    fig.update_xaxes(type="log", title="features per neuron", tickvals=ticks, ticktext=[f"{n}x" for n in ticks])
    fig.update_yaxes(tickformat=".0%", col=1)
    fig.update_yaxes(rangemode="tozero", col=2)
    return fig.update_layout(legend=_BELOW)


def explained_figure(table: pd.DataFrame) -> go.Figure:
    """A row a kind, the most faithful on top: what its features' explanations are worth, a panel a score. Columns: kind,
    recovered, and value, low and high of the scores spearman and logit as spearman_value and so on."""
    titles = {"spearman": "on activations (Spearman)", "logit": "on logits (share right, chance 50 %)"}
    fig = make_subplots(cols=2, shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=list(titles.values()))
    table = table.sort_values("recovered", ascending=False)
    names = [f"{KINDS[row.kind]}<br>{row.recovered:.1%} recovered" for row in table.itertuples()]
    for col, score in enumerate(titles, start=1):
        own = pd.DataFrame({part: table[f"{score}_{part}"] for part in ("value", "low", "high")})
        fig.add_scatter(x=own.value, y=names, mode="markers", showlegend=False, error_x=_bars(own), row=1, col=col,
                        marker={"size": 11, "color": COLOURS[0]})
    fig.update_xaxes(title="median score of a feature")
    fig.update_yaxes(autorange="reversed")
    return fig.update_layout(height=160 + 60 * len(names))


def broken_figure(found: Broken, runs: Sequence[str] = tuple("ABCDEF")) -> go.Figure:
    """A column a run: squared error, L0 and the share of silent features as training goes on; the healthy run's in grey."""
    rows = {"mse": "squared error", "l0": "active features", "dead": "silent"}
    fig = make_subplots(rows=3, cols=len(runs), shared_xaxes=True, shared_yaxes="rows", column_titles=list(runs),
                        horizontal_spacing=0.015, vertical_spacing=0.05, x_title="thousand activations")
    for col, run in enumerate(runs, start=1):
        for row, column in enumerate(rows, start=1):
            for name, colour in ((HEALTHY, "#AAAAAA"), (run, COLOURS[0])):
                part = found.logs[found.logs.run == name]
                values = part[column].clip(lower=FLOOR.get(column))
                fig.add_scatter(x=part.activations / 1e3, y=values, mode="lines", showlegend=col == row == 1,
                                name="healthy" if name == HEALTHY else "the run", line={"color": colour, "width": 1.5},
                                row=row, col=col)
    for row, title in enumerate(rows.values(), start=1):
        fig.update_yaxes(title=title, row=row, col=1)
    fig.update_yaxes(type="log", row=1)
    fig.update_yaxes(type="log", row=2)
    fig.update_yaxes(tickformat=".0%", row=3)
    fig.update_xaxes(row=3, nticks=4)
    return fig.update_layout(height=640, width=1100, legend={"orientation": "h", "y": -0.12, "yanchor": "top"})
