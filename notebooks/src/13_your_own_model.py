# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 13 · Your own model
#
# **Question.** Does all this work on a model that you did not train, with a dictionary that somebody else published?
#
# **You will be able to** open a model in Hugging Face's layout and look at its residual stream; find the positions that would spoil
# a dictionary; train a dictionary or read a published one, and check that it is what it says; put honest numbers beside it; read
# some of its features; push on them; and save the dictionary so that others can load it.
#
# **Needs** nothing: `MODEL = ""` takes the study's own model of several layers, without a network. **Makes** five figures and the
# rows 13 of the scorecard; of any other model, layer or dictionary they go to a folder of their own in `data/runs`, and the study's
# stay what they are. **Time**: 15 minutes to read.
#
# To make it yours, change three lines below, or run `python -m sae_lib.study run --only 13 -p MODEL=models/mine -p LAYER=3`. For
# example:
#
# | | `MODEL` | `LAYER` | `DICTIONARY` |
# |---|---|---|---|
# | the study's own | `""` | `2` | `""` |
# | a folder that you saved, a dictionary trained here | `"models/mine"` | `3` | `""` |
# | a model of the hub and a published dictionary | `"hf:OWNER/MODEL"` | `6` | `"hf:OWNER/DICTIONARY/path/in/it"` |
#
# A dictionary may be in the layout of SAELens, dictionary_learning or sparsify. What comes from the hub is downloaded once, to
# `data/hub`; then no network is needed again.

# %% tags=["parameters"]
PROFILE = "workshop"  # "smoke" (minutes) | "workshop" (a laptop) | "paper" (GPUs)
SEED = 0
ARTEFACTS = "auto"  # "auto": load what exists, else train | "load": never train | "train": never load the reference
CORPUS = ""  # "": the profile's own | "environment" | "files:DIR" | "hf:NAME"
MODEL = ""  # "": the study's own | a folder | "hf:NAME"
LAYER = 2  # the residual stream after so many layers is taken apart
DICTIONARY = ""  # "": trained here | a folder | "hf:OWNER/NAME/path"

# %%
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from IPython.display import HTML, display
from plotly.subplots import make_subplots

from sae_lib import baselines, metrics, residual, study
from sae_lib.evaluate import held_out_pass
from sae_lib.features import activation_table
from sae_lib.sae import SAE
from sae_lib.study import own_cards, own_model
from sae_lib.study.figures import COLOURS

run = study.begin(PROFILE, SEED, ARTEFACTS, CORPUS)
outputs = own_model.outputs(run, MODEL, LAYER, DICTIONARY)

# %% [markdown]
# ## 1 · What is this model?
#
# The corpus is the study's, in the model's *own* tokens: a dictionary is about activations, and those depend on how the text was cut.
# Documents, not tokens, are held out.

# %% tags=["slow"]
own = own_model.open_model(run, MODEL)
model, cfg, draws = own.model, own.model.cfg, {"seed": SEED, "n_boot": run.profile.bootstrap}
loss = own_model.held_out_loss(own, **draws)
pd.Series({"model": own.name, "layers": cfg.n_layers, "width of the residual stream": cfg.d_model, "tokens it knows": cfg.d_vocab,
           "of them, often enough in our text": int(own.used.sum()), "training text (tokens)": own.contexts.numel(),
           "test text (tokens)": own.test.contexts.numel(), "domains": len(own.domains),
           **{f"loss on the test text ({unit})": f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})" for unit, found in loss.items()}}).to_frame("")

# %% [markdown]
# ## 2 · Sinks: what to leave out
#
# **Claim.** In many models some positions, the first of a context above all, have activations tens of times longer than others. A
# squared error cares for little else, so a dictionary spends itself on them; and with them in the average, explained variance says
# nothing of the rest.
#
# The rule: special tokens are left out; so are the leading positions whose median length is over ten times the median of all, and
# single tokens that are as long. What is left out is not trained on, not counted, and not edited either when activations are replaced:
# a baseline that wrecks the sinks as well would flatter the dictionary.
#
# **Predict.** A model of your choice: is the first position longer, and from which layer on?

# %% tags=["slow"]
lengths = own_model.norms(own)
residual.hook_name(model, LAYER)  # says so, if there are not so many layers
skip = own_model.skip_for(own, lengths[LAYER])
counts = own_model.skipped(own, LAYER, skip)
counts.to_frame().assign(share=counts / counts.sum())

# %%
middle = {after: length.median().item() for after, length in lengths.items()}
first = {after: length[:, 0].median().item() / middle[after] for after, length in lengths.items()}
dropped = 1 - counts["counted"] / counts.sum()
outputs.show(own_cards.norm_figure(lengths, skip, LAYER), "13-norms",
             claim=f"After {LAYER} layers the first position is {first[LAYER]:.2g} times as long as the median one; {dropped:.2%} of tokens are left out",
             alt="Median length of the residual stream at each position, a line a number of layers. Median of all and first position relative to it: "
                 + "; ".join(f"after {after}: {middle[after]:.2f}, {first[after]:.2g} times" for after in lengths)
                 + f". Left out after {LAYER}: " + ", ".join(f"{n:,} {why}" for why, n in counts.items() if why != "counted") + ".")

# %% [markdown]
# ## 3 · The dictionary, and is it the right one?
#
# A published dictionary says which model and place it was made for. Believe it, but check: one made for another place gives numbers
# too, only bad ones.
#
# **Predict.** What will the explained variance of a dictionary be that was made for the next layer?

# %% tags=["slow"]
sae = own_model.dictionary(run, own, LAYER, skip, DICTIONARY)
for doubt in own_model.doubts(own, LAYER, sae):
    print(f"WARNING: {doubt}")
pd.Series({"kind": sae.architecture, "features": sae.config.d_sae, "reads": sae.config.d_in, "made for": sae.config.model_name,
           "at": sae.config.hook_name, "asked for": residual.hook_name(model, LAYER)}).to_frame("dictionary")

# %% [markdown]
# The baselines come from the same activations. Principal components are not sparse, so there are two ways to give them as many
# numbers a token as the dictionary has: the *first k* components, always the same; and the *largest k* of all components, chosen anew for
# each token, as a dictionary does. Both are written as dictionaries, so one function measures all three.
#
# Three measures, as in notebook 03, on the test text. **Loss recovered**: of what it costs to set the residual stream to zero (or to its
# mean), the share that the rebuilt stream wins back. **Explained variance**: one minus the squared error, over that of always giving the
# mean. **L0**: how many features are active on a token.

# %% tags=["slow"]
found = {"dictionary": held_out_pass(model, own.test, sae, LAYER, skip)}
l0 = found["dictionary"].average("l0", **draws)
k = int(np.clip(round(l0.value), 1, cfg.d_model))
sample = own_model.stream(run, own, LAYER, skip, batch_size=256).sample(run.profile.component_sample, "components")
rivals = {f"first {k} components": baselines.as_dictionary(baselines.pca(sample, k)),
          f"largest {k} components": baselines.as_dictionary(baselines.pca(sample, cfg.d_model), k)}
found |= {name: held_out_pass(model, own.test, rival, LAYER, skip, known=found["dictionary"]) for name, rival in rivals.items()}
numbers = {name: {"loss recovered (zero)": each.loss_recovered("zero", **draws), "loss recovered (mean)": each.loss_recovered("mean", **draws),
                  "explained variance": each.explained_variance(**draws), "L0": each.average("l0", **draws)} for name, each in found.items()}
dead = metrics.density_summary(found["dictionary"].fired, len(found["dictionary"].document)).dead
pd.DataFrame({name: {what: f"{i.value:.3f} ({i.low:.3f} to {i.high:.3f})" for what, i in each.items()} for name, each in numbers.items()})

# %%
fig = make_subplots(cols=3, subplot_titles=list(numbers["dictionary"])[:3], shared_yaxes=True, horizontal_spacing=0.04)
for column, what in enumerate(list(numbers["dictionary"])[:3], start=1):
    for (name, each), colour in zip(numbers.items(), COLOURS, strict=False):
        value, low, high = each[what]
        fig.add_bar(x=[""], y=[value], name=name, marker_color=colour, showlegend=column == 1, legendgroup=name, row=1, col=column,
                    error_y=dict(array=[high - value], arrayminus=[value - low]))
fig.update_yaxes(tickformat=".0%")
fig.update_layout(width=1000, height=460, legend=dict(orientation="h", y=-0.08))
told = {name: f"{name} {each['loss recovered (zero)'].value:.1%}" for name, each in numbers.items()}
best = max(list(numbers)[1:], key=lambda name: numbers[name]["loss recovered (zero)"].value)
outputs.show(fig, "13-quality", claim=f"With {l0.value:.3g} numbers a token the dictionary recovers {numbers['dictionary']['loss recovered (zero)'].value:.1%} of the loss, the {best} "
             f"{numbers[best]['loss recovered (zero)'].value:.1%}",
             alt="Bars with intervals of loss recovered (against zero and against the mean) and explained variance. Loss recovered, zero: " + "; ".join(told.values())
                 + ". Explained variance: " + "; ".join(f"{name} {each['explained variance'].value:.1%}" for name, each in numbers.items()) + ".")

# %%
def gain(rival):
    """By how much more of the loss the dictionary recovers, over the same draws of documents."""
    mine, other = (found[name].document_sums("clean", "dictionary", "zero") for name in ("dictionary", rival))
    return metrics.bootstrap_interval(np.hstack([mine, other[:, 1:2]]), lambda t: (t[..., 4] - t[..., 1]) / (t[..., 2] - t[..., 0]), **draws)


gains = {name: gain(name) for name in rivals}
beaten = [each.low > 0 for each in gains.values()]
mean_recovered = numbers["dictionary"]["loss recovered (mean)"].value
for name, each in gains.items():
    print(f"more than the {name}: {each.value:+.3f} ({each.low:+.3f} to {each.high:+.3f})")
print(f"numbers a token: {l0.value:.3g} of {cfg.d_model} dimensions, {l0.value / cfg.d_model:.0%}")

# %% [markdown]
# **If the largest components win**, look at the last line. A dictionary that uses a quarter of as many numbers as there are dimensions is
# hardly sparse, and the largest quarter of all components, chosen anew for each token, leaves little to rebuild. Such a dictionary has not
# earned its name by reconstruction: it wants a greater L1 coefficient, or it must show in sections 4 and 5 that its units can be read.

# %%
where = f"{own.name} after {LAYER} of {cfg.n_layers} layers, {sae.config.d_sae:,} features"
recovered = numbers["dictionary"]["loss recovered (zero)"]
outputs.row("13.loss_recovered", claim="Share of the loss recovered by a dictionary of the residual stream, and more than components of equal L0 recover", paper=None,
    paper_source="C, section 2 (dictionaries between layers)", ours=recovered.value, low=recovered.low, high=recovered.high, seeds=1,
    verdict="reproduced" if all(beaten) else "partly" if any(beaten) else "not",
    caveat=f"{where}; zero ablation (against the mean {mean_recovered:.1%}); more than the " + ", the ".join(
        f"{name} by {each.value:.3f} ({each.low:.3f} to {each.high:.3f})" for name, each in gains.items()) + f"; {dropped:.2%} of tokens left out")
outputs.row("13.l0", claim="A token has few active features: fewer than the residual stream has dimensions", paper=None, paper_source="C, section 2",
    ours=l0.value, low=l0.low, high=l0.high, seeds=1, verdict="reproduced" if l0.high < cfg.d_model / 2 else "partly" if l0.high < cfg.d_model else "not",
    caveat=f"{where}, of {cfg.d_model} dimensions (reproduced: under half of them); {dead:.1%} of features never fire on {len(found['dictionary'].document):,} tokens")

# %%
density = metrics.feature_density(found["dictionary"].fired, len(found["dictionary"].document)).numpy()
living = density[density > 0]
fig = go.Figure(go.Histogram(x=np.log10(living), nbinsx=50, marker_color=COLOURS[0], name="features"))
ticks = list(range(-6, 1))
fig.update_xaxes(title="share of tokens that a feature is active on", tickvals=ticks, ticktext=["1e-6", "1e-5", "0.01%", "0.1%", "1%", "10%", "100%"])
fig.update_yaxes(title="features")
typical = np.median(living) if len(living) else np.nan
if len(living):
    outputs.show(fig, "13-density", claim=f"The median living feature fires on {typical:.2%} of tokens; {dead:.1%} of {len(density):,} never fire here",
                 alt=f"Histogram of the density of {len(living):,} living features on a logarithmic axis, from {living.min():.1g} to {living.max():.1%}, median {typical:.2%}. "
                     f"{dead:.1%} of all never fire on {len(found['dictionary'].document):,} tokens.")

# %% [markdown]
# ## 4 · Feature cards
#
# **Claim.** Not only hand-picked features mean something.
#
# So nobody picks: of the features that fire on 20 tokens or more of the validation text, these are at even steps from the rarest to the
# commonest. Expect some to say nothing to you; the commonest of a dictionary often do.
#
# In each example the darker token is the more active one. Underlined is what comes out likelier (solid) or less likely (dotted) because
# the feature is there, by more than 0.1 nats: the feature is taken out of the residual stream, and all layers after it run again.
#
# **Predict.** A reader of the cards alone: what does each feature wait for?

# %% tags=["slow"]
table = activation_table(model, own.validation.contexts, sae.encode, LAYER, skip)
cards = [own_cards.card(own, sae, LAYER, skip, table, unit) for unit in own_cards.choose(table, 6)]
display(HTML(own_cards.page(cards)))

# %% [markdown]
# What they write, measured rather than read off the weights: at a feature's strongest tokens, by how much its presence raises the
# probability of each next token, through all later layers. (In the study's one-layer model the path from a feature to the logits is one
# matrix. Here it is not.)

# %%
raised = {each.feature: own_cards.spelled(own, each.raised[:3]) for each in cards}
strongest = max(cards, key=lambda each: np.nanmax(each.effect))
outputs.show(own_cards.effects_figure(own, cards), "13-effects",
             claim=f"At its strongest tokens feature {strongest.feature} adds {np.nanmax(strongest.effect):.1%} to the probability of "
                   f"{raised[strongest.feature][0]}, more than any other of the {len(cards)} to any token",
             alt="For each feature, with the commonest domain of its strongest tokens, bars of the ten next tokens whose probability it raises most. The first three: "
                 + "; ".join(f"{feature}: {', '.join(tokens)}" for feature, tokens in raised.items()) + ".")

# %% [markdown]
# ## 5 · Push
#
# **Claim.** Adding a feature's direction to the residual stream makes likely what the feature raised in its own examples, on text that has
# nothing to do with them; a random direction of the same length does not.
#
# The ten tokens of each feature are those of the figure above, found on the *validation* text. The prompts are beginnings of contexts
# of the *test* text; such a context is a piece of the packed text, and may begin in the middle of a document and go on with another. The
# direction is added at the last token only, and no two of these are of one document.
#
# How far all expectations are changed is measured by the **Kullback-Leibler divergence** (KL): the mean, over the next tokens that the
# model expects unsteered, of how much less likely steering makes them, in nats. It is 0 if nothing changes.
#
# **Predict.** What does the random direction do to the expectations as a whole: less, or as much?

# %% tags=["slow"]
STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
tokens, at = own_cards.prompts(own.test, skip, run.profile.own.prompts, SEED)
steered = own_cards.steer(own, sae, LAYER, cards, tokens, at, (0.0, *STRENGTHS), SEED)
means = steered.groupby(["way", "strength"])[["share", "divergence"]].mean().unstack("way")
means

# %%
def apart(strength):
    """Probability of a feature's tokens, above that under the random direction: mean over features, interval over prompts."""
    part = steered[steered.strength == strength].pivot_table(index="prompt", columns="way", values="share")
    return metrics.mean_interval((part[own_cards.FEATURE] - part[own_cards.RANDOM]).to_numpy(), **draws)


pushed, clean = means["share"], steered[steered.strength == 0].share.mean()
by_feature = steered[steered.strength == 2].pivot_table(index="feature", columns="way", values="share")
ahead = int((by_feature[own_cards.FEATURE] > by_feature[own_cards.RANDOM]).sum())
outputs.show(own_cards.steering_figure(steered), "13-steering",
             claim=f"At twice its maximum a feature gives its ten tokens {pushed.loc[2.0, own_cards.FEATURE]:.1%} of the probability, a random direction "
                   f"{pushed.loc[2.0, own_cards.RANDOM]:.1%}, none {clean:.1%}",
             alt=f"Two panels against strength, thin lines a feature each, thick their mean, over {len(tokens)} prompts. Probability of the ten tokens: "
                 + ", ".join(f"{s:g}: {pushed.loc[s, own_cards.FEATURE]:.1%} (random {pushed.loc[s, own_cards.RANDOM]:.1%})" for s in STRENGTHS)
                 + f". {ahead} of {len(cards)} features are above their random direction at twice the maximum. KL divergence rises with strength.")

# %%
twice = apart(2.0)
outputs.row("13.steering", claim="Adding a feature at twice its maximum raises the probability of the tokens that it raised on other text: by how much more than a random direction",
    paper=None, paper_source="B, Pinned Feature Sampling (on an MLP)", ours=twice.value, low=twice.low, high=twice.high, seeds=1,
    verdict="reproduced" if twice.low > 0 and ahead == len(cards) else "partly" if twice.low > 0 else "not",
    caveat=f"{where}; mean of {len(cards)} features chosen by rule, {ahead} of them above their random direction; interval over {len(tokens)} prompts")

# %% [markdown]
# ## 6 · Save it, publish it
#
# A dictionary is saved in the layout that SAELens loads: two files, with all that a reader needs to check it. **Check yourself**: read it back, it must
# be the same to the bit.

# %%
sae.metadata |= {"l0": l0.value, "explained_variance": numbers["dictionary"]["explained variance"].value, "model": own.name,
                 "place": residual.hook_name(model, LAYER), "left_out": skip._asdict() | {"above": float(skip.above)}}
sae.save(outputs.published)
again = SAE.load(outputs.published)
assert type(again) is type(sae) and again.config == sae.config, "what was read is not what was saved"
assert all(torch.equal(a, b) for a, b in zip(again.parameters(), sae.parameters(), strict=True)), "weights changed on the way"
print(*sorted(f"{file.name}: {file.stat().st_size:,} bytes" for file in outputs.published.iterdir()), sep="\n")

# %% [markdown]
# To publish it, put the folder on the hub (`huggingface_hub.upload_folder(repo_id="YOU/NAME", folder_path=..., path_in_repo=...)`), and
# say in the README which model and which revision, after how many layers, on what text, with which positions left out, and the table of section
# 3 *with its baselines*. Whoever sets `DICTIONARY = "hf:YOU/NAME/path"` here gets the same table on other text.
#
# ## Key points
#
# - Nothing in the method belongs to one model: it needs activations, text in the model's own tokens, and a way to go on from edited ones.
# - Look at lengths before anything else. Leave sinks out of training, of metrics *and* of the ablations that you compare with.
# - A published dictionary comes with a claim about model and place: a line of code checks it, and the numbers confirm it.
# - Choose features by a rule before you show them, find their tokens on one text and push on another.
#
# **What would change our mind.** If the largest components recovered as much of the loss as the dictionary, or a random direction
# raised a feature's tokens as well, sparsity would have bought nothing here.
#
# **If you only take away one thing**: it is your turn.
#
# Next: [14 · the scorecard](14_scorecard.ipynb)
