"""Whether dictionaries pass from one library to another: one writes, its own loader and another's read, both encode the same."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from sae_lib.sae import SAE, GatedSAE, JumpReLUSAE, SAEConfig, TopKSAE

from .arithmetic import row
from .exchange import D_IN, D_SAE, THRESHOLD, K, activations, answered, fill
from .measure import Benchmark
from .protocol import WorkerError

SAME = 1e-5  # the greatest difference that rounding may make
PEERS = ("saelens", "dictionary_learning", "sparsify")


def own() -> Iterator[tuple[str, SAE]]:
    """A dictionary of each kind; BatchTopK and Matryoshka ones are JumpReLU ones once they are trained."""
    config = SAEConfig(D_IN, D_SAE)
    for name, sae in (("standard", SAE(config)), ("topk", TopKSAE(config, K)), ("jumprelu", JumpReLUSAE(config)),
                      ("gated", GatedSAE(config))):
        yield name, fill(sae)
    batch_top_k = fill(JumpReLUSAE(config))
    batch_top_k.threshold.data.fill_(THRESHOLD)
    yield "batchtopk", batch_top_k


@torch.no_grad()
def interchange(b: Benchmark) -> None:
    """Every kind of ours read by SAELens, and every kind of SAELens, dictionary_learning and sparsify read here."""
    if not b.peers:
        b.note("interchange: nothing was passed on, for there are no peers.")
        return
    b.say("Interchange")
    base = b.folder / "interchange"
    shutil.rmtree(base, ignore_errors=True)
    for name, sae in own():
        folder = base / "project" / name
        sae.save(folder)
        try:
            b.workers["saelens"].ask("read", folder=str(folder))
        except (KeyError, WorkerError) as error:
            b.note(f"interchange: {name} was not read by SAELens ({error})")
            continue
        _record(b, f"project.{name}.read_by_saelens", sae, folder)
    for peer in PEERS:
        worker = b.workers.get(peer)
        try:
            worker = worker or b.start(peer)
            for name in worker.ask("write", folder=str(base / peer))["names"]:
                folder = base / peer / name
                _record(b, f"{peer}.{name}.read_by_project", SAE.load(folder), folder)
        except WorkerError as error:
            b.note(f"interchange: {error}")
        finally:
            if worker and peer not in b.workers:
                worker.close()


def _record(b: Benchmark, name: str, sae: SAE, folder: Path) -> None:
    """A row: the greatest difference between what a dictionary gives here and what the peer found."""
    features, reconstruction = (value.numpy() for value in sae(activations()))
    theirs = answered(folder)
    apart = max(float(np.abs(mine - other).max()) for mine, other in zip((features, reconstruction), theirs, strict=True))
    l0 = (features > 0).sum(1).mean()
    b.rows.append(row(f"interchange.{name}", apart, None, None, "greatest difference",
                      note=f"activations up to {features.max():.2f}, L0 {l0:.1f}"))
    b.say(f"  {name:<60}{apart:.1e}")
    if not (apart <= SAME and l0 > 1):
        b.note(f"interchange: {name} differs by {apart:.2g}, where rounding makes {SAME:g} at most, at L0 {l0:.1f}.")
