"""Sentences of the task, and answers of a model that does it by construction."""

import numpy as np
import pytest
import torch
from texts import scrambled
from tokenizers import Tokenizer, models, pre_tokenizers

from sae_lib import ioi, residual
from sae_lib.errors import StudyError
from sae_lib.transformer import TransformerConfig

PIECE = 3  # the token that the corpus consists of: a full stop


@pytest.fixture(scope="module")
def tokenizer():
    """Of characters, as the study's falls back to."""
    letters = {letter: i for i, letter in enumerate("\0 ,.abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")}
    base = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="\0"))
    base.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return ioi.with_names(base)


def test_names_are_single_tokens_after_all_others(tokenizer):
    first = tokenizer.token_to_id(f" {ioi.NAMES[0]}")
    assert [tokenizer.token_to_id(f" {name}") for name in ioi.NAMES] == list(range(first, first + len(ioi.NAMES)))
    assert first == tokenizer.get_vocab_size() - len(ioi.NAMES)
    assert tokenizer.encode(" then Alice and Bob").ids.count(tokenizer.token_to_id(" Alice")) == 1
    assert len(set(ioi.NAMES)) == len(ioi.NAMES) and list(ioi.NAMES) == sorted(ioi.NAMES)


def test_names_and_ways_to_say_it_are_held_out():
    known, held_out = ioi.split_names()
    assert not set(known) & set(held_out) and set(known) | set(held_out) == set(ioi.NAMES)
    assert len(held_out) == len(ioi.NAMES) // 5
    for part in (0, 1):
        sets = [set(frames[part]) for frames in ioi.SENTENCES.values()]
        assert sum(map(len, sets)) == len(set().union(*sets))


@pytest.mark.parametrize("sentences", list(ioi.SENTENCES))
def test_prompts_ask_for_the_name_that_is_not_repeated(tokenizer, sentences):
    known, _ = ioi.split_names()
    asked = ioi.prompts(tokenizer, known, sentences, 40, seed=3)
    assert asked.abba.sum() == 20
    for row, last, indirect, subject, abba in zip(*asked, strict=True):
        names = [t for t in row.tolist() if t >= tokenizer.token_to_id(f" {ioi.NAMES[0]}")]
        a, b = (indirect, subject) if abba else (subject, indirect)
        assert names == [a, b, subject]
        text = tokenizer.decode(row[1:last + 1].tolist(), skip_special_tokens=False)
        assert row[0] == 0 and (row[last + 1:] == 0).all() and text.replace(" ", "").endswith("to")
    again = ioi.prompts(tokenizer, known, sentences, 40, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(asked, again, strict=True))
    assert not torch.equal(asked.indirect, ioi.prompts(tokenizer, known, sentences, 40, seed=4).indirect)


def test_the_indirect_object_alone_is_exchanged(tokenizer):
    asked = ioi.prompts(tokenizer, ioi.NAMES, "train", 6, seed=0)
    other = torch.full_like(asked.indirect, tokenizer.token_to_id(" Vanessa"))
    changed = asked.exchanged(other)
    assert ((changed.tokens != asked.tokens).sum(1) == (asked.indirect != other)).all()
    assert torch.equal(changed.indirect, other) and torch.equal(changed.subject, asked.subject)


def test_training_text_never_asks_for_held_out_names(tokenizer):
    made = lambda seed: ioi.training_contexts(tokenizer, torch.full((5, 300), PIECE), 200, 128, seed)
    found = made(0)
    assert found.shape == (200, 128) and found.dtype == torch.int32 and (found[:, 0] == 0).all()
    assert torch.equal(found, made(0)) and not torch.equal(found, made(1))
    pieces = (found[:, 1:] == PIECE).all(1)
    assert 8 <= pieces.sum() <= 35  # of 200, one in ten
    known, held_out = ({tokenizer.token_to_id(f" {name}") for name in names} for names in ioi.split_names())
    names = [[token for token in row if token in known | held_out] for row in found.tolist()]
    asked = [row for row in names if len(row) == 4]  # two people, the subject again, the indirect object
    assert len(asked) > 60 and not any(set(row) & held_out for row in asked)
    for first, second, subject, indirect in asked:
        assert {subject, indirect} == {first, second}
    others = [set(row) for row in names if len(row) < 4]
    assert all(row <= known or row <= held_out for row in others) and any(len(row & held_out) == 2 for row in others)


def test_sentences_that_do_not_fit_are_refused(tokenizer):
    with pytest.raises(StudyError, match="longer than a context of 16"):
        ioi.training_contexts(tokenizer, torch.full((5, 300), PIECE), 10, 16, 0)
    with pytest.raises(StudyError, match="fits in a context of 16"):
        ioi.prompts(tokenizer, ioi.NAMES, "train", 2, 0, n_ctx=16)


def test_sentences_that_do_not_exist(tokenizer):
    with pytest.raises(StudyError, match="one of train, dev, held out"):
        ioi.prompts(tokenizer, ioi.NAMES, "tests", 2, 0)
    with pytest.raises(StudyError, match="three names or more"):
        ioi.prompts(tokenizer, ioi.NAMES[:2], "train", 2, 0)


def test_answers_by_hand(monkeypatch):
    """Logits 0, 1, ..., 29 at the last token of the first prompt, and in reverse at that of the second."""
    asked = ioi.Prompts(torch.zeros(2, 3, dtype=torch.long), torch.tensor([2, 1]), torch.tensor([29, 3]), torch.tensor([2, 1]),
                        torch.tensor([True, False]))
    resid = torch.full((2, 3, 30), torch.nan)
    resid[0, 2], resid[1, 1] = torch.arange(30.0), torch.arange(29.0, -1, -1)
    monkeypatch.setattr(residual, "activations", lambda model, tokens, after: resid)
    monkeypatch.setattr(residual, "unembed", lambda model, resid: resid)
    found = ioi.answers(scrambled(TransformerConfig(n_tokens=1, d_vocab=30, n_ctx=8, d_model=8, n_heads=2, d_mlp=12)), asked)
    assert found.right.tolist() == [True, False] and found.first.tolist() == [True, False]
    np.testing.assert_allclose(found.margin, [27, -2])
