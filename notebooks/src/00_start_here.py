# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 00 · Start here
#
# **Question.** A neural network's neurons answer to many unrelated things at once. Is there a better unit to read it by?
#
# **You will be able to** find your way through this study, check that your machine can run it, and see its main result in
# one figure.
#
# **Needs** nothing: small reference artefacts come with the study. **Makes** one figure. **Time**: 5 minutes.
#
# The study reproduces two papers on a laptop, from the training of the model to every figure: *Towards Monosemanticity*
# (Bricken et al. 2023) and *Sparse Autoencoders Find Highly Interpretable Features in Language Models* (Cunningham et al.
# 2023). Nothing is downloaded while it runs.

# %% tags=["parameters"]
PROFILE = "workshop"  # "smoke" (minutes) | "workshop" (a laptop) | "paper" (GPUs)
SEED = 0
ARTEFACTS = "auto"  # "auto": load what exists, else train | "load": never train | "train": never load the reference
CORPUS = ""  # "": the profile's own | "environment" | "files:DIR" | "hf:NAME"

# %%
import pandas as pd
import plotly.graph_objects as go

from sae_lib import study

run = study.begin(PROFILE, SEED, ARTEFACTS, CORPUS)

# %% [markdown]
# ## Your machine
#
# Everything below should say *ok*. Training from nothing (`./run_all.sh --train`) wants two cores and hours; with the
# reference artefacts, minutes.

# %%
pd.DataFrame(study.machine_check(), columns=["check", "found", "verdict"])

# %% [markdown]
# ## The idea in one figure
#
# **Claim.** For rare contexts (a script, a language, an encoding) the model has no neuron, but it has a *direction*, and a
# sparse autoencoder finds it.
#
# A language model with one layer and 512 MLP neurons was trained on text in which every document's domain is known. A
# dictionary of 4,096 sparse *features* was then trained on the neurons' activations, without seeing any label. For each
# rare context the figure compares the best neuron with the best feature as a detector.
#
# **Predict.** If neurons were the right unit, where would the two kinds of dot be?

# %% tags=["slow"]
detectors, won = run.superposition()

# %%
ordered = detectors.sort_values("feature")
fig = go.Figure()
for unit, symbol in (("neuron", "circle-open"), ("feature", "circle")):
    fig.add_scatter(x=ordered[unit], y=ordered.context, mode="markers", name=f"best {unit}", marker=dict(symbol=symbol, size=11))
fig.update_layout(height=820, xaxis=dict(title="Pearson correlation with the context (test text)", range=[0, 1]), yaxis=dict(dtick=1))
study.show(fig, "00-superposition",
           claim=f"Directions, not neurons: {won.value:.0f} of {len(detectors)} rare contexts have a feature far better than any neuron",
           alt=f"For each of {len(detectors)} rare contexts a dot for the best neuron and one for the best feature. The median correlation "
               f"is {detectors.neuron.median():.2f} for neurons and {detectors.feature.median():.2f} for features.")

# %% [markdown]
# ## The map
#
# | notebook | question |
# |---|---|
# | [01 · toy model](01_toy_model.ipynb) | how can there be more features than neurons, and are known ones found? |
# | [02 · corpus and transformer](02_corpus_and_transformer.ipynb) | what is the model, and do its neurons mean anything? |
# | [03 · training the dictionary](03_training_the_dictionary.ipynb) | can 512 neurons be written as few of 4,096 directions? |
# | [04 · four features](04_four_features.ipynb) | is there a feature that *is* Arabic script, or DNA? |
# | [05 · features against neurons](05_features_against_neurons.ipynb) | which units can be read: features, neurons, PCA, ICA, random ones? |
# | [06 · steering](06_steering.ipynb) | what does the model write when a feature is held at its maximum? |
# | [07 · universality](07_universality.ipynb) | does a model from another seed have the same features? |
# | [08 · feature splitting](08_feature_splitting.ipynb) | what does a wider dictionary find? |
# | [09 · automata](09_automata.ipynb) | do features hand over to each other like the states of a machine? |
# | [10 · sparsity and fidelity](10_sparsity_and_fidelity.ipynb) | what does sparsity cost, and which kind of dictionary asks least for it? |
# | [11 · indirect object](11_indirect_object.ipynb) | which few directions carry a name to where it is said, causally? |
# | [12 · case studies](12_case_studies.ipynb) | between layers: what can be read, and what makes a feature fire? |
# | [13 · your own model](13_your_own_model.ipynb) | does all of it work on a model that was trained elsewhere? |
# | [14 · the scorecard](14_scorecard.ipynb) | which findings came true here, and how far? |
#
# ## The claims so far
#
# Each notebook that measures a finding writes its row here: the paper's number, ours with a 95 % interval from a bootstrap
# over documents, and a verdict. A "not" is a result too.

# %%
run.scorecard.table()[["id", "claim", "paper", "ours", "low", "high", "verdict"]]

# %% [markdown]
# ## How to read a notebook
#
# Every section is a small bet: a **claim** with a number, a moment to **predict**, a few lines of code, a figure, and often a
# **check** that fails loudly if you change something that matters. Change `PROFILE` to `"smoke"` to try things in seconds.
