"""A transformer of several layers and dictionaries on its residual stream: what notebooks 11 and 12 stand on."""

from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from sae_lib import residual
from sae_lib.activations import ActivationStream
from sae_lib.precision import best_device
from sae_lib.pretrain import train_transformer
from sae_lib.sae import SAE, SAEConfig
from sae_lib.study.pipeline import Study, Trained
from sae_lib.train import train_sae
from sae_lib.transformer import TransformerConfig, load_transformer, save_transformer


def contexts(study: Study) -> Tensor:
    """What the model, and dictionaries on it, are trained on: int32 [n_contexts, n_ctx]."""
    return study.contexts("train")


def _config(study: Study) -> TransformerConfig:
    return replace(study.profile.deep.transformer, seed=2 * study.seed)


def transformer(study: Study) -> Trained:
    """The model of several layers, and the log of its training."""
    config = _config(study)

    def make(out: Path, checkpoint: Path) -> None:
        model, log = train_transformer(contexts(study), config, checkpoint / "transformer.safetensors", device=best_device())
        save_transformer(model, out / "weights.safetensors", torch.float16)  # the committed one stays small
        log.to_json(out / "log.json", orient="records")

    artefact = study.store.stage("deep_transformer", asdict(config), make, inputs=[study.tokens_artefact])
    return Trained(load_transformer(artefact.path / "weights.safetensors", config),
                   pd.read_json(artefact.path / "log.json", orient="records"), artefact)


def stream(study: Study, after: int, batch_size: int | None = None) -> ActivationStream:
    """Training activations: the residual stream after so many layers, in batches of the dictionaries' size unless told."""
    return ActivationStream(transformer(study).model, contexts(study), batch_size or study.profile.deep.dictionary.batch_size,
                            replace(study.profile.stream, seed=2 * study.seed), device=best_device(), after=after)


def dictionary(study: Study, after: int, l1_coefficient: float | None = None) -> Trained:
    """The dictionary of the residual stream after so many layers, with the profile's L1 coefficient unless told."""
    sizes, model = study.profile.deep, transformer(study)
    train = replace(sizes.dictionary, seed=study.seed)
    if l1_coefficient is not None:
        train = replace(train, l1_coefficient=l1_coefficient)
    config = SAEConfig(d_in=sizes.transformer.d_model, d_sae=sizes.expansion * sizes.transformer.d_model, seed=study.seed,
                       model_name="deep_transformer", hook_name=residual.hook_name(model.model, after),
                       context_size=sizes.transformer.n_ctx)

    def make(out: Path, checkpoint: Path) -> None:
        source = stream(study, after, train.batch_size)
        sae, log = train_sae(source, config, train, checkpoint / "dictionary.safetensors", device=source.device)
        sae.metadata["dataset_path"] = study.profile.corpus.source
        sae.save(out, torch.float16)
        log.to_json(out / "log.json", orient="records")

    name = f"deep_sae_{after}" + ("" if l1_coefficient is None else f"_l1_{l1_coefficient:g}")
    everything = {"sae": asdict(config), "train": asdict(train), "stream": asdict(study.profile.stream)}
    artefact = study.store.stage(name, everything, make, inputs=[model.artefact, study.tokens_artefact])
    return Trained(SAE.load(artefact.path), pd.read_json(artefact.path / "log.json", orient="records"), artefact)
