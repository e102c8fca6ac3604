"""Transformers of several layers and dictionaries on their residual stream: what notebooks 11 and 12 stand on.

There are two. One is trained on the corpus; nobody gives anything to anybody in code and manuals, so the other, "names", is
trained on short text made up for indirect object identification, and has a token for each name besides.
"""

from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import pandas as pd
import torch
from tokenizers import Tokenizer
from torch import Tensor

from sae_lib import ioi, residual
from sae_lib.activations import ActivationStream, Skip
from sae_lib.precision import best_device
from sae_lib.pretrain import train_transformer
from sae_lib.sae import SAE, SAEConfig
from sae_lib.study.pipeline import Study, Trained
from sae_lib.train import train_sae
from sae_lib.transformer import TransformerConfig, load_transformer, save_transformer


def tokenizer(study: Study) -> Tokenizer:
    """The study's tokenizer with a token for each name; ids of all others are as they were."""
    return ioi.with_names(study.tokens.tokenizer)


def vocabulary(study: Study) -> list[bytes]:
    """The bytes of every token of the model with names, by id."""
    return study.vocabulary + [f" {name}".encode() for name in ioi.NAMES]


def contexts(study: Study, on: str = "corpus") -> Tensor:
    """What a model, and dictionaries on it, are trained on: int32 [n_contexts, n_ctx]."""
    return study.contexts("train") if on == "corpus" else _with_names(study)


@lru_cache(1)  # tens of seconds of writing and tokenising, asked for by each dictionary
def _with_names(study: Study) -> Tensor:
    config = study.profile.deep.with_names
    return ioi.training_contexts(tokenizer(study), study.contexts("train"), config.n_steps * config.batch_contexts, config.n_ctx,
                                 study.seed)


def _config(study: Study, on: str) -> TransformerConfig:
    sizes, seed = study.profile.deep, 2 * study.seed
    if on == "corpus":
        return replace(sizes.transformer, seed=seed)
    return replace(sizes.with_names, d_vocab=sizes.transformer.d_vocab + len(ioi.NAMES), seed=seed)


def transformer(study: Study, on: str = "corpus") -> Trained:
    """The model of several layers trained on the "corpus" or on sentences with "names", and the log of its training."""
    config = _config(study, on)

    def make(out: Path, checkpoint: Path) -> None:
        model, log = train_transformer(contexts(study, on), config, checkpoint / "transformer.safetensors", device=best_device())
        save_transformer(model, out / "weights.safetensors", torch.float16)  # the committed one stays small
        log.to_json(out / "log.json", orient="records")

    artefact = study.store.stage("deep_transformer" + _suffix(on), asdict(config), make, inputs=[study.tokens_artefact],
                                 version=1 if on == "corpus" else 2)
    return Trained(load_transformer(artefact.path / "weights.safetensors", config),
                   pd.read_json(artefact.path / "log.json", orient="records"), artefact)


def _suffix(on: str) -> str:
    return "" if on == "corpus" else f"_{on}"


def skip(on: str = "corpus") -> Skip:
    """What is no activation to train on: of the model with names, what fills its short contexts up."""
    return Skip() if on == "corpus" else Skip((ActivationStream.END_OF_TEXT,))


def stream(study: Study, after: int, batch_size: int | None = None, on: str = "corpus") -> ActivationStream:
    """Training activations: the residual stream after so many layers, in batches of the dictionaries' size unless told."""
    sizes, config = study.profile.deep, replace(study.profile.stream, seed=2 * study.seed)
    if on != "corpus":  # about so many tokens of a short context are a sentence's
        config = replace(config, tokens_per_context=sizes.with_names.n_ctx // 2, chunk_contexts=16 * config.chunk_contexts)
    return ActivationStream(transformer(study, on).model, contexts(study, on), batch_size or sizes.dictionary.batch_size, config,
                            device=best_device(), after=after, skip=skip(on))


def dictionary(study: Study, after: int, l1_coefficient: float | None = None, on: str = "corpus") -> Trained:
    """The dictionary of the residual stream after so many layers, with the profile's L1 coefficient unless told."""
    sizes, model, read = study.profile.deep, transformer(study, on), _config(study, on)
    train = replace(sizes.dictionary if on == "corpus" else sizes.names_dictionary, seed=study.seed)
    if l1_coefficient is not None:
        train = replace(train, l1_coefficient=l1_coefficient)
    config = SAEConfig(d_in=read.d_model, d_sae=sizes.expansion * read.d_model, seed=study.seed,
                       model_name="deep_transformer" + _suffix(on), hook_name=residual.hook_name(model.model, after),
                       context_size=read.n_ctx)

    def make(out: Path, checkpoint: Path) -> None:
        source = stream(study, after, train.batch_size, on)
        sae, log = train_sae(source, config, train, checkpoint / "dictionary.safetensors", device=source.device)
        sae.metadata["dataset_path"] = study.profile.corpus.source
        sae.save(out, torch.float16)
        log.to_json(out / "log.json", orient="records")

    name = f"deep_sae{_suffix(on)}_{after}" + ("" if l1_coefficient is None else f"_l1_{l1_coefficient:g}")
    everything = {"sae": asdict(config), "train": asdict(train), "stream": asdict(study.profile.stream)}
    artefact = study.store.stage(name, everything, make, inputs=[model.artefact, study.tokens_artefact])
    return Trained(SAE.load(artefact.path), pd.read_json(artefact.path / "log.json", orient="records"), artefact)
