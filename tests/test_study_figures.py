"""`show`: what it files, and what it refuses."""

import json

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
import pytest

from sae_lib.study import figures, paths

TEXTS = {"claim": "Features beat neurons in 19 of 23 contexts", "alt": "Two rising lines."}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setenv("SAE_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("SAE_RECEIPTS", raising=False)
    return tmp_path / "figures"


def line(**options) -> go.Figure:
    frame = pd.DataFrame({"x": [0, 1, 0, 1], "y": [1.0, 2.0, 2.0, 4.0], "kind": ["feature", "feature", "neuron", "neuron"]})
    return px.line(frame, x="x", y="y", color="kind", **options)


def test_files_and_index(folder):
    figures.show(line(), "03-two-lines", **TEXTS)
    assert {path.name for path in folder.iterdir()} == {"03-two-lines.json", "03-two-lines.html", "index.json", "plotly.min.js"}
    entry = figures.read_index(folder)["03-two-lines"]
    sha256 = paths.sha256(folder / "03-two-lines.json")
    assert entry == {"name": "03-two-lines", "notebook": "03", "n_traces": 2, "sha256": sha256} | TEXTS


def test_page_needs_no_network_and_carries_the_text(folder):
    figures.show(line(), "03-two-lines", claim="A < B", alt='The "first" line is lower.')
    page = (folder / "03-two-lines.html").read_text()
    assert "http" not in page and 'src="plotly.min.js"' in page
    assert "<title>A &lt; B</title>" in page and "The &quot;first&quot; line is lower." in page
    assert (folder / "plotly.min.js").stat().st_size > 1_000_000


def test_same_figure_same_bytes_and_new_data_new_hash(folder):
    figures.show(line(), "03-two-lines", **TEXTS)
    first = (folder / "03-two-lines.json").read_bytes(), (folder / "03-two-lines.html").read_bytes()
    figures.show(line(), "03-two-lines", **TEXTS)
    assert ((folder / "03-two-lines.json").read_bytes(), (folder / "03-two-lines.html").read_bytes()) == first
    before = figures.read_index(folder)["03-two-lines"]["sha256"]
    figures.show(px.line(x=[0, 1], y=[5, 6]), "03-two-lines", **TEXTS)
    assert figures.read_index(folder)["03-two-lines"]["sha256"] != before


def test_look(folder):
    figures.show(line(height=800), "03-two-lines", claim="word " * 40, alt="Two lines.")
    plot = json.loads((folder / "03-two-lines.json").read_text())
    layout = plot["layout"]
    assert (layout["width"], layout["height"]) == (900, 800)
    assert plot["data"][0]["line"]["color"] == "#0072B2"  # plotly.express draws with the study's template
    assert layout["template"]["layout"]["font"]["size"] >= 13
    title = layout["title"]["text"]
    assert title.startswith("<b>word") and title.count("<br>") >= 2
    assert layout["margin"]["t"] > 80


def test_subtitle_is_kept(folder):
    figures.show(line(subtitle="three seeds"), "03-two-lines", **TEXTS)
    assert json.loads((folder / "03-two-lines.json").read_text())["layout"]["title"]["subtitle"]["text"] == "three seeds"


def test_the_figure_given_is_not_changed(folder):
    fig = line()
    before = fig.to_json()
    figures.show(fig, "03-two-lines", **TEXTS)
    assert fig.to_json() == before


@pytest.mark.parametrize("name", ["two-lines", "3-two-lines", "03_two_lines", "03-Two", "03-", "03-a/../b"])
def test_name(folder, name):
    with pytest.raises(ValueError, match="name"):
        figures.show(line(), name, **TEXTS)


@pytest.mark.parametrize("texts", [TEXTS | {"claim": " "}, TEXTS | {"alt": ""}])
def test_claim_and_alt_are_demanded(folder, texts):
    with pytest.raises(ValueError, match="alt text"):
        figures.show(line(), "03-two-lines", **texts)


@pytest.mark.parametrize(
    "fig",
    [
        go.Figure(),
        go.Figure(go.Scatter(x=[], y=[])),
        go.Figure(go.Scatter(x=[1, 2], y=[np.nan, np.nan])),
        go.Figure(go.Scatter(x=[1, 2], y=[None, np.inf])),
        go.Figure(go.Heatmap(z=np.full((3, 3), np.nan))),
    ],
)
def test_nothing_to_see_is_refused(folder, fig):
    with pytest.raises(ValueError, match="no finite data"):
        figures.show(fig, "03-two-lines", **TEXTS)
    assert not folder.exists()


@pytest.mark.parametrize(
    "fig",
    [
        go.Figure(go.Heatmap(z=np.eye(3))),
        go.Figure(go.Bar(x=["a", "b"], y=[1, 2])),
        go.Figure(go.Histogram(x=np.arange(5.0))),
        go.Figure(go.Scatter(x=[1, 2], y=[np.nan, 1.0])),
        go.Figure(go.Table(header={"values": ["a"]}, cells={"values": [["b"]]})),
        go.Figure(go.Pie(labels=["a", "b"], values=[1, 2])),
    ],
)
def test_every_kind_of_figure_with_data_passes(folder, fig):
    figures.show(fig, "03-kind", **TEXTS)
    assert (folder / "03-kind.json").exists()


@pytest.mark.parametrize("layout", [{"xaxis": {"title": {"text": "$\\lambda$"}}}, {"annotations": [{"text": "at $x_0$"}]}])
def test_latex_in_labels_is_refused(folder, layout):
    with pytest.raises(ValueError, match="LaTeX"):
        figures.show(line().update_layout(layout), "03-two-lines", **TEXTS)


def test_dollars_in_data_are_tokens(folder):
    figures.show(go.Figure(go.Bar(x=["$a$", "$b"], y=[1, 2], text=["$c$", "d"])), "03-tokens", **TEXTS)
    assert (folder / "03-tokens.json").exists()


def test_receipt(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_RECEIPTS", str(tmp_path / "receipts"))
    figures.show(line(), "03-two-lines", **TEXTS)
    (receipt,) = paths.receipts(tmp_path / "receipts")
    sha256 = paths.sha256(folder / "03-two-lines.json")
    assert receipt == {"event": "figure", "name": "03-two-lines", "sha256": sha256, "folder": str(folder)}


def test_a_folder_of_its_own(folder, tmp_path):
    figures.show(line(), "03-two-lines", **TEXTS, folder=tmp_path / "apart")
    assert not folder.exists() and list(figures.read_index(tmp_path / "apart")) == ["03-two-lines"]
