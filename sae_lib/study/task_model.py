"""The model that notebook 11 is about: the study's own, trained on names, or one that was trained elsewhere.

The profile says which. What is asked of either, and what is patched in it, is the same; they differ in where their dictionaries
come from, in the names they know as one token, and in what may be said of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor

from sae_lib import ioi
from sae_lib.activations import ActivationStream, Skip
from sae_lib.errors import StudyError
from sae_lib.precision import best_device
from sae_lib.sae import SAE
from sae_lib.study import deep, own_model
from sae_lib.study.artefacts import Artefact
from sae_lib.study.pipeline import Study
from sae_lib.transformer import Transformer

NAMES = "names"  # the study's own, in `deep`


class TaskModel(ABC):
    """A model, and what is made with it."""

    model: Transformer
    tokenizer: Tokenizer
    vocabulary: list[bytes]
    """The bytes of every token, by id."""
    begin: int
    """The token that its texts begin with."""
    n_ctx: int
    names: dict[str, tuple[str, ...]]
    """Each kind of names. Those of the first are exchanged."""
    sentences: dict[str, str]
    """What each kind of `ioi.SENTENCES` is to this model, in words."""
    described: str
    l1_coefficient: float
    """Of the dictionary that is meant unless another is told."""
    recipe: dict
    """What its dictionaries are made by, for the keys of artefacts."""

    @property
    def exchanged(self) -> tuple[str, ...]:
        """Names that are exchanged for each other."""
        return next(iter(self.names.values()))

    def prompts(self, names: Sequence[str], sentences: str, n: int, seed: int) -> ioi.Prompts:
        """Sentences of the task in its tokens; raises StudyError as `ioi.prompts` does."""
        return ioi.prompts(self.tokenizer, names, sentences, n, seed, self.n_ctx, self.begin)

    @abstractmethod
    def stage(self, name: str, recipe: dict, make: Callable[[Path, Path], None]) -> Artefact:
        """What is measured on it and on its dictionaries, made once."""

    @abstractmethod
    def sample(self, after: int, n: int) -> Float[Tensor, "n d_model"]:
        """Rows of the residual stream after so many layers, such as its dictionaries are trained on."""

    @abstractmethod
    def dictionary(self, after: int, l1_coefficient: float | None = None) -> SAE:
        """The dictionary of the residual stream after so many layers, where the model is."""

    @abstractmethod
    def skip(self, after: int) -> Skip:
        """What is left out of training and counting there."""

    @abstractmethod
    def text(self, n: int) -> Int[Tensor, "n pos"]:
        """Made-up text with names, a sentence or two a context, that neither it nor a dictionary was trained on: at most `n`."""


class WithNames(TaskModel):
    """The study's own: trained on sentences of the task, from which some names and some ways to say it are held out."""

    begin = ActivationStream.END_OF_TEXT
    sentences = {"train": "sentences as in training", "dev": "other sentences", "held out": "held-out sentences"}
    described = ("a model of three layers, trained on pieces of the corpus and text made up for the task, whose mixture was "
                 "chosen by the held-out names' accuracy in known sentences")

    def __init__(self, study: Study):
        sizes, trained = study.profile.deep, deep.transformer(study, NAMES)
        self.study, self.model, self._artefact = study, trained.model, trained.artefact
        self.tokenizer, self.vocabulary, self.n_ctx = deep.tokenizer(study), deep.vocabulary(study), sizes.with_names.n_ctx
        self.names = dict(zip(("known", "held out"), ioi.split_names(), strict=True))
        self.l1_coefficient = sizes.names_dictionary.l1_coefficient
        self.recipe = {"dictionary": asdict(sizes.names_dictionary), "expansion": sizes.expansion}

    def stage(self, name: str, recipe: dict, make: Callable[[Path, Path], None]) -> Artefact:
        return self.study.store.stage(f"ioi_{name}", recipe, make, inputs=[self._artefact])

    def sample(self, after: int, n: int) -> Tensor:
        return deep.stream(self.study, after, on=NAMES).sample(n, "components")

    def dictionary(self, after: int, l1_coefficient: float | None = None) -> SAE:
        return deep.dictionary(self.study, after, l1_coefficient, NAMES).model

    def skip(self, after: int) -> Skip:  # noqa: ARG002
        return deep.skip(NAMES)

    def text(self, n: int) -> Tensor:
        made = ioi.training_contexts(self.tokenizer, self.study.contexts("test"), n, self.n_ctx, 10_000 + self.study.seed)
        trained_on = set(map(bytes, deep.contexts(self.study, NAMES).numpy()))  # short sentences come again by chance
        return made[[row not in trained_on for row in map(bytes, made.numpy())]]


class Pretrained(TaskModel):
    """One that was trained elsewhere, on other text: nothing was held out of it, and names are those that are one token to it."""

    sentences = {kind: f"sentences of the {place} list" for kind, place in zip(ioi.SENTENCES, ("first", "second", "third"),
                                                                              strict=True)}

    def __init__(self, study: Study):
        """Raises StudyError if there is no such model, or too few names are one token to it."""
        self.study, self.sizes, self._skips = study, study.profile.pretrained, {}
        self.own = own = own_model.open_model(study, self.sizes.model, self.sizes, best_device())
        self.model, self.tokenizer, self.vocabulary, self.begin = own.model, own.tokenizer, own.vocabulary, own.begin
        self.n_ctx = own.contexts.shape[1]
        self.names = {"all": tuple(ioi.name_ids(own.tokenizer, ioi.NAMES))}
        asked = study.profile.identification
        needed = 2 * max(asked.sentences_of_many // 2, *(exchanges for exchanges, _ in asked.growth)) + 3
        if len(self.exchanged) < needed:
            raise StudyError(f"To {own.name} {len(self.exchanged)} of the study's names are one token, and {needed} are needed; "
                             "take another model, or sets of fewer exchanges.")
        self.described = f"{own.name}, which was trained on other text; {len(self.exchanged)} names are one token to it"
        self.l1_coefficient = self.sizes.l1_coefficient
        self.recipe = {"pretrained": asdict(self.sizes), "dictionary": asdict(study.profile.deep.dictionary)}

    def stage(self, name: str, recipe: dict, make: Callable[[Path, Path], None]) -> Artefact:
        return self.study.store.stage(f"ioi_{name}", recipe | self.recipe, make, inputs=self.own.inputs,
                                      fingerprint=self.own.fingerprint, reference=False)

    def sample(self, after: int, n: int) -> Tensor:
        batch = self.study.profile.deep.dictionary.batch_size
        return own_model.stream(self.study, self.own, after, self.skip(after), batch).sample(n, "components")

    def dictionary(self, after: int, l1_coefficient: float | None = None) -> SAE:
        l1 = self.l1_coefficient if l1_coefficient is None else l1_coefficient
        found = own_model.trained(self.study, self.own, after, self.skip(after), l1, self.sizes.expansion)
        return found.to(best_device())

    def skip(self, after: int) -> Skip:
        if after not in self._skips:
            self._skips[after] = own_model.skip_for(self.own, own_model.norms(self.own)[after])
        return self._skips[after]

    def text(self, n: int) -> Tensor:
        return self.prompts(self.exchanged, "train", n, 10_000 + self.study.seed).tokens


@lru_cache(1)  # it holds the weights
def of(study: Study) -> TaskModel:
    """The model that the profile names, opened once. Raises StudyError as the two kinds do."""
    return Pretrained(study) if study.profile.pretrained.model else WithNames(study)
