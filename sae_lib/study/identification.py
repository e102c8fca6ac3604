"""Indirect object identification, taken apart by patching: what notebook 11 loads.

One name is exchanged for another in sentences of the task, and the directions of several codings of the residual stream are
patched in the order of `patching.order`. An *exchange* is a pair of names; a *set* is one or more exchanges whose sentences share
one order, found on half of the sentences and measured on the other half. Names are those the task was trained with, or all that
are one token to a model that was trained elsewhere; sentences are such as the model was never trained on: "dev" where a choice is
made, "held out" where it is measured.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lib import baselines, features, ioi, patching, residual
from sae_lib.baselines import Projection
from sae_lib.errors import StudyError
from sae_lib.metrics import bootstrap_interval, share_interval
from sae_lib.patching import Coding
from sae_lib.seeds import generator, numpy_generator
from sae_lib.study import paths, task_model
from sae_lib.study.identification_numbers import half, needed
from sae_lib.study.pipeline import Study
from sae_lib.study.task_model import TaskModel

FEATURES, DENSE, PCA, PAIRS, DIMENSIONS, RANDOM = ("features", "dictionary without L1", "PCA", "PCA, two signs", "dimensions",
                                                   "random rotation")
CODINGS = (FEATURES, PCA, PAIRS, DENSE, DIMENSIONS, RANDOM)
ROLES = ("indirect object", "subject", "subject again", "last token", "all others")
# Features of an exchange that are looked at, tokens listed of each, and made-up contexts in which these are looked for.
FIRST, LISTED, TEXT = 3, 5, 6000
PURPOSES = {"order": 0, "measure": 1}


def accuracy(study: Study) -> pd.DataFrame:
    """How well the model does the task. A row for each kind of its names and of sentences, with the share of prompts in which the
    indirect object is likelier than the subject (right) and than all tokens (first), and Wilson's intervals.
    """
    task, n = task_model.of(study), study.profile.identification.prompts

    def make(out: Path, _: Path) -> None:
        rows = []
        for names, chosen in task.names.items():
            for sentences in ioi.SENTENCES:
                found = ioi.answers(task.model, task.prompts(chosen, sentences, n, study.seed))
                row = {"names": names, "sentences": sentences, "prompts": n, "margin": float(found.margin.mean())}
                for name, values in (("right", found.right), ("first", found.first)):
                    row |= dict(zip((name, f"{name}_low", f"{name}_high"), share_interval(int(values.sum()), n), strict=True))
                rows.append(row)
        pd.DataFrame(rows).to_json(out / "accuracy.json", orient="records")

    artefact = task.stage("accuracy", {"prompts": n, "seed": study.seed}, make)
    return pd.read_json(artefact.path / "accuracy.json")


# --- sets of exchanges -----------------------------------------------------------------------------------------------


class Sentences(NamedTuple):
    """Sentences of a set, as base and as target."""

    base: ioi.Prompts
    target: ioi.Prompts


def exchanged(study: Study, exchanges: int, repeat: int, kind: str, purpose: str, n: int) -> Sentences:
    """Sentences of the `repeat`th set of so many exchanges. Subjects are other names; each exchange has ABBA and BABA alike.

    Raises StudyError if there are fewer than two sentences for each exchange.
    """
    if n < 2 * exchanges:
        raise StudyError(f"{n} sentences are too few for {exchanges} exchanges of names; give two or more for each.")
    task, rng = task_model.of(study), numpy_generator(study.seed, f"exchanges, {kind}, {exchanges}", repeat)
    names = rng.permutation(task.exchanged).tolist()
    drawn, others = names[:2 * exchanges], names[2 * exchanges:]
    asked = task.prompts(others, kind, n, 1000 * study.seed + 2 * repeat + PURPOSES[purpose])
    ids = torch.tensor(list(ioi.name_ids(task.tokenizer, drawn).values())).view(exchanges, 2)[torch.arange(n) // 2 % exchanges]
    return Sentences(asked.exchanged(ids[:, 0]), asked.exchanged(ids[:, 1]))


def codings(study: Study, after: int, names: Sequence[str]) -> dict[str, Coding]:
    """Codings of the residual stream after some layers by name; "features, L1 0.3" is of a dictionary of that coefficient."""
    task = task_model.of(study)
    sample, device = task.sample(after, study.profile.component_sample), residual.device(task.model)
    d_model = sample.shape[1]
    rotation = torch.linalg.qr(torch.randn(d_model, d_model, generator=generator(study.seed, "random rotation")))[0].contiguous()
    there = lambda found: Projection(*(part.to(device) for part in found))
    whole, turned = there(baselines.pca(sample, d_model)), there((rotation, rotation.T.contiguous(), torch.zeros(d_model)))
    features_of = lambda l1=None: patching.of_features(task.dictionary(after, l1))
    makers = {FEATURES: features_of, DENSE: lambda: features_of(0.0), PCA: lambda: patching.of_rotation(whole),
              PAIRS: lambda: patching.of_pairs(whole), DIMENSIONS: lambda: patching.of_dimensions(d_model, device),
              RANDOM: lambda: patching.of_rotation(turned)}
    return {name: makers[name]() if name in makers else features_of(float(name.rpartition(" ")[2])) for name in names}


def _set(study: Study, task: TaskModel, coding: Coding, after: int, kind: str, exchanges: int, repeat: int) -> dict:
    """The curves of one set."""
    sizes, model = study.profile.identification, task.model
    n = sizes.sentences if exchanges == 1 else sizes.sentences_of_many
    runs = {}
    for purpose in PURPOSES:
        sentences = exchanged(study, exchanges, repeat, kind, purpose, n)
        runs[purpose] = patching.pair(model, sentences.base.tokens, sentences.target.tokens, sentences.base.last, after)
    thresholds = np.logspace(*sizes.thresholds).tolist()
    ordered = patching.order(model, runs["order"], coding, after, thresholds, study.seed)
    found = patching.patch(model, runs["measure"], coding, after, ordered, sizes.most)
    changes = (coding.codes(runs["measure"].target) - coding.codes(runs["measure"].base)).abs() > 1e-4
    changes &= runs["measure"].inside[..., None]
    kl, bound = found.divergence, half(found.divergence.mean(0))
    draws = numpy_generator(study.seed, "prompts").integers(n, size=(study.profile.bootstrap, n))
    # A draw that never gets there takes more than all of them.
    drawn = np.nan_to_num(half(kl[draws].mean(1)), nan=kl.shape[1])
    return {"after": after, "kind": kind, "exchanges": exchanges, "repeat": repeat,
            "half": None if np.isnan(bound) else float(bound), "drawn": drawn.tolist() if exchanges > 1 else [],
            "changed": float(changes.any(1).sum(1).float().mean()), "ordered": len(ordered),
            "kl": kl.mean(0).round(5).tolist(), "edit": found.edit.mean(0).round(4).tolist(),
            "first": ordered[:FIRST].tolist()}


def _sets(study: Study, name: str, after: int, kind: str, wanted: Sequence[tuple[int, int]],
          chosen: Sequence[str]) -> pd.DataFrame:
    """The table of sets [(exchanges, how many sets), ...] of chosen codings, made once."""
    task = task_model.of(study)

    def sets(coding: Coding) -> dict:
        return {"sets": [_set(study, task, coding, after, kind, exchanges, repeat)
                         for exchanges, repeats in wanted for repeat in range(repeats)]}

    def make(out: Path, checkpoint: Path) -> None:
        rows = []
        for coding, found in codings(study, after, chosen).items():
            part = paths.kept(checkpoint / f"{coding}.json", partial(sets, found))
            rows += [{"coding": coding} | row for row in part["sets"]]
        (out / "sets.json").write_text(json.dumps(rows))

    artefact = task.stage(name, _recipe(study, after) | {"kind": kind, "wanted": list(wanted), "codings": list(chosen)}, make)
    return pd.DataFrame(json.loads((artefact.path / "sets.json").read_text())).astype({"half": float})


def _recipe(study: Study, after: int) -> dict:
    """What sets of exchanges depend on besides the model."""
    return {"after": after, "sizes": asdict(study.profile.identification), "seed": study.seed,
            "components": study.profile.component_sample} | task_model.of(study).recipe


def layer_choice(study: Study) -> pd.DataFrame:
    """Features and PCA after each layer, one exchange at a time, on development sentences: the layer is chosen here."""
    sizes = study.profile.identification
    return pd.concat([_sets(study, f"dev_{after}", after, "dev", [(1, sizes.dev_exchanges)], (FEATURES, PCA))
                      for after in sizes.layers], ignore_index=True)


def chosen_layer(choice: pd.DataFrame) -> int:
    """The layer after which features need fewest directions as a share of what PCA needs; of equals, the first."""
    mean = choice.assign(needed=needed(choice)).pivot_table(index="after", columns="coding", values="needed")
    return int((mean[FEATURES] / mean[PCA].clip(lower=1)).idxmin())


def one_exchange(study: Study, after: int) -> pd.DataFrame:
    """One exchange at a time, each with an order of its own."""
    return _sets(study, f"one_{after}", after, "held out", [(1, study.profile.identification.exchanges)], CODINGS)


def many_exchanges(study: Study, after: int) -> pd.DataFrame:
    """One order for the sentences of many exchanges, as in the paper: the largest set of `growth`, and other codings on it."""
    most, both = study.profile.identification.growth[-1][0], growth(study, after)
    others = _sets(study, f"many_{after}", after, "held out", [(most, 1)], (PAIRS, DENSE))
    return pd.concat([both[(both.exchanges == most) & (both.repeat == 0)], others], ignore_index=True)


def growth(study: Study, after: int) -> pd.DataFrame:
    """Sets of more and more exchanges, of features and PCA."""
    return _sets(study, f"growth_{after}", after, "held out", study.profile.identification.growth, (FEATURES, PCA))


def coefficients(study: Study, after: int) -> pd.DataFrame:
    """One exchange at a time, for dictionaries of several L1 coefficients: columns as elsewhere, and l1."""
    sizes, main = study.profile.identification, task_model.of(study).l1_coefficient
    name_of = {l1: FEATURES if l1 == main else DENSE if l1 == 0 else f"features, L1 {l1:g}" for l1 in sizes.l1}
    others = [name for name in name_of.values() if name not in CODINGS]
    parts = [one_exchange(study, after)] + ([_sets(study, f"l1_{after}", after, "held out", [(1, sizes.exchanges)], others)]
                                            if others else [])
    table = pd.concat(parts, ignore_index=True)
    l1 = table.coding.map({name: l1 for l1, name in name_of.items()})
    return table.assign(l1=l1).dropna(subset="l1")


# --- where, and what -------------------------------------------------------------------------------------------------


def where(study: Study) -> pd.DataFrame:
    """What is left of the KL when the whole residual stream is patched at some positions after some layers: columns role, after,
    left (a share), low, high (bootstrap over sentences).
    """
    model, sizes = task_model.of(study).model, study.profile.identification
    base, target = exchanged(study, sizes.sentences_of_many // 2, 0, "held out", "measure", sizes.sentences_of_many)
    positions, rows = _positions(base), []
    for after in range(model.cfg.n_layers + 1):
        runs = patching.pair(model, base.tokens, target.tokens, base.last, after)
        before = patching.divergences(model, runs, runs.base, after)
        for role, here in positions.items():
            patched = torch.where(here.to(before.device)[..., None], runs.target, runs.base)
            left = patching.divergences(model, runs, patched, after)
            found = bootstrap_interval(torch.stack([left, before], 1).double().cpu().numpy(), lambda t: t[..., 0] / t[..., 1],
                                       seed=study.seed, n_boot=study.profile.bootstrap)
            rows.append({"role": role, "after": after, "left": found.value, "low": found.low, "high": found.high})
    return pd.DataFrame(rows)


def _positions(asked: ioi.Prompts) -> dict[str, Tensor]:
    """Where each of ROLES stands, bool [n, pos]."""
    place = torch.arange(asked.tokens.shape[1])
    subject = asked.tokens == asked.subject[:, None]
    first = subject & (subject.cumsum(1) == 1)
    found = [asked.tokens == asked.indirect[:, None], first, subject & ~first, place == asked.last[:, None]]
    others = ~torch.stack(found).any(0) & (place < asked.last[:, None])
    return dict(zip(ROLES, [*found, others], strict=True))


class Meaning(NamedTuple):
    """The first features of each exchange, and what they fire on in other text."""

    table: pd.DataFrame
    """A row a feature of an exchange. repeat, rank, feature; base, target: the names; role: where its code changes most; change:
    of that code; left: share of the KL that is left when it and those before it are patched; density; fires_on: tokens; share:
    of its activation that is on the first of these; name, name_share: the name whose sentences have most of its activation (-1 if
    it has none), and what share of it."""
    examples: dict[int, list[tuple[list[int], list[float]]]]
    """Of some features, tokens around their strongest activations and the activations."""


def meaning(study: Study, after: int) -> Meaning:
    """What the first features in the order of each exchange are, from made-up text that nothing was trained on."""
    task, sizes, sets = task_model.of(study), study.profile.identification, one_exchange(study, after)

    def make(out: Path, _: Path) -> None:
        sae, made, device = task.dictionary(after), task.text(TEXT), residual.device(task.model)
        units = features.activation_table(task.model, made.to(device), sae.encode, after, task.skip(after))
        tokens, rows, examples, n_ctx = made.flatten().numpy(), [], {}, made.shape[1]
        ids = np.array(list(ioi.name_ids(task.tokenizer, ioi.NAMES).values()))
        has = (made.numpy()[:, :, None] == ids).any(1)
        for row in sets[sets.coding == FEATURES].itertuples():
            sentences = exchanged(study, 1, row.repeat, "held out", "measure", sizes.sentences)
            codes = [sae.encode(residual.activations(task.model, each.tokens.to(device), after), row.first).cpu()
                     for each in sentences]
            role_of = _positions(sentences.base)
            for rank, unit in enumerate(row.first):
                change = (codes[1] - codes[0])[..., rank]
                of_role = {role: change[here].mean().item() for role, here in role_of.items() if here.any()}
                role = max(of_role, key=lambda name: abs(of_role[name]))
                where_, values = features.column(units, unit)
                common = Counter()
                for token, value in zip(tokens[where_].tolist(), values.tolist(), strict=True):
                    common[token] += value
                best, whole = common.most_common(LISTED), sum(common.values())
                of_name = np.bincount(where_ // n_ctx, values, len(made)) @ has
                rows.append({"repeat": row.repeat, "rank": rank + 1, "feature": unit, "base": int(sentences.base.indirect[0]),
                             "target": int(sentences.target.indirect[0]), "role": role, "change": of_role[role],
                             "left": row.kl[rank + 1] / row.kl[0], "density": len(where_) / len(tokens),
                             "fires_on": [token for token, _ in best], "share": best[0][1] / whole if best else 0.0,
                             "name": int(ids[of_name.argmax()]) if best else -1,
                             "name_share": float(of_name.max() / max(whole, 1e-12))})
                examples[unit] = _examples(tokens, where_, values, n_ctx)
        (out / "meaning.json").write_text(json.dumps({"table": rows, "examples": examples}))

    artefact = task.stage(f"meaning_{after}", _recipe(study, after) | {"first": FIRST, "text": TEXT}, make)
    found = json.loads((artefact.path / "meaning.json").read_text())
    return Meaning(pd.DataFrame(found["table"]), {int(unit): value for unit, value in found["examples"].items()})


def _examples(tokens: Int[np.ndarray, " n"], where_: Int[np.ndarray, " active"], values: Float[np.ndarray, " active"],
              n_ctx: int, n: int = 4, around: int = 7) -> list[tuple[list[int], list[float]]]:
    """The greatest activations, each with the tokens before it and a few after it, and the activations on all of them."""
    dense, found = np.zeros(len(tokens)), []
    dense[where_] = values
    for place in where_[np.argsort(-values, kind="stable")[:n]].tolist():
        start = place // n_ctx * n_ctx
        window = slice(max(start, place - around), min(start + n_ctx, place + around // 2))
        found.append((tokens[window].tolist(), dense[window].round(3).tolist()))
    return found
