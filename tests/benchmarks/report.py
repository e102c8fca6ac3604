"""What the rows say in Markdown: the whole table, and the short one of the README."""

from pathlib import Path

from sae_lib.study.readme import put_between

BEGIN, END = "<!-- benchmarks: python -m tests.benchmarks --readme -->", "<!-- end of benchmarks -->"
STEP, HARVEST, TRANSFORMER = "dictionary step, 512 to {:,}", "harvest, 64 of 256 positions kept", "transformer step"
LOSS, MATMULS = "dictionary, 512 to 4,096, held-out loss after 64 s", "its five matrix products alone"
# Rows that the README shows, where a run has them: id -> what is measured, and against what.
SHOWN = {
    "sae_step.relu.8x.vs_saelens_fp32": (STEP.format(4096), "SAELens, float32"),
    "sae_step.relu.8x.vs_saelens_bf16": (STEP.format(4096), "SAELens, bf16 autocast"),
    "sae_step.relu.8x.vs_saelens_bf16_compiled": (STEP.format(4096), "SAELens, bf16 autocast, compiled"),
    "sae_step.relu.8x.vs_dictionary_learning": (STEP.format(4096), "dictionary_learning, float32"),
    "sae_step.relu.8x.vs_own_matmuls": (STEP.format(4096), MATMULS),
    "sae_step.relu.8x.dense.vs_own_matmuls": (f"{STEP.format(4096)}, half of the features active", MATMULS),
    "sae_step.relu.32x.vs_saelens_bf16": (STEP.format(16384), "SAELens, bf16 autocast"),
    "sae_step.topk.32x.vs_saelens_best": (STEP.format(16384) + ", TopK 32", "SAELens, its fastest setting"),
    "sae_step.relu.256x.vs_dense": (STEP.format(131072), "the project's dense way"),
    "harvest.tokens_per_second": (HARVEST, ""),
    "harvest.vs_bridge_cache": (HARVEST, "TransformerBridge's cache, float32"),
    "transformer_step.vs_bridge_fp32": (TRANSFORMER, "TransformerBridge loop, float32"),
    "transformer_step.vs_bridge_bf16": (TRANSFORMER, "TransformerBridge loop, bf16 autocast"),
    "loss.relu.8x.equal_seconds.vs_saelens_fp32": (LOSS, "SAELens, float32"),
    "loss.relu.8x.equal_seconds.vs_saelens_bf16": (LOSS, "SAELens, bf16 autocast"),
    "loss.relu.8x.equal_seconds.vs_dictionary_learning": (LOSS, "dictionary_learning, float32"),
}


def table(rows: list[dict]) -> str:
    """All rows."""
    lines = ["| id | project | peer | ratio (slowest to fastest round) | unit | |", "|---|---|---|---|---|---|"]
    for r in rows:
        peer, value = ("-" if r[key] is None else f"{r[key]:,g}" for key in ("peer", "ratio"))
        lines.append(f"| {r['id']} | {r['project']:,g} | {peer} | {value}{_spread(r)} | {r['unit']} | {r['note']} |")
    return "\n".join(lines)


def short_table(rows: list[dict]) -> str:
    """The rows that the README shows, in words."""
    by_id = {r["id"]: r for r in rows}
    lines = ["| what | project | against | | times (slowest to fastest round) |", "|---|---|---|---|---|"]
    for id_, (what, against) in SHOWN.items():
        if (r := by_id.get(id_)) is None:
            continue
        unit = f" {r['unit']}" if r["unit"].endswith("/s") else ""
        peer = "" if r["peer"] is None else f"{_number(r['peer'])}{unit}"
        times = "" if r["ratio"] is None else f"{r['ratio']:.2f}{_spread(r)}"
        lines.append(f"| {what} | {_number(r['project'])}{unit} | {against} | {peer} | {times} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _spread(r: dict) -> str:
    return f" ({r['low']:.3g} to {r['high']:.3g})" if None not in (r["low"], r["ratio"]) else ""


def heading(result: dict) -> str:
    """One paragraph: machine, date, versions, data."""
    machine, versions = result["machine"], result["versions"]
    peers = ", ".join(f"{name} {version}" for name, version in versions["peers"].items())
    mode = (", quick mode" if result["quick"] else "") + (", in processor time" if result["processor_time"] else "")
    return (f"{machine['processor']}, {machine['threads']} threads, {machine['ram_gb']} GB, bfloat16 by "
            f"{machine['bfloat16']}, {result['date']}{mode}. Project: torch {versions['torch']}. Peers: {peers or 'none'}. "
            f"Activations: {result['data'].get('source', 'none')}.")


def into_readme(result: dict, readme: Path) -> None:
    """Put the short table between the README's two markers."""
    put_between(readme, BEGIN, END, f"{short_table(result['rows'])}\n\n{heading(result)}")
