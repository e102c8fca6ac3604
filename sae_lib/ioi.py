"""Indirect object identification (Cunningham et al., section 4; C4): the task, its sentences, and how well a model does it.

    When Alice and Bob went to the park, Bob gave a ring to -> Alice

The name that is not repeated is the indirect object. Which of the two comes first is told apart as ABBA and BABA. The names and
all other words are this project's own; every name is one token, added to the tokenizer's vocabulary with the blank before it.
Some names, and some ways to say it, are held out: they never stand in a sentence of this kind that a model is trained on.
Held-out names are met in other sentences, so that a model knows them as names, to whom something may be given.

A model that was trained elsewhere is asked the same with those names that are one token of its own tokenizer. Nothing was held
out of its training, nor was it trained on any sentence of these: what is said of known and of held out is not said of it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from sae_lib import residual
from sae_lib.activations import ActivationStream
from sae_lib.errors import StudyError
from sae_lib.seeds import numpy_generator
from sae_lib.transformer import Transformer

NAMES = (
    "Adam", "Alan", "Albert", "Alex", "Alice", "Amanda", "Amy", "Andrew", "Angela", "Anna", "Arthur", "Barbara", "Ben", "Betty",
    "Bob", "Brian", "Bruce", "Carl", "Carol", "Charles", "Chris", "Claire", "Daniel", "David", "Deborah", "Dennis", "Diana",
    "Donald", "Dorothy", "Edward", "Elena", "Emily", "Emma", "Eric", "Eva", "Felix", "Frank", "Fred", "Gary", "George", "Gloria",
    "Grace", "Greg", "Hannah", "Harry", "Helen", "Henry", "Howard", "Ian", "Irene", "Jack", "Jacob", "James", "Jane", "Janet",
    "Jason", "Jean", "Jeff", "Jennifer", "Jerry", "Jessica", "Joan", "John", "Jonathan", "Joseph", "Joyce", "Julia", "Karen",
    "Kate", "Keith", "Kelly", "Kevin", "Kim", "Kyle", "Larry", "Laura", "Lauren", "Leo", "Linda", "Lisa", "Louis", "Lucy", "Luke",
    "Margaret", "Maria", "Marilyn", "Mark", "Martha", "Martin", "Mary", "Matthew", "Max", "Megan", "Melissa", "Michael", "Nancy",
    "Nathan", "Neil", "Nicole", "Nina", "Noah", "Olivia", "Oscar", "Patrick", "Paul", "Peter", "Philip", "Rachel", "Ralph",
    "Rebecca", "Richard", "Robert", "Roger", "Rose", "Roy", "Russell", "Ruth", "Ryan", "Samuel", "Sandra", "Sarah", "Scott",
    "Sean", "Sharon", "Simon", "Sophia", "Stephen", "Steve", "Susan", "Teresa", "Thomas", "Tim", "Tom", "Vanessa", "Victor",
    "Vincent", "Walter", "Wendy", "William", "Zoe")
HELD_OUT_EVERY = 5  # of the names, which are in alphabetical order
CORPUS_SHARE = 0.1  # of the contexts that are trained on
TRIES = 100  # sentences that are written for each one asked for, before it is said that they do not fit
BATCH = 128  # prompts that a model goes on with at once

OPENINGS = ("When", "After", "While", "Then,", "One day", "Because", "Before", "Once", "Later", "At last")
MEETINGS = ("{} and {} went to the {place}", "{} and {} were at the {place}", "{} met {} at the {place}",
            "{} and {} sat in the {place}", "{} saw {} near the {place}", "{} and {} came back from the {place}",
            "{} was with {} in the {place}", "{} and {} had a long talk at the {place}", "{} called {} from the {place}",
            "{} and {} worked in the {place}", "{} took {} to the {place}", "{} and {} stood before the {place}",
            "{} asked {} about the {place}", "{} and {} looked for the {place}", "{} lived with {} behind the {place}",
            "{} and {} left the {place}", "{} drove {} to the {place}", "{} and {} bought a {thing} at the {place}",
            "{} heard {} in the {place}", "{} and {} lost the {thing}", "{} came to the {place} with {}",
            "{} and {} slept in the {place}", "{} followed {} to the {place}", "{} and {} met again")
GIVINGS = ("{} gave a {thing} to", "{} handed the {thing} to", "{} sent a {thing} to", "{} showed the {thing} to",
           "{} wanted to give the {thing} to", "{} read a letter to", "{} said hello to", "{} took a {thing} to",
           "{} was happy to write to", "{} left the {thing} to", "{} brought the {thing} to", "{} sold a {thing} to",
           "{} told a story to", "{} had to return the {thing} to", "{} spoke to", "{} bought a {thing} and gave it to",
           "{} promised a {thing} to", "{} decided to explain the {place} to", "{} listened to", "{} waved to",
           "{} paid for the {thing} and gave it to", "{} opened the {thing} and read it to", "{} sent the {thing} back to",
           "{} carried the {thing} over to")
HELD_OUT_MEETINGS = ("{} and {} walked around the {place}", "{} found {} inside the {place}", "{} and {} ate at the {place}")
HELD_OUT_GIVINGS = ("{} passed the {thing} to", "{} made a {thing} and offered it to", "{} began to sing a song to")
DEV_MEETINGS = ("{} and {} waited at the {place}", "{} ran into {} outside the {place}")
DEV_GIVINGS = ("{} lent the {thing} to", "{} threw a {thing} to")
PLACES = ("park", "house", "school", "market", "office", "garden", "station", "library", "church", "beach", "hotel", "store",
          "kitchen", "river", "castle", "farm")
THINGS = ("ring", "book", "drink", "key", "map", "ball", "picture", "card", "box", "coat", "cake", "flower", "pen", "basket",
          "watch", "lamp")
OTHERS = ("The {thing} of {} is in the {place}.", "{} has a {thing}. It is the best {thing} that {} had.",
          "I asked {} about the {place}.", "The {place} belongs to {}. Nobody but {} has the key.",
          "{} likes the {place}. So {} is there every day.", "My friend {} bought a {thing}.",
          "This is the {place} of {}. You can find {} there.", "We waited for {} at the {place}.")
GIVERS = ("I", "we", "she", "he", "they", "the teacher", "a friend", "somebody")
DEALINGS = ("{0} sold the {thing} to {1}. Now it belongs to {1}.", "{0} bought the {thing} from {1}. Now it belongs to {0}.",
            "{0} lost the {thing} and {1} found it. Now you can get it from {1}.",
            "{0} is older than {1}. The first in the {place} was {0}.", "{0} is older than {1}. The last in the {place} was {1}.",
            "The {thing} was made by {0} and bought by {1}. It was the work of {0}.",
            "The letter was written by {0} for {1}. It was read by {1}.",
            "The {place} was built by {0} and painted by {1}. The colours are by {1}.",
            "{0} asked a question, and {1} knew the answer. The question was from {0}.",
            "{0} asked a question, and {1} knew the answer. The answer was from {1}.",
            "{0} came to the {place} first, then {1}. The last to come was {1}.",
            "Yesterday {0} had the {thing}, today {1} has it. Ask {1}.")
SENTENCES = {"train": (MEETINGS, GIVINGS), "dev": (DEV_MEETINGS, DEV_GIVINGS), "held out": (HELD_OUT_MEETINGS, HELD_OUT_GIVINGS)}
ENDINGS = (".", " at once.", " yesterday.", " again.", ", who smiled.")


def split_names() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names that the task is trained with, and those that are held out of it."""
    held_out = NAMES[HELD_OUT_EVERY - 1::HELD_OUT_EVERY]
    return tuple(name for name in NAMES if name not in held_out), held_out


def with_names(tokenizer: Tokenizer) -> Tokenizer:
    """A copy of a tokenizer with a token for each name and the blank before it, after all others, in the order of NAMES."""
    extended = Tokenizer.from_str(tokenizer.to_str())
    extended.add_tokens([AddedToken(f" {name}", normalized=False) for name in NAMES])
    return extended


def name_ids(tokenizer: Tokenizer, names: Sequence[str]) -> dict[str, int]:
    """Those of the names that are one token after a blank, and that token, in any tokenizer."""
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    before, found = encode(" and"), {}
    for name in names:
        *others, last = encode(f" and {name}")
        if others == before and tokenizer.decode([last]).strip() == name:  # and not a token for what is unknown
            found[name] = last
    return found


# --- text ------------------------------------------------------------------------------------------------------------


class _Writer:
    """Writes sentences with one stream of random numbers."""

    def __init__(self, seed: int, purpose: str):
        self.rng = numpy_generator(seed, f"indirect objects: {purpose}")

    def one_of(self, choices: Sequence[str]) -> str:
        return choices[self.rng.integers(len(choices))]

    def two_of(self, names: Sequence[str]) -> tuple[str, str]:
        first, second = self.rng.choice(len(names), 2, replace=False)
        return names[first], names[second]

    def filled(self, frame: str, *names: str) -> str:
        return frame.format(*names, place=self.one_of(PLACES), thing=self.one_of(THINGS))

    def task(self, sentences: str, indirect: str, subject: str, abba: bool) -> str:
        """A sentence up to the indirect object."""
        meetings, givings = SENTENCES[sentences]
        pair = (indirect, subject) if abba else (subject, indirect)
        meeting, giving = self.filled(self.one_of(meetings), *pair), self.filled(self.one_of(givings), subject)
        return f" {self.one_of(OPENINGS)} {meeting}, {giving}"

    def document(self, known: Sequence[str], held_out: Sequence[str]) -> str:
        """A sentence of the task with known names, or, every other time, one about one person or two, as often held-out ones."""
        if self.rng.random() < 0.5:
            indirect, subject = self.two_of(known)
            return f"{self.task('train', indirect, subject, self.rng.random() < 0.5)} {indirect}{self.one_of(ENDINGS)}"
        names, kind = held_out if self.rng.random() < 0.5 else known, self.rng.random()
        if kind < 0.5:
            return " " + self.filled(self.one_of(DEALINGS), *self.two_of(names))
        name = self.one_of(names)
        if kind < 0.7:
            frame = self.one_of(OTHERS)
            return " " + self.filled(frame, *[name] * frame.count("{}"))
        giving = self.filled(self.one_of(GIVINGS), self.one_of(GIVERS))
        return f" {name} was at the {self.one_of(PLACES)}, and {giving} {name}{self.one_of(ENDINGS)}"


def training_contexts(tokenizer: Tokenizer, corpus: Int[Tensor, "n_corpus long"], n_contexts: int, n_ctx: int,
                      seed: int) -> Int[Tensor, "n_contexts n_ctx"]:
    """Text to train on: one short document a context, after an end-of-text and filled up with it; one in ten is a piece of the
    corpus, whose contexts are given.

    Every other made-up document is a sentence of the task with known names. The others are about one person, also as one to whom
    something is given, or about two of whom the sense says which is named last. Without these a model learns for each known name
    how strongly to say it there, and of two held-out ones says the stronger: what is held out of the names is to choose by who
    acts. Where a sentence begins is where a context does: in long contexts full of sentences, at hundreds of positions that a
    small model learns one by one, it learned to copy a name within millions of tokens, but not to choose. `tokenizer` is one
    `with_names`.

    Raises StudyError if half of the documents are too long for a context.
    """
    writer, (known, held_out) = _Writer(seed, "training text"), split_names()
    found = torch.full((n_contexts, n_ctx), ActivationStream.END_OF_TEXT, dtype=torch.int32)
    encodings = tokenizer.encode_batch_fast([writer.document(known, held_out) for _ in range(n_contexts)])
    if 2 * sum(len(encoding.ids) >= n_ctx for encoding in encodings) > n_contexts:
        raise StudyError(f"In the tokens of this corpus most sentences of the task are longer than a context of {n_ctx}; raise "
                         "n_ctx of the model with names in the profile.")
    for row, encoding in zip(found, encodings, strict=True):
        ids = encoding.ids[:n_ctx - 1]
        row[1:1 + len(ids)] = torch.tensor(ids, dtype=torch.int32)
    pieces = corpus.flatten()[:corpus.numel() // (n_ctx - 1) * (n_ctx - 1)].view(-1, n_ctx - 1)
    rng = numpy_generator(seed, "indirect objects: pieces of the corpus")
    where = rng.random(n_contexts) < CORPUS_SHARE
    found[torch.from_numpy(where), 1:] = pieces[torch.from_numpy(rng.integers(len(pieces), size=where.sum()))].int()
    return found


class Prompts(NamedTuple):
    """Sentences up to the indirect object, each after the token that texts begin with and padded with that at its end."""

    tokens: Int[Tensor, "n longest"]
    last: Int[Tensor, " n"]
    """Position of the last token, whose prediction is asked."""
    indirect: Int[Tensor, " n"]
    subject: Int[Tensor, " n"]
    """Tokens of the names."""
    abba: Bool[Tensor, " n"]

    def exchanged(self, names: Int[Tensor, " n"]) -> "Prompts":
        """The same sentences with another indirect object: what follows is to be another name (the paper's Bob -> Vanessa)."""
        tokens = torch.where(self.tokens == self.indirect[:, None], names[:, None], self.tokens)
        return self._replace(tokens=tokens, indirect=names)


def prompts(tokenizer: Tokenizer, names: Sequence[str], sentences: str, n: int, seed: int, n_ctx: int = 256,
            begin: int = ActivationStream.END_OF_TEXT) -> Prompts:
    """`n` sentences of the task, as many ABBA as BABA, with names out of some and ways to say it out of "train", "dev" or "held
    out"; those that do not fit in a context of `n_ctx` are left out. `begin` is the token that the model's texts begin with.

    Raises StudyError if there are fewer than three names or no such sentences, if a name is not one token, or if next to no
    sentence fits.
    """
    if len(names) < 3 or sentences not in SENTENCES:
        raise StudyError(f"Sentences '{sentences}' with {len(names)} names cannot be made; give three names or more, and one of "
                         f"{', '.join(SENTENCES)}.")
    id_of, writer = name_ids(tokenizer, names), _Writer(seed, f"prompts, {sentences}")
    if cut := [name for name in names if name not in id_of]:
        raise StudyError(f"{', '.join(cut)}: not one token each in this tokenizer; leave these names out.")
    ids, roles = [], []
    for _ in range(TRIES * n):
        indirect, subject = writer.two_of(names)
        text = writer.task(sentences, indirect, subject, len(ids) % 2 == 0)
        found, pair = tokenizer.encode(text, add_special_tokens=False).ids, (id_of[indirect], id_of[subject])
        # A tokenizer that joins a name to what follows would hide it.
        if len(found) < n_ctx and [found.count(name) for name in pair] == [1, 2]:
            ids.append([begin, *found])
            roles.append(pair)
        if len(ids) == n:
            break
    else:
        raise StudyError(f"Next to no sentence of the task fits in a context of {n_ctx} tokens; take a model with longer "
                         "contexts.")
    longest = max(map(len, ids))
    tokens, names_of = torch.tensor([row + [begin] * (longest - len(row)) for row in ids]), torch.tensor(roles)
    return Prompts(tokens, torch.tensor([len(row) - 1 for row in ids]), names_of[:, 0], names_of[:, 1], torch.arange(n) % 2 == 0)


# --- how well it is done ---------------------------------------------------------------------------------------------


class Answers(NamedTuple):
    """What a model says to each prompt."""

    right: Bool[np.ndarray, " n"]
    """Whether the indirect object is likelier than the subject: the field's accuracy."""
    first: Bool[np.ndarray, " n"]
    """Whether it is the likeliest of all tokens."""
    margin: Float[np.ndarray, " n"]
    """By how much its logit is above the subject's."""


def answers(model: Transformer, asked: Prompts) -> Answers:
    """Ask a model to go on with each prompt."""
    first, margin, device = [], [], residual.device(model)
    for tokens, last, indirect, subject, _ in zip(*(values.to(device).split(BATCH) for values in asked), strict=True):
        resid = residual.activations(model, tokens, model.cfg.n_layers)
        logits = residual.unembed(model, resid[torch.arange(len(last)), last])
        of_names = logits.gather(1, torch.stack([indirect, subject], 1))
        first.append(logits.argmax(1) == indirect)
        margin.append(of_names[:, 0] - of_names[:, 1])
    above = torch.cat(margin).cpu().numpy()
    return Answers(above > 0, torch.cat(first).cpu().numpy(), above)
