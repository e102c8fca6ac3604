"""What notebook 01 draws. Its sliders hold the data of all their positions, so that they move without a kernel."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from sae_lib import toy, toy_features
from sae_lib.study.figures import COLOURS
from sae_lib.study.toys import Models, Recovery

GREY = "#777777"
KIND_COLOURS = (COLOURS[1], COLOURS[2], COLOURS[4])  # orange, green, light blue: all bear black text
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")


def spelled(density: float) -> str:
    """A density in words: 1 in 10."""
    return "always" if density > 0.995 else f"1 in {1 / density:.{0 if density < 0.11 else 1}f}"


def _slider(fig: go.Figure, labels: Sequence[str], steps: Sequence[list], prefix: str, active: int) -> go.Figure:
    """Give a figure a slider. Each step is what plotly's `update` takes: new data, new layout, numbers of the traces."""
    entries = [{"label": label, "method": "update", "args": step} for label, step in zip(labels, steps, strict=True)]
    slider = {"steps": entries, "active": active, "currentvalue": {"prefix": prefix}, "pad": {"t": 46}, "x": 0.04, "len": 0.92}
    return fig.update_layout(sliders=[slider])


def _plain(values: Tensor, digits: int) -> list:
    """Rounded numbers as a slider's step holds them: arrays in its arguments are not decoded."""
    return values.double().numpy().round(digits).tolist()


# --- superposition ---------------------------------------------------------------------------------------------------


def _best_starts(models: Models, n: int) -> list[int]:
    """For each of `n` densities the training with the lowest loss."""
    losses = models.losses.view(-1, n)
    return (losses.argmin(0) * n + torch.arange(n)).tolist()


def matrices_figure(linear: Models, relu: Models, active: int) -> go.Figure:
    """W^T W of the linear model and of the one with a ReLU; a slider over densities."""
    n = len(relu.density.unique())
    h, kinds = relu.toys.W.shape[1], ("linear", "with ReLU")
    chosen = list(zip(_best_starts(linear, n), _best_starts(relu, n), strict=True))

    def at(step: int) -> tuple[list, list[str]]:
        toys = [models.toys.pick(torch.tensor([i])) for models, i in zip((linear, relu), chosen[step], strict=True)]
        grams = [_plain((t.W[0].T @ t.W[0]).clamp(-1.5, 1.5), 2) for t in toys]
        return grams, [f"{kind}: {toy.held(t).item()} features in {h} numbers" for kind, t in zip(kinds, toys, strict=True)]

    grams, titles = at(active)
    fig = make_subplots(cols=2, subplot_titles=titles, horizontal_spacing=0.1)
    for column, gram in enumerate(grams, start=1):
        fig.add_heatmap(z=gram, zmin=-1.5, zmax=1.5, colorscale="RdBu", showscale=column == 2, row=1, col=column,
                        colorbar={"title": "WᵀW", "len": 0.9},
                        hovertemplate="feature %{x} in the output of %{y}: %{z}<extra></extra>")
    fig.update_xaxes(title="feature that is there", dtick=5, constrain="domain")
    fig.update_yaxes(title="feature in the output", dtick=5, autorange="reversed", col=1)
    fig.update_yaxes(autorange="reversed", dtick=5, col=2)
    for column in (1, 2):
        fig.update_yaxes(scaleanchor="x" if column == 1 else "x2", constrain="domain", col=column)
    steps = []
    for step in range(n):
        grams, titles = at(step)
        steps.append([{"z": grams}, {f"annotations[{i}].text": title for i, title in enumerate(titles)}, [0, 1]])
    labels = [spelled(density) for density in relu.density[:n].tolist()]
    return _slider(fig, labels, steps, "a feature is there: ", active).update_layout(height=590)


def capacity_figure(linear: Models, relu: Models) -> go.Figure:
    """Features' worth given back against density: mean of several trainings, and from the least to the greatest."""
    fig = go.Figure()
    h = relu.toys.W.shape[1]
    n = len(relu.density.unique())
    density = relu.density[:n].numpy()
    for name, models, dash, symbol in (("with ReLU", relu, "solid", "circle"), ("linear", linear, "dash", "square-open")):
        worth = toy.capacity(models.errors).view(-1, n)
        mean = worth.mean(0)
        bars = {"array": worth.amax(0) - mean, "arrayminus": mean - worth.amin(0)}
        fig.add_scatter(x=density, y=mean, error_y=bars, mode="lines+markers", name=name, line={"dash": dash},
                        marker={"symbol": symbol, "size": 9})
    fig.add_hline(y=h, line_dash="dot", line_color=GREY, annotation_text="the most of any linear model: one a hidden number",
                  annotation_position="bottom right", annotation_font_color=GREY)
    # Sparser to the right.
    fig.update_xaxes(title="share of draws in which a feature is there (sparser to the right)", type="log", autorange="reversed",
                     tickvals=[1, 0.3, 0.1, 0.03, 0.01], tickformat="~%")
    fig.update_yaxes(title="features' worth given back", rangemode="tozero")
    return fig.update_layout(legend={"x": 0.02, "y": 0.98})


def plane_figure(models: Models, active: int) -> go.Figure:
    """The directions that features get in a plane; a slider over densities."""
    n, features = len(models.density), models.toys.W.shape[2]
    limit = 1.15 * models.toys.W.norm(dim=1).max().item()

    def at(step: int) -> dict:
        ends = _plain(models.toys.W[step], 3)
        return {axis: [[0.0, end] for end in of_axis] for axis, of_axis in zip("xy", ends, strict=True)}

    def title(step: int) -> str:
        held = toy.held(models.toys)[step].item()
        return f"{held} of {features} features have a direction"

    fig = go.Figure()
    for i, (x, y) in enumerate(zip(*at(active).values(), strict=True)):
        fig.add_scatter(x=x, y=y, mode="lines+markers", name=f"feature {i + 1}", line={"width": 3, "color": COLOURS[i % 7]},
                        marker={"size": [0, 13], "symbol": SYMBOLS[i % len(SYMBOLS)]})
    for axis in (fig.update_xaxes, fig.update_yaxes):
        axis(range=[-limit, limit], zeroline=True)
    fig.update_xaxes(title="first hidden number", constrain="domain")
    fig.update_yaxes(title="second hidden number", scaleanchor="x")
    fig.add_annotation(text=title(active), x=0.5, y=1.07, xref="paper", yref="paper", showarrow=False)
    steps = [[at(step), {"annotations[0].text": title(step)}, list(range(features))] for step in range(n)]
    labels = [spelled(density) for density in models.density.tolist()]
    return _slider(fig, labels, steps, "a feature is there: ", active).update_layout(height=640, width=760)


def phase_figure(models: Models, grid: tuple[int, int]) -> go.Figure:
    """What becomes of two features and one number: by the closed forms, and of trained models. Rows are importances."""
    best = toy.pair_losses(models.density, models.importance[:, 1]).argmin(1)
    x, y = models.density.view(grid)[:, 0].log10().numpy(), models.importance[:, 1].view(grid)[0].log10().numpy()
    fig = make_subplots(cols=2, shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=("closed form", "trained"))
    scale = [(edge / 3, colour) for i, colour in enumerate(KIND_COLOURS) for edge in (i, i + 1)]
    curve = torch.logspace(y[0], y[-1], 81)
    for column, kind in enumerate((best, toy.pair_kind(models.toys)), start=1):
        fig.add_heatmap(x=x, y=y, z=kind.view(grid).T.numpy(), zmin=-0.5, zmax=2.5, colorscale=scale, showscale=False, xgap=1,
                        ygap=1, row=1, col=column, hovertemplate="density 10^%{x:.2f}, importance 10^%{y:.2f}<extra></extra>")
        fig.add_scatter(x=toy.pair_boundary(curve).log10(), y=curve.log10(), mode="lines", showlegend=column == 1, row=1,
                        col=column, line={"color": "#000000", "width": 2, "dash": "dash"}, name="boundary, closed form")
    for name, colour in zip(("the first alone", "the second alone", "both, opposed (superposition)"), KIND_COLOURS, strict=True):
        fig.add_scatter(x=[None], y=[None], mode="markers", marker={"symbol": "square", "size": 13, "color": colour}, name=name)
    step = (x[0] - x[1]) / 2 if len(x) > 1 else 0.5
    ticks = [v for v in (1, 0.5, 0.2, 0.1, 0.05) if np.log10(v) >= x.min() - 0.01]
    fig.update_xaxes(title="share of draws with a feature", tickvals=np.log10(ticks), ticktext=[f"{v:.0%}" for v in ticks],
                     range=[x.max() + step, x.min() - step])
    fig.update_yaxes(tickvals=[-1, -0.5, 0, 0.5, 1], ticktext=["0.1", "0.3", "1", "3", "10"])
    fig.update_yaxes(title="importance, second over first", col=1)
    return fig.update_layout(legend={"orientation": "h", "y": -0.2}, height=540)


def neurons_figure(cross_entropy: Tensor, squared_error: Tensor) -> go.Figure:
    """Losses [codes, runs] of a neuron that fires on 0, 1, ... features, beside the closed forms."""
    fig = make_subplots(cols=2, horizontal_spacing=0.12, subplot_titles=("cross-entropy (nats)", "squared error"))
    n = len(cross_entropy) - 1
    forms = (toy.shared_cross_entropy, toy.shared_squared_error)
    for column, (losses, form) in enumerate(zip((cross_entropy, squared_error), forms, strict=True), start=1):
        mean, shown = losses.mean(1), column == 1
        exact = [form(n, shared) for shared in range(n + 1)]
        above = ["top center", *["bottom center"] * (n - 1), "top center"]
        fig.add_scatter(x=list(range(n + 1)), y=exact, mode="lines+markers+text", name="closed form", showlegend=shown,
                        text=[f"{value:.3f}" for value in exact], textposition=above, line={"dash": "dot", "color": GREY},
                        marker={"symbol": "line-ew-open", "size": 26, "line": {"width": 2}}, row=1, col=column)
        fig.add_scatter(x=list(range(n + 1)), y=mean, mode="markers", name="trained", showlegend=shown, row=1, col=column,
                        error_y={"array": losses.amax(1) - mean, "arrayminus": mean - losses.amin(1)},
                        marker={"size": 9, "color": COLOURS[0]})
        fig.update_yaxes(range=[0, 1.15 * max(exact)], row=1, col=column)
    fig.update_xaxes(title=f"features of {n} on which the neuron fires", dtick=1)
    return fig.update_layout(legend={"orientation": "h", "y": -0.18})


# --- dictionaries on known features ----------------------------------------------------------------------------------


def cosines_figure(recovery: Recovery, width: int, coefficients: Sequence[float], active: int) -> go.Figure:
    """Cosines of learned features, in the order of their matches, with true ones; a slider over L1 coefficients."""
    def at(l1: float) -> tuple[list, str]:
        rows = recovery.directions[width, l1]
        order = toy_features.match(rows, recovery.truth).unit
        order = np.concatenate([order[order >= 0], np.setdiff1d(np.arange(width), order)])
        found = recovery.table[(recovery.table.truth == 0) & (recovery.table.width == width) & (recovery.table.l1 == l1)].iloc[0]
        note = f"MMCS {found.mmcs:.3f}, F1 {found.f1:.2f}, explained variance {found.explained:.1%}, L0 {found.l0:.1f}"
        return _plain(rows[order] @ recovery.truth.T, 2), note

    z, note = at(coefficients[active])
    fig = go.Figure(go.Heatmap(z=z, zmin=-1, zmax=1, colorscale="RdBu", colorbar={"title": "cosine"},
                               hovertemplate="true %{x}, learned %{y}: %{z}<extra></extra>"))
    fig.update_xaxes(title="true feature", constrain="domain")
    fig.update_yaxes(title="learned feature, in the order of its match", autorange="reversed", scaleanchor="x",
                     constrain="domain")
    fig.add_annotation(text=note, x=0.5, y=1.06, xref="paper", yref="paper", showarrow=False)
    steps = []
    for l1 in coefficients:
        z, note = at(l1)
        steps.append([{"z": [z]}, {"annotations[0].text": note}, [0]])
    return _slider(fig, [f"{l1:g}" for l1 in coefficients], steps, "λ = ", active).update_layout(height=680, width=760)


def bounce_figure(table: pd.DataFrame, n_features: int, active: int) -> go.Figure:
    """Total information against error on the way from narrow to wide dictionaries; a slider over L1 coefficients."""
    coefficients, truths = sorted(table.l1.unique()), sorted(table.truth.unique())

    def at(l1: float) -> tuple[dict, str]:
        part = table[table.l1 == l1]
        paths = [part[part.truth == i].sort_values("width") for i in truths]
        mean = part.groupby("width")[["explained", "bits"]].mean().reset_index()
        true = mean[mean.width == n_features]
        x = [*(1 - path.explained for path in paths), 1 - mean.explained, 1 - true.explained]
        y = [*(path.bits for path in paths), mean.bits, true.bits]
        least = toy_features.bounce(mean.width.tolist(), mean.bits.tolist())
        # Where widths lie close together only the star is named.
        texts = [""] * len(paths) + [[str(width) * (abs(width / n_features - 1) > 0.08) for width in mean.width], ""]
        data = {"x": [column.round(4).tolist() for column in x], "y": [column.round(2).tolist() for column in y], "text": texts}
        return data, f"least information with {least} features; true are {n_features}"

    data, note = at(coefficients[active])
    fig = go.Figure()
    names = [*["one truth"] * len(truths), "mean, by number of features", "the true number"]
    for i, name in enumerate(names):
        mean, star = i == len(truths), i > len(truths)
        marker = {"symbol": "star", "size": 20, "color": COLOURS[5]} if star else {"size": 9, "color": COLOURS[0]}
        mode = "markers" if star else "lines+markers+text" if mean else "lines"
        line = {"width": 3 if mean else 1, "color": COLOURS[0] if mean else "#AAAAAA"}
        fig.add_scatter(x=data["x"][i], y=data["y"][i], text=data["text"][i], name=name, mode=mode, line=line, marker=marker,
                        textposition="top right", showlegend=i == 0 or mean or star)
    fig.update_xaxes(title="unexplained variance", tickformat=".0%", rangemode="tozero")
    fig.update_yaxes(title="total information (bits for each activation)")
    fig.add_annotation(text=note, x=0.5, y=1.08, xref="paper", yref="paper", showarrow=False)
    steps = []
    for l1 in coefficients:
        data, note = at(l1)
        steps.append([data, {"annotations[0].text": note}, list(range(len(names)))])
    return _slider(fig, [f"{l1:g}" for l1 in coefficients], steps, "λ = ", active).update_layout(height=640)


def widths_figure(table: pd.DataFrame, n_features: int) -> go.Figure:
    """Three measures of recovery against width: mean over truths, and from the least to the greatest."""
    fig = go.Figure()
    names = {"mmcs": "MMCS: learned with true", "coverage": "the reverse: true with learned", "f1": "F1 of matched features"}
    for (column, name), symbol in zip(names.items(), SYMBOLS, strict=False):
        grouped = table.groupby("width")[column]
        mean = grouped.mean()
        fig.add_scatter(x=mean.index, y=mean, mode="lines+markers", name=name, marker={"symbol": symbol, "size": 10},
                        error_y={"array": grouped.max() - mean, "arrayminus": mean - grouped.min()})
    fig.add_vline(x=n_features, line_dash="dot", line_color=GREY, annotation_text="true number",
                  annotation_position="bottom right")
    fig.update_xaxes(title="features of the dictionary")
    fig.update_yaxes(title="recovery (1 is perfect)")
    return fig.update_layout(legend={"orientation": "h", "y": -0.18})


def tradeoff_figure(table: pd.DataFrame, column: str, label: str, pca: float) -> go.Figure:
    """Recovery against reconstruction: a point a dictionary, a symbol an L1 coefficient; `pca` is what a rotation recovers."""
    fig = go.Figure()
    for i, (l1, part) in enumerate(table.groupby("l1")):
        fig.add_scatter(x=part.explained, y=part[column], mode="markers", name=f"λ = {l1:g}", customdata=part[["width", "l0"]],
                        marker={"size": 9, "symbol": SYMBOLS[i % len(SYMBOLS)], "color": COLOURS[i % 7], "opacity": 0.8},
                        hovertemplate="%{customdata[0]} features, L0 %{customdata[1]:.1f}<extra></extra>")
    fig.add_scatter(x=[1], y=[pca], mode="markers", name="all principal components",
                    marker={"size": 13, "symbol": "star", "color": "#000000"})
    # Where no points are: those of little recovery are on the left of a best reconstruction, and below a best recovery.
    for text, by, ax, ay in (("best reconstruction", "explained", 125, -60), ("best recovery", column, -140, -32)):
        row = table.loc[table[by].idxmax()]
        text += f"<br>λ = {row.l1:g}, {row.width:.0f} features"
        fig.add_annotation(x=row.explained, y=row[column], text=text, ax=ax, ay=ay)
    fig.update_xaxes(title="explained variance", tickformat=".0%", autorangeoptions={"include": 1.08},
                     tickvals=np.linspace(0, 1, 21))  # what is beyond holds a label
    fig.update_yaxes(title=label)
    return fig.update_layout(legend={"orientation": "h", "y": -0.18})
