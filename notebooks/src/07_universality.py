# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 07 · Universality
#
# **Question.** Train the same model again from another seed. Are the same features there?
#
# **You will be able to** match the features of two models by what they fire on, without being flattered by choosing the best
# of thousands; compare with neurons, and with a model that has learned nothing; and say which of three similarities of a pair
# can be trusted.
#
# **Needs** transformers A and B, A with its weights shuffled, and a dictionary of each (loaded, or made on the way). **Makes** two
# figures and three rows of the scorecard. **Time**: 20 minutes to read.
#
# If features were an accident of training, or of the dictionary, there would be no reason for another run to find them again.
# The paper's features of one model have a median correlation of 0.72 with their best match in another; its neurons, 0.46.

# %% tags=["parameters"]
PROFILE = "workshop"  # "smoke" (minutes) | "workshop" (a laptop) | "paper" (GPUs)
SEED = 0
ARTEFACTS = "auto"  # "auto": load what exists, else train | "load": never train | "train": never load the reference
CORPUS = ""  # "": the profile's own | "environment" | "files:DIR" | "hf:NAME"

# %%
from collections import Counter

import numpy as np
import pandas as pd
import torch
from IPython.display import display
from plotly.subplots import make_subplots
from scipy.sparse import csc_array
from scipy.stats import spearmanr

from sae_lib import compare, effects, features, study
from sae_lib.errors import StudyError
from sae_lib.study.replicas import NEURON_TOKENS
from sae_lib.study.tables import flat, unit_table

run = study.begin(PROFILE, SEED, ARTEFACTS, CORPUS)

# %% [markdown]
# ## 1 · Two models, the same text
#
# **Claim.** A and B have nothing in common but their sizes and their training text: neuron 17 of A and neuron 17 of B are
# strangers, and so are their features.
#
# Both read the same held-out tokens. A unit of A and a unit of B are compared by the correlation of their activations, over all
# of these tokens, the many on which both are silent included.
#
# **Predict.** Before you run it: how much will the *neurons* correlate? They see the same text and do the same job.

# %% tags=["slow"]
a, b = (unit_table(run, on=which) for which in "AB")
test = run.held_out("test")
tokens, documents = flat(test.contexts), flat(test.documents)
print(f"{a.shape[0]:,} tokens of {len(np.unique(documents)):,} documents; living features: {compare.live_units(a).sum():,} of A, {compare.live_units(b).sum():,} of B")

# %% [markdown]
# A third model has learned nothing: A with the entries of each weight matrix shuffled, the papers' *random control*. A dictionary
# trained on it has features too, for its activations still tell tokens apart. What they share with A's features lies in the
# text and the tokeniser, not in what either model has learned.

# %% tags=["slow"]
control = unit_table(run, on="random")
print(f"living features of the dictionary on the random-weights model: {compare.live_units(control).sum():,}")

# %% [markdown]
# Neurons fire on a third of all tokens, so theirs are counted on every few contexts only: enough for 512 of them.

# %% tags=["slow"]
few = -(-len(tokens) // NEURON_TOKENS)  # every context, or every so many
neurons = {which: features.activation_table(run.transformer(which).model, test.contexts[::few], features.neurons) for which in "AB"}
neuron_documents = flat(test.documents[::few])

# %% [markdown]
# ## 2 · The best match, honestly
#
# **Claim.** The best of 4,096 correlations is high by luck alone. So the match is *chosen* on one half of the documents and its
# correlation *measured* on the other. (The paper does not say that it did so.)
#
# **Check yourself.** Here are 4,096 units of pure noise, as rare as features. How well do they match 4,096 others?

# %%
rng = np.random.default_rng(SEED)
noise = [csc_array(((rng.random((4000, 4096)) < 0.002) * rng.random((4000, 4096))).astype(np.float32)) for _ in "AB"]
flattered = compare.universality(*noise, np.arange(4000) // 10, seed=SEED, n_boot=10, min_fired=5).units
print(f"noise: median {flattered.chosen.median():.2f} where it was chosen, {flattered.correlation.median():.2f} where it was not")
assert flattered.chosen.median() > 0.2 > 0.05 > flattered.correlation.median(), "the halves must not share documents"

# %% [markdown]
# **Predict.** Whose median is higher, the features' or the neurons'? What would it mean if they were equal? And how well will A's
# features be matched by a model that has learned nothing?

# %% tags=["slow"]
draws = dict(seed=SEED, n_boot=run.profile.bootstrap)
found = {"features": compare.universality(a, b, documents, **draws),
         "neurons": compare.universality(neurons["A"], neurons["B"], neuron_documents, **draws)}
try:
    found["features, in the random-weights model"] = compare.universality(a, control, documents, **draws)
except StudyError as error:
    print(f"There is no random control: {error}")

# %%
pd.DataFrame({name: {"units": len(u.units), **u.median._asdict(), "lean": u.lean, "where chosen": u.units.chosen.median()} for name, u in found.items()}).T

# %%
fig = make_subplots(rows=len(found), shared_xaxes=True, vertical_spacing=0.09,
                    subplot_titles=[f"{name}: median {u.median.value:.2f}" for name, u in found.items()])
for place, (u, colour, paper) in enumerate(zip(found.values(), ("#0072B2", "#E69F00", "#777777"), (0.72, 0.46, None), strict=False), start=1):
    fig.add_histogram(x=u.units.correlation, histnorm="percent", xbins=dict(start=-0.2, end=1.0, size=0.04), marker_color=colour, opacity=0.7,
                      showlegend=False, row=place, col=1)
    fig.add_vline(x=u.median.value, line=dict(color="#222222", width=2), row=place, col=1)
    fig.add_vrect(x0=u.median.low, x1=u.median.high, fillcolor="#222222", opacity=0.2, line_width=0, row=place, col=1)
    if paper:
        fig.add_vline(x=paper, line=dict(dash="dot", width=1), annotation_text="paper", annotation_position="top left", row=place, col=1)
fig.update_yaxes(title="% of units")
fig.update_xaxes(title="correlation of a unit of A with its best match", row=len(found), col=1)
fig.update_layout(height=240 + 150 * len(found), bargap=0.03)

# %%
f, n = found["features"].median, found["neurons"].median
r = found["features, in the random-weights model"] if len(found) > 2 else None
said = "; ".join(f"{name} {u.median.value:.2f} (95 % interval {u.median.low:.2f} to {u.median.high:.2f}, {len(u.units):,} units)" for name, u in found.items())
study.show(fig, "07-universality", claim=f"Features of A are found again in B with median correlation {f.value:.2f}, neurons with {n.value:.2f}"
           + (f", features in a model with random weights with {r.median.value:.2f}" if r else ""),
           alt=f"Histograms, one below the other, of the correlation of each unit of A with its best match. Medians: {said}. In the paper 0.72 for features, 0.46 for neurons.")

# %% [markdown]
# The intervals come from random halves of the measured documents, for the matches as they were chosen. `lean` is by how much
# the median itself is too high (too low, if negative) for want of documents: a rare feature's correlation rests on a few of them.
# It is not taken out. How much the *trainings* vary, two models cannot tell.
#
# Of the random control the median is not the whole story: which features does it match as well as B does?

# %%
if r:
    both = found["features"].units.merge(r.units, on="unit", suffixes=("", "_random")).assign(single=lambda t: features.is_single_token(a, tokens)[t.unit])
    both["as well"] = both.correlation_random >= both.correlation
    display(both.groupby("single").agg(features=("unit", "size"), in_B=("correlation", "median"), in_random=("correlation_random", "median"),
                                       as_well=("as well", "mean")).rename_axis("fires on one token").round(2))

# %% [markdown]
# ## 3 · Does it depend on how we looked?
#
# **Claim.** The order of the two does not hang on the choices made here: from B to A instead of A to B, on the neurons' tokens
# alone, and without the rarest features.
#
# **Predict.** Do common features match better than rare ones, or worse?

# %% tags=["slow"]
kept = np.zeros(test.contexts.shape, bool)
kept[::few] = True
fewer = [compare.select_tokens(part, kept.ravel()) for part in (a, b)]
variants = {"A to B": found["features"], "B to A": compare.universality(b, a, documents, **draws),
            "on the neurons' tokens": compare.universality(*fewer, neuron_documents, **draws),
            "firing on 100 tokens or more": compare.universality(a, b, documents, min_fired=100, **draws)}
pd.DataFrame({name: {"units": len(u.units), **u.median._asdict()} for name, u in variants.items()}).T

# %%
units = found["features"].units.assign(fired=lambda t: np.diff(a.indptr)[t.unit])
units["rarity"] = pd.qcut(units.fired, 5, duplicates="drop")
units.groupby("rarity", observed=True).correlation.describe()[["count", "25%", "50%", "75%"]].rename_axis("tokens it fires on").round(2)

# %%
row = run.scorecard.row
turned = variants["B to A"].median.value
row("07.median.feature", claim="Features are found again in a model from another seed: median best-match correlation", paper=0.72,
    paper_source="Universality", ours=f.value, low=f.low, high=f.high, seeds=1,
    verdict="reproduced" if f.value >= 0.7 and f.low > n.high else "partly" if f.low > n.high else "not",
    caveat=f"matches chosen on half of the documents, measured on the other; {turned:.2f} from B to A; for want of documents the value leans by {found['features'].lean:+.3f}")
row("07.median.neuron", claim="Neurons are found again less well", paper=0.46, paper_source="Universality", ours=n.value,
    low=n.low, high=n.high, seeds=1, verdict="reproduced" if f.value - n.value >= 0.15 and f.low > n.high else "partly" if f.low > n.high else "not",
    caveat=f"{f.value - n.value:.2f} below the features; on {neurons['A'].shape[0]:,} tokens; living neurons alone")
if r:
    gap, low = f.value - r.median.value, f.low > r.median.high
    row("07.median.random", claim="Features of A are matched less well in a dictionary on A with its weights shuffled", paper=None,
        paper_source="no number (random control: Global Analysis)", ours=r.median.value, low=r.median.low, high=r.median.high, seeds=1,
        verdict="reproduced" if low and gap >= 0.15 else "partly" if low else "not",
        caveat=f"{gap:.2f} below the match in B; {both['as well'].mean():.0%} of the features are matched as well there as in B")

# %% [markdown]
# ## 4 · Do they *do* the same?
#
# **Claim.** Pairs that fire alike need not have like logit weights over the whole vocabulary; but on the tokens that really
# follow, they have like effects.
#
# A feature's logit weights are a vector over all tokens, most of which never follow it. Whatever shares the direction interferes
# there, and nothing in training cares. The *attribution* looks only where it matters: activation times the logit weight of the
# token that really comes next. (Attributions are compared over all the tokens, the choosing half included.)
#
# **Predict.** Which of the two will follow the correlation of activations more closely?

# %% tags=["slow"]
seen = np.bincount(run.tokens.tokens("train")[:20_000_000], minlength=len(run.vocabulary))
used = torch.from_numpy(seen >= 10)  # weights of tokens that hardly occur were never trained
used[0] = False  # end-of-text
weights = {which: effects.logit_weights(run.transformer(which).model, run.dictionary(which).model.W_dec, used) for which in "AB"}
pairs = units[["unit", "match"]].to_numpy(copy=True)
units["logits"] = compare.logit_correlation(weights["A"], weights["B"], pairs)
attributed = [effects.attribution(part, weights[which], test.contexts.flatten(), test.contexts.shape[1]) for part, which in ((a, "A"), (b, "B"))]
units["attribution"] = compare.pair_correlations(*attributed, pairs)
units[["correlation", "logits", "attribution"]].describe().loc[["count", "25%", "50%", "75%"]].round(2)

# %%
whole = units.dropna()
follows = {name: spearmanr(whole.correlation, whole[name]).statistic for name in ("logits", "attribution")}
fig = make_subplots(cols=2, shared_yaxes=True, horizontal_spacing=0.04,
                    subplot_titles=[f"{label}: rank correlation {follows[name]:.2f}" for name, label in (("logits", "logit weights"), ("attribution", "attributions"))])
for column, name in enumerate(follows, start=1):
    fig.add_scatter(x=whole.correlation, y=whole[name], mode="markers", marker=dict(size=4, opacity=0.35, color=("#0072B2", "#009E73")[column - 1]),
                    showlegend=False, row=1, col=column, customdata=whole[["unit", "match"]], hovertemplate="A %{customdata[0]}, B %{customdata[1]}<extra></extra>")
    fig.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line=dict(color="#444444", dash="dot", width=1), showlegend=False, row=1, col=column)

# %%
fig.update_xaxes(title="correlation of activations", range=[-0.1, 1.02])
fig.update_yaxes(range=[-0.5, 1.02])
fig.update_layout(yaxis_title="correlation of the pair's effects")
closer = "attributions" if follows["attribution"] > follows["logits"] else "logit weights"
study.show(fig, "07-logits", claim=f"Of a matched pair's effects, the {closer} follow its activations more closely ({follows['attribution']:.2f} for attributions, "
           f"{follows['logits']:.2f} for logit weights)",
           alt=f"Two scatter plots of {len(whole):,} matched pairs against the correlation of their activations: of their logit weights (median {whole.logits.median():.2f}, "
               f"rank correlation {follows['logits']:.2f}) and of their attributions (median {whole.attribution.median():.2f}, rank correlation {follows['attribution']:.2f}).")

# %% [markdown]
# ## 5 · Look at them
#
# Numbers like these are easily believed. Here are pairs along the whole range, from the best match to the worst, taken at fixed
# places in the ranking. For each: the tokens on which it is most active, and those that it makes likelier, in A and in B.
#
# **Predict.** Down to which correlation would you call the two the same feature?

# %%
def spell(ids):
    return " ".join(repr(run.vocabulary[i].decode(errors="replace"))[1:-1].replace(" ", "␣") for i in ids)


def fires_on(table, unit):
    """The commonest tokens among the 20 greatest activations of a unit."""
    where, values = features.column(table, unit)
    return spell(token for token, _ in Counter(tokens[where[np.argsort(-values)[:20]]].tolist()).most_common(6))


def shown(table):
    return pd.DataFrame([{"pair": f"A {pair.unit} / B {pair.match}", "correlation": pair.correlation, "logits": pair.logits, "attribution": pair.attribution,
                          **{f"{which} fires on": fires_on(part, unit) for which, part, unit in (("A", a, pair.unit), ("B", b, pair.match))},
                          **{f"{which} raises": spell(effects.top_logits(weights[which][unit], run.vocabulary, 6).index[:6])
                             for which, unit in (("A", pair.unit), ("B", pair.match))}} for pair in table.itertuples()]).round(2)


ranked = whole.sort_values("correlation", ascending=False)
pd.set_option("display.max_colwidth", None)
shown(ranked.iloc[np.linspace(0, len(ranked) - 1, 12).astype(int)])

# %% [markdown]
# The features of notebook 04's contexts, found by their label on validation text:

# %% tags=["slow"]
chosen_on, domain = unit_table(run, "validation"), flat(run.held_out("validation").domains)
labels = {name: run.tokens.domains.index(name) for name in ("arabic", "hebrew", "dna", "base64") if name in run.tokens.domains}
best = {name: features.best_unit(chosen_on, domain == i).unit for name, i in labels.items() if (domain == i).any()}
print(f"{', '.join(best) or 'No such context'} in the validation text; features that do not fire in the test text are left out")
shown(whole[whole.unit.isin(best.values())])

# %% [markdown]
# And the pairs that disagree most: alike in when they fire, unlike in their logit weights. The paper's extreme is a pair with
# correlations 0.98 and below 0.

# %%
alike = whole[whole.correlation >= whole.correlation.quantile(0.75)]
shown(alike.sort_values("logits").head(5))

# %% [markdown]
# ## Key points
#
# - Matching asks nothing about meaning: only whether two models' units fire together, on text that did not choose the pair.
# - What decides is the comparison, features against neurons, not the height of one number.
# - Alike in activation and alike in effect are two claims. Where they differ, look at what follows in real text.
#
# **What would change our mind.** If the dictionary of a transformer that has learned nothing matched A as well as B's does, these
# features would be a property of the text; the third histogram is that test, and the features that it matches as well are the
# ones to doubt. And all dictionaries were trained by one recipe on one text: features that another recipe does not find would
# not show here.
#
# **If you only take away one thing**: a direction that two models find independently is not an accident of either.
