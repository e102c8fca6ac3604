"""Tokens as HTML, for everything in the study that shows text: examples, continuations, the rater."""

import codecs
import html
from collections.abc import Iterable

SHADE = "255, 150, 40"  # of a token that the unit in question is active on
BOLD = 0.5


def pieces(tokens: Iterable[bytes]) -> list[str]:
    """The text that each token completes; "·" for a piece of a character that a later token completes."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(token) or "·" for token in tokens]


def token_html(text: str, strength: float = 0.0, style: str = "", title: str = "") -> str:
    """A token's text, escaped, in its own direction, line breaks and tabs visible.

    The darker, the greater `strength` (0 to 1: the activation as a share of the greatest one), and bold above a half. `style` is
    more CSS, `title` what the pointer shows.
    """
    css = "unicode-bidi: isolate" + (f"; background: rgba({SHADE}, {strength:.2f})" if strength > 0 else "")
    css += ("; font-weight: bold" if strength > BOLD else "") + (f"; {style}" if style else "")
    hint = f' title="{html.escape(title)}"' if title else ""
    return f'<span style="{css}"{hint}>{html.escape(text.replace(chr(10), "↵").replace(chr(9), "→"))}</span>'


def line_html(spans: Iterable[str], style: str = "white-space: pre") -> str:
    """Tokens one after another, from left to right whatever their script; `style` (CSS) should keep the spaces."""
    return f'<div dir="ltr" style="{style}">{"".join(spans)}</div>'
