"""The training step of a dictionary, against peers, against its own dense way, and against its own matrix products run bare."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from .arithmetic import l1_at_scale, mean_norm_scale, row, unit_norm_scale
from .measure import Arm, Benchmark, Sizes, alternate
from .protocol import WorkerError

L1 = 3.7  # of the study's main dictionary, at its scale
LR = 1e-3  # the study's, and dictionary_learning's default
ACTIVE = 32  # features that a row has while steps are clocked: where training spends its time; also the k of TopK
SAME = 0.01  # two who compute the same loss from the same weights differ by less: bfloat16 has three digits

Contestants = dict[str, tuple[str, dict]]  # name -> worker, and the arguments of its `new`


def contestants(b: Benchmark, batch: int, d_sae: int, warmup: int, k: int | None = None) -> Contestants:
    """Whom to measure: all minimise the same objective at the same rate, each library in every setting that it offers."""
    mine, theirs = mean_norm_scale(b.data["d_in"], b.data["mean_norm"]), unit_norm_scale(b.data["mean_square_norm"])
    shared = {"data": str(b.folder / "activations_train.npy"), "batch_size": batch, "d_sae": d_sae, "lr": LR, "warmup": warmup}
    sparsity = (lambda scale: {"k": k}) if k else (lambda scale: {"l1_coefficient": l1_at_scale(L1, mine, scale)})
    own = {"k": k} if k else {"l1_coefficient": L1, "birth_density": ACTIVE / d_sae}
    found: Contestants = {"project": ("project", shared | own)}
    settings = {"fp32": {}, "bf16": {"autocast": True}, "bf16_compiled": {"autocast": True, "compiled": True}}
    settings |= {"sparse": {"sparse": True}} if k else {}
    if "saelens" in b.workers:
        found |= {f"saelens_{name}": ("saelens", shared | {"scale": mine} | sparsity(mine) | setting)
                  for name, setting in settings.items()}
    if "dictionary_learning" in b.workers:
        found["dictionary_learning"] = "dictionary_learning", shared | {"scale": theirs} | sparsity(theirs)
    return found


def begin(b: Benchmark, id_: str, everyone: Contestants) -> Contestants:
    """Begin all trainings; those remain that can make a step, and whose loss is the first one's from the first one's weights."""
    weights, remaining, first = str(b.folder / "weights.npz"), {}, None
    for name, (worker, how) in everyone.items():
        try:
            b.workers[worker].ask("new", name=name, **how)
            if first is None:
                b.workers[worker].ask("export", name=name, path=weights)
            loss = b.workers[worker].ask("loss", name=name, path=weights)["loss"]
            b.workers[worker].ask("steps", name=name, steps=1)
        except WorkerError as error:
            b.note(f"{id_}: {name} is left out, for {error}")
            continue
        first = first or loss
        b.losses.append({"id": id_, "name": name, "loss": loss, "relative": loss / first})
        if abs(loss / first - 1) > SAME:
            b.note(f"{id_}: {name} is left out, for its loss is {loss:.5g} where {next(iter(remaining))}'s is {first:.5g}.")
            b.workers[worker].ask("drop", name=name)
            continue
        remaining[name] = worker, how
    return remaining


def end(b: Benchmark, everyone: Contestants) -> None:
    for name, (worker, _) in everyone.items():
        b.workers[worker].ask("drop", name=name)


def arm(b: Benchmark, name: str, worker: str, steps: int, **step: object) -> Arm:
    return Arm(name, lambda: b.workers[worker].ask("steps", name=name, steps=steps, **step)["times"])


def relu(width: int, b: Benchmark) -> None:
    """A step of ReLU-L1 training: the project as it trains and by its dense way, the peers, and five bare products."""
    s, d_sae, steps, id_ = b.sizes, width * b.data["d_in"], max(1, b.sizes.steps * 8 // width), f"sae_step.relu.{width}x"
    b.say(f"Training step, {width}x")
    everyone = begin(b, id_, contestants(b, s.batch, d_sae, warmup=1))
    arms = [arm(b, name, worker, steps) for name, (worker, _) in everyone.items()]
    b.workers["project"].ask("new", name="dense", **everyone["project"][1] | {"birth_density": None})
    arms.append(arm(b, "dense", "project", steps, sparse=False))
    found = alternate([*arms, b.products(d_sae, steps)], max(3, s.rounds * 8 // width))
    l0 = b.workers["project"].ask("steps", name="project", steps=1)["l0"]
    end(b, everyone | {"dense": ("project", {})})
    b.record(id_, found, s.batch, "activations/s", d_sae)
    others = {name: f"vs_{name}" for name in found if name not in ("project", "dense")}
    b.compare(id_, found, s.batch, "activations/s", others, note=f"as in training: sparse way at L0 {l0:.0f}")
    b.compare(f"{id_}.dense", found, s.batch, "activations/s", others, project="dense",
              note="dense way, half of the features active")


def topk(b: Benchmark) -> None:
    """A step of TopK training against the fastest setting of SAELens, and against dictionary_learning."""
    s, d_sae, id_ = b.sizes, b.sizes.topk * b.data["d_in"], f"sae_step.topk.{b.sizes.topk}x"
    b.say(f"TopK training step, {s.topk}x")
    everyone = begin(b, id_, contestants(b, s.batch, d_sae, warmup=1, k=ACTIVE))
    found = alternate([*(arm(b, name, worker, 1) for name, (worker, _) in everyone.items()), b.products(d_sae)], min(3, s.rounds))
    end(b, everyone)
    b.record(id_, found, s.batch, "activations/s", d_sae)
    if "project" not in everyone:
        return
    saelens = [name for name in everyone if name.startswith("saelens")]
    if saelens:
        best = min(saelens, key=lambda name: sum(sum(times) for times in found[name]))
        b.compare(id_, found, s.batch, "activations/s", {best: "vs_saelens_best"}, note=f"k {ACTIVE}; the best is {best}")
    rest = [name for name in ("dictionary_learning", "own_matmuls") if name in found]
    b.compare(id_, found, s.batch, "activations/s", {name: f"vs_{name}" for name in rest}, note=f"k {ACTIVE}")


def wide(b: Benchmark) -> None:
    """A wide dictionary, in a process of its own: the project as it trains against its own dense way."""
    s, d_sae, id_ = b.sizes, b.sizes.wide * b.data["d_in"], f"sae_step.relu.{b.sizes.wide}x"
    b.say(f"Training step, {s.wide}x")
    shared = b.workers["project"]
    b.workers["project"] = b.start("project")
    try:
        ask = b.workers["project"].ask
        ask("new", name="project", **contestants(b, s.batch, d_sae, warmup=1)["project"][1])
        sparse, dense = (arm(b, "project", "project", 1, **way) for way in ({}, {"sparse": False}))
        sparse.run()
        sparse.run()
        peak = ask("memory")["gb"]
        found = alternate([sparse, dense._replace(name="dense"), b.products(d_sae)], min(3, s.rounds))
        l0 = ask("steps", name="project", steps=1)["l0"]
    finally:
        b.workers["project"].close()
        b.workers["project"] = shared
    b.record(id_, found, s.batch, "activations/s", d_sae)
    b.compare(id_, found, s.batch, "activations/s", {"dense": "vs_dense", "own_matmuls": "vs_own_matmuls"},
              note=f"sparse way at L0 {l0:.0f}")
    b.rows.append(row(f"{id_}.peak_memory", peak, None, None, "GB", note="whole process, training the sparse way"))


def parts(sizes: Sizes) -> list[tuple[str, Callable[[Benchmark], None]]]:
    return [*(("relu", partial(relu, width)) for width in sizes.widths), ("topk", topk), ("wide", wide)]


def judged(b: Benchmark, worker: str, name: str) -> dict:
    """Held-out loss of a training as it stands, in one unit for all."""
    path = str(Path(b.folder) / "weights.npz")
    b.workers[worker].ask("export", name=name, path=path)
    return b.workers["project"].ask("evaluate", data=str(b.folder / "activations_held_out.npy"), path=path, l1_coefficient=L1,
                                    scale=mean_norm_scale(b.data["d_in"], b.data["mean_norm"]))
