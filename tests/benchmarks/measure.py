"""What is measured: arms that take turns, and the rows that come of them."""
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from .arithmetic import l1_at_scale, mean_norm_scale, order, product_operations, rate, ratio, row, unit_norm_scale
from .protocol import Worker, WorkerError

L1 = 3.7  # of the study's main dictionary, at its scale
LR = 1e-3  # the study's, and dictionary_learning's default
ACTIVE = 32  # features that a row has while the project is clocked: where training spends its time


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    batch: int
    rows: int
    rounds: int
    steps: int  # of each arm in a round, at 8x
    widths: tuple[int, ...]
    topk: int
    wide: int
    curve_batch: int
    slices: int
    slice_seconds: float
    harvest_contexts: int
    transformer_steps: int


FULL = Sizes(batch=8192, rows=524_288, rounds=7, steps=3, widths=(8, 32), topk=32, wide=256, curve_batch=2048, slices=8,
             slice_seconds=8.0, harvest_contexts=1024, transformer_steps=20)
QUICK = Sizes(batch=1024, rows=32_768, rounds=2, steps=2, widths=(8,), topk=8, wide=32, curve_batch=1024, slices=2,
              slice_seconds=2.0, harvest_contexts=64, transformer_steps=3)


class Arm(NamedTuple):
    """Someone who takes a turn in every round: a name, and what gives the seconds of its steps."""

    name: str
    run: Callable[[], list[float]]


def alternate(arms: list[Arm], rounds: int) -> dict[str, list[list[float]]]:
    """Seconds of each arm in each round, all arms once a round; a first round that warms up is not counted."""
    found: dict[str, list[list[float]]] = {arm.name: [] for arm in arms}
    by_name = {arm.name: arm for arm in arms}
    for arm in arms:
        arm.run()
    for i in range(rounds):
        for name in order([arm.name for arm in arms], i):
            found[name].append(by_name[name].run())
    return found


@dataclass
class Benchmark:
    """The workers that are there, the data they share, and what has been found."""

    sizes: Sizes
    folder: Path
    start: Callable[[str], Worker]  # "project", "saelens" or "dictionary_learning"
    peers: bool
    say: Callable[[str], None]
    rows: list[dict] = field(default_factory=list)
    measurements: list[dict] = field(default_factory=list)
    curves: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    workers: dict[str, Worker] = field(default_factory=dict)
    data: dict = field(default_factory=dict)

    def run(self, tokens: Path | None, transformer: Path | None) -> None:
        """Everything; a part that fails is named in the notes, and the others are measured all the same."""
        try:
            for name in ("project", *(("saelens", "dictionary_learning") if self.peers else ())):
                self.workers[name] = self.start(name)
                try:
                    self.workers[name].ask("drop_all")
                except WorkerError as error:
                    if name == "project":
                        raise
                    self.workers.pop(name).close()
                    self.notes.append(str(error))
            self.data = self.workers["project"].ask(
                "activations", rows=self.sizes.rows, held_out=min(16_384, self.sizes.rows // 4),
                out=str(self.folder / "activations"),
                tokens=str(tokens) if tokens else None, transformer=str(transformer) if transformer else None)
            for part in (*(partial(self.relu, width) for width in self.sizes.widths), self.topk, self.wide, self.harvest,
                         self.transformer, self.loss_curves):
                try:
                    part()
                except WorkerError as error:
                    self.notes.append(str(error))
                    self.say(str(error))
        finally:
            for worker in self.workers.values():
                worker.close()

    # --- dictionaries ------------------------------------------------------------------------------------------------

    def contestants(self, batch: int, d_sae: int, warmup: int, k: int | None = None) -> dict[str, tuple[str, dict]]:
        """Whom to measure: name -> worker, and the arguments of its `new`. All minimise the same objective at the same rate."""
        mine, theirs = mean_norm_scale(self.data["d_in"], self.data["mean_norm"]), unit_norm_scale(self.data["mean_square_norm"])
        shared = {"data": str(self.folder / "activations_train.npy"), "batch_size": batch, "d_sae": d_sae, "lr": LR,
                  "warmup": warmup}
        sparsity = (lambda scale: {"k": k}) if k else (lambda scale: {"l1_coefficient": l1_at_scale(L1, mine, scale)})
        found: dict[str, tuple[str, dict]] = {}
        if k is None:
            found["project"] = "project", shared | {"l1_coefficient": L1, "birth_density": ACTIVE / d_sae}
        if "saelens" in self.workers:
            saelens = shared | {"scale": mine} | sparsity(mine)
            found["saelens_fp32"] = "saelens", saelens | {"autocast": False}
            found["saelens_bf16"] = "saelens", saelens | {"autocast": True}
            if k:
                found["saelens_sparse"] = "saelens", saelens | {"autocast": False, "sparse": True}
        if "dictionary_learning" in self.workers:
            found["dictionary_learning"] = "dictionary_learning", shared | {"scale": theirs} | sparsity(theirs)
        return found

    def arm(self, name: str, worker: str, how: dict, steps: int, **step: object) -> Arm:
        self.workers[worker].ask("new", name=name, **how)
        return Arm(name, lambda: self.workers[worker].ask("steps", name=name, steps=steps, **step)["times"])

    def steps_at(self, width: int) -> int:
        return max(1, self.sizes.steps * 8 // width)

    def relu(self, width: int) -> None:
        """A step of ReLU-L1 training: the project as it trains and by its dense way, the peers, and five bare products."""
        s, d_sae, steps = self.sizes, width * self.data["d_in"], self.steps_at(width)
        self.say(f"Training step, {width}x")
        everyone = self.contestants(s.batch, d_sae, warmup=1)
        arms = [self.arm(name, worker, how, steps) for name, (worker, how) in everyone.items()]
        dense = everyone["project"][1] | {"birth_density": None}
        arms.append(self.arm("project_dense", "project", dense, steps, sparse=False))
        found = alternate([*arms, self.products(d_sae, steps)], max(3, s.rounds * 8 // width))
        l0 = self.workers["project"].ask("steps", name="project", steps=1)["l0"]
        self.drop(everyone | {"project_dense": ("project", {})})
        self.record(f"sae_step.relu.{width}x", found, s.batch, "activations/s", products="own_matmuls",
                    operations=product_operations(s.batch, self.data["d_in"], d_sae))
        self.compare(f"sae_step.relu.{width}x", found, s.batch, "activations/s",
                     {name: f"vs_{name}" for name in found if name not in ("project", "project_dense")},
                     note=f"as in training: sparse way at L0 {l0:.0f}")
        self.compare(f"sae_step.relu.{width}x.dense", found, s.batch, "activations/s", project="project_dense",
                     peers={name: f"vs_{name}" for name in found if name not in ("project", "project_dense")},
                     note="dense way, half of the features active")

    def topk(self) -> None:
        """The peers' TopK step. The project has no TopK, so there is no ratio."""
        s, d_sae = self.sizes, self.sizes.topk * self.data["d_in"]
        self.notes.append(f"sae_step.topk.{s.topk}x.vs_saelens_best is left out: the project has no TopK yet; the peers' rates "
                          "are among the measurements.")
        everyone = self.contestants(s.batch, d_sae, warmup=1, k=32)
        if everyone:
            self.say(f"TopK training step, {s.topk}x (peers only)")
            found = {}
            for name, (worker, how) in everyone.items():
                try:
                    found |= {name: self.arm(name, worker, how, 1)}
                except WorkerError as error:
                    self.notes.append(str(error))
            times = alternate([*found.values(), self.products(d_sae, 1)], min(3, s.rounds))
            self.drop({name: everyone[name] for name in found})
            self.record(f"sae_step.topk.{s.topk}x", times, s.batch, "activations/s", products="own_matmuls")

    def wide(self) -> None:
        """A wide dictionary, in a process of its own: the project as it trains against its own dense way."""
        s, d_sae = self.sizes, self.sizes.wide * self.data["d_in"]
        self.say(f"Training step, {s.wide}x")
        shared = self.workers["project"]
        self.workers["project"] = self.start("project")
        try:
            sparse = self.arm("project", *self.contestants(s.batch, d_sae, warmup=1)["project"], 1)
            sparse.run()
            sparse.run()
            peak = self.workers["project"].ask("memory")["gb"]
            dense = Arm("dense", lambda: self.workers["project"].ask("steps", name="project", steps=1, sparse=False)["times"])
            found = alternate([sparse, dense, self.products(d_sae, 1)], min(5, s.rounds))
            l0 = self.workers["project"].ask("steps", name="project", steps=1)["l0"]
        finally:
            self.workers["project"].close()
            self.workers["project"] = shared
        name = f"sae_step.relu.{s.wide}x"
        self.record(name, found, s.batch, "activations/s", products="own_matmuls")
        self.compare(name, found, s.batch, "activations/s", {"dense": "vs_dense", "own_matmuls": "vs_own_matmuls"},
                     note=f"sparse way at L0 {l0:.0f}")
        self.rows.append(row(f"{name}.peak_memory", peak, None, None, "GB", note="whole process, training the sparse way"))

    def products(self, d_sae: int, repeat: int) -> Arm:
        ask = partial(self.workers["project"].ask, "products", batch=self.sizes.batch, d_in=self.data["d_in"], d_sae=d_sae)
        return Arm("own_matmuls", lambda: [ask()["times"][0] for _ in range(repeat)])

    def drop(self, everyone: dict[str, tuple[str, dict]]) -> None:
        for name, (worker, _) in everyone.items():
            self.workers[worker].ask("drop", name=name)

    # --- harvest, transformer ----------------------------------------------------------------------------------------

    def harvest(self) -> None:
        """Tokens through the model a second, 64 of 256 positions kept, against the bridge's own cache."""
        project, n, turn = self.workers["project"], self.sizes.harvest_contexts, iter(range(10 ** 6))
        self.say("Harvest")
        arms = [Arm("project", lambda: project.ask("harvest", contexts=n, kept=64, chunk=next(turn))["times"]),
                Arm("bridge_cache", lambda: project.ask("harvest_bridge", contexts=min(n, 64))["times"])]
        tokens = project.ask("harvest", contexts=n, kept=64, chunk=0)["tokens"]
        fewer = project.ask("harvest_bridge", contexts=min(n, 64))["tokens"]
        found = alternate(arms, min(5, self.sizes.rounds))
        found["bridge_cache"] = [[t * tokens / fewer for t in times] for times in found["bridge_cache"]]
        self.record("harvest", found, tokens, "tokens/s")
        mine = rate(tokens, found["project"])
        self.rows.append(row("harvest.tokens_per_second", mine.median, None, None, "tokens/s", mine.low, mine.high,
                             note="64 of 256 positions kept; low and high of the rate itself"))
        self.compare("harvest", found, tokens, "tokens/s", {"bridge_cache": "vs_bridge_cache"},
                     note="the bridge in float32, all positions, not shuffled")

    def transformer(self) -> None:
        """A training step of the transformer against the plain TransformerBridge loop."""
        project, n = self.workers["project"], self.sizes.transformer_steps
        self.say("Transformer training step")
        few = max(1, n // 5)
        arms = [Arm("project", lambda: project.ask("transformer_steps", steps=n)["times"]),
                Arm("bridge_fp32", lambda: project.ask("bridge_steps", steps=few, autocast=False)["times"]),
                Arm("bridge_bf16", lambda: project.ask("bridge_steps", steps=few, autocast=True)["times"])]
        tokens = project.ask("bridge_steps", steps=1, autocast=False)["tokens"]
        found = alternate(arms, min(5, self.sizes.rounds))
        self.record("transformer_step", found, tokens, "tokens/s")
        self.compare("transformer_step", found, tokens, "tokens/s", {name: f"vs_{name}" for name in found if name != "project"})

    # --- loss --------------------------------------------------------------------------------------------------------

    def loss_curves(self) -> None:
        """Held-out loss after equal seconds and after equal steps; only what a training itself takes is on its clock."""
        s, d_sae = self.sizes, 8 * self.data["d_in"]
        self.say("Loss after equal seconds and equal steps, 8x")
        everyone = self.contestants(s.curve_batch, d_sae, warmup=20)
        everyone["project"] = "project", everyone["project"][1] | {"birth_density": 0.005}
        clock, step = {}, {}
        for name, (worker, how) in everyone.items():
            clock[name] = self.workers[worker].ask("new", name=name, **how)["seconds"]
        for i in range(1, s.slices + 1):
            for name in order(list(everyone), i):
                worker = everyone[name][0]
                # Whoever took longer to begin has less time left in the first slice.
                answer = self.workers[worker].ask("steps", name=name, seconds=i * s.slice_seconds - clock[name])
                clock[name], step[name] = clock[name] + sum(answer["times"]), answer["step"]
                self.curves.append({"name": name, "seconds": clock[name], "step": step[name], **self.judged(worker, name)})
        self.drop(everyone)
        last = {name: [point for point in self.curves if point["name"] == name] for name in everyone}
        unit = "objective on held-out activations, the project's over the peer's"
        at_steps, done = {}, 0
        self.workers["project"].ask("new", name="again", **everyone["project"][1])
        for name in sorted((name for name in everyone if name != "project"), key=lambda name: step[name]):
            if step[name] > done:
                self.workers["project"].ask("steps", name="again", steps=step[name] - done)
            done, at_steps[name] = step[name], self.judged("project", "again")
        self.workers["project"].ask("drop", name="again")
        for name, mine in at_steps.items():
            theirs, ours = last[name], last["project"]
            below = sum(a["objective"] < b["objective"] for a, b in zip(ours, theirs, strict=True))
            self.rows.append(row(f"loss.relu.8x.equal_seconds.vs_{name}", ours[-1]["objective"], theirs[-1]["objective"],
                                 ours[-1]["objective"] / theirs[-1]["objective"], unit,
                                 note=f"after {s.slices * s.slice_seconds:g} s; lower at {below} of {len(ours)} points"))
            self.rows.append(row(f"loss.relu.8x.equal_steps.vs_{name}", mine["objective"], theirs[-1]["objective"],
                                 mine["objective"] / theirs[-1]["objective"], unit,
                                 note=f"after {step[name]} steps of {s.curve_batch}; L0 {mine['l0']:.0f} and "
                                      f"{theirs[-1]['l0']:.0f}, normalised MSE {mine['normalised_mse']:.3f} and "
                                      f"{theirs[-1]['normalised_mse']:.3f}"))

    def judged(self, worker: str, name: str) -> dict:
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "weights.npz")
            self.workers[worker].ask("export", name=name, path=path)
            return self.workers["project"].ask(
                "evaluate", data=str(self.folder / "activations_held_out.npy"), path=path, l1_coefficient=L1,
                scale=mean_norm_scale(self.data["d_in"], self.data["mean_norm"]))

    # --- results -----------------------------------------------------------------------------------------------------

    def record(self, id_: str, found: dict[str, list[list[float]]], amount: float, unit: str, products: str | None = None,
               operations: float | None = None) -> None:
        """Rates of everyone, each also as a fraction of that of the five bare products."""
        for name, rounds in found.items():
            r = rate(amount, rounds)
            line = {"id": id_, "name": name, "unit": unit} | r._asdict()
            if products:
                line["fraction_of_products"] = ratio(rounds, found[products]).median
            if operations and name == products:
                line["gflop_per_second"] = r.median / amount * operations / 1e9
            self.measurements += [line]
            self.say(f"  {name:<22}{r.median:>12,.0f} {unit} ({r.low:,.0f} to {r.high:,.0f})")

    def compare(self, id_: str, found: dict[str, list[list[float]]], amount: float, unit: str, peers: dict[str, str],
                project: str = "project", note: str = "") -> None:
        for peer, suffix in peers.items():
            r = ratio(found[project], found[peer])
            self.rows.append(row(f"{id_}.{suffix}", rate(amount, found[project]).median, rate(amount, found[peer]).median,
                                 r.median, unit, r.low, r.high, note))
