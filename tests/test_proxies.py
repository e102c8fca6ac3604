import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sae_lib.corpus import SPECIAL_CONTEXTS
from sae_lib.documents import Document
from sae_lib.errors import StudyError
from sae_lib.proxies import ALPHABETS, PROXIES, SCRIPTS, correlation_target, proxy, token_bytes, token_log_ratio
from sae_lib.tokens import TokenConfig, train_tokenizer

FLOOR = math.log(1e-10)


def scores(name, context, vocabulary, sample, **options):
    return proxy(name, torch.tensor([context]), vocabulary, torch.tensor(sample), **options)[0]


# --- tokens as bytes -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizer():
    text = "the cat sat on the mat שלום עולם and 3 cats ran over many other hats with their rats into that barn "
    documents = [Document("d", text * 5, "s")] * 4
    return train_tokenizer(documents, TokenConfig(vocab_size=310))


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_the_bytes_of_tokens_are_the_bytes_of_the_text(tokenizer, text):
    vocabulary = token_bytes(tokenizer)
    assert b"".join(vocabulary[i] for i in tokenizer.encode(text).ids) == text.encode()


def test_the_vocabulary_has_every_byte_and_nothing_for_end_of_text(tokenizer):
    vocabulary = token_bytes(tokenizer)
    assert len(vocabulary) == 310 and vocabulary[0] == b""
    assert {bytes([b]) for b in range(256)} <= set(vocabulary)
    assert b" cat" in vocabulary and any(token.endswith("ל".encode()) for token in vocabulary)


@pytest.fixture(scope="module")
def of_bytes():
    """As GPT-2's and Pythia's: bytes written as characters, a special token, and one added for a run of blanks."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator(["the cat sat on the mat שלום עולם"] * 5, trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    made.add_tokens(["    "])
    made.encode_special_tokens = True
    return made


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_the_bytes_of_a_tokenizer_of_bytes(of_bytes, text):
    vocabulary = token_bytes(of_bytes)
    assert vocabulary[0] == b"" and vocabulary[-1] == b"    "
    assert b"".join(vocabulary[i] for i in of_bytes.encode(text).ids) == text.encode()


def test_the_sign_for_a_blank_is_one():
    pieces = {"<unk>": 0} | {f"<0x{i:02X}>": i + 1 for i in range(256)} | {"\u2581cat": 257}
    made = Tokenizer(models.BPE(vocab=pieces, merges=[], byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["<unk>"])
    assert token_bytes(made)[257] == b" cat" and token_bytes(made)[66] == b"A" and token_bytes(made)[0] == b""


def test_a_tokenizer_of_words_is_refused():
    with pytest.raises(StudyError, match="no tokens for single bytes"):
        token_bytes(Tokenizer(models.WordLevel({"two words": 0}, unk_token="two words")))


# --- alphabets, by hand ----------------------------------------------------------------------------------------------

# 96 times the last of four tokens: with one added to each count, probabilities 0.01, 0.01, 0.01, 0.97.
SAMPLE = [[3] * 96]


def test_base64_runs_begin_where_they_gain_and_end_at_foreign_characters():
    vocabulary = [b"", b"a", b"b7", b"!"]
    a, b7, foreign = math.log(1 / 64 / 0.01), math.log(1 / 64**2 / 0.01), math.log(1e-10 / 0.97)
    assert a > 0 > 2 * a + b7
    expected = [a, 2 * a, 2 * a + b7, a, a + foreign, a, FLOOR, a, 2 * a]
    np.testing.assert_allclose(scores("base64", [1, 1, 2, 1, 3, 1, 0, 1, 1], vocabulary, SAMPLE), expected, rtol=1e-5)


def test_dna_counts_from_two_tokens_on():
    vocabulary = [b"", b"AC", b"G", b"x"]
    ac, g, x = math.log(1 / 16 / 0.01), math.log(1 / 4 / 0.01), math.log(1e-10 / 0.97)
    expected = [FLOOR, g + ac, g + ac + x, g + ac + x + g, FLOOR, FLOOR, 2 * g]
    found = scores("dna", [2, 1, 3, 2, 0, 2, 2], vocabulary, SAMPLE)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert correlation_target("dna", found).tolist() == [0, 1, 0, 0, 0, 0, 1]
    np.testing.assert_allclose(correlation_target("base64", found), np.maximum(expected, 0), rtol=1e-5)


def test_characters_outside_the_alphabet_cost_1e_10_each_and_so_do_pieces_of_characters():
    vocabulary = [b"", b"0f g", "0é".encode(), b"\xd7"]
    expected = [math.log(1e-20 / 16**2 / 0.01), math.log(1e-10 / 16 / 0.01), math.log(1e-10 / 0.97)]
    for i, value in enumerate(expected, start=1):
        assert scores("hex", [i], vocabulary, SAMPLE)[0] == pytest.approx(value, rel=1e-5)


# --- scripts, by hand ------------------------------------------------------------------------------------------------

def test_space_and_punctuation_are_not_arabic():
    vocabulary = [b"", *(text.encode() for text in ("ال", " ال", "،", ",", "1", "ال!", "word"))]
    prior = (1 + 9e-10) / 10
    found = scores("arabic", [1, 2, 3, 4, 5, 6, 7, 0, 1], vocabulary, [[1] + [7] * 9, [0] * 10])
    yes, no = -math.log(prior), FLOOR - math.log(prior)
    np.testing.assert_allclose(found, [yes, no, yes, no, no, no, no, no, yes], rtol=1e-5)


PIECES = [b"", b"\xd7", b"\x90", b"\xd0", b"a"]  # D7 90 is the Hebrew alef, D0 90 the Cyrillic A


def test_a_piece_of_a_character_has_the_share_of_its_occurrences():
    # Of the three tokens \x90 in the sample two end an alef; every \xd7 begins one: P(hebrew) = (2 * 1 + 3 * 2/3) / 8.
    sample = [[1, 2, 4, 4], [1, 2, 3, 2]]
    context = [1, 2, 3, 2, 4, 1, 4, 2, 1]
    logs = [1, 1, 1e-10, 2 / 3, 1e-10, 1, 1e-10, 2 / 3, 1]
    np.testing.assert_allclose(scores("hebrew", context, PIECES, sample), np.log(logs) - np.log(0.5), rtol=1e-5)


def test_in_place_a_piece_counts_with_its_character():
    sample = [[1, 2, 4, 4], [1, 2, 3, 2]]
    context = [1, 2, 3, 2, 4, 1, 4, 2, 1]
    logs = [1, 1] + [1e-10] * 7
    np.testing.assert_allclose(scores("hebrew", context, PIECES, sample, in_place=True), np.log(logs) - np.log(0.5), rtol=1e-5)


def test_no_character_reaches_over_end_of_text_or_into_the_next_context():
    sample = torch.tensor([[1, 2, 3, 2]])
    found = proxy("hebrew", torch.tensor([[1, 0, 2, 1], [2, 1, 2, 4]]), PIECES, sample)
    whole, half = -math.log(0.5), math.log(0.5) - math.log(0.5)
    np.testing.assert_allclose(found[:, :3], [[whole, FLOOR + whole, half], [half, whole, whole]], rtol=1e-5, atol=1e-6)


WRITTEN = {
    "arabic": "العربية", "hebrew": "עברית", "russian": "русский", "greek": "Ελληνικά", "armenian": "հայերեն",
    "georgian": "ქართული", "amharic": "አማርኛ", "hindi": "हिन्दी", "bengali": "বাংলা", "tamil": "தமிழ்",
    "telugu": "తెలుగు", "thai": "ไทย",
    "khmer": "ខ្មែរ", "korean": "한국어", "japanese": "ひらがなカタカナ", "chinese": "中文",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_is_told_from_all_others(name):
    vocabulary = [b"", *(text.encode() for text in WRITTEN.values())]
    everything = list(range(1, len(vocabulary)))
    found = scores(name, everything, vocabulary, [everything])
    assert [list(WRITTEN)[i] for i in np.flatnonzero(found > 0)] == [name]


def test_the_names_are_those_of_the_corpus():
    assert set(PROXIES) <= set(SPECIAL_CONTEXTS)
    with pytest.raises(StudyError, match="base64, dna"):
        scores("klingon", [1], PIECES, [[1]])


def test_a_sample_without_text_is_refused():
    with pytest.raises(StudyError, match="sample"):
        scores("hebrew", [1], PIECES, [[0, 0]])


# --- against the definition, string by string ------------------------------------------------------------------------

MIXED = [b"", b"\xd7", b"\x90", b"\xd0", b"A", b" \xd7", b"\x90\xd7", b"C7", b"\xe0\xa4", *(c.encode() for c in ("א", "אב", "й"))]
ROW = st.lists(st.integers(0, len(MIXED) - 1), min_size=9, max_size=9)
ROWS, SAMPLES = st.lists(ROW, min_size=1, max_size=4), st.lists(ROW.filter(any), min_size=1, max_size=4)


def strings_ending_at(context, i):
    for start in range(i, -1, -1):
        if context[start] == 0:
            return
        yield context[start:i + 1]


def is_hebrew(text):
    return all(0x590 <= ord(c) <= 0x5FF for c in text)


def hebrew_occurrences(context):
    """Whether each token's bytes all are parts of Hebrew characters, from Python's own decoding."""
    data = b"".join(MIXED[t] or b"\0" for t in context)
    flags = [is_hebrew(c) for c in data.decode(errors="surrogateescape") for _ in c.encode(errors="surrogateescape")]
    ends = np.cumsum([len(MIXED[t] or b"\0") for t in context])
    return [all(flags[end - len(MIXED[t] or b"\0"):end]) for t, end in zip(context, ends, strict=True)]


@given(ROWS, SAMPLES)
@settings(max_examples=150, deadline=None)
def test_alphabets_are_the_best_of_all_strings(contexts, sample):
    counts = np.bincount([t for row in sample for t in row if t], minlength=len(MIXED)) + 1

    def ratio(string, letters):
        text = [MIXED[t].decode(errors="replace") for t in string]
        return (sum(math.log(1 / len(letters) if c in letters else 1e-10) for c in "".join(text))
                - sum(math.log(counts[t] / counts.sum()) for t in string))

    for name, alphabet in ALPHABETS.items():
        found = proxy(name, torch.tensor(contexts), MIXED, torch.tensor(sample))
        for row, context in zip(found, contexts, strict=True):
            for i in range(len(context)):
                ratios = [ratio(s, alphabet.letters) for s in strings_ending_at(context, i) if len(s) >= alphabet.min_tokens]
                assert row[i] == pytest.approx(max(ratios, default=FLOOR), rel=1e-4, abs=1e-4)


@given(ROWS, SAMPLES)
@settings(max_examples=150, deadline=None)
def test_scripts_are_the_best_of_all_strings(contexts, sample):
    seen = [(t, hebrew) for row in sample for t, hebrew in zip(row, hebrew_occurrences(row), strict=True)]

    def probability(string):
        try:
            return 1 if is_hebrew(b"".join(MIXED[t] for t in string).decode()) else 1e-10
        except UnicodeDecodeError:
            occurrences = [hebrew for t, hebrew in seen if [t] == string]
            return max(np.mean(occurrences), 1e-10) if occurrences else 1e-10

    words = [probability([t]) for t, _ in seen if t]
    for row, context in zip(proxy("hebrew", torch.tensor(contexts), MIXED, torch.tensor(sample)), contexts, strict=True):
        for i in range(len(context)):
            best = max((probability(s) for s in strings_ending_at(context, i)), default=1e-10)
            assert row[i] == pytest.approx(math.log(best) - math.log(np.mean(words)), rel=1e-4, abs=1e-4)


def test_the_log_ratio_of_a_token_by_hand():
    tokens, is_context = np.array([1, 1, 2, 0, 1, 3]), np.array([True, True, True, True, False, False])
    # Of all tokens, with one added to each count: 1, 4, 2 and 2 of 9. In the context 0, 2, 1 and 0, and one such token more.
    unigram = np.array([1, 4, 2, 2]) / 9
    expected = np.log((np.array([0, 2, 1, 0]) + unigram) / 4 / unigram)
    np.testing.assert_allclose(token_log_ratio(tokens, is_context, 4), expected)
    np.testing.assert_allclose(token_log_ratio(tokens.astype(np.uint16), is_context, 4), expected)
    assert (token_log_ratio(tokens, ~is_context & is_context, 4) == 0).all()  # nothing is known of such a context
