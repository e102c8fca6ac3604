# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 11 · Indirect object identification, causally
#
# **Question.** Are features good handles? If a model is to think of *Vanessa* where it thought of *Bob*, how few directions must be
# changed, and do features take fewer than principal components?
#
# **You will be able to** patch directions from one sentence into another; order them by what the prediction needs (ACDC); compare
# codings of one activation space by *number of directions* and *size of the edit*; and tell a claim about one fact from one about many.
#
# **Needs** a transformer of three layers and dictionaries on its residual stream; loaded as numbers, or made on the way (that takes
# long). **Makes** eight figures and the rows 11 of the scorecard. **Time**: 25 minutes to read.
#
# This is the second paper's own experiment (Cunningham et al. 2023, section 4), with a model small enough to train here. The `paper`
# profile takes the paper's, Pythia-410M, from the hub. The claims below are of the small one.

# %% tags=["parameters"]
PROFILE = "workshop"  # "smoke" (minutes) | "workshop" (a laptop) | "paper" (GPUs)
SEED = 0
ARTEFACTS = "auto"  # "auto": load what exists, else train | "load": never train | "train": never load the reference
CORPUS = ""  # "": the profile's own | "environment" | "files:DIR" | "hf:NAME"

# %%
import numpy as np
import pandas as pd
import torch
from IPython.display import HTML

from sae_lib import patching, study
from sae_lib.metrics import Interval, mean_interval, share_interval
from sae_lib.study import identification, task_model
from sae_lib.study import identification_figures as draw
from sae_lib.study.identification import DENSE, DIMENSIONS, FEATURES, PAIRS, PCA, RANDOM
from sae_lib.study.identification_numbers import drawn_ratios, edit_ratio, mean_half, needed, needed_ratio
from sae_lib.study.verdicts import at_least, at_most, numbers_of
from sae_lib.token_classes import quoted

run = study.begin(PROFILE, SEED, ARTEFACTS, CORPUS)
draws = {"seed": SEED, "n_boot": run.profile.bootstrap}

# %% [markdown]
# ## 1 · The task
#
# Two people, one of whom gives something. To whom? The name that is *not* repeated. The two may come in either order (ABBA, BABA).

# %%
task = task_model.of(run)
model, vocabulary = task.model, task.vocabulary
asked = task.prompts(task.exchanged, "train", 4, SEED)
spelled = lambda ids: b"".join(vocabulary[t] for t in ids).decode(errors="replace").strip()
pd.DataFrame([{"sentence": spelled(row[1:last + 1].tolist()), "indirect object": spelled([who]), "order": "ABBA" if abba else "BABA"}
              for row, last, who, _, abba in zip(*(v.tolist() if i else v for i, v in enumerate(asked)), strict=True)])

# %% [markdown]
# **Claim.** A transformer of three layers learns it, for names and for ways to say it that its training text never had in such a
# sentence. (The paper takes Pythia-410M, which learned it from the Pile. Our corpus is code and manuals, in which nobody gives anything
# to anybody. So this model reads short made-up text besides: a sentence of the task, or one about one person or two.)
#
# Names that are held out of the task do occur in its text: alone, and in pairs of whom the *sense* says which comes last ("Ruth is
# older than Eric. The first in the park was Ruth."). How this text is mixed was chosen by how well the held-out names were done in the
# sentences as in training and in the *other* ones; no choice was made on the *held-out* sentences.
#
# From a model that was trained elsewhere nothing of ours was held out. It is asked with all names that are one token to it; the
# three kinds of sentences are three lists then, of which only the second is used to choose something (the layer).
#
# **Predict.** Chance is one half. Which is harder: new names or new sentences?

# %% tags=["slow"]
accuracy = identification.accuracy(run)
names = list(task.names)[-1]  # held out, if some were
found = accuracy[accuracy.names == names].set_index("sentences")
new_names, hardest, which = found.loc["train"], found.loc["held out"], "held-out" if names == "held out" else names
accuracy.assign(sentences=accuracy.sentences.map(task.sentences)).round(3)

# %%
study.show(draw.accuracy_figure(accuracy, task.sentences), "11-accuracy",
           claim=f"{which.capitalize()} names: {new_names.right:.1%} right in {task.sentences['train']}, {hardest.right:.1%} in {task.sentences['held out']}",
           alt="Share of prompts whose indirect object is likelier than the subject: "
               + "; ".join(f"{r.names} names, {task.sentences[r.sentences]} {r.right:.1%} (likeliest of all tokens {r.first:.1%})" for r in accuracy.itertuples()) + ".")

# %%
row = run.scorecard.row


def of_accuracy(found):
    """What a row says of a share of right answers."""
    return {"paper": None, "paper_source": "section 4 (Pythia-410M does it)", **numbers_of(Interval(found.right, found.right_low, found.right_high)), "seeds": 1,
            "verdict": at_least(Interval(found.right, found.right_low, found.right_high), 0.95, fair=0.75),
            "caveat": f"indirect object likelier than subject; likeliest of all tokens in {found['first']:.1%}; interval over {found.prompts:.0f} prompts; {task.described}"}


row("11.accuracy", claim=f"The model does the task for {which} names, in {task.sentences['train']}", **of_accuracy(new_names))
row("11.accuracy.new_sentences", claim=f"The model does the task for {which} names in {task.sentences['held out']}", **of_accuracy(hardest))

# %% [markdown]
# ## 2 · Where the name is
#
# A name stands in one place and is asked for in another. After which layer is it there?
#
# Take a sentence with one name (the *base*) and the same sentence with another (the *target*). Run the base, but from some layer on
# use the target's residual stream at some positions. What is left of KL(patched || target) at the last token?
#
# **Predict.** After which layer does the *last token* know the name?

# %%
places = identification.where(run)
at_end = places[places.role == "last token"].set_index("after").left
at_name = places[places.role == "indirect object"].set_index("after").left
turn = at_end.index[at_end < 0.5][0]  # after all layers nothing is left
study.show(draw.where_figure(places), "11-where",
           claim=f"After layer {turn} patching the last token removes {1 - at_end[turn]:.0%} of the KL, patching the name's own position {1 - at_name[turn]:.0%}",
           alt="A table in colours: share of the KL that is removed by patching all of the residual stream at a position. "
               + "; ".join(f"after {after}: indirect object {1 - at_name[after]:.0%}, last token {1 - at_end[after]:.0%}" for after in at_end.index) + ".")

# %% [markdown]
# ## 3 · Patching directions
#
# Now along some directions only, at *all* positions, and after one layer:
#
#     x' = x + sum over j in F of (c_j(target) - c_j(base)) d_j
#
# What a coding does not say of x stays as it is. Five lines; the library's must give the same.

# %%
sentences = identification.exchanged(run, 1, 0, "dev", "order", 4)
runs = patching.pair(model, sentences.base.tokens, sentences.target.tokens, sentences.base.last, 1)
basis = patching.of_dimensions(model.cfg.d_model, runs.base.device)
few = np.array([3, 1, 4])
change = basis.codes(runs.target) - basis.codes(runs.base)
by_hand = runs.base + sum(change[..., j, None] * basis.directions[j] for j in few.tolist())
found = patching.patch(model, runs, basis, 1, few, most=3).divergence[:, -1]
assert torch.allclose(torch.from_numpy(found), patching.divergences(model, runs, by_hand, 1).cpu(), atol=1e-5)

# %% [markdown]
# Which directions, in which order? ACDC: begin with all patched, go through them in random order, and drop each without which the KL
# rises by less than a threshold; then again with a higher one. What is dropped last is needed most. The order is found on some
# sentences and measured on others.
#
# **Codings.** The dictionary's *features*; *PCA* as a rotation, and with *two signs* (a direction each way, as features have); a
# *dictionary without L1* (the paper's alpha = 0), as wide but not sparse; the *dimensions* of the residual stream; a *random rotation*.
#
# The layer is chosen on development sentences: where features need fewest directions as a share of what PCA needs. (So were the L1
# coefficient and the length of the dictionaries' training.) An exchange that never gets to half of the KL counts with all directions
# that were patched.

# %% tags=["slow"]
choice = identification.layer_choice(run)
after = identification.chosen_layer(choice)
choice.assign(needed=needed(choice)).pivot_table(index="after", columns="coding", values="needed").rename_axis("after layers").round(1)

# %% [markdown]
# ## 4 · One name for another
#
# **Claim.** To turn one name into another takes at most half as many features as principal components, and a smaller edit. A
# dictionary that is not sparse has no such lead.
#
# **Predict.** How many features would be ideal? How many principal components, in a space of this many dimensions?

# %% tags=["slow"]
one, many = identification.one_exchange(run, after), identification.many_exchanges(run, after)
half = {name: mean_half(one[one.coding == name], **draws) for name in identification.CODINGS}
edits = {name: edit_ratio(one, FEATURES, name, **draws) for name in identification.CODINGS if name != FEATURES}
half_many = many.set_index("coding").half.reindex(identification.CODINGS)
pd.DataFrame([{"coding": name, "directions for half of the KL": half[name].value, "low": half[name].low, "high": half[name].high,
               "exchanges that get there": one[one.coding == name].half.notna().sum(), "directions that change in a sentence": one[one.coding == name].changed.mean(),
               "of many names at once": half_many[name]} for name in identification.CODINGS]).set_index("coding").round(2)

# %%
def said(values, digits=1):
    """What each coding needs, in words."""
    return ", ".join(f"{name} {value:.{digits}f}" if np.isfinite(value) else f"{name} never" for name, value in values.items())


needs = {name: found.value for name, found in half.items()}
n_many = run.profile.identification.growth[-1][0]
parts = {"one exchange of names": one, f"one order for {n_many} exchanges": many}
most = min(80, max(len(kl) for kl in one.kl) - 1)
study.show(draw.curves_figure(parts, most), "11-directions",
           claim=f"Half of the KL takes {needs[FEATURES]:.1f} features or {needs[PCA]:.1f} principal components for one exchange; for {n_many} "
                 f"at once {half_many[FEATURES]:.0f} or {half_many[PCA]:.0f}" if np.isfinite([needs[FEATURES], needs[PCA]]).all() else "Patching few directions does not halve the KL",
           alt=f"Two panels: share of the KL left against patched directions. Directions for half of it, one exchange at a time: {said(needs)}; one order for "
               f"{n_many} exchanges: {said(half_many.dropna(), 0)}. Bands, on the left: the middle 80 % of exchanges.")

# %% [markdown]
# How large is the edit when half of the KL is gone? Two codings are compared on those exchanges in which both get there.

# %%
sizes = {FEATURES: edits[PCA][0].value} | {name: theirs.value for name, (_, theirs, _) in edits.items()}
study.show(draw.edits_figure(parts), "11-edit",
           claim=f"At half of the KL the edit by features is {sizes[FEATURES]:.2f} long, by PCA {sizes[PCA]:.2f}" if np.isfinite([sizes[FEATURES], sizes[PCA]]).all()
           else "There is no edit at half of the KL to compare",
           alt=f"Two panels: the least share of the KL that is left with an edit of at most each size. Mean norm of the edit at half, one exchange at a time: {said(sizes, 2)}.")

# %%
short = {PAIRS: "pca_two_signs", DENSE: "no_l1", DIMENSIONS: "dimensions", RANDOM: "random"}
n_one = run.profile.identification.exchanges
elsewhere = choice[choice.after != after].assign(needed=lambda t: needed(t)).pivot_table(index="after", columns="coding", values="needed").reindex(columns=[FEATURES, PCA])
told = "".join(f"; after layer {i}, on the sentences that chose the layer, {f:.0f} against {p:.0f}" for i, f, p in elsewhere.itertuples())
shared = {"paper": "figure only", "paper_source": "section 4, figure 3", "seeds": 1}
reading = f"one exchange of names at a time, {n_one} exchanges, order and measurement on different sentences, after layer {after}; bootstrap over exchanges, the same for both"
ratio = needed_ratio(one, FEATURES, PCA, **draws)
row("11.half_kl", claim="Half of the KL takes at most half as many features as principal components: the one over the other", **numbers_of(ratio), **shared,
    verdict=at_most(ratio, 0.5, fair=1.0), caveat=f"{needs[FEATURES]:.1f} features, {needs[PCA]:.1f} components; {reading}{told}")
for name, key in short.items():
    ratio = needed_ratio(one, FEATURES, name, **draws)
    row(f"11.half_kl.over.{key}", claim=f"Half of the KL takes at most half as many features as directions of {name}: the one over the other", **numbers_of(ratio), **shared,
        verdict=at_most(ratio, 0.5, fair=1.0), caveat=f"{needs[FEATURES]:.1f} and {needs[name]:.1f}; {reading}")

# %%
control = needed_ratio(one, DENSE, PCA, **draws)
row("11.half_kl.no_l1", claim="A dictionary without L1 has no such lead: its directions for half of the KL over principal components", **numbers_of(control), **shared,
    verdict=at_least(control, 0.5), caveat=f"{needs[DENSE]:.1f} and {needs[PCA]:.1f}; {reading}")
for name, key in ((PCA, "pca"), (DENSE, "no_l1")):
    mine, theirs, smaller = edits[name]
    row(f"11.edit.over_{key}", claim=f"At half of the KL the edit by features is smaller than by {name}: the one over the other", **numbers_of(smaller), **shared,
        verdict=at_most(smaller, 1.0), caveat=f"mean norm at a position {mine.value:.2f} and {theirs.value:.2f}, where both get to half; {reading}")

# %% [markdown]
# ## 5 · Many names at once
#
# The paper's set F is one for 50 prompts with many names. If every name has features of its own, then the more names, the more features
# are needed. Components are shared by all names, and there are no more of them than dimensions: 128 in the small model, 1,024 in the
# paper's. Fifty names crowd the small one; the other has room for them.
#
# **Predict.** Do the two lines cross, and where?

# %% tags=["slow"]
grown = pd.concat([one[one.coding.isin([FEATURES, PCA])], identification.growth(run, after)], ignore_index=True)
grown = grown.assign(half=needed(grown))
means = grown.groupby(["coding", "exchanges"]).half.mean().unstack("coding").reindex(columns=[FEATURES, PCA])
means.round(1)

# %%
ends = means.dropna()
study.show(draw.growth_figure(grown, model.cfg.d_model), "11-names",
           claim=f"From {ends.index[0]} to {ends.index[-1]} exchanges features go from {ends[FEATURES].iloc[0]:.1f} to {ends[FEATURES].iloc[-1]:.0f}, PCA from {ends[PCA].iloc[0]:.1f} to "
                 f"{ends[PCA].iloc[-1]:.0f}" if len(ends) else "Half of the KL is not reached with these sets",
           alt="Directions for half of the KL against the number of exchanges that share an order: "
               + "; ".join(f"{n} exchanges, features {f:.1f}, PCA {p:.1f}" for n, f, p in ends[[FEATURES, PCA]].itertuples()) + ".")

# %%
together, smaller = drawn_ratios(*(many[many.coding == name].iloc[0] for name in (FEATURES, PCA)))
more = [n for n in means.index if means[FEATURES][n] > means[PCA][n]]
row("11.half_kl.many", claim=f"With one order for {n_many} exchanges half of the KL takes at most half as many features as principal components: the one over the other", **numbers_of(together),
    **shared, verdict=at_most(together, 0.5, fair=1.0),
    caveat=f"{said(half_many[[FEATURES, PCA]], 0)}; the paper's reading, one set for {run.profile.identification.sentences_of_many} sentences of many names, in {model.cfg.d_model} dimensions; "
           f"interval over sentences, order fixed; features need more with {', '.join(map(str, more)) or 'no number of'} exchanges of {', '.join(map(str, means.index))}")
row("11.edit.many", claim=f"With one order for {n_many} exchanges the edit by features is smaller than by PCA at half of the KL: the one over the other", **numbers_of(smaller), **shared,
    verdict=at_most(smaller, 1.0), caveat=f"mean norm at a position; the paper's reading, as in the row above; interval over sentences of where half is, order fixed; after layer {after}")

# %% [markdown]
# ## 6 · Other layers, other dictionaries
#
# After which layer it works is a finding too. These are the development sentences on which the layer was chosen.

# %% tags=["slow"]
layers = choice.assign(half=needed(choice))
means = layers.pivot_table(index="after", columns="coding", values="half").reindex(columns=[FEATURES, PCA])
told = "; ".join(f"{f:.0f} features, {p:.0f} components after layer {i}" for i, f, p in means.itertuples())
study.show(draw.layers_figure(layers, after), "11-layers", claim=f"Half of the KL takes {told}",
           alt=f"A dot an exchange, a marker the mean of {layers.repeat.nunique()}; those that never get to half count with all directions: {told}.")

# %% [markdown]
# How sparse should it be? The paper: the larger alpha, the larger the KL that stays even with all features patched.

# %% tags=["slow"]
sparse = identification.coefficients(run, after)
sparse = sparse.assign(half=needed(sparse), least=[min(kl) / max(kl[0], 1e-12) for kl in sparse.kl])
least = sparse.groupby("l1")[["half", "least"]].mean()
told = "; ".join(f"L1 {l1:g}: {h:.1f} directions, {s:.0%} of the KL stays" for l1, h, s in least.itertuples())
study.show(draw.coefficients_figure(sparse), "11-l1",
           claim=f"With L1 {least.index[-1]:g} at least {least.least.iloc[-1]:.0%} of the KL stays, with {least.index[0]:g} {least.least.iloc[0]:.0%}",
           alt=f"Two panels against the L1 coefficient, a dot an exchange: directions for half of the KL, and the least share of the KL that is left. {told}.")

# %%
ends = sparse.pivot(index="repeat", columns="l1", values="least")[[least.index[0], least.index[-1]]].to_numpy()
gap = mean_interval(ends[:, 1] - ends[:, 0], **draws)
row("11.l1", claim="The larger the L1 coefficient, the more of the KL stays: by how much", paper="figure only", paper_source="section 4 (larger alpha, larger minimum KL)", **numbers_of(gap), seeds=1,
    verdict=at_least(gap, 0.0), caveat=f"share of the KL at the largest of {len(least)} coefficients less that at the smallest, one training each; bootstrap over exchanges")

# %% [markdown]
# ## 7 · Which features
#
# One would expect a feature for each of the two names, one of which is switched off and the other on, where the name is carried.
#
# What they fire on is from fresh text, without the sentences that happen to stand in the training text as well. They need not fire
# *on* a name: where the name is carried is another token. A feature is *for a name* here if more than half of its activation is in
# sentences with that name, which are few.
#
# **Predict.** Does *every* exchange need both?

# %% tags=["slow"]
meaning = identification.meaning(run, after)
table = meaning.table
is_name = lambda which: ((table.name == table[which]) & (table.name_share > 0.5)).to_numpy()
labels = [f"{spelled([t])} {s:.0%}" if t >= 0 else "never fires" for t, s in zip(table.name, table.name_share, strict=True)]
shown = table.assign(name=[spelled([t]) if t >= 0 else "" for t in table.name], base=[spelled([t]) for t in table.base], target=[spelled([t]) for t in table.target],
                     fires_on=[" ".join(quoted(vocabulary[t]) for t in fires) for fires in table.fires_on])
shown.drop(columns="repeat").round(3)

# %%
of_pair = is_name("base") | is_name("target")
first = table["rank"] == 1
two = table["rank"] <= 2
signs = table[two].groupby("repeat").change.agg(lambda change: change.min() < 0 < change.max())
left_after = table[table["rank"] == 2].left.mean()
study.show(draw.first_features_figure(table, labels, [f"{b} → {t}" for b, t in zip(shown.base, shown.target, strict=True)]), "11-features",
           claim=f"{of_pair[two].mean():.0%} of the first two features of an exchange are for one of its two names; one goes down and one up in {signs.sum()} of {len(signs)} exchanges",
           alt=f"A row an exchange of names, a mark for each of its first {identification.FIRST} features with the name whose sentences have most of its activation. For one of the two names: "
               f"{of_pair[first].mean():.0%} of the first features, {of_pair.mean():.0%} of all shown. With the first two patched {left_after:.0%} of the KL is left.")

# %%
found = share_interval(int(of_pair[two].sum()), int(two.sum()))
row("11.features_for_names", claim="The first two features of an exchange are for one of its two names", paper=None, paper_source="section 4", **numbers_of(found),
    seeds=1, verdict=at_least(found, 0.5, fair=0.25),
    caveat=f"more than half of the activation on fresh text is in sentences with that name; {int(two.sum())} features of {n_one} exchanges, interval as if independent; one of the two goes down "
           f"and the other up in {signs.sum()} of {len(signs)} exchanges; after layer {after}")

# %%
best = table[first].sort_values("left").head(4)
HTML("".join(draw.examples_html(f"feature {r.feature}, first of {spelled([r.base])} → {spelled([r.target])}", meaning.examples[r.feature], vocabulary) for r in best.itertuples()))

# %% [markdown]
# ## Key points
#
# - A coding is judged by what it takes to *do* something with it: how many directions, how large an edit.
# - "Fewer directions" is a claim about a kind of change. What is one for each name is cheap for one exchange and dear for many; what all
#   names share is never as cheap, and never dearer than the space has dimensions.
# - The order is found on some sentences and measured on others, or the best of many would be flattered.
#
# **What would change our mind.** In a model with more dimensions than names the lines of section 5 should stay apart. That takes
# a larger model, which the `paper` profile asks.
#
# **If you only take away one thing**: ask of "fewer directions than PCA" *for which change*.
