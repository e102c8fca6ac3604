"""Apostrophes, quotation marks and parentheses by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_lib.punctuation import apostrophes, closing, depth, followed_by, has_sign

VOCABULARY = [b"", b"it", b"'", b"s", b" f", b"don", b"t", b"(", b")", b"),", b"()", b")(", b"())", "\u2019".encode(), b" x"]
WORD = {token: i for i, token in enumerate(VOCABULARY)}


def row(*tokens):
    return torch.tensor([[WORD[token] for token in tokens]])


@pytest.mark.parametrize(("tokens", "expected"), [
    ((b"it", b"'", b"s"), [0, 1, 0]),
    ((b"don", "\u2019".encode(), b"t"), [0, 1, 0]),
    ((b" f", b"'", b"s"), [0, 0, 0]),  # a string of Python
    ((b"it", b"'", b" x"), [0, 0, 0]),  # a quotation's end
    ((b" x", b" f", b"it", b"'", b"t"), [0, 0, 0, 1, 0]),
    ((b"it", b"", b"'", b"s"), [0, 0, 0, 0]),  # of another document
])
def test_apostrophes_are_within_words(tokens, expected):
    assert apostrophes(row(*tokens), VOCABULARY)[0].tolist() == [bool(value) for value in expected]


def test_signs_and_what_follows():
    assert [VOCABULARY[i] for i in np.flatnonzero(has_sign(VOCABULARY))] == [b"'", "\u2019".encode()]
    found = followed_by(torch.cat([row(b"'", b"s", b"'", b"t"), row(b"s", b"'", b"'", b"'")]), VOCABULARY, ["s", "t"])
    assert found.tolist() == [[True, False, True, False], [False, False, False, False]]


def test_what_closes():
    assert [VOCABULARY[i] for i in np.flatnonzero(closing(VOCABULARY))] == [b")", b"),", b")(", b"())"]


def test_depth_by_hand():
    assert depth(row(b"it", b"(", b"it", b"(", b"s", b")", b"),", b"it"), VOCABULARY).tolist() == [[0, 1, 1, 2, 2, 1, 0, 0]]
    assert depth(row(b")", b"it", b"()", b")(", b"())", b"it"), VOCABULARY).tolist() == [[0, 0, 0, 1, 0, 0]]
    assert depth(row(b"(", b"it", b"", b"it", b")", b"("), VOCABULARY).tolist() == [[1, 1, 0, 0, 0, 1]]


@given(st.lists(st.lists(st.integers(0, len(VOCABULARY) - 1), min_size=8, max_size=8), min_size=1, max_size=4))
def test_depth_is_that_of_the_characters(rows):
    contexts, expected = torch.tensor(rows), []
    for tokens in rows:
        level, levels = 0, []
        for token in tokens:
            level = level if token else 0
            for character in VOCABULARY[token].decode():
                level = max(0, level + {"(": 1, ")": -1}.get(character, 0))
            levels.append(level)
        expected.append(levels)
    assert depth(contexts, VOCABULARY).tolist() == expected
