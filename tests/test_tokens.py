import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lib import tokens as tokens_module
from sae_lib.documents import Document
from sae_lib.errors import StudyError
from sae_lib.tokens import SPLITS, TokenConfig, TokenData, assign_splits, tokenise, train_tokenizer

CONFIG = TokenConfig(vocab_size=300, n_ctx=16, validation_fraction=0.1, test_fraction=0.1)
WORDS = {"fruit": "apple banana cherry damson elder fig grape", "metal": "iron copper silver gold tin zinc lead"}


def corpus(documents_of_a_domain=40, seed=0):
    rng = np.random.default_rng(seed)
    return [Document(domain, " ".join(rng.choice(words.split(), rng.integers(20, 60))), f"{domain}/{i}")
            for i in range(documents_of_a_domain) for domain, words in WORDS.items()]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(corpus(), CONFIG)


@pytest.fixture
def data(tokenizer, tmp_path):
    tokenise(corpus(), tokenizer, CONFIG, tmp_path)
    return TokenData.open(tmp_path)


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_survives_a_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokens_are_whole_characters_or_single_bytes(tokenizer):
    """Rare characters are bytes; none of these is joined to the letter beside it."""
    tokens = [tokenizer.id_to_token(i) for i in tokenizer.encode("gold \u05d0gold").ids]
    at = tokens.index("<0xD7>")
    assert tokens[at + 1] == "<0x90>" and "".join(tokens[:at] + tokens[at + 2:]) == "gold gold"


def test_end_of_text_is_token_zero_and_cannot_be_written(tokenizer):
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    assert 0 not in tokenizer.encode("a<|endoftext|>b").ids


def test_documents_can_begin_with_another_token(tokenizer, data, tmp_path):
    tokenise(corpus(), tokenizer, CONFIG, tmp_path / "other", begin=7)
    other = TokenData.open(tmp_path / "other")
    assert np.array_equal(np.where(data.tokens("train") == 0, 7, data.tokens("train")), other.tokens("train"))


def test_every_digit_is_a_token():
    dated = [Document("dated", document.text.replace(" ", " 1234 2024 "), document.source) for document in corpus()]
    tokenizer = train_tokenizer(dated, CONFIG)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("gold 1234").ids][-4:] == ["1", "2", "3", "4"]


def test_a_blank_is_joined_to_latin_words_and_not_to_others():
    """A blank is of no script, and a token that begins with one would not be either."""
    both = [Document("both", 20 * "\u05d6\u05d4\u05d1 gold " + document.text, document.source) for document in corpus()]
    tokenizer = train_tokenizer(both, TokenConfig(vocab_size=335))
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(" \u05d6\u05d4\u05d1 gold \u05d6\u05d4\u05d1").ids]
    assert pieces == [" ", "\u05d6\u05d4\u05d1", " gold", " ", "\u05d6\u05d4\u05d1"]


def test_the_tokenizer_is_the_same_every_time(tokenizer):
    assert train_tokenizer(iter(corpus()), CONFIG).to_str() == tokenizer.to_str()


def test_the_sample_holds_every_domain_and_stays_in_its_limit(monkeypatch):
    monkeypatch.setattr(tokens_module, "SAMPLE_CHARS", 3000)
    sample = tokens_module._sample([*corpus(), Document("rare", "one of a kind", "r")])
    assert 1500 < sum(map(len, sample)) <= 3000
    assert "one of a kind" in sample
    assert any("apple" in text for text in sample) and any("copper" in text for text in sample)


def test_too_little_text_for_the_vocabulary():
    with pytest.raises(StudyError, match="260 tokens only, 4096 are wanted"):
        train_tokenizer([Document("a", "ab", "a")], TokenConfig())


def test_contexts_hold_the_documents_with_their_labels(data):
    """Every document, decoded from the stream of its split, is one of the corpus, and its tokens bear its domain."""
    known = {document.text: document.domain for document in corpus()}
    for split in SPLITS:
        tokens, document, domain = data.tokens(split), data.doc_of_token(split), data.domain_of_token(split)
        assert len(tokens) == len(document) == len(domain) and len(tokens) % 16 == 0
        assert data.contexts(split).shape == (len(tokens) // 16, 16)
        assert (data.contexts(split).ravel() == tokens).all()
        for number in np.unique(document)[:-1]:  # the last one may be cut
            own = tokens[document == number]
            assert own[0] == 0 and (own[1:] != 0).all()
            labels = {data.domains[label] for label in domain[document == number]}
            assert labels == {known[data.tokenizer.decode(own[1:].tolist())]}


def test_splits_are_exhaustive_and_share_no_document(data):
    texts = [document for split in SPLITS for document in
             data.tokenizer.decode(data.tokens(split).tolist(), skip_special_tokens=False).split("<|endoftext|>")[1:-1]]
    assert len(texts) == len(set(texts)) == len(corpus()) - len(SPLITS)


def test_the_table_counts_what_is_there(data):
    table = data.table()
    assert table.domain.tolist() == ["fruit", "metal"] and table.documents.tolist() == [40, 40]
    assert (table[list(SPLITS)].sum() == [len(data.tokens(split)) for split in SPLITS]).all()
    assert (table.tokens == table[list(SPLITS)].sum(axis=1)).all()
    assert table.share.sum() == pytest.approx(1)
    assert (table.validation / table.tokens).between(0.05, 0.16).all() and (table.test / table.tokens).between(0.05, 0.16).all()


def test_same_documents_same_hash_and_another_seed_another(data, tokenizer, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        tokenise(iter(corpus()), tokenizer, TokenConfig(300, 16, 0.1, 0.1, seed=seed), tmp_path / name)
    assert TokenData.open(tmp_path / "same").sha256 == data.sha256 != TokenData.open(tmp_path / "other").sha256


def test_budgets_are_kept_and_no_document_takes_all_of_one(tokenizer, tmp_path):
    long = [Document("metal", "zinc " * 5000, "long")]
    tokenise(long + corpus(), tokenizer, CONFIG, tmp_path, {"metal": 800})
    table = TokenData.open(tmp_path).table().set_index("domain")
    assert 700 < table.tokens["metal"] <= 800 < table.tokens["fruit"]
    assert table.documents["metal"] >= 8


def test_pieces_of_a_source_share_its_split():
    sources = [f"s{i // 5}" for i in range(200)]
    split = assign_splits(["a"] * 200, sources, np.full(200, 10), CONFIG)
    assert {len(set(split[i:i + 5])) for i in range(0, 200, 5)} == {1}
    assert np.bincount(split).tolist() == [160, 20, 20]


def test_few_sources_are_split_in_contiguous_blocks():
    split = assign_splits(["a"] * 40, ["book"] * 40, np.full(40, 10), CONFIG)
    assert split.tolist() == [0] * 32 + [1] * 4 + [2] * 4


@pytest.mark.parametrize("lengths", [[10, 10, 10], [10, 500, 10], [5000] + [3] * 9])
def test_a_domain_of_three_documents_is_in_every_split(lengths):
    split = assign_splits(["a"] * len(lengths), [f"s{i}" for i in range(len(lengths))], np.array(lengths), CONFIG)
    assert set(split) == {0, 1, 2}
    assert split[np.argmax(lengths)] == 0 or len(set(lengths)) == 1


def test_too_little_text(tokenizer, tmp_path):
    with pytest.raises(StudyError, match="no text"):
        tokenise([], tokenizer, CONFIG, tmp_path)
    with pytest.raises(StudyError, match="validation split"):
        tokenise([Document("a", "zinc " * 100, "a")], tokenizer, CONFIG, tmp_path)


def test_no_tokens_where_none_were_written(tmp_path):
    with pytest.raises(StudyError, match="there are no tokens"):
        TokenData.open(tmp_path)


def test_meta_says_how_it_was_made(data):
    meta = json.loads((data.path / "meta.json").read_text())
    assert meta["vocab_size"] == 300 and meta["n_ctx"] == 16 and len(meta["sha256"]) == 64
