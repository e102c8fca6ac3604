"""Dictionaries of several widths, trained alike: measured, linked and mapped. What notebook 08 loads.

A wide dictionary takes tens of megabytes and its unit table hundreds, so they stay on the machine that made them; the
numbers, links and places that notebook 08 needs of them are small, and are artefacts that can be committed. The dictionaries
are asked for only while one of these is made.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse
import torch
from jaxtyping import Bool, Int
from safetensors.numpy import load_file, save_file
from scipy.sparse import csc_array, csr_array
from torch import Tensor

from sae_lib import effects, features, splitting
from sae_lib.compare import live_units
from sae_lib.evaluate import Text, held_out_pass
from sae_lib.precision import low_precision
from sae_lib.sae import SAE, SAEConfig
from sae_lib.study.artefacts import Artefact
from sae_lib.study.panels import label
from sae_lib.study.pipeline import Study
from sae_lib.study.tables import flat
from sae_lib.token_classes import Classes
from sae_lib.train import TrainConfig

LISTED = 6  # tokens that are kept of those a feature fires on, and of those it raises
TEXT_SHARES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0)
CLASSES = ("digits", "capitals", "lower-case letters", "capitalised words", "mixed letters and digits", "punctuation",
           "line breaks")
RULES = ("all", "strong")
"""Which activations of a feature decide whether it is *for* a context (`splitting.units_of_context`): all of them, on documents
that are labelled so; or only the strong ones (`splitting.strong`), on text of the context by its label or by its characters
(`effects.CONTEXTS`). The papers count by reading a feature's strongest examples, wherever they are; the second rule is that,
written down."""
EXAMPLES, BEFORE = 3, 8  # of a feature for a context: its greatest activations, each with so many tokens up to it
SEEN = 10  # tokens that occur less often in the training text have logit weights that training hardly set


class Width(NamedTuple):
    """What is known of the dictionary of one width, from held-out text."""

    expansion: int
    features: pd.DataFrame
    """A row a feature. fired, maximum, live (as by `compare.live_units`): on the test text; nearest: greatest cosine of its
    direction with another's; context, pearson: the context that it correlates with best on validation text (its place in
    `study.special_contexts`), and that correlation on the test text."""
    fires_on: Int[np.ndarray, "n_features listed"]
    """The commonest tokens of its 20 greatest activations; -1 where there are fewer."""
    raises: Int[np.ndarray, "n_features listed"]
    """The tokens whose logits it raises most."""
    contexts: pd.DataFrame
    """A row a context and one of RULES. tokens, documents: in the test text; best, pearson: the feature that correlates with the
    label best on validation text, and how well on the test text; chosen: how many features are for it on validation text; count,
    low, high: how many of these are on the test text too; and the share of the context's tokens in each of CLASSES."""
    members: pd.DataFrame
    """A row for each of the chosen, and for the best. context, rule, unit; fired, inside, pearson: on the test text; specific:
    whether it is one of those that are counted; examples: the BEFORE tokens that end with each of its EXAMPLES greatest
    activations; and the share of its activations within the context in each of CLASSES."""
    live_by_text: pd.DataFrame
    summary: dict[str, list[float]]
    """l0 and recovered (loss, against zero ablation), each with its interval."""
    artefact: Artefact

    @property
    def name(self) -> str:
        return f"{self.expansion}x"

    def of_context(self, context: str, rule: str) -> pd.Series:
        """The row of a context and a rule."""
        return self.contexts.set_index(["context", "rule"]).loc[(context, rule)]


# --- what is big -----------------------------------------------------------------------------------------------------


def _configs(study: Study, expansion: int) -> tuple[SAEConfig, TrainConfig]:
    return (replace(study.sae_config(), d_sae=expansion * study.profile.transformer.d_mlp),
            replace(study.profile.width_training, seed=study.seed))


def _recipe(study: Study, expansion: int) -> dict:
    sae, train = _configs(study, expansion)
    return {"sae": asdict(sae), "train": asdict(train), "stream": asdict(study.profile.stream)}


def _dictionary(study: Study, expansion: int) -> tuple[SAE, Artefact]:
    config, train = _configs(study, expansion)

    def make(out: Path, checkpoint: Path) -> None:
        sae, _ = study.train("A", config, train, checkpoint / "dictionary.safetensors")
        sae.save(out)

    inputs = [study.transformer("A").artefact, study.tokens_artefact]
    artefact = study.store.stage(f"sae_width_{expansion}x", _recipe(study, expansion), make, inputs=inputs, reference=False)
    return SAE.load(artefact.path), artefact


def _table(study: Study, expansion: int, split: str) -> csc_array:
    """Unit table of the whole split: of the rarest contexts a part of it would hold too few documents."""
    sae, dictionary = _dictionary(study, expansion)
    dtype = low_precision()  # the encoder's products are most of the work

    def make(out: Path, _: Path) -> None:
        low = sae.to(dtype)
        table = features.activation_table(study.transformer("A").model, study.held_out(split, whole=True).contexts,
                                          lambda acts: low.encode(acts.to(dtype)))
        scipy.sparse.save_npz(out / "table.npz", table, compressed=False)

    artefact = study.store.stage(f"table_width_{expansion}x_{split}", {}, make, inputs=[dictionary, study.tokens_artefact],
                                 reference=False)
    return csc_array(scipy.sparse.load_npz(artefact.path / "table.npz"))


# --- one width -------------------------------------------------------------------------------------------------------


def width(study: Study, expansion: int) -> Width:
    """The dictionary of `expansion` features a neuron, trained as `profile.width_training` says, measured on held-out text."""
    draws = {"seed": study.seed, "n_boot": study.profile.bootstrap}

    def make(out: Path, _: Path) -> None:
        sae, _ = _dictionary(study, expansion)
        found = held_out_pass(study.transformer("A").model, study.held_out("test"), sae)
        summary = {"l0": found.average("l0", **draws), "recovered": found.loss_recovered("zero", **draws)}
        (out / "summary.json").write_text(json.dumps(summary))
        text, table = study.held_out("test", whole=True), _table(study, expansion, "test")
        splitting.live_by_text(table, flat(text.documents), TEXT_SHARES, study.seed).to_json(out / "live_by_text.json")
        best, contexts, members = _contexts(study, _table(study, expansion, "validation"), table, draws)
        contexts.to_json(out / "contexts.json", orient="records")
        members.to_json(out / "members.json", orient="records")
        columns = {"fired": np.diff(table.indptr).astype(np.int32), "live": live_units(table), "maximum": features.maxima(table),
                   "nearest": splitting.nearest_cosine(sae.W_dec), "fires_on": fires_on(table, flat(text.contexts)),
                   "raises": _raises(study, sae.W_dec)}
        save_file(columns | best, out / "features.safetensors")

    config = _recipe(study, expansion) | draws | {"held_out": study.profile.held_out_contexts, "rules": RULES, "examples": BEFORE}
    artefact = study.store.stage(f"width_{expansion}x", config, make,
                                 inputs=[study.transformer("A").artefact, study.tokens_artefact])
    columns = load_file(artefact.path / "features.safetensors")
    tokens, raises = columns.pop("fires_on"), columns.pop("raises")
    read = lambda name: pd.read_json(artefact.path / f"{name}.json")
    return Width(expansion, pd.DataFrame(columns), tokens, raises, read("contexts"), read("members"), read("live_by_text"),
                 json.loads((artefact.path / "summary.json").read_text()), artefact)


def _contexts(study: Study, chosen_on: csc_array, table: csc_array,
              draws: dict) -> tuple[dict[str, np.ndarray], pd.DataFrame, pd.DataFrame]:
    """Each feature's best context; the table of contexts; the table of features that are specific to one."""
    texts = {split: study.held_out(split, whole=True) for split in ("validation", "test")}
    labels = {split: [label(study, name, text) for name in study.special_contexts] for split, text in texts.items()}
    correlation = {split: np.stack([features.pearson_with(units, y) for y in labels[split]], axis=1)
                   for split, units in (("validation", chosen_on), ("test", table))}
    documents, tokens, classes = flat(texts["test"].documents), flat(texts["test"].contexts), _classes(study)
    best, rows, members = correlation["validation"].argmax(0).tolist(), [], []
    for rule in RULES:
        tables = (chosen_on, table) if rule == "all" else (splitting.strong(chosen_on), splitting.strong(table))
        for i, name in enumerate(study.special_contexts):
            inside = {split: labels[split][i] | (_by_characters(study, name, text) if rule == "strong" else False)
                      for split, text in texts.items()}
            is_context, own = inside["test"], {"context": name, "rule": rule}
            chosen = splitting.units_of_context(tables[0], inside["validation"])
            count, counted = splitting.count_of_context(tables[1], chosen, is_context, documents, **draws)
            shares = _shares(classes, tokens[is_context], np.ones(is_context.sum()))
            rows.append(own | {"tokens": int(is_context.sum()), "documents": len(np.unique(documents[is_context])),
                               "best": best[i], "pearson": correlation["test"][best[i], i], "chosen": len(chosen),
                               "count": count.value, "low": count.low, "high": count.high} | shares)
            for unit in np.union1d(chosen, best[i]).tolist():
                where, values = features.column(tables[1], unit)
                within, top = is_context[where], where[np.argsort(-values, kind="stable")[:EXAMPLES]]
                members.append(own | {"unit": unit, "fired": len(where), "inside": int(within.sum()),
                                      "pearson": correlation["test"][unit, i], "specific": unit in chosen[counted],
                                      "examples": _examples(texts["test"].contexts, top)}
                               | _shares(classes, tokens[where[within]], values[within]))
    best = correlation["validation"].argmax(1)
    columns = {"context": best.astype(np.int32), "pearson": correlation["test"][np.arange(len(best)), best].astype(np.float32)}
    names = ["context", "rule", "unit", "fired", "inside", "pearson", "specific", "examples", *CLASSES]
    return columns, pd.DataFrame(rows), pd.DataFrame(members, columns=names)


def _by_characters(study: Study, context: str, text: Text) -> Bool[np.ndarray, " n_tokens"]:
    """Whether the characters of each token, wherever it stands, are of a context; never, if that cannot be told of characters."""
    if context not in effects.CONTEXTS:
        return np.zeros(text.contexts.numel(), dtype=bool)
    return effects.in_characters(text.contexts, study.vocabulary, effects.CONTEXTS[context]).ravel()


def _examples(contexts: Int[Tensor, "n_contexts n_ctx"], places: Int[np.ndarray, " places"]) -> list[list[int]]:
    """The tokens up to each place, of its document."""
    found = []
    for row, end in zip(*np.divmod(places, contexts.shape[1]), strict=True):
        tokens = contexts[row, max(0, end + 1 - BEFORE):end + 1].numpy()
        found.append(tokens[np.flatnonzero(np.append(0, tokens) == 0)[-1]:].tolist())  # after an end-of-text, if there is one
    return found


def _classes(study: Study) -> Bool[np.ndarray, "classes d_vocab"]:
    found = Classes(study.vocabulary)
    none = np.zeros(len(study.vocabulary), dtype=bool)
    return np.stack([found.member[found.names.index(name)] if name in found.names else none for name in CLASSES])


def _shares(classes: np.ndarray, tokens: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    total = weights.sum()
    shares = classes[:, tokens] @ weights / total if total else np.full(len(CLASSES), np.nan)
    return dict(zip(CLASSES, shares.tolist(), strict=True))


def fires_on(table: csc_array, tokens: Int[np.ndarray, " n_tokens"]) -> Int[np.ndarray, "n_units listed"]:
    """The commonest tokens of each unit's 20 greatest activations, commonest first; -1 where there are fewer."""
    found = np.full((table.shape[1], LISTED), -1, dtype=np.int32)
    for unit in np.flatnonzero(np.diff(table.indptr)).tolist():
        where, values = features.column(table, unit)
        top = tokens[where[np.argsort(-values, kind="stable")[:features.ENDS]]]
        common = [token for token, _ in Counter(top.tolist()).most_common(LISTED)]
        found[unit, :len(common)] = common
    return found


def used_tokens(study: Study) -> Bool[Tensor, " d_vocab"]:
    """Which tokens occur SEEN times in the training text's first 20 million; never end-of-text."""
    used = torch.from_numpy(np.bincount(study.tokens.tokens("train")[:20_000_000], minlength=len(study.vocabulary)) >= SEEN)
    used[0] = False
    return used


def _raises(study: Study, directions: Tensor) -> Int[np.ndarray, "n_units listed"]:
    model, used = study.transformer("A").model, used_tokens(study)
    weights = (effects.logit_weights(model, part, used) for part in directions.split(1024))
    return np.concatenate([part.nan_to_num(-torch.inf).topk(LISTED).indices.numpy() for part in weights]).astype(np.int32)


# --- several widths --------------------------------------------------------------------------------------------------


class Links(NamedTuple):
    """Which features of one width hang together with which of the next."""

    links: list[csr_array]
    """`splitting.masked_cosine` of each width and the next, over the test text."""
    by_luck: list[csr_array]
    """The same where the two read different text."""


def links(study: Study, widths: Sequence[Width]) -> Links:
    """Links between the features of successive widths."""
    def make(out: Path, _: Path) -> None:
        narrow = _table(study, widths[0].expansion, "test")
        for i, wider in enumerate(widths[1:]):
            wide = _table(study, wider.expansion, "test")
            for name, found in (("links", splitting.masked_cosine(narrow, wide)),
                                ("by_luck", splitting.links_by_luck(narrow, wide, study.profile.tokens.n_ctx))):
                scipy.sparse.save_npz(out / f"{name}_{i}.npz", found.astype(np.float32))
            narrow = wide

    artefact = study.store.stage("width_links", {"by_luck": "links"}, make, inputs=[each.artefact for each in widths])
    read = lambda name: [csr_array(scipy.sparse.load_npz(artefact.path / f"{name}_{i}.npz")) for i in range(len(widths) - 1)]
    return Links(read("links"), read("by_luck"))


def feature_map(study: Study, widths: Sequence[Width]) -> pd.DataFrame:
    """`splitting.decoder_map` of the live features of all widths: dictionary is the place in `widths`."""
    def make(out: Path, _: Path) -> None:
        decoders = [_dictionary(study, each.expansion)[0].W_dec for each in widths]
        found = splitting.decoder_map(decoders, study.seed, [each.features.live.to_numpy() for each in widths], min_dist=0.01)
        save_file({name: found[name].to_numpy(np.float32 if name in ("x", "y") else np.int32) for name in found},
                  out / "map.safetensors")

    artefact = study.store.stage("width_map", {"seed": study.seed}, make, inputs=[each.artefact for each in widths])
    return pd.DataFrame(load_file(artefact.path / "map.safetensors"))
