# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 03 · Training the dictionary
#
# **Question.** Can the activations of 512 neurons be written as sums of a few directions out of thousands, and do those
# directions mean more than the neurons do?
#
# **You will be able to** write down the sparse autoencoder and its loss; read its training curves; say how faithful, how
# sparse and how alive a dictionary is; and compare its features with neurons as detectors of what is in the text.
#
# **Needs** the corpus and transformer A (made on the way, or loaded). **Makes** the dictionary of 8 features a neuron, five
# figures and six rows of the scorecard. **Time**: 20 minutes to read.

# %% tags=["parameters"]
PROFILE = "workshop"  # "smoke" (minutes) | "workshop" (a laptop) | "paper" (GPUs)
SEED = 0
ARTEFACTS = "auto"  # "auto": load what exists, else train | "load": never train | "train": never load the reference
CORPUS = ""  # "": the profile's own | "environment" | "files:DIR" | "hf:NAME"

# %%
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from sae_lib import study
from sae_lib.evaluate import held_out_pass
from sae_lib.metrics import density_summary, share_interval
from sae_lib.transformer import mlp_activations

run = study.begin(PROFILE, SEED, ARTEFACTS, CORPUS)

# %% [markdown]
# ## 1 · The autoencoder in six lines
#
# **Claim.** The whole method is a one-hidden-layer network and a loss of two terms.
#
# An activation vector $x$ of 512 neurons is encoded into thousands of non-negative *features* $f$ and decoded back. The loss
# asks for a faithful reconstruction and for few active features (its L1 norm stands in for their number). The same bias is
# taken off before the encoder and put back after the decoder, and each feature's decoder direction has norm 1.

# %% tags=["slow"]
trained = run.dictionary("A")
sae, log = trained.model, trained.log
model = run.transformer("A").model
test = run.held_out("test")


# %%
def autoencode(x, W_enc, b_enc, W_dec, b_dec):
    f = torch.relu((x - b_dec) @ W_enc + b_enc)  # features, [batch, d_sae]
    return f, f @ W_dec + b_dec  # and the reconstruction, [batch, d_in]


def loss(x, f, x_hat, l1_coefficient):
    return ((x - x_hat) ** 2).sum(-1).mean() + l1_coefficient * f.abs().sum(-1).mean()


# %% [markdown]
# **Check yourself.** What you have just read is what the library computes:

# %%
x = mlp_activations(model, test.contexts[:4].long()).flatten(0, 1)
f, x_hat = autoencode(x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
output = sae(x)
assert torch.allclose(f, output.features, atol=1e-5), "the features differ: is the bias taken off before the encoder?"
assert torch.allclose(x_hat, output.reconstruction, atol=1e-5), "the reconstructions differ: is the bias put back?"
assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(sae.W_dec.shape[0]), atol=1e-3), "decoder directions have norm 1"
print(f"{sae.W_dec.shape[0]:,} features for {sae.W_dec.shape[1]} neurons; loss here {loss(x, f, x_hat, 1.0):.2f} at coefficient 1")

# %% [markdown]
# ## 2 · How it trained
#
# **Claim.** The loss falls fast at first; the number of active features goes on falling long after that, and the loss with it.
#
# Two steps of the recipe keep the decoder honest: the part of its gradient that would only lengthen a direction is taken
# out before Adam sees it, and the norm is set back to 1 after the step. Features that have not fired for a while are
# *resampled*: they get a new direction from an input that the dictionary reconstructs badly, four times in the first tenth of
# the run.
#
# One step is ours. The paper's features are born with a bias near zero, so that each fires on half of all tokens; a million
# steps make them rare. We have thousands of steps, so ours are born rare: each along a random activation, with the bias that
# lets it fire on a small share of tokens (the profile's `birth_density`, printed below). Section 5 shows what happens without.
#
# **Predict.** Which of the three curves would still move if we trained ten times longer?

# %%
fig = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.06)
for row, (column, label) in enumerate({"loss": "loss", "l0": "active features", "dead": "not firing"}.items(), start=1):
    fig.add_scatter(x=log.activations, y=log[column], row=row, col=1, name=label, showlegend=False)
    fig.update_yaxes(title=label, type="linear" if column == "dead" else "log", row=row, col=1)
for at in log[log.resampled > 0].activations:
    fig.add_vline(x=at, line_dash="dot", line_width=1)
fig.update_xaxes(title="activations seen", row=3, col=1)
fig.update_layout(height=680)
study.show(fig, "03-training", claim=f"After {log.activations.iloc[-1] / 1e6:.3g} million activations {log.l0.iloc[-1]:.0f} features are active on a token",
           alt=f"Three curves against activations seen: the loss falls to {log.loss.iloc[-1]:.0f}, the active features per token to "
               f"{log.l0.iloc[-1]:.1f}, the share of features not firing to {log.dead.iloc[-1]:.1%}. Dotted lines mark resamplings.")

# %%
born = run.profile.dictionary.birth_density
print("Features are born as in the paper." if born is None else f"Features are born to fire on {born:.2%} of tokens, 1 in {1 / born:.0f}.")
log[log.resampled > 0][["step", "activations", "resampled", "dead", "l0", "loss"]]

# %% [markdown]
# ## 3 · Faithful
#
# **Claim.** With its MLP activations replaced by the dictionary's reconstruction, the transformer keeps most of what the
# MLP is worth.
#
# *Loss recovered* is (L<sub>ablated</sub> − L<sub>dictionary</sub>) / (L<sub>ablated</sub> − L<sub>clean</sub>), on held-out
# text. The paper ablates to zero; the mean is the other usual baseline. Intervals come from a bootstrap over documents.
#
# The L1 penalty also *shrinks*: it charges for every unit of activation, so features are let in too weakly. The second row
# of the table undoes that: the same features are active, but each has a gain fitted by regression on training activations.
#
# **Predict.** The paper's dictionary of this size recovers 79 % with about 5 active features. Ours may use up to 20.

# %% tags=["slow"]
held_out = held_out_pass(model, test, sae)

# %%
draws = dict(n_boot=run.profile.bootstrap, seed=SEED)
corrected = held_out_pass(model, test, run.corrected_dictionary("A"))
numbers = {"recovered": held_out.loss_recovered("zero", **draws), "corrected": corrected.loss_recovered("zero", **draws), "recovered_mean": held_out.loss_recovered("mean", **draws),
           "l0": held_out.average("l0", **draws), "explained": held_out.explained_variance(**draws)}
labels = ["loss recovered (zero ablation)", "the same, shrinkage undone", "loss recovered (mean ablation)", "active features (L0)", "explained variance"]
pd.DataFrame([{"": label, "held-out": n.value, "low": n.low, "high": n.high} for label, n in zip(labels, numbers.values(), strict=True)])

# %%
losses = {name: held_out.values[name].mean().item() for name in ("clean", "dictionary", "zero", "mean")}
bars = {"untouched": losses["clean"], "dictionary": losses["dictionary"], "dictionary,<br>shrinkage undone": corrected.values["dictionary"].mean().item(),
        "MLP at zero": losses["zero"], "MLP at its mean": losses["mean"]}
fig = px.bar(x=list(bars), y=list(bars.values()),
             labels={"x": "", "y": "held-out loss (nats per token)"}, text_auto=".2f")
r, c = numbers["recovered"], numbers["corrected"]
study.show(fig, "03-loss-recovered", claim=f"With {numbers['l0'].value:.1f} active features the dictionary recovers {r.value:.1%} of the MLP's worth, {c.value:.1%} with shrinkage undone",
           alt=f"Bars of held-out loss: untouched {losses['clean']:.2f} nats, with the dictionary {losses['dictionary']:.2f}, with the MLP at zero "
               f"{losses['zero']:.2f}, at its mean {losses['mean']:.2f}. Loss recovered {r.value:.1%} (95 % interval {r.low:.1%} to {r.high:.1%}), with shrinkage undone {c.value:.1%}.")

# %%
row = run.scorecard.row
row("03.loss_recovered", claim="The 8x dictionary recovers most of the MLP's worth (zero ablation)", paper=0.79, paper_source="How much of the model",
    ours=r.value, low=r.low, high=r.high, seeds=1, verdict="reproduced" if r.low > 0.79 else "partly" if r.low > 0.5 else "not",
    caveat=f"held-out text; {numbers['recovered_mean'].value:.1%} against mean ablation; L0 differs from the paper's, see 03.l0")
row("03.loss_recovered.corrected", claim="The same dictionary with the shrinkage of its activations undone", paper=0.79, paper_source="How much of the model",
    ours=c.value, low=c.low, high=c.high, seeds=1, verdict="reproduced" if c.low > 0.79 else "partly" if c.low > 0.5 else "not",
    caveat="a gain for each feature, fitted on training activations, which the paper does not have; the same features are active")
n = numbers["l0"]
row("03.l0", claim="Few features are active on a token", paper=4.9, paper_source="sum of A/1's published densities (derived)",
    ours=n.value, low=n.low, high=n.high, seeds=1, verdict="reproduced" if n.high < 10 else "partly" if n.high < 20 else "not",
    caveat="the paper advises an L0 under 10 or 20; a shorter training needs more features for the same fidelity")

# %% [markdown]
# ## 4 · Alive
#
# **Claim.** Nearly all features are in use. Most are denser than the paper's, as they must be where more of them are active
# on each token.
#
# A feature's *density* is the share of tokens on which it is active. Two kinds of feature deserve distrust: *dead* ones that
# never fire, and the *ultralow* cluster that the paper found far to the left, which fires almost never and means nothing.
#
# **Predict.** Where is the peak? The paper's live features have a median density of 0.08 %.

# %%
tokens = len(held_out.document)
summary = density_summary(held_out.fired, tokens, ultralow=1e-5)
density = (held_out.fired / tokens).clamp_min(0.3 / tokens)
fig = px.histogram(x=density.log10().numpy(), nbins=80, labels={"x": "feature density, log10 of the share of tokens (dead at the left edge)"})
fig.add_vline(x=-3.09, line_dash="dot", annotation_text="median in the paper")
fig.update_yaxes(title="features")
study.show(fig, "03-density", claim=f"{summary.dead:.1%} of the features are dead, {summary.ultralow:.1%} ultralow",
           alt=f"Histogram of the log density of {len(density):,} features on {tokens:,} held-out tokens; the median live feature fires on "
               f"{summary.median_live:.2%} of tokens, {summary.dead:.1%} never fire.")

# %% [markdown]
# The held-out text is much smaller than the 100 million tokens of the paper. A feature with a density of one in a million
# will look dead here: read "dead" as "never active on these tokens". *Ultralow* is here a density under 1 in 100,000; the
# paper could see, and used, 1 in a million.

# %%
for share, name, paper, place, claim in (
        (summary.dead, "dead", 0.041, "Global Analysis (168 of 4,096)", "Few features of the 8x dictionary are dead"),
        (summary.ultralow, "ultralow", 0.071, "Global Analysis (292 of 4,096)", "A small cluster of features fires almost never")):
    interval = share_interval(round(share * len(density)), len(density))
    row(f"03.{name}_fraction", claim=claim, paper=paper, paper_source=place, ours=share, low=interval.low, high=interval.high,
        seeds=1, verdict="reproduced" if interval.high <= 1.5 * paper else "not",
        caveat=f"on {tokens:,} held-out tokens where the paper has 100 million; interval over features; ultralow is below 1e-5 here")

# %% [markdown]
# ## 5 · How sparse should it be?
#
# **Claim.** The L1 coefficient trades one virtue for the other; there is no free choice.
#
# Here short trainings, all with the same budget, differ in nothing but the coefficient. One more, the diamond, differs in how
# its features are born: with the paper's Kaiming weights and biases.
#
# **Predict.** Which end of the curve would you rather explain to somebody? And what becomes of 4,096 features that all begin
# by firing on every second token?

# %% tags=["slow"]
sweep = run.sparsity_sweep()
sweep

# %%
rare, dense = sweep[sweep.born == "rare"], sweep[sweep.born != "rare"].iloc[0]
fig = go.Figure(go.Scatter(x=rare.l0, y=rare.value, mode="lines+markers+text", text=[f"λ = {v:g}" for v in rare.l1], name="short trainings",
                           textposition=["top left"] * (len(rare) - 1) + ["bottom right"], error_y=dict(array=rare.high - rare.value, arrayminus=rare.value - rare.low)))
fig.add_scatter(x=[dense.l0], y=[dense.value], mode="markers", marker=dict(size=12, symbol="diamond-open"), name=f"born as in the paper (λ = {dense.l1:g})")
fig.add_scatter(x=[n.value], y=[r.value], mode="markers", marker=dict(size=14, symbol="star"), name="main dictionary")
fig.add_scatter(x=[4.9], y=[0.79], mode="markers", marker=dict(size=12, symbol="x"), name="the paper's A/1")
fig.update_layout(xaxis=dict(title="active features per token (L0)", type="log", tickvals=[2, 5, 10, 20, 50, 100, 200]), yaxis=dict(title="loss recovered", tickformat=".0%"))
study.show(fig, "03-sparsity-fidelity", claim="Fewer active features, less of the loss recovered",
           alt=f"Loss recovered against L0 for {len(rare)} short trainings, from {rare.value.min():.1%} at L0 {rare.l0.min():.1f} to {rare.value.max():.1%} at {rare.l0.max():.1f}; "
               f"the main dictionary at L0 {n.value:.1f} and {r.value:.1%}; one born as in the paper at L0 {dense.l0:.1f} and {dense.value:.1%}, {dense.dead:.0%} dead.")

# %%
same = rare[rare.l1 == dense.l1].iloc[0]
print(f"Born rare: {same.dead:.1%} dead, the median living feature fires on {same.median_density:.3%} of tokens. "
      f"Born as in the paper: {dense.dead:.1%} dead, {dense.median_density:.3%}.")

# %% [markdown]
# ## 6 · Features against neurons
#
# **Claim.** For most of the special contexts some feature is a far better detector than any neuron: scripts, languages, DNA,
# base64. There are exceptions, which are listed below the figure.
#
# This is superposition made visible: the model has no neuron for these contexts, but it has a direction. Both sides choose
# their best unit on the validation text and are measured on the test text.
#
# **Predict.** Features are thousands and neurons hundreds. Why does choosing on other text make that comparison fair?

# %% tags=["slow"]
detectors, won = run.superposition()
detectors.head()

# %%
ordered = detectors.sort_values("feature")
fig = go.Figure()
for unit, symbol in (("neuron", "circle-open"), ("feature", "circle")):
    fig.add_scatter(x=ordered[unit], y=ordered.context, mode="markers", name=f"best {unit}", marker=dict(symbol=symbol, size=11),
                    error_x=dict(array=ordered[f"{unit}_high"] - ordered[unit], arrayminus=ordered[unit] - ordered[f"{unit}_low"], thickness=1))
fig.update_layout(height=820, xaxis=dict(title="Pearson correlation with the context (test text)", range=[0, 1]), yaxis=dict(dtick=1))
study.show(fig, "03-superposition", claim=f"In {won.value:.0f} of {len(detectors)} contexts the best feature beats the best neuron by 0.3 or more",
           alt=f"For each of {len(detectors)} special contexts a dot for the best neuron and one for the best feature. Median correlation "
               f"{detectors.neuron.median():.2f} for neurons and {detectors.feature.median():.2f} for features.")

# %%
even = ordered[ordered.feature - ordered.neuron < 0.3]
print(f"{len(even)} contexts in which the feature is not ahead by 0.3: " + (", ".join(f"{c.context} (feature {c.feature:.2f}, neuron {c.neuron:.2f})" for c in even.itertuples()) or "none"))

# %% [markdown]
# **Check yourself.** What might those have in common? Think of what else in the corpus looks like them, and of how much text of
# each there is.

# %%
row("02.superposition.contexts", claim="Contexts whose best feature beats the best neuron by 0.3 in correlation", paper=None, paper_source="figure only",
    ours=won.value, low=won.low, high=won.high, seeds=1, verdict="reproduced" if won.low >= len(detectors) / 2 else "partly" if won.value else "not",
    caveat=f"of {len(detectors)} special contexts; units chosen on validation text, measured on test text")

# %% [markdown]
# ## Key points
#
# - A sparse autoencoder is two matrices and a loss of two terms; the art is in getting its features started and keeping them alive.
# - Faithfulness, sparsity and density are all measured on text that neither model has seen.
# - For rare scripts, DNA and base64 it finds directions that are far better detectors than the model's own neurons.
#
# **What would change our mind.** If the random control's dictionary detected the contexts as well, the features would be a
# property of the text and not of the model. That is not measured yet.
#
# **If you only take away one thing**: look for directions, not neurons.
