"""Documents to tokens: the tokenizer, and token arrays on disk, split by document."""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Int, UInt8, UInt16
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm

from sae_lib.documents import Document
from sae_lib.errors import StudyError
from sae_lib.seeds import numpy_generator

SPLITS = ("train", "validation", "test")
END_OF_TEXT = "<|endoftext|>"
# A domain of fewer sources is split by contiguous blocks of documents: one long file would be a whole split.
MIN_SOURCES = 8
# Characters the tokenizer is trained on, about.
SAMPLE_CHARS = 24_000_000
# What is left of a document when its domain's budget is spent is dropped if it is shorter than this many tokens.
SHORTEST_CUT = 64


@dataclass(frozen=True)
class TokenConfig:
    """`n_ctx`: tokens of a context. The fractions are of tokens; whole sources go to one split, so they are met nearly."""

    vocab_size: int = 4096
    n_ctx: int = 256
    validation_fraction: float = 0.03
    test_fraction: float = 0.05
    seed: int = 0


@dataclass
class _Share:
    """What the sample has of one domain: every `stride`-th document."""

    texts: list[tuple[int, str]] = field(default_factory=list)
    stride: int = 1
    seen: int = 0
    size: int = 0

    def take(self, text: str) -> None:
        if self.seen % self.stride == 0:
            self.texts.append((self.seen, text))
            self.size += len(text)
        self.seen += 1

    def halve(self) -> None:
        self.stride *= 2
        self.texts = [(index, text) for index, text in self.texts if index % self.stride == 0]
        self.size = sum(len(text) for _, text in self.texts)


def _sample(documents: Iterable[Document]) -> list[str]:
    """At most SAMPLE_CHARS of the documents, in one pass. Whenever that is exceeded, the domain with most of it gives up half.

    So the domains have a more equal part in the vocabulary than in the text: whole letters of a rare script become tokens, not
    only pieces of them.
    """
    shares: dict[str, _Share] = {}
    for document in documents:
        shares.setdefault(document.domain, _Share()).take(document.text)
        while sum(share.size for share in shares.values()) > SAMPLE_CHARS:
            largest = max(shares.values(), key=lambda share: share.size)
            if len(largest.texts) == 1:
                break
            largest.halve()
    return [text for share in shares.values() for _, text in share.texts]


def train_tokenizer(documents: Iterable[Document], config: TokenConfig) -> Tokenizer:
    """Byte-pair encoding of characters, learned from a sample of every domain. Digits stand alone; text survives a round trip.

    A token is made of whole characters, or it is one byte of a character too rare for the vocabulary: none ends inside a
    character and goes on from another, as those of byte-level encodings do. Token 0 is END_OF_TEXT, 1 to 256 are the bytes.
    Raises StudyError if the text is too little to find `vocab_size` tokens in.
    """
    special = [END_OF_TEXT, *(f"<0x{byte:02X}>" for byte in range(256))]
    learned = config.vocab_size - len(special) + 1
    trained = _pieces(Tokenizer(models.BPE()))
    trained.train_from_iterator(_sample(documents), trainers.BpeTrainer(
        vocab_size=max(0, learned), limit_alphabet=max(0, learned) // 3, special_tokens=[END_OF_TEXT], show_progress=False))
    model = json.loads(trained.to_str())["model"]
    known = [token for token in sorted(model["vocab"], key=model["vocab"].get) if token != END_OF_TEXT]
    if len(special) + len(known) != config.vocab_size:
        raise StudyError(f"the corpus has text for {len(special) + len(known)} tokens only, {config.vocab_size} are wanted: "
                         "take more text or a profile with a smaller vocabulary")
    merges = [tuple(merge) for merge in model["merges"]]
    vocabulary = {token: i for i, token in enumerate([*special, *known])}
    tokenizer = _pieces(Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True)))
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return _plain(tokenizer)


def _pieces(tokenizer: Tokenizer) -> Tokenizer:
    """No token reaches over the ends of words; marks belong to the letters that carry them.

    A blank is joined to what follows unless that is a word in another script than Latin: most of the text is in Latin letters,
    and the vocabulary would hold the pieces of all other words twice, with a blank, which is of no script, and without.
    """
    words = Regex(r" ?\p{Latin}[\p{Latin}\p{M}]*|[\p{L}\p{M}]+| ?[^\s\p{L}\p{M}]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Split(words, "isolated")])
    return tokenizer


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    """Text that spells the end-of-text token out does not become one; a saved tokenizer forgets this."""
    tokenizer.encode_special_tokens = True
    return tokenizer


class _Source(NamedTuple):
    """Documents that go to one split together."""

    documents: list[int]
    tokens: int


def _sources(sources: list[str], lengths: Int[np.ndarray, " documents"], rng: np.random.Generator) -> list[_Source]:
    """The sources of one domain, shuffled; or, of few sources, single documents from the last to the first."""
    groups: dict[str, list[int]] = {}
    for i, source in enumerate(sources):
        groups.setdefault(source, []).append(i)
    if len(groups) < MIN_SOURCES:
        return [_Source([i], int(lengths[i])) for i in reversed(range(len(sources)))]
    members = list(groups.values())
    return [_Source(members[i], int(lengths[members[i]].sum())) for i in rng.permutation(len(members))]


def assign_splits(domains: list[str], sources: list[str], lengths: Int[np.ndarray, " documents"],
                  config: TokenConfig) -> UInt8[np.ndarray, " documents"]:
    """The index in SPLITS of each document.

    Within each domain whole sources go to test and validation, in random order, until these have their fractions; a source that
    would overfill one is passed over while another is left. Of a domain with fewer than MIN_SOURCES sources (whole books, say)
    the units are documents, and the last contiguous ones are held out. A domain of 3 units or more is in every split.
    """
    of_domain: dict[str, list[int]] = {}
    for i, domain in enumerate(domains):
        of_domain.setdefault(domain, []).append(i)
    split = np.zeros(len(domains), np.uint8)
    for domain, members in of_domain.items():
        index = np.array(members)
        units = _sources([sources[i] for i in members], lengths[index], numpy_generator(config.seed, f"split/{domain}"))
        if len(units) < 3:
            continue
        total = lengths[index].sum()
        for held_out, fraction in ((2, config.test_fraction), (1, config.validation_fraction)):
            wanted, taken = fraction * total, 0
            while taken < wanted and len(units) > held_out:
                chosen = next((i for i, unit in enumerate(units) if taken + unit.tokens <= 1.5 * wanted), None)
                if chosen is None:
                    if taken:
                        break
                    chosen = min(range(len(units)), key=lambda i: units[i].tokens)
                unit = units.pop(chosen)
                split[index[unit.documents]] = held_out
                taken += unit.tokens
    return split


def _encoded(documents: Iterable[Document], tokenizer: Tokenizer, budgets: Mapping[str, int],
             begin: int) -> Iterator[tuple[str, str, UInt16[np.ndarray, " tokens"]]]:
    """(domain, source, tokens) of documents until each domain's budget is spent; no document gets more than an eighth of it."""
    left, documents = dict(budgets), iter(documents)
    _plain(tokenizer)
    while batch := list(islice(documents, 512)):
        wanted = [document for document in batch if left.get(document.domain, 1) > 0]
        encodings = tokenizer.encode_batch_fast([document.text for document in wanted], add_special_tokens=False)
        for document, encoding in zip(wanted, encodings, strict=True):
            ids = np.array([begin, *encoding.ids], dtype=np.uint16)
            if document.domain in left:
                cut = ids[:min(left[document.domain], budgets[document.domain] // 8)]
                if len(cut) < min(len(ids), SHORTEST_CUT):
                    continue
                ids = cut
                left[document.domain] -= len(ids)
            yield document.domain, document.source, ids


def tokenise(documents: Iterable[Document], tokenizer: Tokenizer, config: TokenConfig, out: Path,
             budgets: Mapping[str, int] | None = None, begin: int = 0) -> None:
    """Writes the documents' tokens, split by document and shuffled within each split, to the folder `out` (see TokenData).

    `budgets`: the most tokens of a domain (`corpus.budgets`); domains that are not in it are taken whole. `begin`: the token that
    begins each document; no other special token is added. Memory does not grow with the text, only with the number of documents.
    Raises StudyError if a split has less than one context.
    """
    if tokenizer.get_vocab_size() > 2**16:
        raise StudyError(f"a vocabulary of {tokenizer.get_vocab_size()} does not fit in 16 bits: make it 65,536 or less")
    out.mkdir(parents=True, exist_ok=True)
    domains, sources, lengths = [], [], []
    unordered = out / "unordered.bin"
    with unordered.open("wb") as file:
        for domain, source, ids in tqdm(_encoded(documents, tokenizer, budgets or {}, begin), desc="tokenise", unit=" documents"):
            domains.append(domain)
            sources.append(source)
            lengths.append(len(ids))
            ids.tofile(file)
    if not lengths:
        raise StudyError("the corpus has no text: name a folder or dataset that has")
    names = sorted(set(domains))
    if len(names) > 256:
        raise StudyError(f"the corpus has {len(names)} domains, too many for 8 bits: sort the text into 256 or fewer")
    lengths = np.array(lengths, dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    ids = np.memmap(unordered, np.uint16, "r")
    split = assign_splits(domains, sources, lengths, config)
    labels = np.array([names.index(domain) for domain in domains], np.uint8)
    digest = hashlib.sha256()
    for i, name in enumerate(SPLITS):
        members = np.flatnonzero(split == i)
        members = numpy_generator(config.seed, f"shuffle/{name}").permutation(members)
        n = lengths[members].sum() // config.n_ctx * config.n_ctx
        if n == 0:
            raise StudyError(f"the corpus is too small: its {name} split has less than one context of {config.n_ctx} tokens, "
                             "take more text")
        with (out / f"{name}.tokens.bin").open("wb") as file:
            for document in members:
                piece = np.asarray(ids[starts[document]:starts[document] + lengths[document]])
                piece.tofile(file)
                digest.update(piece)
            file.truncate(n * 2)
        np.save(out / f"{name}.lengths.npy", lengths[members])
        np.save(out / f"{name}.labels.npy", labels[members])
    del ids
    unordered.unlink()
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "meta.json").write_text(json.dumps({"domains": names, "sha256": digest.hexdigest(), **asdict(config)}, indent=1))
    TokenData.open(out).table().to_csv(out / "table.csv", index=False)


@dataclass(frozen=True)
class TokenData:
    """A tokenised corpus on disk; nothing is read before it is asked for.

    Of each split: `SPLIT.tokens.bin`, uint16, documents one after another, each begun by token 0 or another, cut to whole
    contexts; `SPLIT.lengths.npy` and `SPLIT.labels.npy`, tokens and domain of each document; `tokenizer.json`, `meta.json`,
    `table.csv`.
    """

    path: Path
    domains: list[str]
    n_ctx: int
    sha256: str

    @classmethod
    def open(cls, path: Path) -> "TokenData":
        """Raises StudyError if `path` holds no tokens."""
        try:
            meta = json.loads((path / "meta.json").read_text())
        except FileNotFoundError:
            raise StudyError(f"there are no tokens in {path}: run the study again to make them") from None
        return cls(path, meta["domains"], meta["n_ctx"], meta["sha256"])

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        return _plain(Tokenizer.from_file(str(self.path / "tokenizer.json")))

    def tokens(self, split: str) -> UInt16[np.ndarray, " tokens"]:
        """The tokens of a split, memory-mapped; a whole number of contexts."""
        return np.memmap(self.path / f"{split}.tokens.bin", np.uint16, "r")

    def contexts(self, split: str) -> UInt16[np.ndarray, "contexts n_ctx"]:
        """The same as rows."""
        return self.tokens(split).reshape(-1, self.n_ctx)

    def doc_of_token(self, split: str) -> Int[np.ndarray, " tokens"]:
        """The number, within its split, of the document each token is from."""
        lengths = np.load(self.path / f"{split}.lengths.npy")
        return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[:len(self.tokens(split))]

    def domain_of_token(self, split: str) -> UInt8[np.ndarray, " tokens"]:
        """The index in `domains` of each token's document; the end-of-text token that begins a document belongs to it."""
        lengths = np.load(self.path / f"{split}.lengths.npy")
        return np.repeat(np.load(self.path / f"{split}.labels.npy"), lengths)[:len(self.tokens(split))]

    def table(self) -> pd.DataFrame:
        """Columns domain, documents, tokens, share, and the tokens in each split."""
        def count(labels: np.ndarray) -> np.ndarray:
            return np.bincount(labels, minlength=len(self.domains))

        documents = sum(count(np.load(self.path / f"{split}.labels.npy")) for split in SPLITS)
        tokens = {split: count(self.domain_of_token(split)) for split in SPLITS}
        total = sum(tokens.values())
        shares = total / total.sum()
        return pd.DataFrame({"domain": self.domains, "documents": documents, "tokens": total, "share": shares, **tokens})
