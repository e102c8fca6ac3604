"""A pattern explainer: what a unit fires on, as a few readable clauses over tokens and what stands before them.

It stands in for the language model of B14 where there is no network, and is named for what it is. It knows nothing of meaning;
it has words for scripts, case, digits, punctuation and the like (token_classes.py) and for single tokens. From the examples
alone it picks, greedily, the clauses that explain most of the activations' variance, each paying for its length, so that
"Arabic letters" is preferred to a list of the Arabic tokens that happened to be shown. The explanation is what it predicts
with: the text says all that the simulator uses.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from sae_lib.interpret import Examples
from sae_lib.token_classes import Classes, quoted

MAX_CLAUSES = 4
MAX_LITERALS = 3
# Share of the variance that a clause must explain for each class it names, and for each token.
CLASS_PRICE, TOKEN_PRICE = 0.02, 0.03
# Rows that say "no change", added to both sides of every split, so that one example is not a rule.
PRIOR_ROWS = 1.5
LONGEST_LIST = 6
LOGIT_CLASSES = 2
# A class of logits is named if its share among the shown ones is so far above its share of the vocabulary.
LOGIT_MARGIN, LOGIT_PRICE = 0.3, 0.05

PLACES = {
    "here": "{}",
    "before": "right after {}",
    "before2": "two after {}",
    "left": "after a stretch of {}",
    "amid": "among {}",
    "earlier": "with {} some tokens before",
}


class Literal(NamedTuple):
    """One condition: a token of some set stands in some place."""

    place: str
    words: str
    member: Bool[np.ndarray, " d_vocab"]
    price: float

    def holds(self, windows: Int[np.ndarray, "n width"]) -> Bool[np.ndarray, "n width"]:
        return _in_place(self.place, self.member[windows])

    def __str__(self) -> str:
        return PLACES[self.place].format(self.words)


class Clause(NamedTuple):
    literals: tuple[Literal, ...]
    strength: float

    def holds(self, windows: Int[np.ndarray, "n width"]) -> Bool[np.ndarray, "n width"]:
        return np.logical_and.reduce([literal.holds(windows) for literal in self.literals])

    def __str__(self) -> str:
        here = [literal.words for literal in self.literals if literal.place == "here"]
        around = [str(literal) for literal in self.literals if literal.place != "here"]
        return " ".join([" that are also ".join(here) or "any token", " and ".join(around)]).strip()


def _in_place(place: str, member: Bool[np.ndarray, "*sets n width"]) -> Bool[np.ndarray, "*sets n width"]:
    """From "this token is one of them" to "one of them stands in `place`", which a window's edge can leave unknown: false."""
    if place == "here":
        return member
    if place in ("before", "before2"):
        steps = 1 if place == "before" else 2
        shifted = np.zeros_like(member)
        shifted[..., steps:] = member[..., :-steps]
        return shifted
    seen = np.cumsum(member, axis=-1, dtype=np.int8)
    before = seen - member
    if place == "left":  # at least half of what the window shows before, and that is two tokens or more
        n_before = np.arange(member.shape[-1])
        return (2 * before >= n_before) & (n_before >= 2)
    if place == "amid":  # at least half of the window's other tokens
        return 2 * (seen[..., -1:] - member) >= member.shape[-1] - 1
    return before > 0


class PatternExplanation(NamedTuple):
    """Clauses whose strengths add up to the square root of the level, and what the unit makes more likely."""

    text: str
    base: float
    clauses: tuple[Clause, ...]
    raises: Bool[np.ndarray, " d_vocab"]

    def simulate(self, windows: Int[np.ndarray, "n width"]) -> Float[np.ndarray, "n width"]:
        """The expected level, 0-9, of every token."""
        total = self.base + sum((clause.strength * clause.holds(windows) for clause in self.clauses), np.zeros(windows.shape))
        return np.clip(total, 0, 3) ** 2

    def logits(self, tokens: Int[np.ndarray, " k"]) -> Bool[np.ndarray, " k"]:
        """Whether the text counts each token among those that the unit makes more likely."""
        return self.raises[tokens]


class PatternExplainer:
    """Explains units by patterns of tokens and contexts, without any network or language model."""

    def __init__(self, vocabulary: Sequence[bytes]):
        self.classes = Classes(vocabulary)
        names, member = self.classes.names, self.classes.member
        self._pairs = [(i, j) for i in range(len(names)) for j in range(i, len(names))]
        self._sets = np.array([member[i] & member[j] for i, j in self._pairs])
        self._share = self._sets.mean(1)
        self._class_literals = [Literal(place, name, tokens, CLASS_PRICE) for place in PLACES
                                for name, tokens in zip(names, member, strict=True)]

    def explain(self, examples: Examples, top_logits: Int[np.ndarray, " top"],
                bottom_logits: Int[np.ndarray, " bottom"]) -> PatternExplanation:
        """The clauses that fit the examples best; `bottom_logits` are tokens that no class of raised ones may describe."""
        # The square root lies between how strongly a unit fires and whether it does; rank correlation asks for both.
        target = np.sqrt(examples.levels.ravel().astype(np.float64))
        base, clauses = _fit(self._literals(examples), examples.tokens, target)
        raises, raised_words = self._logits(top_logits, bottom_logits)
        return PatternExplanation(f"{_sentence(base, clauses)} {raised_words}".strip(), base, clauses, raises)

    def _literals(self, examples: Examples) -> list[Literal]:
        """Every condition worth trying: classes in all places, and tokens seen at least twice where the unit fires."""
        classes, tokens = self.classes, examples.tokens
        literals, fires = list(self._class_literals), examples.levels > 0
        for place in ("here", "before", "before2", "earlier"):
            shift = {"here": 0, "before": 1, "before2": 2, "earlier": 3}[place]
            found, count = np.unique(tokens[:, :tokens.shape[1] - shift][fires[:, shift:]], return_counts=True)
            frequent = found[count >= 2]
            literals += [self._tokens(place, frequent[[i]]) for i in range(len(frequent))]
            forms = np.unique(classes.form[frequent])
            literals += [self._form(place, form) for form in forms[classes.form_size[forms] > 1].tolist()]
        return literals + self._lists(examples)

    def _tokens(self, place: str, tokens: Int[np.ndarray, " n"]) -> Literal:
        member = np.zeros(len(self.classes.vocabulary), dtype=bool)
        member[tokens] = True
        words = " or ".join(self.classes.show(token) for token in tokens.tolist())
        return Literal(place, words, member, TOKEN_PRICE * len(tokens))

    def _form(self, place: str, form: int) -> Literal:
        member = self.classes.form == form
        spelling = self.classes.spelling[form]
        return Literal(place, f"{quoted(spelling.strip().lower() or spelling)} in any spelling", member, TOKEN_PRICE)

    def _lists(self, examples: Examples) -> list[Literal]:
        """Lists of the two, three, ... tokens on which the unit fires most."""
        tokens, index = np.unique(examples.tokens, return_inverse=True)
        levels, index = examples.levels.ravel() - examples.levels.mean(), index.ravel()
        evidence = np.bincount(index, weights=levels) / np.sqrt(np.bincount(index) + PRIOR_ROWS)
        best = tokens[np.argsort(-evidence, kind="stable")]
        return [self._tokens("here", best[:n]) for n in range(2, min(LONGEST_LIST, int((evidence > 0).sum())) + 1)]

    def _logits(self, top: Int[np.ndarray, " top"],
                bottom: Int[np.ndarray, " bottom"]) -> tuple[Bool[np.ndarray, " d_vocab"], str]:
        """The set of raised tokens that the shown ones suggest: their spellings, and up to two classes they share."""
        raises, words = np.zeros(len(self.classes.vocabulary), dtype=bool), []
        if not len(top):
            return raises, ""
        price = LOGIT_PRICE * np.array([1 + (i != j) for i, j in self._pairs])
        new, share = self._sets, self._share
        for _ in range(LOGIT_CLASSES):
            gain = new[:, top].mean(1) - np.maximum(share, new[:, bottom].sum(1) / max(len(bottom), 1)) - price
            best = int(gain.argmax())
            if gain[best] < LOGIT_MARGIN:
                break
            raises |= self._sets[best]
            words.append(" that are also ".join(dict.fromkeys(self.classes.names[i] for i in self._pairs[best])))
            new = self._sets & ~raises
            share = new.mean(1)
        raises |= np.isin(self.classes.form, self.classes.form[top])
        shown = ", ".join(self.classes.show(token) for token in top.tolist())
        return raises, f"Makes more likely: {' or '.join([*words, f'tokens spelled like those shown ({shown})'])}."


def _sentence(base: float, clauses: Sequence[Clause]) -> str:
    level = lambda root: f"{np.clip(root, 0, 3) ** 2:.1f}"
    if not clauses:
        return f"No pattern found: level {level(base)} everywhere."
    more, less = ([c for c in clauses if (c.strength > 0) == up] for up in (True, False))
    parts = [f"on {clause} (alone {level(base + clause.strength)})" for clause in more]
    parts += [f"less on {clause} ({clause.strength:+.1f} in roots)" for clause in less]
    return f"Fires {'; '.join(parts)}; otherwise {level(base)}."


# --- fitting ---------------------------------------------------------------------------------------------------------

def _holds(literals: list[Literal], windows: Int[np.ndarray, "n width"]) -> Bool[np.ndarray, "literals rows"]:
    """Where each literal holds; those of the same place at once, for there are hundreds."""
    holds = np.empty((len(literals), windows.size), dtype=bool)
    for place in PLACES:
        which = [i for i, literal in enumerate(literals) if literal.place == place]
        if which:
            members = np.array([literals[i].member[windows] for i in which])
            holds[which] = _in_place(place, members).reshape(len(which), -1)
    return holds


def _fit(literals: list[Literal], windows: Int[np.ndarray, "n width"],
         target: Float[np.ndarray, " rows"]) -> tuple[float, tuple[Clause, ...]]:
    """Base and clauses of a sparse additive model: greedily the best conjunction, then all strengths again by ridge."""
    holds = _holds(literals, windows)
    first = {row.tobytes(): i for i, row in reversed(list(enumerate(holds)))}
    keep = np.array(sorted(first.values()))
    count = holds[keep].sum(1)
    keep = keep[(count > 0) & (count < holds.shape[1])]
    pairs = _Pairs(holds[keep], np.array([literals[i].price for i in keep]))
    chosen: list[tuple[int, ...]] = []
    strengths, residual, spread = np.array([target.mean()]), target - target.mean(), target.var() * len(target)
    while spread > 0 and len(keep) and len(chosen) < MAX_CLAUSES:
        clause = pairs.best_clause(residual, spread)
        if clause is None:
            break
        chosen.append(tuple(keep[list(clause)]))
        columns = np.array([np.ones(len(target)), *(holds[list(c)].all(0) for c in chosen)], dtype=np.float64)
        ridge = np.diag([0.0] + [PRIOR_ROWS] * len(chosen))
        strengths = np.linalg.solve(columns @ columns.T + ridge, columns @ target)
        residual = target - strengths @ columns
    found = [Clause(tuple(literals[i] for i in c), float(s)) for c, s in zip(chosen, strengths[1:], strict=True)]
    return float(strengths[0]), tuple(sorted(found, key=lambda clause: -clause.strength))


class _Pairs:
    """The conjunctions of two literals: how many rows each holds on and what it costs, which no residual changes."""

    def __init__(self, holds: Bool[np.ndarray, "literals rows"], price: Float[np.ndarray, " literals"]):
        self.matrix, self.price = holds.astype(np.float32), price
        self.count = self.matrix @ self.matrix.T
        # A pair of a literal with itself is the literal alone.
        self.cost = price[:, None] + price - np.diag(price)

    def best_clause(self, residual: Float[np.ndarray, " rows"], spread: float) -> tuple[int, ...] | None:
        """The conjunction that explains most of the residual beyond its price; None if none is worth its price."""
        matrix = self.matrix
        centred = (residual - residual.mean()).astype(np.float32)

        def worth(count: np.ndarray, total: np.ndarray, cost: np.ndarray) -> np.ndarray:
            squared = total**2
            explained = squared / (count + PRIOR_ROWS) + squared / (len(residual) - count + PRIOR_ROWS)
            return np.where(count >= 2, explained / spread - cost, -np.inf)

        pairs = worth(self.count, (matrix * centred) @ matrix.T, self.cost)
        i, j = np.unravel_index(int(pairs.argmax()), pairs.shape)
        clause, best = tuple(sorted({int(i), int(j)})), pairs[i, j]
        if len(clause) == MAX_LITERALS - 1:
            both = matrix[i] * matrix[j]
            triples = worth(matrix @ both, matrix @ (both * centred), self.price + self.price[list(clause)].sum())
            third = int(triples.argmax())
            if triples[third] > best and third not in clause:
                clause, best = (*clause, third), triples[third]
        return clause if best > 0 else None
