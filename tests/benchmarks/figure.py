"""The measured ratios and the loss curves as one plotly figure."""

import os
from pathlib import Path

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lib.study.paths import write_atomic

from .report import SHOWN

LABELS = {"project": "project", "saelens_fp32": "SAELens, float32", "saelens_bf16": "SAELens, bf16 autocast",
          "saelens_bf16_compiled": "SAELens, bf16, compiled", "dictionary_learning": "dictionary_learning"}
COLOURS = dict(zip(LABELS, ("#0072b2", "#e69f00", "#d55e00", "#cc79a7", "#009e73"), strict=True))
SYMBOLS = dict(zip(LABELS, ("circle", "square", "diamond", "x", "triangle-up"), strict=True))
LOSSES = [50, 100, 150, 200, 300, 400, 500, 700, 1000, 2000, 5000]
HEAD = "sae_step.relu.8x.vs_saelens_"


def draw(result: dict) -> go.Figure:
    """Left: how many times as fast the project is, with the slowest and fastest round. Right: held-out loss against time."""
    fig = make_subplots(1, 2, subplot_titles=("Speed", "Held-out loss after equal seconds"), column_widths=[0.5, 0.5],
                        horizontal_spacing=0.1)
    by_id = {r["id"]: r for r in result["rows"]}
    speeds = [(f"{what}<br><i>against {against}</i>", by_id[id_]) for id_, (what, against) in SHOWN.items()
              if id_ in by_id and by_id[id_]["unit"].endswith("/s") and by_id[id_]["ratio"] is not None]
    rows = [r for _, r in speeds]
    fig.add_scatter(x=[r["ratio"] for r in rows], y=[label for label, _ in speeds], mode="markers", showlegend=False,
                    marker={"color": COLOURS["project"], "size": 10}, row=1, col=1,
                    error_x={"type": "data", "symmetric": False, "array": [r["high"] - r["ratio"] for r in rows],
                             "arrayminus": [r["ratio"] - r["low"] for r in rows]})
    fig.add_vline(x=1, line_dash="dot", row=1, col=1)
    for name, label in LABELS.items():
        points = [p for p in result["curves"] if p["name"] == name]
        if points:
            fig.add_scatter(x=[p["seconds"] for p in points], y=[p["objective"] for p in points], name=label, row=1, col=2,
                            mode="lines+markers", line_color=COLOURS[name], marker={"symbol": SYMBOLS[name], "size": 8})
    fig.update_xaxes(title="project's rate over the other's", type="log", tickvals=[0.25, 0.5, 1, 2, 5, 10, 20, 50], row=1, col=1)
    fig.update_yaxes(autorange="reversed", row=1, col=1)
    fig.update_xaxes(title="seconds of training", rangemode="tozero", row=1, col=2)
    fig.update_yaxes(title="squared error + L1, one unit for all", type="log", tickvals=LOSSES, row=1, col=2)
    machine = result["machine"]
    subtitle = f"{machine['processor']}, {machine['threads']} threads, bfloat16 by {machine['bfloat16']}, {result['date']}"
    return fig.update_layout(template="plotly_white", width=1400, height=max(460, 38 * len(speeds) + 190), margin_l=330,
                             margin_t=110, title=f"{_finding(by_id)}<br><sup>{subtitle}</sup>")


def _finding(by_id: dict[str, dict]) -> str:
    found = [f"{by_id[HEAD + kind]['ratio']:.1f} times as fast as SAELens in {words}"
             for kind, words in (("fp32", "float32"), ("bf16", "bf16 autocast")) if HEAD + kind in by_id]
    return f"A dictionary's step is {' and '.join(found)}" if found else "How fast the project is"


def write(result: dict, path: Path) -> None:
    """As HTML that fetches plotly when opened, as JSON, and as PNG where a browser for kaleido is found."""
    fig = draw(result)
    write_atomic(path, fig.to_html(include_plotlyjs="cdn"))
    write_atomic(path.with_suffix(".figure.json"), fig.to_json())
    if os.environ.get("BROWSER_PATH"):
        fig.write_image(path.with_suffix(".png"))
