"""A model of the reader's own, and a dictionary for it: trained elsewhere or here, from a folder or from the hub (notebook 13).

What the rest of the study does on its own transformers is done here on any that TransformerLens can bridge. Such a model brings
its own tokenizer, its own special tokens and, as a rule, positions whose activations are far longer than all others.
"""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from tokenizers import Tokenizer
from torch import Tensor

from sae_lib import corpus, effects, residual
from sae_lib import tokens as tokens_module
from sae_lib.activations import ActivationStream, Skip, StreamConfig
from sae_lib.errors import StudyError
from sae_lib.evaluate import Text
from sae_lib.metrics import Interval, bootstrap_interval
from sae_lib.precision import best_device
from sae_lib.proxies import token_bytes
from sae_lib.sae import SAE, SAEConfig
from sae_lib.study import deep, figures, paths
from sae_lib.study.artefacts import Artefact
from sae_lib.study.hub_folders import dictionary_folder, model_folder
from sae_lib.study.pipeline import Study, spread
from sae_lib.study.profiles import OwnSizes
from sae_lib.study.scorecard import Scorecard
from sae_lib.tokens import TokenData
from sae_lib.train import train_sae
from sae_lib.transformer import Transformer, load_pretrained

NORM_CONTEXTS = 64  # contexts that norms are looked at in
SINK = 10  # times the median norm; what is longer is a sink
MIN_USED = 5  # times that a token occurs in the training text before anything is said of its logit
STUDYS = ("", 2, "")  # MODEL, LAYER and DICTIONARY of notebook 13 as it comes: its figures and rows are the study's


@dataclass(frozen=True)
class Own:
    """A model with the study's text in its own tokens."""

    name: str
    """"the study's deep model", or what the user asked for."""
    sizes: OwnSizes
    model: Transformer
    tokenizer: Tokenizer
    vocabulary: list[bytes]
    """The bytes of every token of the model, by id; none for special and unused ones."""
    contexts: Tensor
    """Training text, int32 [n_contexts, n_ctx]."""
    validation: Text
    test: Text
    domains: list[str]
    special: tuple[int, ...]
    """Ids of special tokens."""
    begin: int
    """That of them which its texts begin with."""
    inputs: tuple[Artefact, ...]
    fingerprint: str
    folder: Path | None
    """Where the model was read from; none if it is the study's."""

    @cached_property
    def used(self) -> Bool[Tensor, " d_vocab"]:
        """Tokens that the training text has often enough, and that are text."""
        return effects.used_tokens(self.contexts.flatten().numpy(), self.vocabulary, MIN_USED)


# --- where the results go --------------------------------------------------------------------------------------------

class Outputs(NamedTuple):
    """Where notebook 13 puts what it makes."""

    show: Callable[..., None]
    """`figures.show`."""
    row: Callable[..., None]
    """`Scorecard.row`."""
    published: Path
    """The folder for the dictionary."""


def outputs(study: Study, model: str, after: int, dictionary: str) -> Outputs:
    """Of the study's own model, layer and dictionary: the study's figures and scorecard. Of any other: a folder for these
    alone, data/runs/PROFILE/own/NAME, so that the study's stay what they are.
    """
    asked, profile = (model, after, dictionary), study.profile.name
    words = (short_name(model) or "study", f"after-{after}", short_name(dictionary), paths.digest(asked)[:6])
    name = "-".join(re.sub(r"[^\w.-]", "_", word) for word in words if word)
    published = paths.data() / "published" / profile / name
    if asked == STUDYS:
        return Outputs(figures.show, study.scorecard.row, published)
    folder = paths.runs(profile) / "own" / name
    scorecard = Scorecard(folder / "results.json", **study.scorecard.header)
    print(f"figures and rows go to {folder}")
    return Outputs(partial(figures.show, folder=folder), scorecard.row, published)


def short_name(source: str) -> str:
    """The last part of the name of a model or dictionary, in small letters."""
    return source.removeprefix("hf:").rstrip("/").rpartition("/")[2].lower()


# --- the model and its text ------------------------------------------------------------------------------------------

def open_model(study: Study, name: str = "", sizes: OwnSizes | None = None, device: torch.device | str = "cpu") -> Own:
    """The model: "" is the study's own of several layers, else a folder in Hugging Face's layout or a name of the hub.

    The corpus is tokenised anew by the model's tokenizer, by the profile's sizes for notebook 13 unless told. Raises StudyError
    if there is no such model, or it has no tokenizer.
    """
    sizes = sizes or study.profile.own
    if not name:
        trained = deep.transformer(study)
        vocabulary = study.vocabulary + [b""] * (trained.model.cfg.d_vocab - len(study.vocabulary))
        data, inputs = study.tokens, (trained.artefact, study.tokens_artefact)
        return Own("the study's deep model", sizes, trained.model, data.tokenizer, vocabulary, deep.contexts(study),
                   *(spread(data, split, sizes.held_out_contexts) for split in ("validation", "test")), data.domains,
                   (ActivationStream.END_OF_TEXT,), ActivationStream.END_OF_TEXT, inputs, "", None)
    folder = model_folder(name)
    tokenizer, begin = _tokenizer(folder)
    model = load_pretrained(str(folder), device)
    artefact = _tokens(study, tokenizer, begin, sizes.n_tokens, min(sizes.n_ctx, model.cfg.n_ctx))
    data, vocabulary = TokenData.open(artefact.path), token_bytes(tokenizer)
    if len(vocabulary) > model.cfg.d_vocab:
        raise StudyError(f"The tokenizer in {folder} has {len(vocabulary)} tokens and the model {model.cfg.d_vocab}; take "
                         "the tokenizer that the model was trained with.")
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    files = [file for file in sorted(folder.glob("*")) if file.suffix in (".json", ".safetensors", ".bin")]
    return Own(name, sizes, model, tokenizer, vocabulary + [b""] * (model.cfg.d_vocab - len(vocabulary)),
               torch.from_numpy(data.contexts("train").astype(np.int32)),
               *(spread(data, split, sizes.held_out_contexts) for split in ("validation", "test")), data.domains,
               tuple(sorted(special | {begin})), begin, (artefact,),
               paths.digest({file.name: paths.sha256(file) for file in files}), folder)


def _tokenizer(folder: Path) -> tuple[Tokenizer, int]:
    """The tokenizer of a model's folder, and the token that its texts begin with: BOS, else the end of the text before."""
    if not (folder / "tokenizer.json").is_file():
        raise StudyError(f"The model in {folder} has no tokenizer.json; save its fast tokenizer there as well.")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config, special = paths.read_json(folder / "config.json") or {}, tokenizer.get_added_tokens_decoder()
    named = [token for key in ("bos_token_id", "eos_token_id") for token in np.atleast_1d(config.get(key)).tolist()]
    known = [token for token in named if token in special] + [i for i, token in special.items() if token.special]
    if not known:
        raise StudyError(f"Neither the configuration nor the tokenizer in {folder} names a special token to begin a text with; "
                         "add one, such as <|endoftext|>.")
    return tokenizer, known[0]


def _tokens(study: Study, tokenizer: Tokenizer, begin: int, n_tokens: int, n_ctx: int) -> Artefact:
    """A slice of the study's corpus in another tokenizer's tokens, split by document like the whole."""
    text = replace(study.profile.corpus, target_tokens=n_tokens)
    config = replace(study.profile.tokens, vocab_size=tokenizer.get_vocab_size(), n_ctx=n_ctx)

    def make(out: Path, _: Path) -> None:
        documents = corpus.documents(text, cache=paths.data() / "hub")
        tokens_module.tokenise(documents, tokenizer, config, out, corpus.budgets(text), begin)

    everything = {"corpus": asdict(text), "tokens": asdict(config), "begin": begin,
                  "tokenizer": paths.digest(json.loads(tokenizer.to_str()))}
    return study.store.stage("own_tokens", everything, make, fingerprint=corpus.fingerprint(text), reference=False)


def held_out_loss(own: Own, **draws: int) -> dict[str, Interval]:
    """Loss on the test text, of tokens that are text: in nats a token, and in bits a byte, which compares tokenizers."""
    text, size = own.test, torch.tensor([float(len(token)) for token in own.vocabulary])
    losses = torch.cat([residual.losses(own.model, few.long(), {"clean": None}, own.model.cfg.n_layers)["clean"]
                        for few in text.contexts.split(16)])
    following = size[text.contexts[:, 1:].long()]
    documents, index = torch.unique(text.documents[:, 1:], return_inverse=True)
    terms = torch.stack([losses, torch.ones_like(losses), following], -1)[following > 0].double()
    sums = torch.zeros(len(documents), 3, dtype=torch.float64).index_add_(0, index[following > 0], terms).numpy()
    return {"nats a token": bootstrap_interval(sums, lambda t: t[..., 0] / t[..., 1], **draws),
            "bits a byte": bootstrap_interval(sums, lambda t: t[..., 0] / t[..., 2] / np.log(2), **draws)}


# --- sinks -----------------------------------------------------------------------------------------------------------

def norms(own: Own) -> dict[int, Tensor]:
    """Length of the residual stream after each number of layers, in some held-out contexts: {after: [n_contexts, n_ctx]}."""
    n, found = own.model.cfg.n_layers, []
    for few in own.validation.contexts[:NORM_CONTEXTS].long().to(residual.device(own.model)).split(16):
        resid = residual.activations(own.model, few, 0)
        lengths = [resid.float().norm(dim=-1)]
        for after in range(n):
            resid = residual.go_on(own.model, resid, after, after + 1)
            lengths.append(resid.float().norm(dim=-1))
        found.append(torch.stack(lengths))
    return dict(enumerate(torch.cat(found, dim=1)))


def skip_for(own: Own, lengths: Tensor) -> Skip:
    """What to leave out, by rule, from `norms` at a layer: special tokens; the leading positions whose median is more than ten
    times the median of all; and single tokens beyond that.
    """
    limit = SINK * lengths.median().item()
    long = (lengths.median(0).values > limit).int()
    return Skip(own.special, int(long.cumprod(0).sum()), limit)


def skipped(own: Own, after: int, skip: Skip) -> pd.Series:
    """Tokens of the test text by why they are left out (each for the first reason that fits), and those that are counted."""
    counts = dict.fromkeys(("special tokens", "first positions", f"over {SINK} times the median norm", "counted"), 0)
    for few in own.test.contexts.long().split(16):
        steps = [Skip(own.special).mask(few), Skip(own.special, skip.first).mask(few),
                 skip.mask(few, residual.activations(own.model, few, after))]
        upto = [0, *(int(step.sum()) for step in steps), few.numel()]
        for name, n in zip(counts, np.diff(upto).tolist(), strict=True):
            counts[name] += n
    return pd.Series(counts, name="tokens of the test text")


# --- the dictionary --------------------------------------------------------------------------------------------------

def stream(study: Study, own: Own, after: int, skip: Skip, batch_size: int) -> ActivationStream:
    """Training activations of the residual stream, harvested on the GPU if there is one: where another's model is not there yet,
    it is loaded a second time.
    """
    device, n_ctx = best_device(), own.contexts.shape[1]
    there = own.folder is None or residual.device(own.model) == device
    model = own.model if there else load_pretrained(str(own.folder), device)
    kept = max(1, n_ctx - max(8, 2 * skip.first))  # room for what is left out
    config = StreamConfig(tokens_per_context=kept, chunk_contexts=study.profile.stream.chunk_contexts, seed=2 * study.seed)
    return ActivationStream(model, own.contexts, batch_size, config, device=device, after=after, skip=skip)


def dictionary(study: Study, own: Own, after: int, skip: Skip, source: str = "") -> SAE:
    """The dictionary: "" is one that is trained here (of the study's own model, the study's), else a folder in any of the three
    layouts, or hf:OWNER/NAME/path/in/repository.

    Raises StudyError if there is none, or if it is of another width than the residual stream.
    """
    if source:
        sae, wanted = SAE.load(dictionary_folder(source)), residual.width(own.model, after)
        if sae.config.d_in != wanted:
            raise StudyError(f"The dictionary reads {sae.config.d_in} numbers and the residual stream of {own.name} has "
                             f"{wanted}: give a dictionary of this model, or another MODEL.")
        return sae
    if own.folder is None:
        return deep.dictionary(study, after).model
    sizes = study.profile.deep
    return trained(study, own, after, skip, sizes.dictionary.l1_coefficient, sizes.expansion)


def trained(study: Study, own: Own, after: int, skip: Skip, l1_coefficient: float, expansion: int) -> SAE:
    """A dictionary of so many features per dimension that is trained here, by the recipe of those on the study's own models."""
    train = replace(study.profile.deep.dictionary, seed=study.seed, n_activations=own.sizes.n_activations,
                    l1_coefficient=l1_coefficient)
    d_in = residual.width(own.model, after)
    config = SAEConfig(d_in, expansion * d_in, study.seed, own.name, residual.hook_name(own.model, after),
                       own.contexts.shape[1])

    def make(out: Path, checkpoint: Path) -> None:
        activations = stream(study, own, after, skip, train.batch_size)
        sae, _ = train_sae(activations, config, train, checkpoint / "dictionary.safetensors", device=activations.device)
        sae.metadata["dataset_path"] = study.profile.corpus.source
        sae.save(out)

    everything = {"sae": asdict(config), "train": asdict(train), "skip": skip._asdict(),
                  "chunk_contexts": study.profile.stream.chunk_contexts}
    return SAE.load(study.store.stage("own_sae", everything, make, inputs=own.inputs, fingerprint=own.fingerprint,
                                      reference=False).path)


PLACES = ((r"blocks\.(\d+)\.hook_resid_pre", 0), (r"blocks\.(\d+)\.hook_resid_post", 1), (r"(?:.*\.)?(?:layers|h)\.(\d+)", 1),
          (r"resid_post_layer_(\d+)", 1))


def layers_before(hook_name: str) -> int | None:
    """After how many layers the place lies that a dictionary names, in any of three libraries' words; none if it is no residual
    stream that is known here.
    """
    for pattern, more in PLACES:
        if found := re.fullmatch(pattern, hook_name):
            return int(found[1]) + more
    return None


def doubts(own: Own, after: int, sae: SAE) -> list[str]:
    """What a dictionary says of itself that is not what was asked for, a sentence each; nothing if all agrees."""
    said, found = sae.config, []
    names = {short_name(own.name)} | ({"deep_transformer"} if own.folder is None else set())
    if said.model_name and short_name(said.model_name) not in names:
        found.append(f"The dictionary was made for the model '{said.model_name}', and this is {own.name}.")
    place = layers_before(said.hook_name)
    if said.hook_name and place is None:
        found.append(f"The dictionary was made for '{said.hook_name}', which is not known to be a residual stream.")
    elif place is not None and place != after:
        found.append(f"The dictionary was made for '{said.hook_name}', after {place} layers, and LAYER is {after}.")
    return found
