"""Who takes turns, and what becomes of the seconds they take: rates, ratios, rows."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .arithmetic import order, product_operations, rate, ratio, row
from .protocol import Worker, WorkerError


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
QUICK = Sizes(batch=1024, rows=32_768, rounds=3, steps=2, widths=(8,), topk=32, wide=32, curve_batch=1024, slices=3,
              slice_seconds=4.0, harvest_contexts=256, transformer_steps=3)


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
    losses: list[dict] = field(default_factory=list)  # of everyone who was compared, on the same weights and activations
    curves: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: dict = field(default_factory=dict)
    workers: dict[str, Worker] = field(default_factory=dict)

    def run(self, parts: list[Callable[["Benchmark"], None]], tokens: Path | None, transformer: Path | None) -> None:
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
                    self.note(str(error))
            self.data = self.workers["project"].ask(
                "activations", rows=self.sizes.rows, held_out=min(16_384, self.sizes.rows // 4),
                out=str(self.folder / "activations"),
                tokens=str(tokens) if tokens else None, transformer=str(transformer) if transformer else None)
            for part in parts:
                try:
                    part(self)
                except WorkerError as error:
                    self.note(str(error))
        finally:
            for worker in self.workers.values():
                worker.close()

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.say(text)

    def products(self, d_sae: int, repeat: int = 1) -> Arm:
        """The five matrix products of a step, bare."""
        ask = self.workers["project"].ask
        return Arm("own_matmuls", lambda: ask("products", batch=self.sizes.batch, d_in=self.data["d_in"], d_sae=d_sae,
                                              repeat=repeat)["times"])

    def record(self, id_: str, found: dict[str, list[list[float]]], amount: float, unit: str, d_sae: int,
               operations: float | None = None) -> None:
        """Rates of everyone, each also as a share of that of bare matrix products: those of a dictionary of `d_sae` features.

        `operations` are those of the products that a step cannot do without, if they are others than these.
        """
        bare = product_operations(self.sizes.batch, self.data["d_in"], d_sae)
        for name, rounds in found.items():
            r, share = rate(amount, rounds), ratio(rounds, found["own_matmuls"]).median
            line = {"id": id_, "name": name, "unit": unit} | r._asdict()
            if name == "own_matmuls":
                line["gflop_per_second"] = bare / amount * r.median / 1e9
            else:
                line["share_of_products"] = share * ((operations or bare) / bare)
                self.say(f"  {name:<22}{r.median:>12,.0f} {unit} ({r.low:,.0f} to {r.high:,.0f}), "
                         f"{line['share_of_products']:.2f} of the rate of bare products")
            self.measurements.append(line)

    def compare(self, id_: str, found: dict[str, list[list[float]]], amount: float, unit: str, peers: dict[str, str],
                project: str = "project", note: str = "") -> None:
        """A row for each peer: name of its arm -> how its id ends."""
        for peer, suffix in peers.items():
            r = ratio(found[project], found[peer])
            self.rows.append(row(f"{id_}.{suffix}", rate(amount, found[project]).median, rate(amount, found[peer]).median,
                                 r.median, unit, r.low, r.high, note))
