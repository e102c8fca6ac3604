"""What is true of a text's punctuation, told from its characters alone: the ground truths of the case studies (C5).

A dictionary's feature is called an apostrophe feature or a closing-parenthesis feature; whether it is one is a question with an
answer only if somebody says, of each token, whether it is an apostrophe and whether a parenthesis is open.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from sae_lib.activations import ActivationStream
from sae_lib.effects import in_characters, inside
from sae_lib.proxies import Vocabulary

SIGNS = ("'", "\u2019")
APOSTROPHE = r"(?<=[A-Za-z])(?<!\b[bfruBFRU])(?<!\b[bfruBFRU]{2})['\u2019](?=[A-Za-z])"
"""A sign between two letters. What stands before a string in Python code, as in f'x' or rb'x', is no word."""
CLITICS = ("s", "t", "re", "ll", "ve", "d", "m")
"""What follows an apostrophe in English: it's, don't, we're, we'll, we've, I'd, I'm."""


def apostrophes(contexts: Int[Tensor, "n_contexts n_ctx"], vocabulary: Vocabulary) -> Bool[np.ndarray, "n_contexts n_ctx"]:
    """Whether each token is an apostrophe within a word (at least half of its bytes are)."""
    return in_characters(contexts, vocabulary, inside(APOSTROPHE))


def has_sign(vocabulary: Vocabulary) -> Bool[np.ndarray, " d_vocab"]:
    """Whether each token of the vocabulary holds the sign that is an apostrophe here and a quotation mark there."""
    return np.array([any(sign.encode() in token for sign in SIGNS) for token in vocabulary])


def followed_by(contexts: Int[Tensor, "n_contexts n_ctx"], vocabulary: Vocabulary,
                texts: Sequence[str]) -> Bool[np.ndarray, "n_contexts n_ctx"]:
    """Whether the next token of the context is one of these texts, whole; nothing follows the last token of a context."""
    wanted = np.array([token in {text.encode() for text in texts} for token in vocabulary])
    found = np.zeros(contexts.shape, dtype=bool)
    found[:, :-1] = wanted[contexts.numpy()][:, 1:]
    return found


def depth(contexts: Int[Tensor, "n_contexts n_ctx"], vocabulary: Vocabulary) -> Int[np.ndarray, "n_contexts n_ctx"]:
    """How many parentheses are open after each token: opened in the same context and document, and not yet closed.

    A closing one that closes nothing counts as nothing. At an end-of-text token none is open.
    """
    steps = [[1 if byte == b"("[0] else -1 for byte in token if byte in b"()"] for token in vocabulary]
    busy = np.array([bool(step) for step in steps])
    found = np.zeros(contexts.shape, dtype=np.int32)
    for tokens, row in zip(contexts.numpy(), found, strict=True):
        level, since = 0, 0
        for place in np.flatnonzero(busy[tokens] | (tokens == ActivationStream.END_OF_TEXT)).tolist():
            row[since:place], since = level, place
            if tokens[place] == ActivationStream.END_OF_TEXT:
                level = 0
            for step in steps[tokens[place]]:
                level = max(0, level + step)
        row[since:] = level
    return found


def closing(vocabulary: Vocabulary) -> Bool[np.ndarray, " d_vocab"]:
    """Whether each token of the vocabulary closes a parenthesis that it does not open: ")", ")," and "())", but not "()"."""
    def closes(token: bytes) -> bool:
        level = 0
        for byte in token:
            level += (byte == b"("[0]) - (byte == b")"[0])
            if level < 0:
                return True
        return False

    return np.array([closes(token) for token in vocabulary])
