"""How much of what a steered model writes is in a context, and what that costs (Bricken et al., Pinned Feature Sampling; B10).

The papers show samples. Here they are measured, in two ways that know nothing of each other: by their characters, and by a
classifier that has learned from the corpus's labels which tokens each domain uses. The same measures of real text say what the
most is that a sample could reach.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Integer
from scipy.sparse import csr_array
from sklearn.naive_bayes import MultinomialNB
from torch import Tensor

from sae_lib.activations import ActivationStream
from sae_lib.effects import CONTEXTS, character_share, fluency
from sae_lib.errors import StudyError
from sae_lib.evaluate import Text
from sae_lib.metrics import bootstrap_interval
from sae_lib.proxies import Vocabulary
from sae_lib.transformer import Transformer

PIECE = 10  # tokens that are classified together
COUNTED = 4_000_000  # tokens counted at once


class DomainClassifier:
    """Which domain a piece of text is from, by its tokens in any order: unigram naive Bayes, all domains equally likely.

    It sees tokens where `CONTEXTS` sees characters, so it tells Welsh from Finnish and a list of names from base64.
    """

    def __init__(self, tokens: Integer[np.ndarray, " n_tokens"], labels: Integer[np.ndarray, " n_tokens"], domains: Sequence[str],
                 d_vocab: int):
        """Learn from training text: its tokens with the index of each one's domain. Raises StudyError if there is none."""
        counts = np.zeros(len(domains) * d_vocab, dtype=np.int64)
        for start in range(0, len(tokens), COUNTED):
            part, label = tokens[start:start + COUNTED].astype(np.int64), labels[start:start + COUNTED].astype(np.int64)
            text = part != ActivationStream.END_OF_TEXT
            counts += np.bincount(label[text] * d_vocab + part[text], minlength=len(counts))
        table = counts.reshape(len(domains), d_vocab)
        known = np.flatnonzero(table.sum(1))
        if not len(known):
            raise StudyError("There is no text to learn domains from; give training tokens with their labels.")
        self.domains, self.d_vocab = list(domains), d_vocab
        self._bayes = MultinomialNB(fit_prior=False).fit(table[known], known)

    def __call__(self, pieces: Int[Tensor, "n length"]) -> list[str]:
        """The likeliest domain of each piece."""
        tokens = pieces.numpy()
        rows = np.repeat(np.arange(len(tokens)), tokens.shape[1])
        text = tokens.ravel() != ActivationStream.END_OF_TEXT
        counts = csr_array((text.astype(np.int64), (rows, tokens.ravel())), shape=(len(tokens), self.d_vocab))
        return [self.domains[i] for i in self._bayes.predict(counts)]


def windows(text: Text, domain: int, length: int) -> Int[Tensor, "n length"]:
    """Stretches of real text of one domain, as long as a sample: each within one document and context, none overlapping."""
    n = text.contexts.shape[1] // length
    tokens, documents, domains = (values[:, :n * length].reshape(-1, length) for values in text)
    whole = ((documents == documents[:, :1]) & (domains == domain) & (tokens != ActivationStream.END_OF_TEXT)).all(1)
    return tokens[whole].long()


def as_text(tokens: Int[Tensor, " n"], vocabulary: Vocabulary) -> str:
    """Tokens as text; bytes that are no UTF-8 become U+FFFD."""
    return as_bytes(tokens, vocabulary).decode("utf-8", errors="replace")


def as_bytes(tokens: Int[Tensor, " n"], vocabulary: Vocabulary) -> bytes:
    """The bytes that tokens stand for."""
    return b"".join(vocabulary[i] for i in tokens.tolist())


@dataclass(frozen=True)
class Gauge:
    """Measures samples that continue a prompt of `prompt_length` tokens, which is not counted."""

    model: Transformer
    """The unsteered model, by which fluency is judged."""
    vocabulary: Vocabulary
    classifier: DomainClassifier
    prompt_length: int
    seed: int
    n_boot: int

    def __call__(self, samples: Int[Tensor, "n_samples length"], context: str) -> dict[str, float]:
        """How much of the samples is in a context, and how fluent they are; intervals are bootstraps over samples.

        Keys: share, low, high: of the characters (`character_share`), or of the pieces for a context that `CONTEXTS` does not
        know; classified, classified_low, classified_high: the share of pieces of 10 tokens that the classifier puts in the
        domain of this name; log_likelihood and distinct: the means of `fluency`.

        Raises StudyError if fewer than two samples have text, or the samples are shorter than a piece.
        """
        draws = {"seed": self.seed, "n_boot": self.n_boot}
        written = samples[:, self.prompt_length:]
        pieces = written.unfold(1, PIECE, PIECE) if written.shape[1] >= PIECE else written[:, None, :0]
        if not pieces.numel():
            raise StudyError(f"Samples of {written.shape[1]} tokens are shorter than the {PIECE} that are classified together; "
                             "draw longer ones.")
        inside = np.array([name == context for name in self.classifier(pieces.flatten(0, 1))]).reshape(len(samples), -1)
        classified = bootstrap_interval(np.stack([inside.sum(1), np.full(len(samples), inside.shape[1])], 1),
                                        lambda t: t[..., 0] / t[..., 1], **draws)
        share = classified
        if context in CONTEXTS:
            share = character_share([as_bytes(row, self.vocabulary) for row in written], CONTEXTS[context], **draws)
        cost = fluency(self.model, samples, self.prompt_length)
        return {"share": share.value, "low": share.low, "high": share.high, "classified": classified.value,
                "classified_low": classified.low, "classified_high": classified.high,
                "log_likelihood": cost.log_likelihood.mean().item(), "distinct": cost.distinct.mean().item()}
