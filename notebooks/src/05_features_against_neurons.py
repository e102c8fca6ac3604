# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 05 · Features against neurons
#
# **Question.** Four features can be lucky. Is the *whole* dictionary easier to understand than the neurons, and than other ways
# to cut the same activations into pieces?
#
# **You will be able to** rate units blindly by the paper's rubric; say what an automated score measures and what it does not; tell
# a score of activations from one of effects; and use a control that never learned anything.
#
# **Needs** transformer A, its dictionary, the dictionary on the random-weights transformer, PCA and ICA (loaded, or made on the way).
# **Makes** five figures and twelve rows of the scorecard. **Time**: 25 minutes to read, 20 more to rate.
#
# The paper asks in four ways: people with a rubric, a language model that explains activations, the same for effects, and how far
# down an interpretation holds. All ask about a *random sample*, never about favourites.

# %% tags=["parameters"]
PROFILE = "workshop"  # "smoke" (minutes) | "workshop" (a laptop) | "paper" (GPUs)
SEED = 0
ARTEFACTS = "auto"  # "auto": load what exists, else train | "load": never train | "train": never load the reference
CORPUS = ""  # "": the profile's own | "environment" | "files:DIR" | "hf:NAME"

# %%
import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
from IPython.display import display
from plotly.subplots import make_subplots

from sae_lib import rubric, study
from sae_lib.study.figures import COLOURS
from sae_lib.study.rater import Rater
from sae_lib.study.scores import INTERVALS, KINDS, by_interval, differences, explainer, rating, score, summary, text_of

run = study.begin(PROFILE, SEED, ARTEFACTS, CORPUS)

# %% [markdown]
# ## 1 · Six kinds of unit, one text
#
# **Claim.** A comparison is fair if all kinds meet the same text, the same questions and the same explainer, and if nobody chose
# the units.
#
# Units are *drawn by the seed*. Those that are active on at least 20 tokens of the **validation** text count as living; the first of
# the living are explained and scored on the **test** text, the same contexts for every kind. PCA and ICA are fitted to activations of
# the training text; their components, and random directions, have their negative side cut off, as a neuron's is. The last kind is
# the control: the entries of each weight matrix of A shuffled, and a dictionary trained on what comes out.
#
# The explainer sees examples as in the paper, from the top 20, five near each of eleven levels down to 0, and the 20 weakest: up to
# 34 windows of nine tokens, with 5 random ones and 10 in which the unit's top tokens stand elsewhere. Asked it is about others: no
# window is shown and asked, and none that overlaps one shown.
#
# **Look at the last column below.** A neuron's "random" windows are full of activity, a feature's are almost silent: the question is
# not the same, and no sampling makes it so. And of a feature the few strongest examples may all be shown. What that means for the
# scores is in sections 3 and 5.
#
# The default explainer is no language model: it finds **patterns of tokens and contexts**, writes them down, and predicts by what
# it wrote. It knows no meanings. With `OPENAI_BASE_URL` and `OPENAI_MODEL` set, a language model does the same.

# %% tags=["slow"]
print("explained by:", explainer(run.vocabulary)[1])
scores = {kind: score(run, kind) for kind in KINDS}
draws = dict(seed=SEED, n_boot=run.profile.bootstrap)
looked_at = text_of(run, "test").contexts.numel()
activity = {kind: found.units.active.median() if len(found.units) else np.nan for kind, found in scores.items()}
pd.DataFrame([{"kind": KINDS[kind], "living, of those drawn": f"{found.living.value:.0%}", "explained": int(found.units.get("spearman", pd.Series(dtype=float)).notna().sum()),
               "dropped": int((found.units.get("dropped", pd.Series(dtype=str)) != "").sum()), "active on (median)": f"{activity[kind] / looked_at:.2%} of tokens"}
              for kind, found in scores.items()])

# %% [markdown]
# Some explanations, good and bad, taken at fixed places of the ranking:

# %%
pd.set_option("display.max_colwidth", None)
for kind in ("feature", "neuron"):
    ranked = scores[kind].units.dropna(subset=["spearman"]).sort_values("spearman", ascending=False)
    places = np.unique(np.linspace(0, len(ranked) - 1, min(4, len(ranked))).astype(int)) if len(ranked) else []
    display(ranked.iloc[places][["unit", "spearman", "logit", "text"]].round(2).rename(columns={"unit": kind}).style.hide())

# %% [markdown]
# ## 2 · You, with the rubric
#
# **Claim.** The paper's first judge was a person, who rated 412 intervals of 162 features and neurons without knowing which was
# which: the median feature interval got 12 of 14 points, the median neuron 0.
#
# Below are features, neurons and features of the control, shuffled, under codes that say nothing. Each is shown at its strongest and
# at half of that. Enter your name and rate; every answer is saved at once, in one file for all raters. Then run the cell after it.
#
# **Predict.** Will you and your neighbour agree?

# %% tags=["live"]
asked = rating(run, scores)
Rater(asked.items, lambda item: asked.shown[item.code], run.vocabulary, asked.path).box

# %%
ratings = rubric.read(asked.path)
rated = rubric.ratings_table(ratings, asked.items)
if rated.empty:
    print(f"No ratings yet ({len(asked.items)} items to rate): the rubric's part of this notebook is empty, and nothing else depends on it.")
else:
    display(rated.groupby(["kind", "interval"]).total.describe()[["count", "25%", "50%", "75%"]], rubric.agreement(ratings).round(2).style.hide())

# %% [markdown]
# ## 3 · Explaining activations
#
# **Claim.** The explanation of a feature predicts its activations better than that of a neuron, a component or a random direction.
#
# The score is Spearman's correlation of predicted and true levels (0 to 9) over all tokens of the asked windows. A prediction that
# is the same everywhere scores 0.
#
# **Predict.** Where will the control be? It learned nothing; but its dictionary did.

# %%
def distribution(column, title, lines=()):
    """A dot a unit, jittered; the median of each kind with its interval; dotted lines at given values {label: value}."""
    found, fig = summary(scores, column, **draws), go.Figure()
    rng = np.random.default_rng(SEED)
    for i, (kind, part) in enumerate(scores.items()):
        known = part.units[column].dropna() if column in part.units else pd.Series(dtype=float)
        fig.add_scatter(x=known, y=i + rng.uniform(-0.25, 0.25, len(known)), mode="markers", marker=dict(size=5, opacity=0.4, color=COLOURS[i]), showlegend=False)
        m = found.loc[kind]
        fig.add_scatter(x=[m.value], y=[i], mode="markers", marker=dict(symbol="line-ns", size=26, line=dict(width=3, color="#222222")), showlegend=False,
                        error_x=dict(array=[m.high - m.value], arrayminus=[m.value - m.low], thickness=3, color="#222222"))
    for label, value in dict(lines).items():
        fig.add_vline(x=value, line_dash="dot", annotation_text=label)
    fig.update_yaxes(tickvals=list(range(len(KINDS))), ticktext=list(KINDS.values()), autorange="reversed")
    return found, fig.update_xaxes(title=title).update_layout(height=460)


# %%
def spelled(found):
    return "; ".join(f"{KINDS[kind]} {m.value:.2f} ({m.low:.2f} to {m.high:.2f}, {m.units:.0f} units)" for kind, m in found.iterrows())


OTHERS = ["neuron", "pca", "ica", "random_direction"]
activation, fig = distribution("spearman", "Spearman, predicted and true activations (dot: a unit; bar: median, 95 %)")
above = [kind for kind in OTHERS if activation.low["feature"] > activation.high[kind]]
study.show(fig, "05-activation-scores", claim=f"Explanations of features predict activations at {activation.value['feature']:.2f}, of neurons at {activation.value['neuron']:.2f}; "
           f"features are clearly above {len(above)} of {len(OTHERS)} other ways to cut", alt="Scores of each unit by kind, with medians: " + spelled(activation) + ".")

# %% [markdown]
# Two intervals may overlap although the difference is not by chance: rarely do both medians err, and towards each other. The
# scorecard's verdict asks for intervals apart; the difference, with an interval of its own, stands in its caveat.

# %%
apart = differences({kind: scores[kind] for kind in ("feature", *OTHERS)}, "spearman", **draws)
spelled_apart = {kind: f"features higher by {m.value:.2f} ({m.low:.2f} to {m.high:.2f})" for kind, m in apart.iterrows()}
print("\n".join(f"{KINDS[kind]}: {text}" for kind, text in spelled_apart.items()) or "too few scores to compare")

# %% [markdown]
# ### Does it depend on the score?
#
# Pearson's correlation asks mostly about strong activations; in the paper it looks "almost identical" to Spearman's. The
# **importance** score weights every token by how often its like occurs, so that it asks mostly about random text: there the best
# guess for a feature is silence, and many features score near 0 in the paper too. Kinds that fire on half of all tokens have
# ranks everywhere, and Spearman asks about all of them: a kind with clear peaks over a noisy floor does better by Pearson.

# %%
variants = {label: summary(scores, column, **draws) for label, column in (("Spearman", "spearman"), ("Pearson", "pearson"), ("importance", "importance"))}
for label, found in variants.items():
    print(f"{label}: above the features are", ", ".join(KINDS[kind] for kind in found.index[found.value > found.value["feature"]]) or "no others")
pd.DataFrame({label: {KINDS[kind]: f"{m.value:.2f} ({m.low:.2f} to {m.high:.2f})" for kind, m in found.iterrows()} for label, found in variants.items()})

# %%
ACTIVATION_PLACE = {kind: "figure only: Automated Interpretability, activations" for kind in ("feature", "neuron", "random_weights")}
ACTIVATION_PLACE |= dict.fromkeys(("pca", "ica", "random_direction"), "figure only: Cunningham et al., figure 2")
row = run.scorecard.row
number = lambda value: None if np.isnan(value) else value
caveat = lambda column, kind: f"{explainer(run.vocabulary)[1]}, not the paper's; median of {summary(scores, column, **draws).units[kind]:.0f} units, interval over units"
f = activation.loc["feature"]
for kind, m in activation.iterrows():
    if kind == "feature":
        claim, verdict = "Features are explained better than neurons and components", "reproduced" if len(above) == 4 else "partly" if (m.value > activation.value[OTHERS]).all() else "not"
    elif kind == "random_weights":
        claim, verdict = "Features of the random control score higher still on activations", "reproduced" if m.low > f.high else "partly" if m.value > f.value else "not"
    else:
        claim, verdict = f"Activations of {KINDS[kind]} are explained less well than features'", "reproduced" if m.high < f.low else "partly" if m.value < f.value else "not"
    row(f"05.score.activation.{kind}", claim=claim, paper="figure only", paper_source=ACTIVATION_PLACE[kind], ours=number(m.value), low=number(m.low), high=number(m.high),
        seeds=1, verdict=verdict, caveat="; ".join(filter(None, [caveat("spearman", kind), f"Pearson {variants['Pearson'].value[kind]:.2f}", spelled_apart.get(kind)])))

# %% [markdown]
# ## 4 · Explaining effects
#
# **Claim.** The same explanations say something of what features *do*; of the control's they cannot, for it does nothing.
#
# The explainer also saw the ten tokens that the unit raises most. Now 100 tokens: the 11th to the 60th, and 50 at random. Which
# are raised? Fifty are, so chance is 50 % for whoever guesses. But raised tokens could look alike for *all* units, and then an
# explanation of anything would do. So every explanation is asked about **another unit of its kind** too: that is chance, measured.
#
# **Predict.** Where is the control now?

# %%
logit, fig = distribution("logit", "share of 100 tokens told right (dot: a unit; bar: median, 95 %)", {"guessing": 0.5})
chance = summary(scores, "logit_of_another", **draws)
for i, kind in enumerate(KINDS):
    fig.add_scatter(x=[chance.value[kind]], y=[i], mode="markers", marker=dict(symbol="diamond-open", size=13, color="#222222", line_width=2),
                    name="asked about another unit", showlegend=i == 0)
fig.update_layout(legend=dict(orientation="h", y=-0.25))
study.show(fig, "05-logit-scores", claim=f"Effects of features are told right at {logit.value['feature']:.0%}, of neurons at {logit.value['neuron']:.0%}, of the random control at {logit.value['random_weights']:.0%}",
           alt="Share of tokens told right by kind of unit. Medians: " + spelled(logit) + ". Asked about another unit: " + spelled(chance) + ".")

# %%
pd.DataFrame({"own unit": logit.value, "another unit (chance)": chance.value, "gain": logit.value - chance.value,
              "mean, own unit": summary(scores, "logit", np.mean, **draws).value, "the paper's median": pd.Series({"feature": 0.74, "neuron": 0.53, "random_weights": 0.5})}).rename(KINDS).round(3)

# %%
PAPER = {"feature": 0.74, "neuron": 0.53, "random_weights": 0.5}
f = logit.loc["feature"]
for kind, m in logit.iterrows():
    base = chance.value[kind]
    if kind == "feature":
        claim, verdict = "What features raise is told from their explanations, better than of neurons", "reproduced" if m.low > logit.high["neuron"] and m.high >= 0.74 else "partly" if m.low > logit.high["neuron"] else "not"
    elif kind == "random_weights":
        claim, verdict = "What the random control's features raise cannot be told", "reproduced" if m.low - 0.02 <= base <= m.high + 0.02 and m.high < f.low else "partly" if m.high < f.low else "not"
    else:
        claim, verdict = f"What {KINDS[kind]} raise is told less well than of features", "reproduced" if m.high < f.low else "partly" if m.value < f.value else "not"
    row(f"05.score.logit.{kind}", claim=claim, paper=PAPER.get(kind), paper_source="Automated Interpretability, logit weights (median)" if kind in PAPER else "not in the papers",
        ours=number(m.value), low=number(m.low), high=number(m.high), seeds=1, verdict=verdict, caveat=f"{caveat('logit', kind)}; chance, measured on other units, is {base:.2f}")

# %% [markdown]
# ## 5 · How far down does it hold?
#
# **Claim.** What is true of the strongest activations need not be true of the weak ones; of features it holds further down.
#
# Three questions of each interval, from the top to the weakest. *Does the explanation hold?* How often it ranks a token of this
# interval above a silent token of random text (0.5 is chance). *The same token?* and *the same kind of text?* The share of examples
# with the token, or the domain label, that most of the top ones have; these two need no explainer.
#
# Left out is what fewer than ten units have examples for: of a rare unit the few strongest are shown, and none is left to ask about.
#
# **Predict.** Many of the paper's features are consistent over the whole range, some in the upper 60 % only. And neurons?

# %% tags=["slow"]
PANELS = {"": "the explanation holds", "token: ": "the same token", "domain: ": "the same kind of text"}
held = {title: by_interval(scores, prefix, **draws) for prefix, title in PANELS.items()}
fig = make_subplots(cols=3, shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=list(held))
ticks = ["top", *(f"{1 - k / 10:.1f}" for k in range(11)), "bottom"]
for col, table in enumerate(held.values(), start=1):
    for i, (kind, part) in enumerate(table.groupby("kind", sort=False)):
        fig.add_scatter(x=ticks, y=part.value, name=KINDS[kind], legendgroup=kind, showlegend=col == 1, row=1, col=col, mode="lines+markers",
                        line=dict(color=COLOURS[i], dash=("solid", "dash", "dot", "dashdot", "longdash", "solid")[i]), marker=dict(symbol=i, size=7),
                        error_y=dict(array=part.high - part.value, arrayminus=part.value - part.low, thickness=1, width=0))
fig.add_hline(y=0.5, line_dash="dot", row=1, col=1)
fig.update_xaxes(type="category", tickangle=-60).update_layout(width=1100, height=480, legend=dict(orientation="h", y=-0.35), xaxis2_title="activation, share of the maximum")

# %%
first = held["the explanation holds"].pivot(index="interval", columns="kind", values="value").reindex(INTERVALS)
middle = first.loc["Subsample Interval 5"]
study.show(fig, "05-intervals", claim=f"At half of its maximum the explanation of a feature holds at {middle['feature']:.2f}, of a neuron at {middle['neuron']:.2f}; at the weakest, {first['feature'].iloc[-1]:.2f} and {first['neuron'].iloc[-1]:.2f}",
           alt="Three panels along the activation intervals, a line a kind. How often the explanation ranks the token above a silent one, at top, half and bottom: "
               + "; ".join(f"{KINDS[k]} {first[k].iloc[0]:.2f}, {middle[k]:.2f}, {first[k].iloc[-1]:.2f}" for k in KINDS) + ".")

# %% [markdown]
# A share of the same token can be high because a unit fires on one token only, or low because it fires on a whole script.
# The share of the same *kind of text* has the opposite weakness. Read them together.
#
# ## 6 · Is it the model, or the data?
#
# **Claim.** The control's features are explained well because many of them are single tokens: that is the data, and needs no model.
# What they do cannot be explained.
#
# Text is full of regularities, and shuffled weights still tell tokens apart. A unit is here a *single-token* unit if its 20 greatest
# activations are all on the same token. In the paper's A/1 that is true of 57 % of the features (counted by us from its data), and many
# of them are more than a token: "the" *in mathematics* is one token as well.

# %%
rows = [{"kind": KINDS[kind], **found.single._asdict()} for kind, found in scores.items() if found.single]
single = pd.DataFrame(rows, columns=["kind", "value", "low", "high"])
fig = px.scatter(single, x="value", y="kind", error_x=single.high - single.value, error_x_minus=single.value - single.low, height=380,
                 labels={"value": "share of living units that are single-token units", "kind": ""})
fig.update_yaxes(autorange="reversed")
fig.update_traces(marker_size=11).update_xaxes(range=[-0.02, 1], tickformat=".0%").add_vline(x=0.57, line_dash="dot", annotation=dict(text="the paper's A/1", y=0.3, xanchor="left"))
share = single.set_index("kind").value.reindex(KINDS.values())
study.show(fig, "05-single-token", claim=f"{share[KINDS['feature']]:.0%} of the features and {share[KINDS['random_weights']]:.0%} of the control's are single-token units",
           alt="Share of single-token units by kind: " + "; ".join(f"{kind} {value:.0%}" for kind, value in share.items()) + ". In the paper's A/1 57 %.")

# %% [markdown]
# **Predict.** Take the single-token units away. Does the control keep its score?

# %%
rows = []
for kind in ("feature", "random_weights", "neuron"):
    for name, wanted in (("single-token", True), ("other", False)):
        units = scores[kind].units
        part = {kind: scores[kind]._replace(units=units[units.single.astype(bool) == wanted] if len(units) else units)}
        for what, column in (("activations", "spearman"), ("logits", "logit")):
            rows.append({"kind": KINDS[kind], "units": name, "score": what, **summary(part, column, **draws).loc[kind].rename({"units": "n"})})
parts = pd.DataFrame(rows)
kinds = list(parts.kind.unique())
rows = parts.kind.map(kinds.index) + parts.units.map({"single-token": -0.1, "other": 0.1})  # one above the other
fig = px.scatter(parts, x="value", y=rows, color="units", symbol="units", facet_col="score", error_x=parts.high - parts.value, error_x_minus=parts.value - parts.low,
                 labels={"value": "median score", "y": "", "units": ""}, height=360, width=1000)
fig.update_yaxes(autorange="reversed", tickvals=list(range(len(kinds))), ticktext=kinds, zeroline=False)
fig.update_traces(marker_size=11).for_each_annotation(lambda note: note.update(text=note.text.replace("score=", "")))

# %%
at = parts.set_index(["kind", "units", "score"]).value
own, control = KINDS["feature"], KINDS["random_weights"]
study.show(fig, "05-model-or-data", claim=f"Without single-token units, features score {at[own, 'other', 'activations']:.2f} and the control's {at[control, 'other', 'activations']:.2f} on activations; "
           f"{at[own, 'other', 'logits']:.2f} and {at[control, 'other', 'logits']:.2f} on effects",
           alt="Median scores of single-token and other units. " + "; ".join(f"{r.kind}, {r.units}, {r.score}: {r.value:.2f} (n = {r.n:.0f})" for r in parts.itertuples()) + ".")

# %% [markdown]
# **Check yourself.** Which of the two scores would you publish alone?

# %%
flattered = activation.value["random_weights"] >= activation.value["feature"] - 0.05
print(f"By activations alone the control {'would pass for a trained model' if flattered else 'is told apart from the trained model'} "
      f"({activation.value['random_weights']:.2f} against {activation.value['feature']:.2f}); by effects it scores {logit.value['random_weights']:.2f} against {logit.value['feature']:.2f}.")

# %% [markdown]
# ## Key points
#
# - Sample, do not pick; explain on some examples, ask about others; use the same text and questions for every kind.
# - A high score of activations says that a pattern was found. Whether the *model* uses it, only effects can say.
# - Chance is a measurement too: ask each explanation about another unit.
# - Every score has a taste. Where Spearman and Pearson disagree, say so.
#
# **What would change our mind.** A language model, or you with the rubric, who ranks the kinds otherwise than a pattern explainer
# that knows no meanings. ICA at a larger sample, with more rounds. Or a control that scores above chance on effects.
#
# **If you only take away one thing**: put a model that learned nothing through the same questions before you believe the answers.
