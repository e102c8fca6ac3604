"""The transformer's side: harvesting activations, and its own training step, against TransformerBridge as users know it."""

from .arithmetic import rate, row
from .measure import Arm, Benchmark, alternate
from .protocol import WorkerError

KEPT = 64  # positions of a context whose activations are kept
PRODUCTS = 4096  # features of the dictionary whose bare products stand for what the machine can do
SAME = 0.02  # of a loss, or of the length of activations, in bfloat16


def harvest(b: Benchmark) -> None:
    """Tokens through the model a second, against the bridge's own cache."""
    ask, n, turn = b.workers["project"].ask, b.sizes.harvest_contexts, iter(range(10 ** 6))
    few = min(n, 64)
    b.say("Harvest")
    shape, same = ask("sizes"), ask("same_model")
    b.losses.append({"id": "harvest", "name": "difference of activations", "relative": same["activations"]})
    if same["activations"] > SAME:
        raise WorkerError(f"The harvest is left out, for its activations differ from the bridge's by {same['activations']:.1%}.")
    tokens = n * shape["n_ctx"]
    found = alternate([Arm("project", lambda: ask("harvest", contexts=n, kept=KEPT, chunk=next(turn))["times"]),
                       Arm("bridge_cache", lambda: ask("harvest_bridge", contexts=few)["times"]), b.products(PRODUCTS)],
                      min(5, b.sizes.rounds))
    found["bridge_cache"] = [[t * n / few for t in times] for times in found["bridge_cache"]]
    operations = tokens * (shape["attention"] + shape["mlp"] * KEPT / shape["n_ctx"])
    b.record("harvest", found, tokens, "tokens/s", PRODUCTS, operations)
    mine = rate(tokens, found["project"])
    b.rows.append(row("harvest.tokens_per_second", mine.median, None, None, "tokens/s", mine.low, mine.high,
                      note=f"{KEPT} of {shape['n_ctx']} positions kept; low and high of the rate itself"))
    b.compare("harvest", found, tokens, "tokens/s", {"bridge_cache": "vs_bridge_cache"},
              note="the bridge in float32, all positions, not shuffled")


def transformer(b: Benchmark) -> None:
    """A training step of the transformer against the plain TransformerBridge loop."""
    ask, n = b.workers["project"].ask, b.sizes.transformer_steps
    b.say("Transformer training step")
    shape, (mine, theirs) = ask("sizes"), ask("same_model")["losses"]
    b.losses += [{"id": "transformer_step", "name": name, "loss": loss, "relative": loss / mine}
                 for name, loss in (("project", mine), ("bridge", theirs))]
    if abs(theirs / mine - 1) > SAME:
        raise WorkerError(f"The transformer step is left out, for its loss is {mine:.4f} where the bridge's is {theirs:.4f}.")
    few = max(1, n // 5)
    found = alternate([Arm("project", lambda: ask("transformer_steps", steps=n)["times"]),
                       Arm("bridge_fp32", lambda: ask("bridge_steps", steps=few, autocast=False)["times"]),
                       Arm("bridge_bf16", lambda: ask("bridge_steps", steps=few, autocast=True)["times"]), b.products(PRODUCTS)],
                      min(5, b.sizes.rounds))
    b.record("transformer_step", found, shape["tokens"], "tokens/s", PRODUCTS, shape["tokens"] * shape["training"])
    b.compare("transformer_step", found, shape["tokens"], "tokens/s",
              {name: f"vs_{name}" for name in ("bridge_fp32", "bridge_bf16")})
