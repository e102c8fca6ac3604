"""Held-out loss after equal seconds and after equal steps."""

from .arithmetic import order, row
from .dictionaries import begin, contestants, end, judged
from .measure import Benchmark

BIRTH_DENSITY = 0.005  # of the project's features, as the study has it
WARMUP = 20


def curves(b: Benchmark) -> None:
    """Only what a training itself takes is on its clock, which runs from its beginning."""
    s, d_sae = b.sizes, 8 * b.data["d_in"]
    b.say("Loss after equal seconds and equal steps, 8x")
    everyone = contestants(b, s.curve_batch, d_sae, warmup=WARMUP)
    everyone["project"] = "project", everyone["project"][1] | {"birth_density": BIRTH_DENSITY}
    everyone = begin(b, "loss.relu.8x", everyone)  # compiles what is compiled, and leaves out what cannot be compared
    clock, step = {}, {}
    for name, (worker, how) in everyone.items():
        b.workers[worker].ask("drop", name=name)
        clock[name] = b.workers[worker].ask("new", name=name, **how)["seconds"]
    for i in range(1, s.slices + 1):
        for name in order(list(everyone), i):
            worker = everyone[name][0]
            # Whoever took longer to begin has less time left in the first slice.
            answer = b.workers[worker].ask("steps", name=name, seconds=i * s.slice_seconds - clock[name])
            clock[name], step[name] = clock[name] + sum(answer["times"]), answer["step"]
            b.curves.append({"name": name, "seconds": clock[name], "step": step[name], **judged(b, worker, name)})
    end(b, everyone)
    _rows(b, everyone["project"][1], step)


def _rows(b: Benchmark, how: dict, step: dict[str, int]) -> None:
    """Of each peer, where it ended: against the project after as much time, and after as many steps."""
    s, ask = b.sizes, b.workers["project"].ask
    points = {name: [point for point in b.curves if point["name"] == name] for name in step}
    unit, done = "objective on held-out activations, the project's over the peer's", 0
    ask("new", name="again", **how)
    for name in sorted((name for name in step if name != "project"), key=lambda name: step[name]):
        ask("steps", name="again", steps=step[name] - done)
        done, mine, theirs, ours = step[name], judged(b, "project", "again"), points[name], points["project"]
        below = sum(a["objective"] < c["objective"] for a, c in zip(ours, theirs, strict=True))
        for kind, own, note in (
                ("equal_seconds", ours[-1], f"after {s.slices * s.slice_seconds:g} s; lower at {below} of {len(ours)} points"),
                ("equal_steps", mine, f"after {done} steps of {s.curve_batch}")):
            b.rows.append(row(f"loss.relu.8x.{kind}.vs_{name}", own["objective"], theirs[-1]["objective"],
                              own["objective"] / theirs[-1]["objective"], unit,
                              note=f"{note}; L0 {own['l0']:.0f} and {theirs[-1]['l0']:.0f}, normalised MSE "
                                   f"{own['normalised_mse']:.3f} and {theirs[-1]['normalised_mse']:.3f}"))
    ask("drop", name="again")
