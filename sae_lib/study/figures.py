"""The one door for figures: `show` gives a figure its finding as title, files it, and displays it without any browser."""

import html
import json
import re
import textwrap
from collections.abc import Iterator
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
from plotly.offline import get_plotlyjs

from sae_lib.study import paths

# Okabe and Ito's palette: distinguishable with any common colour blindness. Yellow comes last: it is faint on white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
WIDTH, HEIGHT = 900, 520
# "Share" would upload the figure to a server; nothing here needs a network.
_NESTS = ("data", "annotations", "frames", "layout", "buttons", "updatemenus", "sliders")  # lists that hold labels
CONFIG = {"displaylogo": False, "showSendToCloud": False}
MIMETYPE = "application/vnd.plotly.v1+json"

_AXIS = {"gridcolor": "#E5E5E5", "linecolor": "#444444", "zerolinecolor": "#BBBBBB", "showline": True, "ticks": "outside",
         "tickcolor": "#444444", "automargin": True, "title": {"standoff": 8}}
TEMPLATE = go.layout.Template(layout={
    "colorway": COLOURS,
    "font": {"family": "Open Sans, DejaVu Sans, Arial, sans-serif", "size": 14, "color": "#222222"},
    "paper_bgcolor": "white",
    "plot_bgcolor": "white",
    "colorscale": {"sequential": "Viridis", "sequentialminus": "Viridis", "diverging": "RdBu"},
    "hoverlabel": {"align": "left", "font": {"size": 13}},
    "legend": {"bgcolor": "rgba(255,255,255,0.8)"},
    "xaxis": _AXIS,
    "yaxis": _AXIS,
    "title": {"x": 0.02, "xanchor": "left", "y": 1, "yanchor": "top", "pad": {"t": 16}, "font": {"size": 16},
              "subtitle": {"font": {"size": 13, "color": "#555555"}}},
})
# plotly.express writes the default template's colours into its traces, so the template must be the default before they exist.
pio.templates["study"] = TEMPLATE
pio.templates.default = "study"


def style(fig: go.Figure) -> go.Figure:
    """Give `fig` the study's look, in place: template, and a size unless it has one."""
    fig.update_layout(template=TEMPLATE, width=fig.layout.width or WIDTH, height=fig.layout.height or HEIGHT)
    return fig


def show(fig: go.Figure, name: str, *, claim: str, alt: str, folder: Path | None = None) -> None:
    """File `fig` as figures/<name>.json and .html, enter it in figures/index.json, and display it.

    name: "NN-words-with-hyphens", NN the notebook's number; claim: the finding, which becomes the title (a subtitle the
    figure already has is kept); alt: what someone who cannot see the figure should know; folder: instead of figures/.
    Raises ValueError for a figure that breaks the rules of the house: no claim or alt text, no finite data, LaTeX in a label.
    """
    if not re.fullmatch(r"\d\d-[a-z0-9]+(-[a-z0-9]+)*", name):
        raise ValueError(f"A figure's name is the notebook's number and words, as in 03-density-histogram, not '{name}'")
    if not claim.strip() or not alt.strip():
        raise ValueError(f"Figure {name} needs a claim (its finding) and alt text (what it shows, in words)")
    if isinstance(fig, go.FigureWidget):
        raise ValueError(f"Figure {name} is a FigureWidget, which stores the whole of plotly in the notebook: use go.Figure")
    if not any(_finite(trace.to_plotly_json()) for trace in fig.data):
        raise ValueError(f"Figure {name} has no finite data to show")
    fig = style(go.Figure(fig))
    _set_title(fig, claim)
    for label in _labels(fig.to_plotly_json()):
        if re.search(r"\$[^$]+\$", label):
            raise ValueError(f"Figure {name} has LaTeX in the label '{label}', which most viewers show as raw text: use Unicode")

    folder = folder or paths.figures()
    plot = json.loads(fig.to_json())
    content = json.dumps(plot, sort_keys=True, separators=(",", ":")) + "\n"
    paths.write_atomic(folder / f"{name}.json", content)
    _write_plotlyjs(folder)
    paths.write_atomic(folder / f"{name}.html", _page(fig, name, claim, alt))
    entry = {"name": name, "notebook": name[:2], "claim": claim, "alt": alt, "n_traces": len(fig.data),
             "sha256": paths.sha256(folder / f"{name}.json")}
    update_index(folder, {name: entry})
    paths.receipt("figure", name=name, sha256=entry["sha256"], folder=str(folder))
    _display(plot, entry)


def read_index(folder: Path) -> dict[str, dict]:
    """figures/index.json as {name: entry}."""
    return (paths.read_json(folder / "index.json") or {}).get("figures", {})


def update_index(folder: Path, entries: dict[str, dict]) -> None:
    """Add to, or complete, entries of figures/index.json."""
    with paths.lock(paths.data() / "locks" / "figures"):
        index = read_index(folder)
        for name, entry in entries.items():
            index[name] = index.get(name, {}) | entry
        paths.write_json(folder / "index.json", {"figures": index})


def _set_title(fig: go.Figure, claim: str) -> None:
    subtitle = fig.layout.title.subtitle.text
    # A bold character of 16 pixels is up to 10.4 wide, a line 21 high.
    lines = textwrap.wrap(claim.strip(), int(0.96 * fig.layout.width / 10.4))
    rows = 21 * len(lines) + (18 * (1 + subtitle.count("<br>")) if subtitle else 0)
    # Plotly sets a title of several lines half a line too high.
    top = 16 + 11 * (len(lines) > 1)
    fig.update_layout(title={"text": "<br>".join(f"<b>{line}</b>" for line in lines), "pad": {"t": top}})
    fig.update_layout(margin={"t": max(fig.layout.margin.t or 0, 42 + rows), "l": 70, "r": 40, "b": 60})


def _finite(value: Any) -> bool:
    """Whether a trace's JSON holds at least one finite number or one text where data goes."""
    data = (value.get(key) for key in ("x", "y", "z", "values", "r", "theta", "open", "value", "header", "lat", "a", "labels"))
    numbers = [item for item in data if item is not None]
    if value.get("type") in ("sankey", "table", "parcoords", "splom"):
        return any(value.get(key) for key in ("node", "link", "cells", "dimensions"))
    # x alone says nothing: a line needs its y to be finite, a heat map its z.
    return bool(numbers) and all(_any_finite(item) for item in numbers)


def _any_finite(item: Any) -> bool:
    array = np.asarray(item, dtype=object).ravel()
    return any(np.isfinite(entry) if isinstance(entry, Number) else entry is not None for entry in array)


def _labels(value: Any, key: str = "") -> Iterator[str]:
    """Titles, names and annotations of a figure; not its data, where a dollar sign may be a token."""
    if isinstance(value, dict):
        for child, item in value.items():
            if child != "template":
                yield from _labels(item, child)
    elif isinstance(value, list | tuple) and key in _NESTS:
        for item in value:
            yield from _labels(item, key)
    elif isinstance(value, str) and key in ("text", "name", "title", "label", "prefix"):
        yield value


def _page(fig: go.Figure, name: str, claim: str, alt: str) -> str:
    """A page that needs no network: plotly.min.js lies beside it."""
    plot = pio.to_html(fig, config=CONFIG, include_plotlyjs=False, full_html=False, div_id=name)
    claim, alt = html.escape(claim), html.escape(alt)
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{claim}</title>'
        '<script src="plotly.min.js"></script></head>\n'
        f'<body><figure><div role="img" aria-label="{alt}">{plot}</div><figcaption>{alt}</figcaption></figure></body>\n</html>\n'
    )


def _write_plotlyjs(folder: Path) -> None:
    target, source = folder / "plotly.min.js", get_plotlyjs().encode()
    if not target.exists() or target.stat().st_size != len(source):
        paths.write_atomic(target, source)


def _display(plot: dict, entry: dict) -> None:
    """Show the figure in a notebook, with its text for viewers that run no JavaScript; nothing outside a notebook."""
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        return
    if get_ipython() is not None:
        bundle = {MIMETYPE: plot | {"config": CONFIG}, "text/plain": f"Figure {entry['name']}: {entry['claim']} {entry['alt']}"}
        about = {"figure": entry["name"], "alt": entry["alt"], "sha256": entry["sha256"]}
        display(bundle, raw=True, metadata={MIMETYPE: about})
