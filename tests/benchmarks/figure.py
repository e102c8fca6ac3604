"""The measured ratios and the loss curves as one plotly figure."""

import os
from pathlib import Path

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lib.study.paths import write_atomic

LABELS = {"project": "project", "saelens_fp32": "SAELens, float32", "saelens_bf16": "SAELens, bf16 autocast",
          "saelens_bf16_compiled": "SAELens, bf16, compiled", "dictionary_learning": "dictionary_learning"}
COLOURS = dict(zip(LABELS, ("#0072b2", "#e69f00", "#d55e00", "#cc79a7", "#009e73"), strict=True))


def draw(result: dict) -> go.Figure:
    """Left: how many times as fast the project is, with the slowest and fastest round. Right: held-out loss against time."""
    fig = make_subplots(1, 2, subplot_titles=("Times as fast as ...", "Held-out loss after equal seconds"),
                        column_widths=[0.55, 0.45], horizontal_spacing=0.12)
    speeds = [r for r in result["rows"] if ".vs_" in r["id"] and not r["id"].startswith("loss.")]
    fig.add_bar(x=[r["ratio"] for r in speeds], y=[r["id"] for r in speeds], orientation="h", showlegend=False,
                marker_color="#0072b2", row=1, col=1,
                error_x={"type": "data", "symmetric": False, "array": [r["high"] - r["ratio"] for r in speeds],
                         "arrayminus": [r["ratio"] - r["low"] for r in speeds]})
    fig.add_vline(x=1, line_dash="dot", row=1, col=1)
    for name, label in LABELS.items():
        points = [p for p in result["curves"] if p["name"] == name]
        if points:
            fig.add_scatter(x=[p["seconds"] for p in points], y=[p["objective"] for p in points], name=label, row=1, col=2,
                            mode="lines+markers", line_color=COLOURS[name])
    fig.update_xaxes(title="project's rate over the other's", type="log", row=1, col=1)
    fig.update_yaxes(autorange="reversed", row=1, col=1)
    fig.update_xaxes(title="seconds of training", row=1, col=2)
    fig.update_yaxes(title="squared error + L1, one unit for all", type="log", row=1, col=2)
    return fig.update_layout(template="plotly_white", width=1300, height=max(420, 26 * len(speeds) + 160),
                             margin_l=310, title=f"Measured {result['date']} on {result['machine']['processor']}, "
                                                 f"{result['machine']['threads']} threads")


def write(result: dict, path: Path) -> None:
    """As HTML that fetches plotly when opened, as JSON, and as PNG where a browser for kaleido is found."""
    fig = draw(result)
    write_atomic(path, fig.to_html(include_plotlyjs="cdn"))
    write_atomic(path.with_suffix(".figure.json"), fig.to_json())
    if os.environ.get("BROWSER_PATH"):
        fig.write_image(path.with_suffix(".png"))
