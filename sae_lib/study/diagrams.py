"""What notebook 09 draws: automata as nodes and arrows, how long they last, and text with its states marked."""

import html
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lib.study.figures import COLOURS
from sae_lib.study.token_html import line_html, pieces, token_html
from sae_lib.token_classes import quoted

COLUMNS = 3
NODE = 0.24  # radius of a node, where the nodes of an automaton lie on a circle of radius 1
GREY, PALE = "#777777", "#C8C8C8"
IN_EVERY_FONT = ("\0", "\u06ff"), ("\u1e00", "\u2bff")  # first and last character of ranges


class Drawn(NamedTuple):
    """An automaton and what is to be known of it."""

    title: str
    states: Sequence[int]
    tokens: Sequence[Sequence[bytes]]
    """The tokens that each state fires on most."""
    share: np.ndarray
    """[n_states, n_states]: how often one state follows another; nan where there is no edge."""


def spelled(token: bytes) -> str:
    """A token in quotation marks, for pictures: letters that the font of an image may lack by their Unicode names.

    A browser finds a font for every script; where PNGs are made there may be none but the commonest. What is left as it is
    are Latin, Greek, Cyrillic, Armenian, Hebrew and Arabic letters, and common signs.
    """
    try:
        text = token.decode("utf-8")
    except UnicodeDecodeError:
        return quoted(token)
    return repr("".join(c if in_every_font(c) else f"‹{_name(c)}›" for c in text))


def in_every_font(text: str) -> bool:
    """Whether the font of an image surely has all characters of a text."""
    return all(any(first <= c <= last for first, last in IN_EVERY_FONT) for c in text)


def _name(character: str) -> str:
    """A character's script and name, as in "Tamil ka" or "Cjk 4e2d"; its number if it has no name."""
    words = unicodedata.name(character, f"U+{ord(character):04X}").replace("-", " ").split()
    return " ".join(word for word in words if word not in ("LETTER", "SYLLABLE", "VOWEL", "UNIFIED", "IDEOGRAPH")).capitalize()


def escaped(text: str) -> str:
    """Text of a corpus as text of a label, where what stands between two dollar signs would be taken for a formula."""
    return html.escape(text, quote=False).replace("$", "&#36;")


def token_list(tokens: Sequence[bytes], width: int = 1000, spell: Callable[[bytes], str] = quoted) -> str:
    """Tokens in quotation marks as text for a label: escaped, each in its own direction, as many as go into the width."""
    shown, used = [], 0
    for token in map(spell, tokens):
        used += len(token) + 1
        if shown and used > width:
            break
        shown.append(f"\u2068{escaped(token)}\u2069")  # a right-to-left token must not turn the list around
    return " ".join(shown)


# --- node-link diagrams ----------------------------------------------------------------------------------------------

def layout(n: int) -> np.ndarray:
    """Positions of n states, [n, 2]: on a circle, clockwise from the left; one alone in the middle."""
    angle = np.pi - 2 * np.pi * np.arange(n) / n + (np.pi / 6 if n == 3 else -np.pi / 4 if n == 4 else 0)
    return np.column_stack([np.cos(angle), 0.8 * np.sin(angle)]) * (n > 1)


def arrow(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Points of a curve from the rim of one node to the rim of another, [points, 2], bent to the left; if they are one, of a
    loop that points away from the middle, or up."""
    if np.allclose(start, end):
        away = start / np.linalg.norm(start) if start.any() else np.array([0.0, 1.0])
        turn, across = np.linspace(-np.pi, np.pi, 60)[:, None], away[::-1] * [-1, 1]
        points = start + 0.42 * away + 0.4 * (np.cos(turn) * away + 0.8 * np.sin(turn) * across)
    else:
        t, across = np.linspace(0, 1, 60)[:, None], (end - start)[::-1] * [-1, 1]
        points = (1 - t) ** 2 * start + 2 * t * (1 - t) * ((start + end) / 2 + 0.24 * across) + t**2 * end
    outside = (np.linalg.norm(points - start, axis=1) > NODE) & (np.linalg.norm(points - end, axis=1) > NODE + 0.03)
    return points[outside]


def automata_figure(automata: Sequence[Drawn]) -> go.Figure:
    """A panel an automaton: its states as numbered nodes, its edges as arrows with their share, its states' tokens below."""
    rows = max(1, -(-len(automata) // COLUMNS))
    fig = make_subplots(rows=rows, cols=COLUMNS, horizontal_spacing=0.03, vertical_spacing=0.14 / rows,
                        subplot_titles=[html.escape(drawn.title, quote=False) for drawn in automata])
    for number, drawn in enumerate(automata):
        at, nodes = {"row": number // COLUMNS + 1, "col": number % COLUMNS + 1}, layout(len(drawn.states))
        for i, j in np.argwhere(np.isfinite(drawn.share)).tolist():
            own = j in (i, (i + 1) % len(nodes))  # of the loop or the cycle; else one of those across
            points, said = arrow(nodes[i], nodes[j]), f"{drawn.share[i, j]:.0%}"
            colour, width, head = (GREY, 1 + 3 * drawn.share[i, j], 13) if own else (PALE, 1, 8)
            fig.add_scatter(x=points[:, 0], y=points[:, 1], mode="lines+markers", **at, hoverinfo="text", showlegend=False,
                            hovertext=f"feature {drawn.states[i]} → {drawn.states[j]}: {said}",
                            line={"color": colour, "width": width},
                            marker={"symbol": "arrow", "angleref": "previous", "color": colour,
                                    "size": [0] * (len(points) - 1) + [head]})
            if own:
                middle = points[len(points) // 2]
                fig.add_annotation(x=middle[0], y=middle[1], text=said, showarrow=False, bgcolor="white", borderpad=1,
                                   font={"size": 11}, **at)
        key = "<br>".join(f"<b>{i + 1}</b> {token_list(tokens, 46, spelled)}" for i, tokens in enumerate(drawn.tokens))
        fig.add_scatter(x=nodes[:, 0], y=nodes[:, 1], mode="markers+text", text=[str(i + 1) for i in range(len(nodes))], **at,
                        hovertext=[f"feature {state}" for state in drawn.states], hoverinfo="text", showlegend=False,
                        marker={"size": 28, "color": "white", "line": {"width": 3, "color": COLOURS[:len(nodes)]}})
        fig.add_annotation(x=-1.9, y=-1.5, text=key, showarrow=False, xanchor="left", yanchor="top", align="left",
                           font={"size": 11}, **at)
    if not automata:
        fig.add_scatter(x=[0], y=[0], mode="text", text=["no automaton was found"], showlegend=False)
    fig.update_xaxes(range=[-2, 2], visible=False)
    fig.update_yaxes(range=[-2.6, 1.85], visible=False)
    return fig.update_layout(height=110 + 300 * rows, width=1000)


# --- verification ----------------------------------------------------------------------------------------------------

def stay_figure(table: pd.DataFrame) -> go.Figure:
    """A row an automaton. Columns: automaton (its name); stay, low, high; control, control_low, control_high; text_stay,
    document_rate, base_rate.
    """
    y, height, fig = np.arange(len(table))[::-1], 46 * max(1, len(table)), go.Figure()
    sampled = (("automaton, sampled", "stay", "low", "high", "circle", 0.12),
               ("control, sampled", "control", "control_low", "control_high", "diamond-open", -0.12))
    for name, column, low, high, symbol, shift in sampled:
        value = table[column]
        fig.add_scatter(x=value, y=y + shift, mode="markers", name=name, marker={"symbol": symbol, "size": 11},
                        error_x={"array": table[high] - value, "arrayminus": value - table[low], "thickness": 1.5})
    for name, column, symbol in (("automaton, in real text", "text_stay", "circle-open"),
                                 ("rate in the same documents", "document_rate", "line-ns-open"),
                                 ("rate in all text", "base_rate", "x-thin-open")):
        fig.add_scatter(x=table[column], y=y, mode="markers", name=name,
                        marker={"symbol": symbol, "size": 11, "line": {"width": 2}})
    if not len(table):
        fig.add_scatter(x=[0.5], y=[0], mode="text", text=["no automaton was verified"], showlegend=False)
    fig.update_xaxes(title="share of next tokens on which a state fires", range=[-0.02, 1.02], tickformat=".0%")
    names = [html.escape(name, quote=False) for name in table.automaton]
    fig.update_yaxes(tickvals=y, ticktext=names, range=[-0.6, max(1, len(y)) - 0.4], zeroline=False)
    return fig.update_layout(height=230 + height, legend={"orientation": "h", "y": -90 / (90 + height), "yanchor": "top"})


def marked_html(tokens: Sequence[bytes], fires: np.ndarray, n_prompt: int) -> str:
    """One line of text: grey is the prompt, and where state i fires the token is underlined in its colour, with i below it.

    `fires` is bool [n_tokens, n_states].
    """
    spans = []
    for position, (text, states) in enumerate(zip(pieces(tokens), fires, strict=True)):
        numbers = np.flatnonzero(states)
        style = [f"color: {GREY}"] * (position < n_prompt)
        style += [f"border-bottom: 3px solid {COLOURS[i]}" for i in numbers[:1]]
        mark = f"<sub>{','.join(str(i + 1) for i in numbers)}</sub>" if len(numbers) else ""
        spans.append(token_html(text, style="; ".join(style)) + mark)
    return line_html(spans, "font-family: monospace; white-space: pre-wrap; line-height: 2")
