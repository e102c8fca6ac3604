# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 14 · The scorecard
#
# **Question.** Which findings of the papers came true here, how far, and which did not?
#
# **You will be able to** state each claim with the paper's number, ours, and the doubt that remains.
#
# **Needs** the rows that the other notebooks write. **Makes** the table, one figure and `results.json`. **Time**: 5 minutes.

# %% tags=["parameters"]
PROFILE = "workshop"  # "smoke" (minutes) | "workshop" (a laptop) | "paper" (GPUs)
SEED = 0
ARTEFACTS = "auto"  # "auto": load what exists, else train | "load": never train | "train": never load the reference
CORPUS = ""  # "": the profile's own | "environment" | "files:DIR" | "hf:NAME"

# %%
import plotly.graph_objects as go

from sae_lib import study

run = study.begin(PROFILE, SEED, ARTEFACTS, CORPUS)

# %% [markdown]
# ## All rows
#
# *Reproduced* means that our interval agrees with the claim, *partly* that the direction is right and the size or the
# conditions are not, *not* that it did not come true at our scale. The caveat is part of the result.

# %%
table = run.scorecard.table()
table[["id", "claim", "paper", "paper_source", "ours", "low", "high", "verdict", "caveat"]]

# %% [markdown]
# ## Beside the paper
#
# **Claim.** Where the papers print a number, ours can be compared with it.
#
# Each row shows our value divided by the paper's, on a logarithmic axis: a dot at 1 is the paper's own number. Being far
# from 1 is not always worse; read the caveat.
#
# **Predict.** Which of our numbers will be furthest from the paper's?

# %%
both = table.dropna(subset=["paper", "ours"])
both = both[both.ours > 0]
ratio = both.ours / both.paper
colours = {"reproduced": "#009E73", "partly": "#E69F00", "not": "#D55E00"}
fig = go.Figure(go.Scatter(
    x=ratio, y=both.id, mode="markers+text", text=both.verdict, textposition="top center",
    marker=dict(size=12, color=both.verdict.map(colours)),
    error_x=dict(array=both.high / both.paper - ratio, arrayminus=ratio - both.low / both.paper)))
fig.add_vline(x=1, line_dash="dot")
fig.update_layout(xaxis=dict(title="our value / the paper's value (dotted: the same)", type="log"), yaxis=dict(autorange="reversed"))
counts = table.verdict.value_counts()
spelled = ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
study.show(fig, "14-scorecard", claim=f"Of {len(table)} findings: {spelled}",
           alt="Our value divided by the paper's for each finding with a published number: "
               + ", ".join(f"{i} {v:.2f}" for i, v in zip(both.id, ratio, strict=True)) + ".")

# %% [markdown]
# ## What would change our mind
#
# - The intervals come from a bootstrap over held-out documents of one corpus; another corpus may differ by more.
# - Rows with one seed say nothing about the spread between trainings.
# - The paper's model saw 100 billion tokens and its dictionaries 8 billion activations, thousands and hundreds of times ours.
