# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 02 · The corpus and the one-layer transformer
#
# **Question.** What is the model that we are going to take apart, and is there anything hidden in it?
#
# **You will be able to** say what the model was trained on and how good it is; measure what its MLP layer is worth; and
# show that no single neuron stands for Hebrew, or base64, or DNA.
#
# **Needs** nothing. **Makes** the tokens, the transformers A and B and the random control, and five figures.
# **Time**: 15 minutes to read.
#
# *Towards Monosemanticity* (Bricken et al. 2023) studies the smallest transformer that has the problem: one attention layer
# and one MLP of 512 ReLU neurons. Ours has the same sizes; what differs is the text (40 million tokens of what is installed
# on this computer, where the paper had 100 billion of the Pile) and the vocabulary (4,096 tokens, where the paper had 65,536).

# %% tags=["parameters"]
PROFILE = "workshop"  # "smoke" (minutes) | "workshop" (a laptop) | "paper" (GPUs)
SEED = 0
ARTEFACTS = "auto"  # "auto": load what exists, else train | "load": never train | "train": never load the reference
CORPUS = ""  # "": the profile's own | "environment" | "files:DIR" | "hf:NAME"

# %%
import pandas as pd
import plotly.express as px
import torch

from sae_lib import study
from sae_lib.evaluate import best_detectors, held_out_pass, label_correlations
from sae_lib.transformer import ngram_losses, sample

run = study.begin(PROFILE, SEED, ARTEFACTS, CORPUS)

# %% [markdown]
# ## 1 · The text
#
# **Claim.** A Python installation holds enough text for this study: code, prose, headers, data, and small amounts of some
# thirty scripts, languages and encodings.
#
# The small amounts matter most. A context that makes up several per cent of all tokens gets neurons of its own, and then
# there is nothing to untangle. The *special contexts* below are therefore kept near 0.1 to 0.4 % each. The label of every
# document is known: a ground truth that the papers did not have.
#
# **Predict.** Which domain is the largest?

# %%
table = run.tokens.table()
table["special"] = table.domain.isin(run.special_contexts).map({True: "yes", False: "no"})
rare = table[table.special == "yes"].share
print(f"{table.tokens.sum():,} tokens in {table.documents.sum():,} documents; {len(rare)} special contexts")
table.sort_values("share", ascending=False)

# %%
fig = px.scatter(table.sort_values("share"), x="share", y="domain", color="special", symbol="special", log_x=True, height=900,
                 labels={"share": "share of tokens", "domain": "", "special": "special context"})
fig.update_traces(marker_size=9).update_yaxes(dtick=1, categoryorder="array", categoryarray=table.sort_values("share").domain)
fig.update_xaxes(dtick=1, tickformat="~%", minor=dict(dtick="D1", showgrid=True, gridcolor="#F2F2F2"))
study.show(fig, "02-corpus", claim=f"{len(rare)} special contexts, each {rare.min():.2%} to {rare.max():.2%} of the tokens",
           alt=f"Markers of the share of tokens of {len(table)} text domains on a logarithmic axis. The {len(rare)} special contexts, "
               f"scripts, languages and encodings, lie between {rare.min():.2%} and {rare.max():.2%}.")

# %% [markdown]
# ## 2 · Tokens
#
# The tokenizer is a BPE of characters in which digits stand alone. Characters too rare for the vocabulary, most of them Chinese
# and Korean, are written byte by byte: keep that in mind when a feature seems to fire on a third of a letter. The sample it
# learned from is more even over the domains than the text is, so that the letters of rare scripts became tokens.

# %%
tokenizer = run.tokens.tokenizer
for text in ("def forward(self, x):", "The licence is granted, free of charge,", "שלום עולם", "مرحبا", "aGVsbG8gd29ybGQ=", "2026"):
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(text).ids]
    print(f"{len(text):3} characters, {len(pieces):3} tokens: {' | '.join(pieces)}")

# %% [markdown]
# ## 3 · Training
#
# **Claim.** After one pass over the text, the one-layer model is far better than counting pairs of tokens.
#
# Two models are trained, A and B, that differ in nothing but the seed of their initial weights. What is found in both
# is more likely to be a property of the data than an accident.
#
# **Predict.** How far apart will the two curves be at the end?

# %% tags=["slow"]
twins = {name: run.transformer(name) for name in "AB"}
control = run.transformer("random")
test = run.held_out("test")

# %%
ngrams = ngram_losses(run.contexts("train").flatten(), test.contexts, tokenizer.get_vocab_size())
curves = pd.concat([t.log.assign(transformer=name) for name, t in twins.items()])
fig = px.line(curves, x="tokens", y="loss", color="transformer", line_dash="transformer",
              labels={"tokens": "tokens seen", "loss": "training loss of a batch (nats per token)"})
for name, loss in ngrams.items():
    fig.add_hline(y=loss, line_dash="dot", annotation_text=f"{name} model, held-out: {loss:.2f}")
final = curves.groupby("transformer").loss.apply(lambda losses: losses.tail(20).mean())
study.show(fig, "02-training", claim=f"Both transformers end near {final.mean():.2f} nats, below a bigram model's {ngrams['bigram']:.2f}",
           alt=f"Training loss against tokens seen for transformers A and B: two curves that fall together to {final.A:.2f} and "
               f"{final.B:.2f} nats, below dotted lines for a unigram model ({ngrams['unigram']:.2f}) and a bigram model ({ngrams['bigram']:.2f}).")

# %% [markdown]
# ## 4 · What is the MLP worth?
#
# **Claim.** Without its MLP the model loses nats, not hundredths. That difference is what a dictionary has to
# "recover" in the next notebook.
#
# There are two ways of taking a layer away: set its activations to zero, or to their mean. Zero is the papers' choice, and
# it flatters whoever is compared with it if zero is far from anything that the model ever sees. So both are shown.
#
# **Predict.** Which of the two hurts more?

# %%
rows = []
for name, model in (("A", twins["A"].model), ("B", twins["B"].model), ("random", control.model)):
    held_out = held_out_pass(model, test)
    for edit in ("clean", "zero", "mean"):
        interval = held_out.average(edit, seed=SEED, n_boot=run.profile.bootstrap)
        rows.append({"transformer": name, "MLP": edit, **interval._asdict()})
ablation = pd.DataFrame(rows).assign(up=lambda t: t.high - t.value, down=lambda t: t.value - t.low)
ablation

# %%
fig = px.bar(ablation, x="transformer", y="value", color="MLP", barmode="group", error_y="up", error_y_minus="down",
             labels={"value": "held-out loss (nats per token)", "MLP": "MLP activations"})
a = ablation[ablation.transformer == "A"].set_index("MLP").value
study.show(fig, "02-mlp-ablation", claim=f"The MLP of transformer A is worth {a.zero - a.clean:.2f} nats against zero, {a['mean'] - a.clean:.2f} against its mean",
           alt=f"Bars of held-out loss for transformers A, B and the random control with the MLP untouched, at zero and at its mean. "
               f"For A: {a.clean:.2f}, {a.zero:.2f} and {a['mean']:.2f} nats, with small intervals.")

# %% [markdown]
# The *random control* is transformer A with the entries of each weight matrix shuffled, as in the paper. It keeps the sizes
# and the distribution of the weights and has learned nothing. Whether our findings show in it too is a question for later.
#
# ## 5 · It writes
#
# A model of this size catches form and not sense. Read the sample for what it knows: indentation, brackets, licences.

# %%
prompt = torch.tensor(tokenizer.encode("def __init__(self, ").ids)
for name, model in (("transformer A", twins["A"].model), ("random control", control.model)):
    written = sample(model, prompt, min(60, run.profile.tokens.n_ctx - len(prompt)), seed=SEED, temperature=0.8)
    print(f"--- {name} ---\n{tokenizer.decode(written[0].tolist())}\n")

# %% [markdown]
# ## 6 · No neuron for Hebrew
#
# **Claim.** For most special contexts the best of the 512 neurons is a poor detector.
#
# For each context we take the neuron whose activation correlates best with "this token is from such a document". It is
# chosen on the validation text and measured on the test text, so that the best of 512 is not flattered by luck.
#
# **Predict.** A perfect detector has correlation 1. What will the median context's best neuron have?

# %%
names = run.special_contexts
labels = [run.tokens.domains.index(name) for name in names]
validation, everything = (run.held_out(split, whole=True) for split in ("validation", "test"))
best = best_detectors(twins["A"].model, None, validation, everything, labels)
detectors = pd.DataFrame({"context": names, "unit": best.unit, "pearson": best.pearson()}).sort_values("pearson")
detectors.tail(8)

# %%
fig = px.bar(detectors, x="pearson", y="context", orientation="h", height=800, hover_data=["unit"], range_x=[0, 1],
             labels={"pearson": "Pearson correlation of the best neuron with the context (test text)", "context": ""})
fig.update_yaxes(dtick=1)
study.show(fig, "02-best-neurons", claim=f"The median special context's best neuron correlates {detectors.pearson.median():.2f} with it",
           alt=f"Bars of the correlation of the best neuron with each of {len(detectors)} special contexts, from {detectors.pearson.min():.2f} "
               f"({detectors.context.iloc[0]}) to {detectors.pearson.max():.2f} ({detectors.context.iloc[-1]}); the median is {detectors.pearson.median():.2f}.")

# %% [markdown]
# Worse, a neuron that is best for one context answers to others as well. Each row below is one of those neurons; a
# monosemantic neuron would have a single bright cell.

# %%
shown = list(dict.fromkeys(detectors.sort_values("pearson", ascending=False).unit))[:15]
correlations = label_correlations(twins["A"].model, None, test, len(run.tokens.domains))
matrix = correlations[shown][:, labels].clamp(min=0)
fig = px.imshow(matrix.numpy(), x=names, y=[f"neuron {n}" for n in shown], zmin=0, zmax=max(0.1, float(matrix.max())), aspect="auto", height=620,
                color_continuous_scale="Viridis", labels={"color": "Pearson", "x": "special context", "y": ""})
fig.update_xaxes(dtick=1, tickangle=60)
shared = int(((matrix > 0.1).sum(1) > 1).sum())
study.show(fig, "02-polysemantic-neurons", claim=f"{shared} of these {len(shown)} neurons answer to more than one context",
           alt=f"Heat map of the correlation of {len(shown)} neurons with {len(names)} special contexts. {shared} of the neurons exceed 0.1 for "
               "more than one context.")

# %% [markdown]
# ## Key points
#
# - The corpus is real, labelled, local, and composed so that many contexts are *rare*: rarity is what makes a model share
#   neurons between them.
# - The transformer is far better than bigrams, and its MLP is worth a lot: there is something in it to explain.
# - Neurons do not line up with contexts. The next notebook looks for directions that do.
#
# **What would change our mind.** If the best neurons had correlations like the features of the next notebook, the
# dictionary would be solving a problem that is not there. That did happen in a prototype whose base64 made up 5 % of the text.
#
# Next: [03 · training the dictionary](03_training_the_dictionary.ipynb)
