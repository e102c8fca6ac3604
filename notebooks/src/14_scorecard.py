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
# **Needs** the rows that the other notebooks write. **Makes** the table, two figures and `results.json`. **Time**: 5 minutes.

# %% tags=["parameters"]
PROFILE = "workshop"  # "smoke" (minutes) | "workshop" (a laptop) | "paper" (GPUs)
SEED = 0
ARTEFACTS = "auto"  # "auto": load what exists, else train | "load": never train | "train": never load the reference
CORPUS = ""  # "": the profile's own | "environment" | "files:DIR" | "hf:NAME"

# %%
import pandas as pd
import plotly.graph_objects as go

from sae_lib import study
from sae_lib.study import replicas

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
# Each row shows our value divided by the paper's, on a logarithmic axis: a marker at 1 is the paper's own number. Being far
# from 1 is not always worse; read the caveat.
#
# **Predict.** Which of our numbers will be furthest from the paper's?

# %%
both = table.assign(paper=pd.to_numeric(table.paper, errors="coerce")).dropna(subset=["paper", "ours"])  # not "figure only"
both = both[both.ours > 0].assign(ratio=lambda t: t.ours / t.paper)
looks = {"reproduced": ("#009E73", "circle"), "partly": ("#E69F00", "diamond"), "not": ("#D55E00", "x")}
fig = go.Figure()
for verdict, (colour, symbol) in looks.items():
    part = both[both.verdict == verdict]
    fig.add_scatter(x=part.ratio, y=part.id, mode="markers", name=verdict, marker=dict(size=11, color=colour, symbol=symbol),
                    error_x=dict(array=part.high / part.paper - part.ratio, arrayminus=part.ratio - part.low / part.paper))
fig.add_vline(x=1, line_dash="dot")
fig.update_xaxes(title="our value / the paper's value (dotted: the same)", type="log", tickvals=[0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100])
fig.update_yaxes(dtick=1, categoryorder="array", categoryarray=both.id, autorange="reversed")
fig.update_layout(height=200 + 26 * len(both), legend=dict(orientation="h", x=0, y=-90 / (60 + 26 * len(both)), yanchor="top"))

# %%
counts = table.verdict.value_counts()
spelled = ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
study.show(fig, "14-scorecard", claim=f"Of {len(table)} findings: {spelled}; here the {len(both)} for which the papers print a number",
           alt="Our value divided by the paper's for each finding with a published number: "
               + ", ".join(f"{i} {v:.2f}" for i, v in zip(both.id, both.ratio, strict=True)) + ".")

# %% [markdown]
# ## The luck of the seed
#
# **Claim.** Another transformer from another seed, with its own dictionary, gives nearly the same numbers.
#
# The bars are the intervals of the table: how much a number depends on the text it was measured on. A diamond is the same number of
# another training, measured in the same way. Making them takes as long as the study itself, so they are loaded; where there
# are none, `python -m sae_lib.study replicas` makes them.
#
# **Predict.** Which will vary more between trainings, the numbers of features or those of neurons?

# %%
others = {row.id: replicas.known(run, row.id) for row in table.itertuples() if row.ours}
dots = pd.DataFrame([(i, value / table.set_index("id").ours[i]) for i, values in others.items() for value in values], columns=["id", "ratio"])
here = table[table.id.isin(dots.id)] if len(dots) else both
away = (dots.ratio - 1).abs().groupby(dots.id).max()
fig = go.Figure(go.Scatter(x=[1] * len(here), y=here.id, mode="markers", name="this training", marker=dict(symbol="line-ns-open", size=12),
                           error_x=dict(array=here.high / here.ours - 1, arrayminus=1 - here.low / here.ours)))
fig.add_scatter(x=dots.ratio, y=dots.id, mode="markers", name="other trainings", marker=dict(size=10, symbol="diamond"))
fig.update_yaxes(dtick=1, categoryorder="array", categoryarray=here.id, autorange="reversed")
fig.update_layout(height=200 + 26 * len(here), xaxis_title="value / the value of this training",
                  legend=dict(orientation="h", x=0, y=-90 / (60 + 26 * len(here)), yanchor="top"))

# %%
said = f"Other trainings differ by {away.median():.0%} in the median of {len(away)} headline numbers" if len(away) else f"How much {len(here)} numbers depend on the text: there is no other training yet to compare with"
study.show(fig, "14-trainings", claim=said, alt=said + "".join(f"; {i}: at most {share:.0%}" for i, share in away.items()) + ".")

# %% [markdown]
# ## What would change our mind
#
# - The intervals come from a bootstrap over held-out documents of one corpus; another corpus may differ by more.
# - Rows with one seed say nothing about the spread between trainings; three are few.
# - The paper's model saw 100 billion tokens and its dictionaries 8 billion activations, thousands and hundreds of times ours.
