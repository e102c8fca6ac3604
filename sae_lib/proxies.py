"""How much like base64, like DNA, like Arabic, ... the text up to a token is (Bricken et al., Feature Proxies; paper_facts B8).

A token's score is the greatest log(P(s | context) / P(s)) of all strings s of consecutive tokens that end at it, within its
context and its document: no string reaches over an end-of-text. P(s) is the product of the tokens' unigram probabilities.

*Alphabets* (base64, DNA, hex). P(s | context) is a product over characters, so the ratio is a sum of one gain a token,
a(t) = sum over its characters of log P(character) - log P(t), and the best string ending at token i gains
S(i) = a(i) + max(0, S(i - 1)).

*Scripts* (Arabic, Hebrew, ...). By Bayes' rule P(s | script) / P(s) = P(script | s) / P(script), where P(script | s) is 1 if all
characters of s are of the script and 1e-10 if one is not. A longer string can then never do better than the token itself,
unless the token begins or ends inside a character:
- Where a string exists that ends with the token, is made of whole characters, and all of them are of the script, the score is
  -log P(script). Of such strings the shortest is enough to look at: it begins at the last token that begins with a character.
- Otherwise the token stands alone: if it holds a piece of a character, P(script | s) is the share of its occurrences in the
  sample in which every character that it takes part in is of the script; if it holds none, 1e-10.

Space and punctuation belong to no script, and so do the many tokens that begin with a space. A small vocabulary writes rare
characters in pieces, and scripts share the pieces: by the paper's rule a piece scores above 0 for each of its scripts, even next
to the rest of its character. `in_place` is our own stricter reading, which asks for the character itself.
"""

import json
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int64, Integer, UInt8
from tokenizers import Tokenizer
from torch import Tensor

from sae_lib.errors import StudyError

Vocabulary = list[bytes]
FOREIGN = 1e-10


class Alphabet(NamedTuple):
    """A context in which every character of `letters` is equally probable and any other has probability 1e-10."""

    letters: str
    min_tokens: int = 1
    """Shortest string that counts."""


_UPPER, _DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
# By the names of the corpus's domains. The paper's are base64 and dna; hex is our own.
ALPHABETS = {
    "base64": Alphabet(_UPPER + _UPPER.lower() + _DIGITS + "+/"),
    "dna": Alphabet("ACGT", min_tokens=2),
    "hex": Alphabet(_DIGITS + "abcdef"),
}
# Unicode blocks, first and last code point. The paper's are arabic and hebrew;
# Japanese is written partly in the Chinese one.
SCRIPTS = {
    "arabic": ((0x0600, 0x06FF), (0x0750, 0x077F)),
    "hebrew": ((0x0590, 0x05FF),),
    "russian": ((0x0400, 0x052F),),
    "greek": ((0x0370, 0x03FF), (0x1F00, 0x1FFF)),
    "armenian": ((0x0530, 0x058F),),
    "georgian": ((0x10A0, 0x10FF), (0x1C90, 0x1CBF)),
    "amharic": ((0x1200, 0x139F),),
    "hindi": ((0x0900, 0x097F),),
    "bengali": ((0x0980, 0x09FF),),
    "tamil": ((0x0B80, 0x0BFF),),
    "telugu": ((0x0C00, 0x0C7F),),
    "thai": ((0x0E00, 0x0E7F),),
    "khmer": ((0x1780, 0x17FF), (0x19E0, 0x19FF)),
    "korean": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xAC00, 0xD7AF)),
    "japanese": ((0x3040, 0x30FF),),
    "chinese": ((0x3400, 0x4DBF), (0x4E00, 0x9FFF)),
}
PROXIES = (*ALPHABETS, *SCRIPTS)


def token_bytes(tokenizer: Tokenizer) -> Vocabulary:
    """The bytes of every token, by id; none for special tokens and unused ids.

    Of a tokenizer of characters with bytes to fall back on, as the study's own and SentencePiece's, or of one of bytes, as those
    of GPT-2 and Pythia. Raises StudyError if it is of another kind.
    """
    tokens = [tokenizer.id_to_token(i) or "" for i in range(tokenizer.get_vocab_size())]
    added = {i: b"" if token.special else token.content.encode() for i, token in tokenizer.get_added_tokens_decoder().items()}
    how = json.dumps(json.loads(tokenizer.to_str())["decoder"], ensure_ascii=False)
    byte = {f"<0x{i:02X}>": bytes([i]) for i in range(256)}
    if '"ByteLevel"' in how:
        value = {character: i for i, character in enumerate(_byte_characters())}
        spell = lambda token: bytes(value[character] for character in token)
    elif byte.keys() <= set(tokens):
        blank = "\u2581" if "\u2581" in how else " "  # SentencePiece's sign for a space
        spell = lambda token: byte.get(token, token.replace(blank, " ").encode())
    else:
        raise StudyError("The tokenizer has no tokens for single bytes, to fall back on or to begin with; use one that has, as "
                         "have those of `tokens.train_tokenizer` and of GPT-2.")
    return [added[i] if i in added else spell(token) for i, token in enumerate(tokens)]


def _byte_characters() -> list[str]:
    """The printable character by which byte-level tokenizers write each byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (chr(code) for code in range(256, 512))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


def proxy(name: str, contexts: Int[Tensor, "n_contexts n_ctx"], vocabulary: Vocabulary,
          sample: Int[Tensor, "n_sampled n_sample_ctx"], in_place: bool = False) -> Float[np.ndarray, "n_contexts n_ctx"]:
    """Scores, in nats, of the tokens of `contexts` as text of the context `name` (one of PROXIES).

    `sample`: contexts of training text, from which the unigram probabilities (one added to each count), P(script) and the
    shares of incomplete tokens are taken. The score of a token at which no string ends that counts, such as end-of-text
    itself, is that of one foreign character, log 1e-10 (for a script less log P(script)).

    `in_place`: not the paper's rule for scripts, but P(script | token) = 1 if every character that the token is a part of, where
    it stands, is of the script, and else 1e-10.

    Raises StudyError if there is no proxy of this name, or no text in the sample.
    """
    tokens, sampled = contexts.numpy().astype(np.int64), sample.numpy().astype(np.int64)
    if not sampled.any():
        raise StudyError("The sample that a proxy learns its probabilities from has no text; take some training contexts.")
    if name in ALPHABETS:
        return _alphabet_scores(ALPHABETS[name], tokens, vocabulary, sampled).astype(np.float32)
    if name in SCRIPTS:
        scores = _in_place_scores if in_place else _script_scores
        return scores(name, tokens, vocabulary, sampled).astype(np.float32)
    raise StudyError(f"There is no proxy for {name!r}; choose one of {', '.join(PROXIES)}.")


def correlation_target(name: str, scores: Float[np.ndarray, "*tokens"]) -> Float[np.ndarray, "*tokens"]:
    """What units are correlated with: for DNA whether the score is above 0 (1 or 0), for the others the score, or 0 if below."""
    return (scores > 0).astype(np.float32) if name == "dna" else np.maximum(scores, 0)


def token_log_ratio(tokens: Integer[np.ndarray, " n_tokens"], is_context: Bool[np.ndarray, " n_tokens"],
                    d_vocab: int) -> Float64[np.ndarray, " d_vocab"]:
    """log P(token | context) / P(token) of every token of the vocabulary, in nats; end-of-text (0) is not counted.

    The truth is here the label of the text, so that no rule about characters is needed. One is added to each count for P(token),
    and to the context's tokens one drawn from it, so that a rare token that is never in the context gets a low ratio.
    """
    everywhere = np.bincount(tokens[tokens != 0], minlength=d_vocab) + 1.0
    inside, unigram = np.bincount(tokens[is_context & (tokens != 0)], minlength=d_vocab), everywhere / everywhere.sum()
    return np.log((inside + unigram) / (inside.sum() + 1)) - np.log(unigram)


# --- alphabets -------------------------------------------------------------------------------------------------------

def _alphabet_scores(alphabet: Alphabet, tokens: Int64[np.ndarray, "n_contexts n_ctx"], vocabulary: Vocabulary,
                     sample: Int64[np.ndarray, "n_sampled n_sample_ctx"]) -> Float64[np.ndarray, "n_contexts n_ctx"]:
    counts = np.bincount(sample[sample != 0], minlength=len(vocabulary)) + 1
    gains = _log_letters(alphabet, vocabulary) - np.log(counts / counts.sum())
    gains[[not token for token in vocabulary]] = -np.inf
    gain = gains[tokens]
    best = gain.copy()
    for i in range(1, gain.shape[1]):
        best[:, i] += np.maximum(best[:, i - 1], 0)
    for _ in range(alphabet.min_tokens - 1):  # the best longer string is this token and the best that ended before it
        best = gain + np.pad(best[:, :-1], ((0, 0), (1, 0)), constant_values=-np.inf)
    return np.where(np.isinf(best), np.log(FOREIGN), best)


def _log_letters(alphabet: Alphabet, vocabulary: Vocabulary) -> Float64[np.ndarray, " d_vocab"]:
    """log P(characters | context) of each token; each piece of an incomplete character is a foreign character."""
    texts = [token.decode(errors="replace") for token in vocabulary]
    known = np.array([sum(c in alphabet.letters for c in text) for text in texts])
    return -known * np.log(len(alphabet.letters)) + (np.array([len(text) for text in texts]) - known) * np.log(FOREIGN)


# --- scripts ---------------------------------------------------------------------------------------------------------

class _InScript(NamedTuple):
    """Of each token, given its neighbours."""

    ends: Bool[np.ndarray, "n_contexts n_ctx"]
    """Whether a string ends with it that is made of whole characters, all of the script."""
    inside: Bool[np.ndarray, "n_contexts n_ctx"]
    """Whether all characters that it takes part in are of the script."""


def _in_script(name: str, tokens: Int64[np.ndarray, "n_contexts n_ctx"], vocabulary: Vocabulary) -> _InScript:
    # A zero byte in front of each context and for each special token keeps their characters apart.
    pieces = [token or b"\0" for token in vocabulary]
    sizes = np.array([len(piece) for piece in pieces])
    stream = np.pad(tokens, ((0, 0), (1, 0))).ravel()
    size = sizes[stream]
    first = np.cumsum(size) - size
    source = np.repeat((np.cumsum(sizes) - sizes)[stream] - first, size) + np.arange(size.sum())
    data = np.frombuffer(b"".join(pieces), np.uint8)[source]

    first_byte, code = _characters(data)
    begins = np.zeros(len(data), bool)
    begins[first_byte] = True
    of_script = np.any([(code >= low) & (code <= high) for low, high in SCRIPTS[name]], axis=0)
    inside = np.logical_and.reduceat(of_script[np.cumsum(begins) - 1], first)
    begins_token, ends_token = begins[first], np.append(begins[first[1:]], True)
    start = np.maximum.accumulate(np.where(begins_token, np.arange(len(stream)), 0))
    outside = np.cumsum(~inside)
    unbroken = outside - outside[start] + ~inside[start] == 0
    shape = (len(tokens), tokens.shape[1] + 1)
    return _InScript((ends_token & unbroken).reshape(shape)[:, 1:], inside.reshape(shape)[:, 1:])


# Bytes of the UTF-8 character that a byte begins; 0 for a byte that begins none.
_LENGTH = np.repeat([1, 0, 2, 3, 4, 0], [0x80, 0x40, 0x20, 0x10, 0x08, 0x08])


def _characters(data: UInt8[np.ndarray, " bytes"]) -> tuple[Int64[np.ndarray, " characters"], Int64[np.ndarray, " characters"]]:
    """Where the UTF-8 characters begin, and their code points; -1 for broken ones, one for each byte too many."""
    place, continues = np.arange(len(data)), (data & 0xC0) == 0x80
    since = place - np.maximum.accumulate(np.where(continues, 0, place))
    first = np.flatnonzero(~continues | (since >= _LENGTH[data[place - since]]))
    length = _LENGTH[data[first]]
    code = data[first] & np.array([0, 0x7F, 0x1F, 0x0F, 0x07])[length]
    for i in range(1, 4):
        longer = length > i
        code[longer] = code[longer] << 6 | data[np.minimum(first[longer] + i, len(data) - 1)] & 0x3F
    return first, np.where(np.diff(first, append=len(data)) == length, code, -1)


def _script_scores(name: str, tokens: Int64[np.ndarray, "n_contexts n_ctx"], vocabulary: Vocabulary,
                   sample: Int64[np.ndarray, "n_sampled n_sample_ctx"]) -> Float64[np.ndarray, "n_contexts n_ctx"]:
    d_vocab = len(vocabulary)
    occurrences = np.bincount(sample.ravel(), minlength=d_vocab)
    inside = np.bincount(sample[_in_script(name, sample, vocabulary).inside], minlength=d_vocab)
    incomplete = np.array(["\ufffd" in token.decode(errors="replace") for token in vocabulary])
    alone = _in_script(name, np.arange(d_vocab)[:, None], vocabulary).ends[:, 0]
    probability = np.maximum(np.where(incomplete, inside / np.maximum(occurrences, 1), alone), FOREIGN)
    prior = probability[sample[sample != 0]].mean()
    return np.log(np.where(_in_script(name, tokens, vocabulary).ends, 1.0, probability[tokens])) - np.log(prior)


def _in_place_scores(name: str, tokens: Int64[np.ndarray, "n_contexts n_ctx"], vocabulary: Vocabulary,
                     sample: Int64[np.ndarray, "n_sampled n_sample_ctx"]) -> Float64[np.ndarray, "n_contexts n_ctx"]:
    inside, sampled = (np.maximum(_in_script(name, t, vocabulary).inside, FOREIGN) for t in (tokens, sample))
    return np.log(inside) - np.log(sampled[sample != 0].mean())
