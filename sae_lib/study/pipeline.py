"""What the notebooks ask for: each slow product of the study by its name, loaded if it exists, else made."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from sae_lib import corpus as corpus_module
from sae_lib import tokens as tokens_module
from sae_lib.activations import ActivationStream
from sae_lib.distributed import ALONE, Processes
from sae_lib.errors import StudyError
from sae_lib.evaluate import Text, best_detectors, count_won, held_out_pass
from sae_lib.memory import fitting_plan
from sae_lib.metrics import Interval, bootstrap_interval, density_summary, pearson_from_sums
from sae_lib.precision import best_device
from sae_lib.pretrain import train_transformer
from sae_lib.proxies import token_bytes
from sae_lib.sae import SAE, SAEConfig
from sae_lib.shrinkage import Correction, apply_correction, fit_correction
from sae_lib.study import environment, paths
from sae_lib.study.artefacts import Artefact, Store
from sae_lib.study.profiles import PROFILES
from sae_lib.study.scorecard import Scorecard
from sae_lib.tokens import TokenData
from sae_lib.train import TrainConfig, train_sae
from sae_lib.transformer import Transformer, TransformerConfig, load_transformer, save_transformer, shuffle_weights

SWEEP_CONTEXTS = 384  # held-out contexts on which the short trainings are compared


class Trained(NamedTuple):
    """A trained model or dictionary with the log of its training."""

    model: Transformer | SAE
    log: pd.DataFrame
    artefact: Artefact


def spread(tokens: TokenData, split: str, n_contexts: int | None) -> Text:
    """Contexts spread evenly over a split, so many or all of them."""
    contexts = torch.from_numpy(tokens.contexts(split).astype(np.int32))
    chosen = torch.linspace(0, len(contexts) - 1, min(len(contexts), n_contexts or len(contexts))).long().unique()

    def per_token(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).view_as(contexts)[chosen]

    return Text(contexts[chosen], per_token(tokens.doc_of_token(split)), per_token(tokens.domain_of_token(split)))


class Study:
    """One profile, seed and corpus; `begin` makes it. Its methods compose the library's steps into named artefacts."""

    def __init__(self, profile: str = "workshop", seed: int = 0, artefacts: str = "auto", corpus: str = "",
                 processes: Processes = ALONE):
        if profile not in PROFILES:
            raise StudyError(f"There is no profile '{profile}'; choose one of {', '.join(PROFILES)}.")
        self.profile = PROFILES[profile]
        paths.use_profile(profile)
        if corpus:
            self.profile = replace(self.profile, corpus=replace(self.profile.corpus, source=corpus))
        self.seed, self.processes = seed, processes
        self.store = Store(mode=artefacts)
        self._transformers: dict[str, Trained] = {}
        self.scorecard = Scorecard(profile=profile, corpus=self.profile.corpus.source, seed=seed)

    # --- text ---------------------------------------------------------------------------------------------------------

    @cached_property
    def _fingerprint(self) -> str:
        return corpus_module.fingerprint(self.profile.corpus)

    def _documents(self) -> Iterator[corpus_module.Document]:
        return corpus_module.documents(self.profile.corpus, cache=paths.data() / "hub")

    @cached_property
    def _tokenizer(self) -> Artefact:
        def make(out: Path, _: Path) -> None:
            tokens_module.train_tokenizer(self._documents(), self.profile.tokens).save(str(out / "tokenizer.json"))

        return self.store.stage("tokenizer", {"corpus": asdict(self.profile.corpus), "tokens": asdict(self.profile.tokens)}, make,
                                fingerprint=self._fingerprint, version=2)

    @cached_property
    def tokens_artefact(self) -> Artefact:
        def make(out: Path, _: Path) -> None:
            tokenizer = Tokenizer.from_file(str(self._tokenizer.path / "tokenizer.json"))
            budgets = corpus_module.budgets(self.profile.corpus)
            tokens_module.tokenise(self._documents(), tokenizer, self.profile.tokens, out, budgets)

        return self.store.stage("tokens", {"corpus": asdict(self.profile.corpus), "tokens": asdict(self.profile.tokens)}, make,
                                inputs=[self._tokenizer], fingerprint=self._fingerprint, reference=False, version=2)

    @cached_property
    def tokens(self) -> TokenData:
        """The tokenised corpus, split by document."""
        return TokenData.open(self.tokens_artefact.path)

    @cached_property
    def vocabulary(self) -> list[bytes]:
        """The bytes of every token, by id."""
        return token_bytes(self.tokens.tokenizer)

    def contexts(self, split: str) -> Tensor:
        """All contexts of a split, int32 [n_contexts, n_ctx]."""
        return torch.from_numpy(self.tokens.contexts(split).astype(np.int32))

    def contexts_with(self, domains: Sequence[str]) -> Tensor:
        """The contexts of the training text that hold text of any of these domains; all, if the corpus has none of them."""
        contexts, wanted = self.contexts("train"), [i for i, name in enumerate(self.tokens.domains) if name in domains]
        per_token = self.tokens.domain_of_token("train")[:contexts.numel()].reshape(contexts.shape)
        return contexts[torch.from_numpy(np.isin(per_token, wanted).any(1))] if wanted else contexts

    @cached_property
    def special_contexts(self) -> list[str]:
        """Names of the domains that are special contexts: the corpus's own, or all of another corpus's."""
        found = [name for name in self.tokens.domains if name in corpus_module.SPECIAL_CONTEXTS]
        return found or list(self.tokens.domains)

    def held_out(self, split: str = "test", whole: bool = False) -> Text:
        """Held-out text: contexts spread evenly over the split, as many as the profile evaluates, or all of them."""
        return spread(self.tokens, split, None if whole else self.profile.held_out_contexts)

    # --- transformers -------------------------------------------------------------------------------------------------

    def _seed_of(self, which: str) -> int:
        return {"B": 2 * self.seed + 1, "C": 10_000 + self.seed}.get(which, 2 * self.seed)

    def _transformer_config(self, which: str) -> TransformerConfig:
        return replace(self.profile.transformer, seed=self._seed_of(which))

    def transformer(self, which: str = "A") -> Trained:
        """Transformer "A", its twin "B" from another seed, a third, "C", or the control "random": A with each matrix's entries
        shuffled.
        """
        if which not in ("A", "B", "C", "random"):
            raise StudyError(f"There is no transformer '{which}'; ask for A, B, C or random.")
        if which not in self._transformers:
            self._transformers[which] = self._stage_transformer(which)
        return self._transformers[which]

    def pretrain(self, which: str, checkpoint: Path | None = None) -> tuple[Transformer, pd.DataFrame]:
        """A transformer trained on the corpus, and its log."""
        return train_transformer(self.contexts("train"), self._transformer_config(which), checkpoint, processes=self.processes,
                                 device=best_device())

    def _stage_transformer(self, which: str) -> Trained:
        config = self._transformer_config(which)

        def make(out: Path, checkpoint: Path) -> None:
            if which == "random":
                model, log = shuffle_weights(self.transformer("A").model, config, self.seed), pd.DataFrame()
            else:
                model, log = self.pretrain(which, checkpoint / "transformer.safetensors")
            save_transformer(model, out / "weights.safetensors")
            log.to_json(out / "log.json", orient="records")

        inputs = [self.transformer("A").artefact] if which == "random" else [self.tokens_artefact]
        artefact = self.store.stage(f"transformer_{which}", asdict(config) | {"kind": which}, make, inputs=inputs)
        return Trained(load_transformer(artefact.path / "weights.safetensors", config),
                       pd.read_json(artefact.path / "log.json", orient="records"), artefact)

    # --- dictionaries -------------------------------------------------------------------------------------------------

    def stream(self, which: str = "A", batch_size: int | None = None) -> ActivationStream:
        """Training activations of a transformer, in batches of the main dictionary's size unless told."""
        config = replace(self.profile.stream, seed=self._seed_of(which))
        return ActivationStream(self.transformer(which).model, self.contexts("train"),
                                batch_size or self.profile.dictionary.batch_size, config, self.processes, best_device())

    def train(self, on: str, config: SAEConfig, train: TrainConfig, checkpoint: Path | None = None) -> tuple[SAE, pd.DataFrame]:
        """A dictionary trained on a transformer's activations, and its log; refused if there is too little memory for it."""
        stream = self.stream(on, train.batch_size)
        self.store.log(str(fitting_plan(config, train, stream.rows_held, self.processes, device=stream.device)))
        return train_sae(stream, config, train, checkpoint, processes=self.processes, device=stream.device)

    def sae_config(self, on: str = "A") -> SAEConfig:
        """Sizes of the main dictionary on a transformer's activations."""
        transformer = self.profile.transformer
        return SAEConfig(d_in=transformer.d_mlp, d_sae=self.profile.d_sae, seed=self.seed,
                         model_name=f"transformer_{on}", hook_name=transformer.hook_name, context_size=transformer.n_ctx)

    def dictionary(self, on: str = "A") -> Trained:
        """The main dictionary, trained on a transformer's activations."""
        config, train = self.sae_config(on), replace(self.profile.dictionary, seed=self.seed)
        transformer = self.transformer(on)

        def make(out: Path, checkpoint: Path) -> None:
            sae, log = self.train(on, config, train, checkpoint / "dictionary.safetensors")
            sae.metadata["dataset_path"] = self.profile.corpus.source
            sae.save(out, torch.float16)  # the committed ones stay small
            log.to_json(out / "log.json", orient="records")

        everything = {"sae": asdict(config), "train": asdict(train), "stream": asdict(self.profile.stream)}
        artefact = self.store.stage(f"sae_{self.profile.expansion}x_{on}", everything, make,
                                    inputs=[transformer.artefact, self.tokens_artefact])
        return Trained(SAE.load(artefact.path), pd.read_json(artefact.path / "log.json", orient="records"), artefact)

    def corrected_dictionary(self, on: str = "A") -> SAE:
        """The main dictionary with the shrinkage of its activations undone; the same features are active."""
        dictionary, n = self.dictionary(on), self.profile.correction_activations

        def make(out: Path, _: Path) -> None:
            correction = fit_correction(dictionary.model, self.stream(on).sample(n, "correction"))
            save_file(correction._asdict(), out / "correction.safetensors")

        artefact = self.store.stage(f"correction_{self.profile.expansion}x_{on}", {"n_activations": n, "seed": self.seed}, make,
                                    inputs=[dictionary.artefact])
        return apply_correction(dictionary.model, Correction(**load_file(artefact.path / "correction.safetensors")))

    def sparsity_sweep(self) -> pd.DataFrame:
        """Short trainings that differ in the L1 coefficient alone, and one that differs in how features are born.

        Columns: l1; born ("rare", or "as in the paper": with Kaiming weights); l0; loss recovered (value, low, high); explained
        (variance); dead (share of features never active on the text evaluated); median_density of the others.
        """
        config, text, model = self.sae_config(), self.held_out("test").first(SWEEP_CONTEXTS), self.transformer("A")
        draws = {"seed": self.seed, "n_boot": self.profile.bootstrap}
        short = replace(self.profile.sweep, seed=self.seed)
        trainings = [replace(short, l1_coefficient=l1) for l1 in self.profile.sweep_l1] + [replace(short, birth_density=None)]

        def one(train: TrainConfig, checkpoint: Path) -> dict:
            sae, _ = self.train("A", config, train, checkpoint)
            found = held_out_pass(model.model, text, sae)
            density = density_summary(found.fired, len(found.document))
            return {"l1": train.l1_coefficient, "born": "as in the paper" if train.birth_density is None else "rare",
                    "l0": found.average("l0", **draws).value, **found.loss_recovered("zero", **draws)._asdict(),
                    "explained": found.explained_variance(**draws).value, "dead": density.dead,
                    "median_density": density.median_live}

        def make(out: Path, checkpoint: Path) -> None:
            rows = [one(train, checkpoint / f"{i}.safetensors") for i, train in enumerate(trainings)]
            pd.DataFrame(rows).to_json(out / "sweep.json", orient="records")

        everything = {"sae": asdict(config), "trainings": [asdict(train) for train in trainings],
                      "stream": asdict(self.profile.stream), "held_out": len(text.contexts)}
        artefact = self.store.stage("sparsity_sweep", everything, make, inputs=[model.artefact, self.tokens_artefact])
        return pd.read_json(artefact.path / "sweep.json", orient="records")

    def superposition(self, which: str = "A") -> tuple[pd.DataFrame, Interval]:
        """How well a transformer's best neuron and best feature detect each special context, chosen on validation text and
        measured on test text; and how many contexts the feature wins by 0.3.

        Columns: context; for each of neuron and feature its correlation (`neuron`), index (`neuron_unit`) and the ends of its
        interval (`neuron_low`, `neuron_high`).
        """
        labels = [self.tokens.domains.index(name) for name in self.special_contexts]
        model, dictionary = self.transformer(which), self.dictionary(which)
        draws = {"seed": self.seed, "n_boot": self.profile.bootstrap}

        def make(out: Path, _: Path) -> None:
            table, found = pd.DataFrame({"context": self.special_contexts}), {}
            texts = self.held_out("validation", whole=True), self.held_out("test", whole=True)
            for unit, sae in (("neuron", None), ("feature", dictionary.model)):
                best = found[unit] = best_detectors(model.model, sae, *texts, labels)
                ends = [bootstrap_interval(best.sums[:, :, i], lambda t: pearson_from_sums(*np.moveaxis(t, -1, 0)), **draws)
                        for i in range(len(labels))]
                table = table.assign(**{unit: best.pearson(), f"{unit}_unit": best.unit, f"{unit}_low": [e.low for e in ends],
                                        f"{unit}_high": [e.high for e in ends]})
            table.to_json(out / "detectors.json", orient="records")
            won = count_won(found["feature"], found["neuron"], 0.3, **draws)
            (out / "won.json").write_text(json.dumps(won._asdict()))

        # Measured on this environment's own text, so a committed one would not do.
        artefact = self.store.stage("superposition", draws | {"contexts": self.special_contexts}, make, reference=False,
                                    inputs=[model.artefact, dictionary.artefact, self.tokens_artefact])
        won = Interval(**json.loads((artefact.path / "won.json").read_text()))
        return pd.read_json(artefact.path / "detectors.json", orient="records"), won


def begin(profile: str, seed: int, artefacts: str, corpus: str) -> Study:
    """Start a notebook: check its parameters and print what it runs on."""
    from sae_lib.study import replicas  # imports this file

    study, versions = Study(profile, seed, artefacts, corpus), environment.versions()
    print(f"profile {profile} · seed {seed} · artefacts {artefacts} · corpus {study.profile.corpus.source}")
    print(" · ".join(f"{name} {number}" for name, number in versions.items()), f"· {environment.cpus()} cores")
    # What further trainings gave, where they are known, belongs to the rows.
    study.scorecard.others = lambda row: replicas.known(study, row)
    return study
