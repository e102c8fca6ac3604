"""What notebook 12 draws: levels of activation, effects, edits side by side, and trees of causes."""

from collections.abc import Callable, Sequence
from numbers import Real

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lib.study.diagrams import escaped, spelled, token_list
from sae_lib.study.edits import Compared
from sae_lib.study.figures import COLOURS
from sae_lib.token_classes import quoted

FAINT = "#BBBBBB"
SPLIT = (COLOURS[0], COLOURS[1], FAINT)  # of what a unit fires on: the truth, what resembles it, anything else
PATTERN = ("", "/", "")


def _bars(part: pd.DataFrame) -> dict:
    return {"array": part.high - part.value, "arrayminus": part.value - part.low, "thickness": 1.2}


def quality_figure(table: pd.DataFrame) -> go.Figure:
    """Three panels by layer: active features; shares that are kept; perplexity. `table` is that of `cases.quality`."""
    panels = (("active features (L0)", {"l0": "L0"}),
              ("what is kept", {name: name for name in ("loss recovered (zero)", "loss recovered (mean)", "explained variance")}),
              ("perplexity", {"perplexity, untouched": "untouched", "perplexity": "reconstruction in place"}))
    fig, colours = make_subplots(cols=3, horizontal_spacing=0.09, subplot_titles=[title for title, _ in panels]), iter(COLOURS)
    for col, (_, measures) in enumerate(panels, start=1):
        for measure, name in measures.items():
            part = table[table.measure == measure]
            fig.add_scatter(x=part.after, y=part.value, error_y=_bars(part), name=name, mode="lines+markers", row=1, col=col,
                            showlegend=col > 1, line={"color": next(colours)}, marker={"size": 8})
    after = sorted(table.after.unique().tolist())
    fig.update_xaxes(title="after layers", tickvals=after, range=[min(after) - 0.3, max(after) + 0.3])
    fig.update_yaxes(rangemode="tozero", row=1, col=1)
    fig.update_yaxes(tickformat=".0%", row=1, col=2)
    fig.update_yaxes(rangemode="tozero", row=1, col=3)
    return fig.update_layout(width=1000, height=430, legend={"orientation": "h", "y": -0.25, "yanchor": "top"})


def scores_figure(means: dict[int, pd.DataFrame], names: dict[str, str]) -> go.Figure:
    """Mean scores with their intervals: a panel for each number of layers, a row for each kind of unit."""
    fig = make_subplots(cols=len(means), shared_yaxes=True, horizontal_spacing=0.04,
                        subplot_titles=[f"after layer {after}" for after in means])
    for col, table in enumerate(means.values(), start=1):
        colours = [COLOURS[0] if kind == "feature" else COLOURS[1] for kind in table.index]
        fig.add_scatter(x=table.value, y=[names[kind] for kind in table.index], error_x=_bars(table), mode="markers",
                        marker={"size": 10, "color": colours}, showlegend=False, row=1, col=col)
    fig.update_xaxes(rangemode="tozero", title="mean correlation (95 %)")
    return fig.update_yaxes(autorange="reversed").update_layout(width=1000, height=420)


def levels_figure(units: dict[str, pd.DataFrame]) -> go.Figure:
    """A panel a unit (its caption): of its active tokens at each level of activation the share of each truth, in a stack; above
    each bar the number of tokens."""
    fig, seen = make_subplots(cols=len(units), shared_yaxes=True, subplot_titles=list(units), horizontal_spacing=0.05), set()
    for col, table in enumerate(units.values(), start=1):
        total = table.groupby("level").tokens.transform("sum")
        heights = table.tokens / total.where(total > 0)
        for truth, colour, shape in zip(table.truth.unique(), SPLIT, PATTERN, strict=False):
            part = table.truth == truth
            fig.add_bar(x=table.level[part], y=heights[part], width=table.width[part], name=truth, legendgroup=truth,
                        showlegend=truth not in seen, marker={"color": colour, "pattern": {"shape": shape}, "line": {"width": 0}},
                        row=1, col=col)
            seen.add(truth)
        counts = table.groupby("level").tokens.sum()
        fig.add_scatter(x=counts.index, y=np.full(len(counts), 1.03), mode="text", text=[_short(n) for n in counts], row=1,
                        col=col, textfont={"size": 10, "color": "#555555"}, showlegend=False, hoverinfo="skip")
        if table.empty:
            fig.add_scatter(x=[0], y=[0.5], mode="text", text=["never active"], showlegend=False, row=1, col=col)
    fig.update_xaxes(title="activation")
    fig.update_yaxes(tickformat=".0%", range=[0, 1.08])
    fig.update_yaxes(title="share of active tokens", row=1, col=1)
    return fig.update_layout(barmode="stack", width=1000, height=440, legend={"orientation": "h", "y": -0.22, "yanchor": "top"})


def _short(count: Real) -> str:
    return f"{count:.0f}" if count < 1000 else f"{count / 1000:.2g}k" if count < 1e5 else f"{count / 1e6:.2g}M"


def units_figure(table: pd.DataFrame) -> go.Figure:
    """Two panels by layer: correlation with the truth, and share of activation on it, a colour a role. `table` is
    `Apostrophe.units`."""
    fig = make_subplots(cols=2, horizontal_spacing=0.12,
                        subplot_titles=["correlation with apostrophes", "share of activation on apostrophes"])
    for i, (role, part) in enumerate(table.groupby("role", sort=False)):
        for col, measure in ((1, "pearson"), (2, "share")):
            numbers = part.rename(columns={measure: "value", f"{measure}_low": "low", f"{measure}_high": "high"})
            fig.add_scatter(x=numbers.after + (i - 1) * 0.06, y=numbers.value, error_y=_bars(numbers), mode="markers", name=role,
                            marker={"symbol": ("circle", "diamond-open", "square-open")[i], "size": 11, "color": COLOURS[i]},
                            showlegend=col == 1, row=1, col=col)
    fig.update_xaxes(title="after layers", tickvals=sorted(table.after.unique().tolist()))
    fig.update_yaxes(rangemode="tozero")
    fig.update_yaxes(tickformat=".0%", row=1, col=2)
    return fig.update_layout(width=1000, height=430, legend={"orientation": "h", "y": -0.22, "yanchor": "top"})


def lowered_figure(table: pd.DataFrame, vocabulary: Sequence[bytes], k: int = 12) -> go.Figure:
    """A panel a role: the k tokens whose probability falls most, with the intervals that are known. `table`: `Apostrophe.effect`.
    """
    roles = list(table.role.unique())
    fig = make_subplots(cols=len(roles), horizontal_spacing=0.16, subplot_titles=[f"ablated: the {role}" for role in roles])
    for col, role in enumerate(roles, start=1):
        part = table[table.role == role].nsmallest(k, "probability") if table.probability.notna().any() else table[:0]
        names = [f"{token_list([vocabulary[t]], spell=spelled)} " for t in part.token]
        high, low = (part.high - part.probability).fillna(0), (part.probability - part.low).fillna(0)
        fig.add_bar(x=part.probability, y=np.arange(len(part)), orientation="h", row=1, col=col,
                    marker={"color": COLOURS[col - 1]},
                    error_x={"array": high, "arrayminus": low, "thickness": 1.2}, showlegend=False)
        fig.update_yaxes(tickvals=np.arange(len(part)), ticktext=names, autorange="reversed", row=1, col=col)
    if table.probability.isna().all():
        fig.add_scatter(x=[0], y=[0], mode="text", text=["the feature is on no apostrophe here"], showlegend=False)
    fig.update_xaxes(title="change of the probability", tickformat="+.1%", matches="x")
    return fig.update_layout(width=1000, height=470)


def kinds_figure(table: pd.DataFrame, kinds: Sequence[str]) -> go.Figure:
    """A row a feature, a column a kind of apostrophe: the share of the feature's activation there."""
    columns = [*kinds, "other"]
    shares = table[columns].to_numpy(dtype=float)
    named = [f"feature {row.feature} after {row.after}<br>(searched for {escaped(row.kind)})" for row in table.itertuples()]
    fig = go.Figure(go.Heatmap(z=shares, x=["any other token" if name == "other" else escaped(name) for name in columns],
                               y=named, zmin=0, zmax=1, colorscale="Blues", texttemplate="%{z:.0%}", showscale=False))
    fig.update_xaxes(title="share of the feature's activation on apostrophes of this kind")
    fig.update_yaxes(autorange="reversed")
    return fig.update_layout(height=150 + 90 * len(table))


def probability_figure(table: pd.DataFrame, places: Sequence[str], edits: Sequence[str]) -> go.Figure:
    """How likely a closing token is: a group of bars a place, a bar an edit. `table`: `Parenthesis.effect`."""
    fig = go.Figure()
    for edit, colour, shape in zip(edits, (FAINT, COLOURS[1], COLOURS[0]), ("", "/", "x"), strict=True):
        part = table[table.edit == edit].set_index("place").reindex(places)
        fig.add_bar(x=list(places), y=part.value, error_y=_bars(part), name=f"feature {edit}",
                    marker={"color": colour, "pattern": {"shape": shape}})
    if table.value.isna().all():
        fig.add_scatter(x=[places[0]], y=[0], mode="text", text=["the feature is never active here"], showlegend=False)
    fig.update_yaxes(title="probability that the next token closes", tickformat=".0%")
    return fig.update_layout(barmode="group", height=460, legend={"orientation": "h", "y": -0.15, "yanchor": "top"})


def edits_figure(cases: dict[str, Compared], names: dict[str, str]) -> go.Figure:
    """A column a case; KL against the effect where it is wanted, a line an edit, a point a strength, about the whole effect of
    the first edit, which a dotted line marks.

    Above KL where the concept is absent, below where the feature is active and not wanted. `names` spells the edits. Both axes
    are logarithmic: lines between points are those along which equal effects are found.
    """
    rows = {"absent": "KL, concept absent", "active": "KL, active unwanted"}
    fig = make_subplots(rows=len(rows), cols=len(cases), horizontal_spacing=0.06, vertical_spacing=0.06, shared_xaxes=True,
                        subplot_titles=list(cases))
    for col, found in enumerate(cases.values(), start=1):
        whole = -found.curves.set_index(["edit", "strength"]).wanted[next(iter(names)), 1.0]
        near = found.curves[(-found.curves.wanted).between(whole / 20, whole * 8)]
        for row, (measure, title) in enumerate(rows.items(), start=1):
            for i, (edit, name) in enumerate(names.items()):
                part = near[(near.edit == edit) & (near[measure] > 0)]
                fig.add_scatter(x=-part.wanted, y=part[measure], name=name, legendgroup=edit, showlegend=(row, col) == (1, 1),
                                mode="lines+markers", line={"color": COLOURS[i]}, row=row, col=col,
                                marker={"size": 7, "symbol": ("circle", "diamond", "square")[i]})
            if whole > 0:
                fig.add_vline(x=whole, line={"dash": "dot", "color": "#555555"}, row=row, col=col)
            fig.update_yaxes(type="log", dtick=1, exponentformat="power", row=row, col=col,
                             title={"text": f"{title} (nats)" if col == 1 else "", "font": {"size": 13}})
        if near.empty:
            fig.add_scatter(x=[1], y=[1], mode="text", text=["nothing to compare on here"], showlegend=False, row=1, col=col)
    fig.update_xaxes(type="log", dtick="D2", tickangle=0)
    fig.update_xaxes(title="log-likelihood lost where wanted (nats)", row=len(rows), col=(len(cases) + 1) // 2)
    return fig.update_layout(width=1100, height=620, legend={"orientation": "h", "y": -0.14, "yanchor": "top"})


# --- trees -----------------------------------------------------------------------------------------------------------

def _heights(tree: pd.DataFrame) -> dict[int, float]:
    """Where each node stands: leaves one below the other, others in the middle of theirs."""
    children = {node: part.node.tolist() for node, part in tree.groupby("parent")}
    heights: dict[int, float] = {}

    def place(node: int) -> float:
        below = [place(child) for child in children.get(node, [])]
        heights[node] = float(np.mean(below)) if below else float(sum(node not in children for node in heights))
        return heights[node]

    place(0)
    return heights


def tree_figure(tree: pd.DataFrame, vocabulary: Sequence[bytes], raises: Callable[[int], str] | None = None) -> go.Figure:
    """Causes to the left of what they cause; an edge is the thicker, the more of the target's activation its loss takes.

    `tree` comes from `causes.tree`; `raises` gives a further line for the target's label.
    """
    if tree.empty:
        return go.Figure(go.Scatter(x=[0], y=[0], mode="text", text=["the feature is too rare here to ask for its causes"]))
    nodes = tree[tree.kind.isin(("target", "cause"))]
    heights, by_node, fig = _heights(nodes), nodes.set_index("node"), go.Figure()
    for row in nodes[nodes.parent >= 0].itertuples():
        t = np.linspace(0, 1, 30)
        y = heights[row.node] + (3 * t**2 - 2 * t**3) * (heights[row.parent] - heights[row.node])
        line = {"width": 1 + 12 * max(row.value, 0), "color": COLOURS[4] if row.low > 0 else FAINT}
        fig.add_scatter(x=row.after + t, y=y, mode="lines", line=line, hoverinfo="skip", showlegend=False)
        fig.add_annotation(x=row.after + t[5], y=y[5], text=f"{row.value:.0%}", showarrow=False, font={"size": 11},
                           bgcolor="rgba(255,255,255,0.8)", borderpad=0)
    first = int(nodes.after.min())
    for row in nodes.itertuples():
        lines = [f"<b>{row.feature}</b>", token_list([vocabulary[t] for t in row.fires_on[:4]], 30, _bracketed)]
        if row.parent < 0 and raises is not None:
            lines.append(raises(row.feature))
        beside = {"xanchor": "right", "xshift": -12, "text": "  ".join(lines)}
        above = {"xanchor": "center", "yshift": 14 + 8 * len(lines), "text": "<br>".join(lines)}
        fig.add_annotation(x=row.after, y=heights[row.node], showarrow=False, font={"size": 13},
                           **(beside if row.after == first else above))
    same = nodes.cosine > 0.7
    for chosen, name, colour, symbol in ((same, "points the way of what it causes (cosine above 0.7)", COLOURS[1], "diamond"),
                                         (~same, "another direction", COLOURS[0], "circle")):
        part = nodes[chosen]
        if len(part):
            fig.add_scatter(x=part.after, y=[heights[node] for node in part.node], mode="markers", name=name,
                            marker={"size": 14, "color": colour, "symbol": symbol}, hoverinfo="text",
                            hovertext=[f"feature {r.feature} after {r.after}: {_told(r)}" for r in part.itertuples()])
    layers = list(range(first, int(by_node.after[0]) + 1))
    fig.update_xaxes(tickvals=layers, ticktext=[f"after layer {n}" for n in layers], range=[first - 0.95, layers[-1] + 0.35],
                     showgrid=False, zeroline=False)
    leaves = len([node for node in heights if node not in set(nodes.parent)])
    fig.update_yaxes(visible=False, range=[leaves - 0.3, -1.1])
    below = {"orientation": "h", "y": -0.1, "yanchor": "top"}
    return fig.update_layout(width=1100, height=160 + 40 * max(leaves, 6), legend=below)


def _bracketed(token: bytes) -> str:
    """A token as in `spelled`, but no quotation mark is lost among quotation marks."""
    text = spelled(token)
    return f"‹{text[1:-1]}›" if text[0] in "'\"" else text


def _told(row) -> str:
    return "the target" if row.parent < 0 else f"{row.value:.0%} lost (95 %: {row.low:.0%} to {row.high:.0%})"


def survey_figure(table: pd.DataFrame) -> go.Figure:
    """Two panels by layer, a point a feature: what ablating its causes takes; how weights rank the causes."""
    fig = make_subplots(cols=2, horizontal_spacing=0.12,
                        subplot_titles=["share of activation lost", "rank correlation with the causes"])
    series = ((1, {"first": "greatest cause", "together": "first four together", "alike": "another, nearest in activity there"}),
              (2, {"encoder": "cosine with what the target reads", "decoder": "cosine with its direction"}))
    for col, columns in series:
        for i, (column, name) in enumerate(columns.items()):
            colour = COLOURS[i + 3 * (col - 1)]
            fig.add_box(x=[f"after layer {after}" for after in table.after], y=table[column], name=name, boxpoints="all",
                        jitter=0.5, pointpos=0, marker={"color": colour, "size": 4, "opacity": 0.6}, line={"width": 1.5},
                        fillcolor="rgba(0,0,0,0)", offsetgroup=str(i), row=1, col=col)
    if table.empty:
        fig.add_scatter(x=[0], y=[0], mode="text", text=["no feature is strong in enough documents"], showlegend=False)
    fig.update_yaxes(tickformat=".0%", row=1, col=1)
    fig.update_yaxes(range=[-1.05, 1.05], row=1, col=2)
    return fig.update_layout(boxmode="group", width=1000, height=470, legend={"orientation": "h", "y": -0.12, "yanchor": "top"})


def spell(tokens: Sequence[int], vocabulary: Sequence[bytes], k: int = 6) -> str:
    """Tokens in quotation marks, for tables."""
    return " ".join(quoted(vocabulary[int(t)]) for t in tokens[:k]) if isinstance(tokens, list) else ""
