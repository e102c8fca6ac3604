"""The rater: one blinded item at a time, its examples and the rubric's sliders; every answer is saved at once."""

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import ipywidgets
import numpy as np

from sae_lib import rubric
from sae_lib.errors import StudyError
from sae_lib.study.token_html import line_html, pieces, token_html
from sae_lib.token_classes import quoted


class Shown(NamedTuple):
    """What a rater sees of an item: windows of token ids, the unit's levels 0-9 there, and the tokens it makes more likely."""

    tokens: np.ndarray
    levels: np.ndarray
    top_logits: Sequence[int]


class Session:
    """One rater's way through the items, without any widget. What the rater has rated before is not asked again."""

    def __init__(self, items: Sequence[rubric.Item], path: Path, rater: str):
        self.path, self.rater = path, rater.strip()
        done = {entry.code for entry in rubric.read(path) if entry.rater == self.rater}
        self.n_items, self.open = len(items), [item for item in items if item.code not in done]

    @property
    def current(self) -> rubric.Item | None:
        """The item to rate; None at the end."""
        return self.open[0] if self.open else None

    @property
    def progress(self) -> str:
        return f"{self.n_items - len(self.open)} of {self.n_items} rated"

    def save(self, answers: dict[str, int]) -> None:
        """Write the answers for the current item and go on. Raises StudyError for impossible answers, and stays."""
        if self.current is not None:
            rubric.append(self.path, rubric.rating(self.rater, self.current.code, answers))
            self.open.pop(0)

    def skip(self) -> None:
        """Put the current item last."""
        self.open = self.open[1:] + self.open[:1]


def item_html(shown: Shown, vocabulary: Sequence[bytes]) -> str:
    """An item's examples, one a line, and the tokens its unit makes more likely."""
    lines = [line_html(token_html(text, level / 9, title=f"level {level}")
                       for text, level in zip(pieces(vocabulary[t] for t in tokens), levels.tolist(), strict=True))
             for tokens, levels in zip(shown.tokens, shown.levels, strict=True)]
    logits = " · ".join(token_html(quoted(vocabulary[token])) for token in shown.top_logits)
    return f'<div style="font-family: monospace; line-height: 1.6">{"".join(lines)}<p>Made more likely: {logits}</p></div>'


class Rater:
    """The rater as a widget: `Rater(items, show, vocabulary, path).box` as a cell's last line displays it.

    It begins when its rater has entered a name. `show(item)` gives what to show of an item; its kind and number are never
    displayed.
    """

    def __init__(self, items: Sequence[rubric.Item], show: Callable[[rubric.Item], Shown], vocabulary: Sequence[bytes],
                 path: Path, rater: str = ""):
        self._show, self._vocabulary = show, vocabulary
        self.name = ipywidgets.Text(rater, description="your name", continuous_update=False)
        self.name.observe(lambda change: self._start(items, path, change["new"]), "value")
        self.examples, self.message = ipywidgets.HTML(), ipywidgets.HTML()
        wide = ipywidgets.Layout(width="95%")
        self.sliders = {question.name: ipywidgets.IntSlider(0, 0, question.most, description=question.name, layout=wide)
                        for question in rubric.RUBRIC}
        save, skip = ipywidgets.Button(description="Save", button_style="primary"), ipywidgets.Button(description="Later")
        save.on_click(lambda _: self.save())
        skip.on_click(lambda _: self.skip())
        asked = [ipywidgets.VBox([ipywidgets.Label(question.text), self.sliders[question.name]]) for question in rubric.RUBRIC]
        self.box = ipywidgets.VBox([self.name, self.examples, *asked, ipywidgets.HBox([save, skip]), self.message])
        self._start(items, path, rater)

    def _start(self, items: Sequence[rubric.Item], path: Path, rater: str) -> None:
        self.session = Session(items, path, rater)
        self._refresh()

    def save(self) -> None:
        """Save the sliders' answers and show the next item; an impossible answer is explained instead."""
        try:
            self.session.save({name: slider.value for name, slider in self.sliders.items()})
        except StudyError as error:
            self.message.value = html.escape(str(error))
            return
        self._refresh()

    def skip(self) -> None:
        self.session.skip()
        self._refresh()

    def _refresh(self) -> None:
        item = self.session.current
        if not self.session.rater:
            self.examples.value = "<p>Enter your name to begin.</p>"
        else:
            self.examples.value = item_html(self._show(item), self._vocabulary) if item else "<p>All rated. Thank you.</p>"
        self.message.value = html.escape(self.session.progress)
        for slider in self.sliders.values():
            slider.value = 0
