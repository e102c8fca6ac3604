# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 06 · Steering
#
# **Question.** A feature that fires on Arabic might only *watch*. If we hold it up by hand, does the model write Arabic?
#
# **You will be able to** pin a feature while the model writes, and add its direction instead; measure how much of a sample is
# in a context, in two independent ways; compare with the best neuron; and say what steering costs.
#
# **Needs** transformer A and its dictionary (loaded, or made on the way). **Makes** three figures and six rows of the
# scorecard. **Time**: 20 minutes to read.
#
# The paper shows samples: after `1,2,3,4,5,6,7,8,9,10` the model goes on with numbers, and with the base64 feature held at its
# greatest value it writes what looks like base64. It gives no number. Here the samples are counted.

# %% tags=["parameters"]
PROFILE = "workshop"  # "smoke" (minutes) | "workshop" (a laptop) | "paper" (GPUs)
SEED = 0
ARTEFACTS = "auto"  # "auto": load what exists, else train | "load": never train | "train": never load the reference
CORPUS = ""  # "": the profile's own | "environment" | "files:DIR" | "hf:NAME"

# %%
import ipywidgets
import pandas as pd
import plotly.express as px
import torch
from plotly.subplots import make_subplots

from sae_lib import effects, features, steering, study
from sae_lib.evaluate import label_correlations
from sae_lib.study.replicas import STEERED
from sae_lib.study.tables import flat, unit_table
from sae_lib.transformer import mlp_activations, sample

run = study.begin(PROFILE, SEED, ARTEFACTS, CORPUS)

# %% [markdown]
# ## 1 · Which feature, which neuron, and how far up?
#
# **Claim.** Nobody has to choose: for each context we take the feature, and the neuron, whose activation correlates best with
# the documents' labels on validation text.
#
# Their *maximum* is the greatest activation on all the training text of these contexts. The last column is for later: by how much the L1
# penalty has shrunk the feature, as measured in notebook 03.

# %% tags=["slow"]
model, sae = run.transformer("A").model, run.dictionary("A").model
corrected = run.corrected_dictionary("A")
validation, test = run.held_out("validation"), run.held_out("test", whole=True)
table, domain = unit_table(run, "validation"), flat(validation.domains)

# %%
present = [name for i, name in enumerate(run.tokens.domains) if (domain == i).any()]
names = [name for name in STEERED if name in present] or present[:4]
print(f"Not in the validation text: {', '.join(set(STEERED) - set(present)) or 'none'}.")
label = {name: run.tokens.domains.index(name) for name in names}
neurons = label_correlations(model, None, validation, len(run.tokens.domains))[:, list(label.values())].argmax(0)
units = pd.DataFrame({"feature": [features.best_unit(table, domain == i).unit for i in label.values()], "neuron": neurons}, index=names)

# %%
f, n = (torch.tensor(units[kind].to_numpy()) for kind in ("feature", "neuron"))


def chosen(acts):
    """Activations of the chosen features, then of the chosen neurons."""
    return torch.cat([sae.encode(acts, f), acts[:, n]], dim=1)


greatest = features.maxima(features.activation_table(model, run.contexts_with(names), chosen))
units["feature_max"], units["neuron_max"] = greatest[:len(units)], greatest[len(units):]
units["shrunk_by"] = (corrected.W_enc.norm(dim=0) / sae.W_enc.norm(dim=0))[f]
units

# %% [markdown]
# ## 2 · Three ways to push
#
# *Pinning* replaces what feature $i$ does on a token: $x + (v - f_i(x))\,d_i$. *Adding* takes no notice of it: $x + v\,d_i$. A
# neuron is pinned by writing $v$ in its place. In all three the rest of the activations stays as it was, and so does all that
# the dictionary does not reconstruct.
#
# **Check yourself.** Pinning moves the activations along the feature's direction and nowhere else; and to hold a silent feature
# at 0 is to do nothing.

# %%
prompt = torch.tensor(run.tokens.tokenizer.encode("1,2,3,4,5,6,7,8,9,10").ids)
acts, first = mlp_activations(model, prompt[None]), int(units.feature.iloc[0])
moved, direction = effects.pin(sae, first, 3.0)(acts) - acts, sae.W_dec[first]
along = (moved @ direction)[..., None] * direction
assert torch.allclose(moved, along, atol=1e-4), "something besides the feature changed: was the input rebuilt from features?"
silent = sae.encode(acts)[..., first] == 0
assert torch.equal(effects.pin(sae, first, 0.0)(acts)[silent], acts[silent]), "a silent feature held at 0 must change nothing"

# %% [markdown]
# ## 3 · Samples
#
# **Predict.** The prompt is `1,2,3,4,5,6,7,8,9,10`. What comes next, unsteered? With the base64 feature at its maximum? With the
# neuron that is the best base64 detector at *its* maximum?

# %% tags=["slow"]
length, N_SAMPLES = min(100, run.profile.tokens.n_ctx - len(prompt)), 64


def edits(name, strength):
    feature, neuron, high, neuron_high = units.loc[name, ["feature", "neuron", "feature_max", "neuron_max"]]
    return {"feature pinned": effects.pin(sae, int(feature), strength * high),
            "feature added": effects.add(sae.W_dec[int(feature)], strength * high),
            "neuron pinned": effects.pin_neuron(int(neuron), strength * neuron_high)}


def write(edit):
    return sample(model, prompt, length, SEED, n_samples=N_SAMPLES, edit=edit)


samples = {name: {way: write(edit) for way, edit in edits(name, 1).items()} for name in names}
unsteered = write(None)

# %%
print("unsteered")
for row in unsteered[:3]:
    print("   ", repr(steering.as_text(row[len(prompt):], run.vocabulary)))
for name in names[:2]:
    for way in ("neuron pinned", "feature pinned"):
        print(f"{name}, {way} at its maximum")
        for row in samples[name][way][:3]:
            print("   ", repr(steering.as_text(row[len(prompt):], run.vocabulary)))

# %% [markdown]
# ## 4 · Counting
#
# **Claim.** How much of a sample is in a context can be counted without knowing which feature was pinned.
#
# - By **characters**: for a script those in its Unicode blocks; for base64 those in runs of 16 or more of its alphabet that mix
#   capitals, small letters and digits; for DNA those in runs of 16 or more bases.
# - By **tokens**: a naive Bayes classifier has learned from training text how often each domain uses each token. It calls ten
#   sampled tokens at a time by the likeliest of all domains. It tells Greek text from a formula with Greek letters, which
#   characters do not.
#
# Real text does not reach 1 by either. Arabic documents hold digits, brackets and Latin names; ten tokens of digits may look
# like hexadecimal. So real held-out text is measured in the same way, and is the mark to compare with.
#
# **Predict.** For which context will the two measures agree least on real text?

# %% tags=["slow"]
some = slice(20_000_000)
classifier = steering.DomainClassifier(run.tokens.tokens("train")[some], run.tokens.domain_of_token("train")[some],
                                       run.tokens.domains, len(run.vocabulary))
gauge = steering.Gauge(model, run.vocabulary, classifier, len(prompt), seed=SEED, n_boot=run.profile.bootstrap)
stretches = {name: steering.windows(test, label[name], len(prompt) + length) for name in names}
real = pd.DataFrame({name: gauge(stretches[name], name) for name in names if len(stretches[name]) >= 2}).T
real = real.reindex(index=names, columns=list(gauge(unsteered, names[0])))
print(f"Too little held-out text to compare with: {', '.join(real.index[real.share.isna()]) or 'none'}.")
real

# %% [markdown]
# ## 5 · At the maximum
#
# **Claim.** For most contexts the feature at its maximum brings much of the text into the context, and the best neuron at its
# own maximum far less. Unsteered, the context does not occur.
#
# Intervals are bootstraps over the 64 samples. Each bar is about *one* unit, the one found in section 1.

# %% tags=["slow"]
rows = [{"context": name, "text": "unsteered", **gauge(unsteered, name)} for name in names]
rows += [{"context": name, "text": f"best {way}", **gauge(samples[name][way], name)} for name in names for way in ("neuron pinned", "feature pinned")]
rows += [{"context": name, "text": "the same, at twice its maximum", **gauge(write(edits(name, 2)["feature pinned"]), name)} for name in names]
rows += [{"context": name, "text": "real text", **real.loc[name]} for name in names]
bars = pd.DataFrame(rows).assign(up=lambda t: t.high - t.share, down=lambda t: t.share - t.low)
looks = {"unsteered": "#777777", "best neuron pinned": "#E69F00", "best feature pinned": "#0072B2",
         "the same, at twice its maximum": "#56B4E9", "real text": "#BBBBBB"}
bars.pivot(index="context", columns="text", values="share").loc[names, list(looks)].round(2)

# %% [markdown]
# And by the classifier:

# %%
bars.pivot(index="context", columns="text", values="classified").loc[names, list(looks)].round(2)

# %%
fig = px.bar(bars, x="context", y="share", color="text", barmode="group", error_y="up", error_y_minus="down", color_discrete_map=looks,
             labels={"share": "share of characters in the context", "context": "", "text": ""})
fig.update_layout(yaxis=dict(tickformat=".0%", range=[0, 1.05]), width=1000, legend=dict(orientation="h", y=-0.1))
middle = bars.groupby("text").share.median()
study.show(fig, "06-contexts", claim=f"Pinned at its maximum, the median context's feature puts {middle['best feature pinned']:.0%} of the text "
           f"in its context, its best neuron {middle['best neuron pinned']:.0%}",
           alt=f"Bars of the share of characters in {len(names)} contexts: unsteered (median {middle['unsteered']:.0%}), best neuron pinned at its "
               f"maximum ({middle['best neuron pinned']:.0%}), best feature pinned at its maximum ({middle['best feature pinned']:.0%}) and at twice "
               f"that ({middle['the same, at twice its maximum']:.0%}), and real text ({middle['real text']:.0%}).")

# %% [markdown]
# **Check yourself.** Would *any* feature have done? Each row is a pinned feature, each column the share of characters in a context:
# off the diagonal there should be nothing.

# %%
written = {name: "\n".join(steering.as_text(row[len(prompt):], run.vocabulary) for row in samples[name]["feature pinned"]) for name in names}
crossed = pd.DataFrame({context: {name: effects.CONTEXTS[context](written[name]).mean() for name in names}
                        for context in names if context in effects.CONTEXTS})
crossed.rename_axis("pinned").round(3)

# %% [markdown]
# ## 6 · How hard to push?
#
# **Claim.** The share rises with strength, and the maximum that was seen is not always enough.
#
# Why should it not be? A dictionary's activations are *shrunk* by the L1 penalty: what it calls the maximum is less than the
# model itself ever used in this direction. The dotted vertical line is the maximum with the shrinkage undone.
#
# **Predict.** Once the text is Arabic, the feature is active by itself. Which then pushes harder: pinning, or adding?

# %% tags=["slow"]
STRENGTHS = (0.25, 0.5, 1, 1.5, 2, 3, 4)
pair = names[:2]
swept = pd.DataFrame([{"context": name, "strength": strength, "way": way, **gauge(write(edit), name)}
                      for name in pair for strength in STRENGTHS for way, edit in edits(name, strength).items()])
undone = {name: gauge(write(edits(name, units.shrunk_by[name])["feature pinned"]), name) for name in pair}
swept[swept.way == "feature pinned"].drop(columns=["low", "high", "classified_low", "classified_high"]).round(2)

# %%
fig = make_subplots(cols=len(pair), subplot_titles=pair, shared_yaxes=True, horizontal_spacing=0.05)
curves = {"feature pinned": ("#0072B2", "circle"), "feature added": ("#009E73", "diamond"), "neuron pinned": ("#E69F00", "square")}
for column, name in enumerate(pair, start=1):
    for way, (colour, symbol) in curves.items():
        line = swept[(swept.context == name) & (swept.way == way)]
        fig.add_scatter(x=line.strength, y=line.share, name=way, legendgroup=way, showlegend=column == 1, row=1, col=column, line_color=colour,
                        marker=dict(symbol=symbol, size=9), error_y=dict(array=line.high - line.share, arrayminus=line.share - line.low, thickness=1))
    line = swept[(swept.context == name) & (swept.way == "feature pinned")]
    fig.add_scatter(x=line.strength, y=line.classified, name="feature pinned, by the classifier", showlegend=column == 1, row=1, col=column,
                    line=dict(color="#0072B2", dash="dot"), mode="lines")
    fig.add_scatter(x=[units.shrunk_by[name]] * 2, y=[0, 1.05], name="the maximum, shrinkage undone", showlegend=column == 1, row=1, col=column,
                    line=dict(color="#000000", dash="dot", width=1), mode="lines")
    if real.share.notna()[name]:
        fig.add_hline(y=real.share[name], line_dash="dash", line_width=1, annotation_text="real text", row=1, col=column)

# %%
fig.update_xaxes(title="strength, in units of the unit's maximum", type="log", tickvals=STRENGTHS, ticktext=[f"{s:g}" for s in STRENGTHS])
fig.update_yaxes(range=[0, 1.05], tickformat=".0%")
fig.update_layout(yaxis_title="share of characters in the context", legend=dict(orientation="h", y=-0.2))
tops = swept.groupby(["context", "way"]).share.max().unstack().loc[pair]
said = "; ".join(f"{name} up to {top['feature pinned']:.0%} by the feature, {top['neuron pinned']:.0%} by the neuron" for name, top in tops.iterrows())
levels = "; ".join(f"{name} at {', '.join(f'{s:g}' for s in STRENGTHS)}: " + ", ".join(f"{v:.0%}" for v in
                   swept[(swept.context == name) & (swept.way == "feature pinned")].share) for name in pair)
study.show(fig, "06-steering", claim=f"Steered text by strength: {said}",
           alt=f"Share of characters in the context against strength for {' and '.join(pair)}, with intervals: the feature pinned, its direction added, "
               f"the best neuron pinned; a dashed line for real text. Feature pinned, {levels}.")

# %%
def reaches(name):
    """The least strength at which the pinned feature reaches real text's share, or 90 % if that is less."""
    enough = swept[(swept.context == name) & (swept.way == "feature pinned") & (swept.share >= goal[name])]
    return f"reached at {enough.strength.min():g} times the maximum" if len(enough) else "not reached at any strength tried"


goal = real.share.fillna(0.9).clip(upper=0.9)
for name in pair:
    print(f"{name}: goal {goal[name]:.0%}, {reaches(name)}; with shrinkage undone ({units.shrunk_by[name]:.2f} times) {undone[name]['share']:.0%}")

# %%
texts = {"share": "best feature pinned", "baseline": "unsteered", "neuron": "best neuron pinned"}
claims = {"share": "The {} feature pinned at its maximum: share of sampled characters in the context",
          "baseline": "Unsteered, the model does not write {} after the prompt",
          "neuron": "The best {} neuron pinned at its maximum writes less of it than the feature does"}


def judge(name, at):
    """Verdicts of the three rows of a context, from its measures at the maximum."""
    share, baseline, neuron = (at.loc[which] for which in texts)
    above, aim = share.low > max(neuron.high, baseline.high), goal.get(name, 0.9)
    return {"share": "reproduced" if share.share >= aim else "partly" if above and share.share >= aim / 2 else "not",
            "baseline": "reproduced" if baseline.high < 0.02 else "not", "neuron": "reproduced" if above else "not"}


# %%
measured = bars.set_index(["context", "text"])
for name in ("base64", "arabic"):
    at = measured.reindex([(name, text) for text in texts.values()]).set_axis(list(texts))
    verdict = judge(name, at)
    caveat = f"interval over {N_SAMPLES} samples of one unit" if name in names else "this context is not in the text"
    reached = f"; goal {goal[name]:.0%} (real text's, at most 90 %), {reaches(name)}" if name in pair else ""
    for which, found in at.iterrows():
        ours, low, high = (None if pd.isna(number) else number for number in found[["share", "low", "high"]])
        run.scorecard.row(f"06.pin.{name}.{which}", claim=claims[which].format({"arabic": "Arabic"}.get(name, name)), paper=None,
                          paper_source="figure only (Pinned Feature Sampling)", ours=ours, low=low, high=high, seeds=1,
                          verdict=verdict[which], caveat=caveat + reached * (which == "share"))

# %% [markdown]
# ## 7 · What it costs
#
# **Claim.** Strength is not free: what is gained in the context may be paid for in text that the model itself finds unlikely, or
# that goes round in circles. Whether it is, and from where on, is for the curves to say.
#
# Two prices. The unsteered model's mean **log-likelihood** of the sampled tokens says how strange they look to it; real text of
# the context (dashed) shows what is normal there, for base64 is hard to predict at the best of times. The share of **distinct**
# tokens falls when a sample repeats itself.
#
# **Predict.** Which of the two gives way first?

# %%
fig = make_subplots(rows=3, cols=len(pair), column_titles=pair, shared_xaxes=True, shared_yaxes="rows", vertical_spacing=0.05, horizontal_spacing=0.05)
prices = {"share": "share in context", "log_likelihood": "log-likelihood (nats)", "distinct": "distinct tokens"}
plain = gauge(unsteered, pair[0])
for column, name in enumerate(pair, start=1):
    for row, measure in enumerate(prices, start=1):
        for way, (colour, symbol) in curves.items():
            line = swept[(swept.context == name) & (swept.way == way)]
            fig.add_scatter(x=line.strength, y=line[measure], name=way, legendgroup=way, showlegend=column == row == 1, row=row, col=column,
                            line_color=colour, marker=dict(symbol=symbol, size=8))
        if real.share.notna()[name]:
            fig.add_hline(y=real.loc[name, measure], line_dash="dash", line_width=1, row=row, col=column)
        if measure != "share":
            fig.add_hline(y=plain[measure], line_dash="dot", line_width=1, row=row, col=column)

# %%
for row, title in enumerate(prices.values(), start=1):
    fig.update_yaxes(title=title, row=row, col=1)
fig.update_xaxes(type="log", tickvals=STRENGTHS, ticktext=[f"{s:g}" for s in STRENGTHS])
fig.update_xaxes(title="strength, in units of the unit's maximum", row=3)
fig.update_layout(height=760, legend=dict(orientation="h", y=-0.1))
pinned = swept[swept.way == "feature pinned"].set_index(["context", "strength"])
ends = {name: (pinned.loc[(name, 1)], pinned.loc[(name, STRENGTHS[-1])]) for name in pair}
said = "; ".join(f"{name} {one.log_likelihood:.1f} nats and {one.distinct:.0%} distinct at the maximum, {four.log_likelihood:.1f} and {four.distinct:.0%} at four times"
                 for name, (one, four) in ends.items())
falls = [name for name, (one, four) in ends.items() if four.log_likelihood < one.log_likelihood]
price = "; ".join(f"{name} {four.log_likelihood:.1f} nats a token, not {one.log_likelihood:.1f} (real text {real.log_likelihood[name]:.1f})"
                  for name, (one, four) in ends.items())
study.show(fig, "06-fluency", claim=f"Pushed four times as hard, {' and '.join(falls) or 'neither'} text is less likely: {price}",
           alt=f"Three rows of curves against strength for {' and '.join(pair)}: share in the context, mean log-likelihood under the unsteered model, distinct "
               f"tokens. Unsteered: {plain['log_likelihood']:.1f} nats, {plain['distinct']:.0%} distinct (dotted); real text dashed. Feature pinned: {said}.")

# %% [markdown]
# ## 8 · Your turn
#
# Pin any feature. (This cell needs a running kernel; nothing else depends on it. The strength is in units of the feature's own
# maximum on the validation text, and a feature that never fired there stays at 0.)

# %% tags=["live"]
maximum = features.maxima(table)


def steer(feature, strength):
    written = sample(model, prompt, length, SEED, n_samples=4, edit=effects.pin(sae, feature, strength * float(maximum[feature])))
    for row in written:
        print(repr(steering.as_text(row[len(prompt):], run.vocabulary)))


_ = ipywidgets.interact(steer, feature=ipywidgets.BoundedIntText(value=first, min=0, max=len(maximum) - 1),
                        strength=ipywidgets.FloatSlider(value=2, min=0, max=4, step=0.25, continuous_update=False))

# %% [markdown]
# ## Key points
#
# - A feature is not only read off: hold it up, and the model writes what the feature stands for. That is evidence of another
#   kind than a correlation.
# - The comparison that counts is with the best neuron under the same treatment, and with real text under the same measure.
# - "At its maximum" is a convention. Look at the whole curve, and at what it costs.
#
# **What would change our mind.** If the best neuron's curve met the feature's at some strength, or if the wrong feature wrote the
# same text, there would be nothing special about these directions. And a share by characters alone could be won by one letter
# repeated: that is why the distinct tokens stand beside it.
#
# **If you only take away one thing**: steering tests whether a feature *does* what its activations suggest.
#
# Next: [07 · universality](07_universality.ipynb)
