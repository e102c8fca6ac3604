# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 12 · Case studies: an apostrophe, a parenthesis, and what makes them fire
#
# **Question.** Between the layers of a deeper model, is a feature still about one thing? What does the model do with it, how little
# has to be changed to take it away, and which features of the layer before made it?
#
# **You will be able to** find a feature by a sentence, by correlation and by its weights; tell what it fires on from what it does;
# ablate less than a direction; and grow a tree of causes whose numbers were not chosen to be large.
#
# **Needs** the model of three layers and a dictionary after each: loaded, or trained on the way (that takes long). **Makes** twelve
# figures and the rows 12 of the scorecard. **Time**: 30 minutes to read.
#
# The paper is Cunningham et al. (2023), whose models are Pythia-70M and 410M. Ours has three layers, 128 numbers in its residual
# stream, and has read mostly code. Intervals are bootstraps over documents, with 95 % of the draws inside, unless a caveat says
# otherwise.

# %% tags=["parameters"]
PROFILE = "workshop"  # "smoke" (minutes) | "workshop" (a laptop) | "paper" (GPUs)
SEED = 0
ARTEFACTS = "auto"  # "auto": load what exists, else train | "load": never train | "train": never load the reference
CORPUS = ""  # "": the profile's own | "environment" | "files:DIR" | "hf:NAME"

# %%
from functools import partial

import numpy as np
import pandas as pd
import torch

from sae_lib import erasure, study
from sae_lib.interpret import unit_interval
from sae_lib.metrics import Interval, share_interval
from sae_lib.study import apostrophes, case_figures, cases, causes, deep, edits, layer_scores, parentheses
from sae_lib.study.case_figures import spell
from sae_lib.study.cases import Unit
from sae_lib.study.scores import differences, explainer, summary
from sae_lib.study.verdicts import numbers_of

run = study.begin(PROFILE, SEED, ARTEFACTS, CORPUS)
row, last, words = partial(run.scorecard.row, seeds=1), cases.layers(run)[-1], run.vocabulary

# %% [markdown]
# ## 1 · A dictionary after each layer
#
# **Claim.** The paper: with the reconstruction in place of the residual stream the model reads on, though worse. Pythia-70M's
# perplexity goes from 25 to 40. How many times does ours rise?
#
# Each dictionary has 8 features for each number of the stream, and was trained like that of notebook 03. One L1 coefficient serves all.
#
# **Predict.** The same L1 coefficient after layers 1, 2 and 3. Where does a reconstruction error cost most: early, where later layers
# build on it, or late, where nothing can mend it?

# %% tags=["slow"]
quality = cases.quality(run)
quality.assign(shown=[f"{r.value:.3g} ({r.low:.3g} to {r.high:.3g})" for r in quality.itertuples()]).pivot(
    index="after", columns="measure", values="shown")[list(cases.MEASURES)]

# %%
measured = {measure: part.set_index("after") for measure, part in quality.groupby("measure")}
clean, times = measured["perplexity, untouched"].value.iloc[0], measured["perplexity, times"]
said = ", ".join(f"{r.value:.1f} after layer {after}" for after, r in measured["perplexity"].iterrows())
study.show(case_figures.quality_figure(quality), "12-quality", claim=f"Perplexity {clean:.1f} untouched; with the reconstruction in place {said}",
           alt="Three panels by layer. Active features a token: " + ", ".join(f"{v:.1f}" for v in measured["l0"].value) + ". Loss recovered (zero ablation): "
               + ", ".join(f"{v:.1%}" for v in measured["loss recovered (zero)"].value) + f". Perplexity: {clean:.1f} untouched, {said}.")

# %%
for after, r in times.iterrows():
    row(f"12.perplexity.{after}", claim=f"Perplexity rises when the residual stream after layer {after} is rebuilt from features: how many times", paper=1.6,
        paper_source="6.2 (25 to 40, after layer 2 of Pythia-70M)", **numbers_of(Interval(r.value, r.low, r.high)),
        verdict="not" if r.low <= 1 or r.value > 3 else "reproduced" if r.value <= 1.6 else "partly",
        caveat=f"{clean:.1f} to {measured['perplexity'].value[after]:.1f}, L0 {measured['l0'].value[after]:.1f}, {measured['loss recovered (zero)'].value[after]:.1%} of the loss "
               "recovered (zero ablation); reproduced: it rises, and by no more than in the paper; not: more than threefold")

# %% [markdown]
# ## 2 · Which layers can be read?
#
# **Claim.** The paper: features are explained better than any other way to cut the residual stream, most of all early on: far above
# the others in the first layers of Pythia-70M, like ICA's at layer 4, hardly above them in the last. Does either hold here?
#
# The paper's protocol: take the 20 fragments of 64 tokens on which a unit is strongest; explain it from five of them; let the
# explanation predict five others of the 20 and five random ones of the rest on which the unit varies. The score is the correlation of
# predicted and true activations over these 640 tokens. Units of seven kinds go through it: features; the stream's own numbers; random
# directions; PCA and ICA; and PCA and ICA with only the k largest of a token kept, k being the dictionary's L0. What is negative
# counts as 0. Explained by patterns, as in notebook 05, not by GPT-4: compare the numbers with each other.
#
# **Predict.** The stream's own numbers have no reason to mean anything, as a layer can turn them as it likes. Will they be above
# random directions?

# %% tags=["slow"]
scored, cuts, draws = layer_scores.scores(run), layer_scores.KINDS, {"seed": SEED, "n_boot": run.profile.bootstrap}
layers, explained_by, units_each = cases.layers(run), explainer(words)[1], min(run.profile.scored_units, run.profile.deep.transformer.d_model)
by_layer = {after: layer_scores.of_layer(scored, after) for after in layers}
mean_scores = {after: summary(units, "top_random", np.mean, **draws) for after, units in by_layer.items()}

# %%
ahead = {after: differences(units, "top_random", statistic=np.mean, **draws) for after, units in by_layer.items()}
said_of = {after: ", ".join(f"{cuts[kind]} {m.value:.2f} ({m.low:.2f} to {m.high:.2f})" for kind, m in found.iterrows()) for after, found in mean_scores.items()}
nearest = {after: found.value.idxmin() for after, found in ahead.items() if len(found)}
told = "; ".join(f"{mean_scores[a].value['feature']:.2f} against {mean_scores[a].value[kind]:.2f} ({cuts[kind]}) after layer {a}" for a, kind in nearest.items())
study.show(case_figures.scores_figure(mean_scores, cuts), "12-scores", claim=f"Mean score of features and of the next best kind: {told or 'too few scores'}",
           alt="Mean scores by layer and kind, with intervals. " + " ".join(f"After layer {after}: {text}." for after, text in said_of.items()))
leads = {after: found.value.min() if len(found) else np.nan for after, found in ahead.items()}
print("Features less the next best kind: " + ", ".join(f"{value:+.2f} after layer {after}" for after, value in leads.items())
      + f"; {'most' if leads[layers[0]] == max(leads.values()) else 'not most'} after the first")

# %% [markdown]
# Random fragments alone are the harder question: there a strong firing is rare, and an explanation that only knows the strongest
# examples has little to say. The paper's control finds lower scores, and features still ahead. Ours?

# %%
control = {after: summary(units, "random_only", np.mean, **draws) for after, units in by_layer.items()}
pd.concat({f"after layer {a}": pd.DataFrame({"5 strong and 5 random": mean_scores[a].value, "random only": control[a].value, "units": mean_scores[a].units})
           .rename(index=cuts) for a in layers}, axis=1).round(2)

# %%
for after in layers:
    best = ahead[after].loc[nearest[after]] if after in nearest else pd.Series(np.nan, ["value", "low", "high"])
    row(f"12.score.{after}", claim=f"After layer {after} features are explained better than the next best kind of unit: by how much", paper="figure only",
        paper_source="3, figure 2 (far above in early layers, like ICA late)", **numbers_of(Interval(*best[["value", "low", "high"]])),
        verdict="reproduced" if best.low > 0 else "partly" if best.value > 0 else "not",
        caveat=f"{explained_by}, not GPT-4; up to {units_each} units a kind, interval over units; next best {cuts.get(nearest.get(after), 'unknown')}; {said_of[after]}")
lead = {after: control[after].value["feature"] - control[after].value.drop("feature").max() for after in layers}
alone, both = control[layers[0]].loc["feature"], mean_scores[layers[0]].value["feature"]
row("12.score.random_only", claim="On random fragments alone features score lower, and are still ahead: their mean after layer 1", paper="figure only",
    paper_source="App. G", **numbers_of(Interval(*alone[["value", "low", "high"]])),
    verdict="reproduced" if alone.high < both and min(lead.values()) > 0 else "partly" if alone.value < both else "not",
    caveat=f"{both:.2f} with strong ones; interval over units; features less the best other kind: " + ", ".join(f"after layer {a} {value:+.2f}" for a, value in lead.items()))

# %% [markdown]
# ## 3 · An apostrophe feature
#
# **Claim.** The paper: one feature fires on nearly only apostrophes, and its ablation mainly lowers the logit of "s". The number of
# the residual stream that it reads most fires on all kinds of things. Is there such a feature in our dictionaries?
#
# The paper found it with a sentence: the features most active at its last token. We ask our dictionaries the same. What a feature
# fires on is measured on held-out text, where the ground truth is told from the characters: an *apostrophe* has a letter on either
# side (and is no opening of a string, as in `f'x'`); the same sign elsewhere is a quotation mark. Our corpus is full of those.
#
# **Predict.** At the token, the model has not seen what follows. Can it tell an apostrophe from a quotation mark?

# %% tags=["slow"]
found = apostrophes.apostrophe(run)
print(apostrophes.PROBE)
found.probe.assign(fires_on=[spell(tokens, words) for tokens in found.probe.fires_on]).round(2)

# %% [markdown]
# A sentence finds what is active *there*; the paper's own first two hits were something else. The second search asks for the feature
# that correlates best with the ground truth over validation text, at each layer. From here on everything is measured on test text.
#
# **Predict.** Then we take it out of the stream at all positions, in contexts where it is active on an apostrophe. Which tokens does
# the model then expect less? In code and documentation, which words have *'s*, and which *'t*?

# %%
best, dims = found.best, found.units[found.units.role == "dimension it reads most"].set_index("after")
dim = dims.loc[best.after]
name, other = f"feature {best.number} after layer {best.after}", f"dimension {dim.number} of the stream there"
panels = {name: found.levels[found.levels.role == "feature"], other: found.levels[found.levels.role == "dimension it reads most"]}
study.show(case_figures.levels_figure(panels), "12-apostrophe-levels",
           claim=f"Where {name} is strong, {best.strong_wider:.0%} are the sign and {best.strong:.0%} apostrophes in words; of {other} {dim.strong_wider:.1%}",
           alt=f"Bars of the share of active tokens that are apostrophes, the same sign elsewhere, or anything else, by level of activation. Left {name}: of all its "
               f"activation {best.wider:.0%} is on the sign and {best.share:.0%} on apostrophes. Right {other}, the number it reads most: {dim.wider:.1%} and {dim.share:.1%}.")
top = found.units[found.units.role == "feature"].set_index("after")
fair = found.units[found.units.role == "best dimension"].set_index("after")
told = "; ".join(f"after layer {a} {top.pearson[a]:.2f} against {fair.pearson[a]:.2f}" for a in top.index)
study.show(case_figures.units_figure(found.units), "12-apostrophe-units", claim=f"Correlation with apostrophes, best feature against best dimension: {told}",
           alt=f"Two panels by layer with intervals: correlation with apostrophes of the best feature, the best dimension and the dimension the feature reads most; and the "
               f"share of their activation that is on apostrophes. {told}.")

# %%
effect = found.effect.set_index(["role", "token"])
(s, t), scale = (effect.loc["feature", apostrophes.token(run, letter)] for letter in "st"), found.scale
rank = {which: scale[f"feature {which}"] for which in ("probability", "logit")}
study.show(case_figures.lowered_figure(found.effect, words), "12-apostrophe-effect",
           claim=f"Ablating {name} takes {-100 * s.probability:.1f} points from the probability of 's' ({scale['probability of s']:.0%}): number {rank['probability']:,.0f} of the {len(words):,} tokens",
           alt=f"Two panels of the tokens whose probability falls most, mean over {scale['places']:.0f} apostrophes: with the feature ablated 's' is number {rank['probability']:.0f}; "
               f"with the dimension it reads most set to its mean 's' is number {scale['dimension it reads most probability']:.0f}.")

# %% [markdown]
# The paper has three apostrophe features: for *'s*, for *'ll* and for *'t*. So we search for each kind of apostrophe, told by what
# follows it. How many kinds have a feature here?

# %%
endings = list(apostrophes.KINDS)
own = np.array([r[r.kind] for _, r in found.kinds.iterrows()], dtype=float)
units = found.kinds[["after", "feature"]].drop_duplicates()
study.show(case_figures.kinds_figure(found.kinds, endings), "12-apostrophe-kinds",
           claim=f"The searches for {len(endings)} kinds of apostrophe end at {len(units)} feature{'s' * (len(units) != 1)}; at {int((own >= 0.5).sum())} of them most activation is on that kind",
           alt="A table in colours: for the best feature for each kind of apostrophe the share of its activation on each kind. "
               + "; ".join(f"{r.kind}: feature {r.feature} after layer {r.after}, correlation {r.pearson:.2f}" for r in found.kinds.itertuples()) + ".")
row("12.apostrophe.kinds", claim="Features of their own for 's, n't and the other endings: how many kinds have one", paper=3, paper_source="5 (two other apostrophe features)",
    ours=int((own >= 0.5).sum()), low=None, high=None, verdict="reproduced" if (own >= 0.5).all() and len(units) == 3 else "partly" if (own >= 0.5).sum() > 1 else "not",
    caveat="its own: at least half of the activation is on that kind; shares " + ", ".join(f"{kind} {value:.0%}" for kind, value in zip(endings, own, strict=True)))

# %%
of = lambda unit, measure: unit[[measure, f"{measure}_low", f"{measure}_high"]].set_axis(["value", "low", "high"])
sign, share, of_dim = of(best, "strong_wider"), of(best, "strong"), of(dim, "strong_wider")
logit, less = of(s, "logit"), s[["probability", "low", "high"]].set_axis(["value", "low", "high"])
nearly = lambda share: "reproduced" if share.low >= 0.9 else "partly" if share.value >= 0.5 else "not"
mainly = lambda change, rank, first: "not" if not change.high < 0 else "reproduced" if rank <= first else "partly"

# %%
for which, claim, ours, verdict, caveat in (
        ("sign", "Share of the apostrophe feature's strong activations (above half of the maximum) that is on the sign, be it apostrophe or quotation mark: nearly all", sign, nearly(sign),
         f"{name}, chosen on validation text; of all its activation {best.wider:.0%} on the sign, {best.share:.0%} on apostrophes in words; correlation {best.pearson:.2f}, sensitivity {best.sensitivity:.0%}"),
        ("share", "Share of its strong activations that is on apostrophes in words: nearly all", share, nearly(share), "told from quotation marks by the letters on either side"),
        ("dimension", "Share on the sign of the strong activations of the dimension that it reads most: hardly any", of_dim,
         "reproduced" if of_dim.high < sign.low / 4 else "partly" if of_dim.high < sign.low else "not",
         f"{other}, above or below its mean; the best dimension of all correlates {fair.pearson[best.after]:.2f} with apostrophes in words"),
        ("s_logit", "Ablating the apostrophe feature mainly lowers the logit of 's': mean change", logit, mainly(logit, rank["logit"], 3),
         f"beyond the mean logit's, which an ablation shifts too; number {rank['logit']:,.0f} of the lowered tokens; reproduced: among the first 3"),
        ("s_probability", "It mainly lowers the probability of 's': mean change", less, mainly(less, rank["probability"], 1),
         f"of {scale['probability of s']:.1%}; number {rank['probability']:,.0f} of the lowered tokens, 't' changes by {t.probability:+.1%}")):
    row(f"12.apostrophe.{which}", claim=claim, paper="figure only", paper_source="5 (apostrophe feature, residual dimension 21)", **numbers_of(Interval(*ours)), verdict=verdict, caveat=caveat)
    print(f"{claim}: {ours.value:.3g} ({ours.low:.3g} to {ours.high:.3g}); {verdict}")

# %% [markdown]
# ## 4 · A closing-parenthesis feature
#
# **Claim.** The paper: a feature of the last layer writes ")" and its variants. Does one of ours, and is it active where a
# parenthesis is open?
#
# Now the search is by weights: what each direction adds to the logits. No text is needed for that, so the text can be the test. The
# ground truth is again in the characters: whether a parenthesis is open after a token, and whether the next token closes one.
#
# **Predict.** A feature that writes ")" must not fire on "(", but where the parenthesis should end. Where would that be?

# %% tags=["slow"]
closing = parentheses.parenthesis(run)
columns = ["number", "sign", "closing", "active", "pearson", "share", "wider", "sensitivity"]
closing.units[columns].assign(raises=[spell(tokens, words, 10) for tokens in closing.units.raises]).rename(
    columns={"share": "share: closed next", "wider": "share: open", "closing": "closing of 10 raised"}).round(2)

# %%
first, rival, base = closing.units.iloc[0], closing.units.iloc[-1], closing.base
study.show(case_figures.levels_figure({f"feature {first.number} after layer {last}": closing.levels.replace({"open": "open, not closed next", "anything else": "nothing open"})}), "12-parenthesis-levels",
           claim=f"{first.wider:.0%} of the activation of feature {first.number} is where a parenthesis is open ({base['open']:.0%} of all tokens are), {first.share:.0%} where the next token closes it",
           alt=f"Stacked bars by level of activation: the share of active tokens at which a parenthesis is open and closed next, open, or not open. By activation {first.share:.0%}, "
               f"{first.wider - first.share:.0%} and {1 - first.wider:.0%}.")

# %% [markdown]
# **Check yourself.** Specificity is half of the matter. Of all tokens after which an open parenthesis is closed, on how many is the
# feature active (the column *sensitivity*)? Who does the rest?
#
# **Predict.** We ablate it where it is active; and where it is silent we hold it at its maximum. Will the model close a parenthesis
# that nobody opened?

# %%
held = ("as it is", "ablated", "held at its maximum")
p = closing.effect.set_index(["place", "edit"])
told = "; ".join(f"{place}: {p.value[place, 'as it is']:.0%}, ablated {p.value[place, 'ablated']:.0%}, held {p.value[place, 'held at its maximum']:.0%}" for place in parentheses.PINNED_AT)
active, silent, nothing = (p.loc[place] for place in parentheses.PINNED_AT)
study.show(case_figures.probability_figure(closing.effect, parentheses.PINNED_AT, held), "12-parenthesis-effect",
           claim=f"Ablated where it is active, feature {first.number} takes the probability of closing from {active.value['as it is']:.0%} to {active.value['ablated']:.0%}; held where nothing is open, "
                 f"from {nothing.value['as it is']:.0%} to {nothing.value['held at its maximum']:.0%}",
           alt=f"Bars of the probability that the next token closes a parenthesis. {told}.")

# %%
down, up = active.loc["ablated: change"], silent.loc["held at its maximum: change"]
row("12.parenthesis.raises", claim="Of the ten tokens that the feature raises most, those that close a parenthesis", paper="no number", paper_source="App. D (feature 5_2027 unembeds to variants of ')')",
    ours=int(first.closing), low=None, high=None, verdict="reproduced" if first.closing >= 8 else "partly" if first.closing >= 4 else "not",
    caveat=f"feature {first.number} after layer {last}, chosen by these weights; {spell(first.raises, words, 10)}")
row("12.parenthesis.open", claim="Share of the closing-parenthesis feature's activation where a parenthesis is open", paper=None, paper_source="", **numbers_of(Interval(*of(first, "wider"))),
    verdict="reproduced" if first.wider_low >= 0.9 else "partly" if first.wider_low > base["open"] else "not",
    caveat=f"{base['open']:.0%} of all tokens; {first.share:.0%} where it is closed next ({base['closed next']:.1%} of all tokens), sensitivity {first.sensitivity:.0%}; correlation {first.pearson:.2f}, "
           f"the best dimension's {rival.pearson:.2f}")
linear = "of the last layer and chosen for raising these tokens: but for the layer norm the sign is given, the size is not"
row("12.parenthesis.ablation", claim="Change of the probability of closing when it is ablated where it is active", paper=None, paper_source="", **numbers_of(Interval(*down)),
    verdict="reproduced" if down.high < 0 else "not", caveat=f"{linear}; {told}")
row("12.parenthesis.pin", claim="Change of the probability of closing when it is held at its maximum where it is silent and a parenthesis open", paper=None, paper_source="", **numbers_of(Interval(*up)),
    verdict="reproduced" if up.low > 0 else "not", caveat=f"{linear}; where nothing is open {nothing.value['held at its maximum: change']:+.1%}")

# %% [markdown]
# ## 5 · Less than rank one
#
# **Claim.** The paper: to take a feature away it is enough to move x back along its direction until the feature stops: *less* than a
# rank-one change, since wherever the feature is silent nothing is changed at all. Does the model lose less of everything else?
#
# How far is that? The feature's activation is relu(w · (x − b) + c). Each step along its direction d lowers what is inside by w · d.
# So from an activation f the end is at f / (w · d) steps. In the paper's tied dictionaries w = d, and this is the same as to subtract
# the feature's part f d; in ours that is the same edit at strength w · d. **Check yourself** in the next cell.
#
# *Rank one* means: everywhere in the text the component along a direction is set to its mean. Beside the feature's direction we take
# LEACE's, the smallest edit after which no linear probe finds the concept (it alone is told where the concept is), and a random one.
#
# An edit that does little also breaks little: to do nothing breaks nothing. So each is made at strengths t from 1/64 to 1, as
# x + t (edit(x) − x), and they are compared where they do as much of what they are *for*: there the model should go on with "s", or
# close the parenthesis, and we ask how much of the log-likelihood of that is lost. What an edit *breaks* is the KL divergence of its
# predictions from the untouched ones: how many nats a token costs more, on average, if the untouched model is right. It is measured on
# two kinds of token: where the concept is absent (no apostrophe; no parenthesis about to close), and where the feature is active and
# this is not wanted.
#
# **Predict.** At equal effect, which breaks less: to move the few tokens far on which the feature is active, or all of them a little?
# On what does it depend?

# %%
unit = Unit(int(best.after), int(best.number))
sae, model = deep.dictionary(run, unit.after).model, deep.transformer(run).model
x = torch.randn(1000, sae.config.d_in, generator=torch.Generator().manual_seed(SEED)) * sae.b_dec.norm() + sae.b_dec
f, w_d = sae.encode(x, [unit.number]), float(sae.W_enc[:, unit.number] @ sae.W_dec[unit.number])
if w_d > 0:
    stopped = x - f / w_d * sae.W_dec[unit.number]
    assert sae.encode(stopped, [unit.number]).max() < 1e-3 * max(1, float(f.max())), "still active: did you divide by w . d?"
    assert torch.equal(stopped[f[:, 0] == 0], x[f[:, 0] == 0]), "where the feature is silent nothing may change"
    assert torch.allclose(stopped, erasure.silence(sae, unit.number)(x), atol=1e-4), "not what the library does"
print(f"w · d = {w_d:.2f}: " + (f"subtracting the feature's part is the same at strength {w_d:.2f}" if w_d > 0 else "no step back along its direction makes it stop"))

# %% tags=["slow"]
of_case = {"apostrophe": Unit(last, int(top.number[last])), "parenthesis": Unit(last, int(first.number)), "apostrophe, early": Unit(1, int(top.number[1]))}
compared = {case: edits.rank_one(run, case.split(",")[0], which) for case, which in of_case.items()}
named = {edits.LEAST: "until the feature stops (less than rank one)", "rank one": "rank one, its direction", "LEACE": "rank one, LEACE's"}
full = {case: found.curves[found.curves.strength == 1].set_index("edit") for case, found in compared.items()}
ratio = {case: found.ratios.set_index(["measure", "edit"]) for case, found in compared.items()}
# The claim has to hold against the better of the two.
against = {(case, measure): ratio[case].loc[measure].reindex(list(named)[1:]).sort_values("value", na_position="first").iloc[-1]
           for case in compared for measure in edits.BROKEN}
titles = {case: f"{case.split(',')[0]}, feature {which.number} after layer {which.after}" for case, which in of_case.items()}
told = "; ".join(f"{against[case, 'absent'].value:.2g} times the KL of the best rank-one edit where the concept is absent, {against[case, 'active'].value:.2g} where it is active unwanted "
                 f"({titles[case]})" for case in compared)
sensitive = {"apostrophe": top.sensitivity[last], "parenthesis": first.sensitivity, "apostrophe, early": top.sensitivity[1]}
shares = ", ".join(f"{against[case, 'absent'].value:.2g} ({case})" for case in compared)
study.show(case_figures.edits_figure({titles[case]: found for case, found in compared.items()}, named), "12-rank-one",
           claim=f"KL of less than rank one over the best rank-one edit's at equal effect, concept absent: {shares}",
           alt=f"Six panels on logarithmic axes: a column a case, KL where the concept is absent above, where the feature is active unwanted below, against the log-likelihood lost where wanted, a line an edit. At equal effect: {told}.")

# %% [markdown]
# The table has the KL of moving back until the feature stops over that of each other edit, at equal effect; nan where that edit does
# not do as much at any strength.

# %%
for case in compared:
    print(f"{titles[case]} is active on {sensitive[case]:.0%} of the concept's tokens: {against[case, 'absent'].value:.2g} times the KL of the better rank-one edit")
pd.concat({titles[case]: found for case, found in ratio.items()}).round(2)

# %%
broken = {"absent": "where the concept is absent", "active": "where the feature is active and this is not wanted"}
for case, edited in full.items():
    least, key, moved = edited.loc[edits.LEAST], case.replace(", ", "_"), f"Moving back until the {case.split(',')[0]} feature after layer {of_case[case].after} stops"
    row(f"12.rank_one.wanted.{key}", claim=f"{moved} lowers the log-likelihood of what it is for", paper=None,
        paper_source="5 (less-than-rank-one ablation)", **numbers_of(Interval(*of(least, "wanted"))), verdict="reproduced" if least.wanted_high < 0 else "not",
        caveat=f"nats; rank one {edited.wanted['rank one']:+.2f}, LEACE {edited.wanted['LEACE']:+.2f}, a random direction {edited.wanted['rank one, random']:+.2f}; the feature is active on "
               f"{sensitive[case]:.0%} of the concept's tokens; {least.untouched:.1%} of all tokens are left exactly as they are")
    for measure, where in broken.items():
        worst = against[case, measure]
        row(f"12.rank_one.{measure}.{key}", claim=f"{moved} breaks less than the best rank-one edit of equal effect {where}: its share of the KL", paper=None,
            paper_source="5 (less-than-rank-one ablation)", **numbers_of(Interval(*worst)), verdict="reproduced" if worst.high < 1 else "partly" if worst.value < 1 else "not",
            caveat=f"{least[measure]:.2g} nats; share of " + " and ".join(f"{named[edit]}, {r.value:.2f} ({r.low:.2f} to {r.high:.2f})" for edit, r in ratio[case].loc[measure].dropna().iterrows() if edit in named)
                   + f"; after layer {of_case[case].after} of {last}; paired bootstrap over documents")

# %% [markdown]
# ## 6 · What makes them fire
#
# **Claim.** The paper: a feature's causes in the layer before can be found by ablation, and their causes in turn: a tree that can be
# read.
#
# The paper's rule: with M the target's maximum, take 20 contexts where its activation is between M/2 and M; ablate each feature of
# the layer before, at all positions; rank by how much of the target's activation is lost; recurse. What the dictionary misses, x less
# its reconstruction, is left in place. Of a thousand candidates the first is flattered, so our edges are measured in *other* contexts,
# of other documents, than those that ranked. The table below the trees has the number of the ranking too. And beside each cause stands
# another feature, *alike*: of the three that come nearest to it in how often, and then in how strongly, they are active at the very
# places where the target is, one at random. Ablating any feature that is active there takes something away.
#
# **Predict.** The residual stream carries everything along. How many of the causes are other features, and how many are the same
# feature a layer earlier?

# %% tags=["slow"]
roots = {case: of_case[case] for case in ("apostrophe", "parenthesis")}
trees = {case: causes.tree(run, case, root) for case, root in roots.items()}
parts, texts = {}, {}
for case, tree in trees.items():
    of_root = tree[tree.parent == 0]
    parts[case] = {kind: of_root[of_root.kind == kind].reset_index(drop=True) for kind in ("cause", "alike", "together")}
    told = f"its greatest cause takes {of_root.value.iloc[0]:.0%} of it, the first {len(parts[case]['cause'])} together {parts[case]['together'].value[0]:.0%}" if len(of_root) else "too rare for a tree"
    texts[case] = {"claim": f"The {case} feature {roots[case].number} after layer {last}: {told}",
                   "alt": f"A tree from right to left: the target, its causes a layer before, and theirs, each with the tokens it fires on; {told}. "
                          + "; ".join(f"feature {r.feature} {r.value:.0%}" for r in parts[case]["cause"].itertuples()) + "."}
study.show(case_figures.tree_figure(trees["apostrophe"], words), "12-tree-apostrophe", claim=texts["apostrophe"]["claim"], alt=texts["apostrophe"]["alt"])
study.show(case_figures.tree_figure(trees["parenthesis"], words), "12-tree-parenthesis", claim=texts["parenthesis"]["claim"], alt=texts["parenthesis"]["alt"])

# %%
pd.concat({case: tree[tree.parent >= 0].groupby(["parent", "kind"], sort=False)[["ranked", "value", "low", "high", "active", "here", "cosine"]].first() for case, tree in trees.items()}).round(3)

# %%
for case, of_kind in parts.items():
    known = len(of_kind["cause"]) > 0
    greatest, alike, joint = (of_kind[kind].iloc[0] if known else pd.Series(np.nan, trees[case].columns) for kind in ("cause", "alike", "together"))
    luck = of_kind["alike"].high.max()
    row(f"12.tree.first.{case}", claim=f"Share of the {case} feature's activation lost when its greatest cause in the layer before is ablated", paper="figure only", paper_source="5 (causal tree)",
        **numbers_of(Interval(*greatest[["value", "low", "high"]])), verdict="reproduced" if greatest.low > luck else "partly" if greatest.value > of_kind["alike"].value.max() else "not",
        caveat=f"of features alike at most {of_kind['alike'].value.max():.1%}; mean activation there {greatest.here:.1f}, of the nearest other {alike.here:.1f}; where it was ranked {greatest.ranked:.0%}; "
               f"cosine with the target {greatest.cosine:.2f}; measured in contexts other than those that ranked; interval over contexts; reproduced: above every such feature's interval" if known else "too rare here")
    row(f"12.tree.together.{case}", claim="The same when its first causes are ablated together: most of it", paper=None, paper_source="", **numbers_of(Interval(*joint[["value", "low", "high"]])),
        verdict="reproduced" if joint.low > max(luck, 0.5) else "partly" if joint.low > luck else "not", caveat=f"the first {len(of_kind['cause'])}; what the dictionary misses is left in place; interval over contexts")

# %% [markdown]
# **The method that failed.** The paper first tried weights: the cosine of one layer's directions with the next layer's. It saw no
# meaningful connections. Two features chosen by hand prove nothing either way, so we draw features at random, of those that are strong
# in enough documents to be ranked and measured; rank their causes by ablation; and ask how often the greatest cosine is the greatest
# cause. (Of the hundreds of candidates most do nothing, so a rank correlation over all of them is mostly noise: the figure has it, the
# row has not.)
#
# **Predict.** In a model of three layers, 128 numbers wide, will the weights fail too?

# %% tags=["slow"]
survey = causes.survey(run)
middle, n, hits = survey.median(numeric_only=True), len(survey), int(survey.hit.sum())
drawn_from = f"drawn at random of those strong in {2 * run.profile.deep.tree_places} documents"
study.show(case_figures.survey_figure(survey), "12-survey",
           claim=f"{n} features {drawn_from}: the greatest cause takes {middle['first']:.0%}, the nearest other in activity {middle.alike:.1%}; the greatest cosine is the greatest cause of {hits}" if n else
                 "No feature is strong in enough documents",
           alt=f"Boxes with a point a feature, by layer. Left: share of activation lost (medians: greatest cause {middle['first']:.1%}, first four together {middle.together:.1%}, the nearest other in activity there "
               f"{middle.alike:.1%}). Right: rank correlation with cosines (medians {middle.encoder:.2f} and {middle.decoder:.2f}).")

# %%
nothing_known = Interval(np.nan, np.nan, np.nan)
lost, luck = (unit_interval(survey[column], seed=SEED) if n > 1 else nothing_known for column in ("first", "alike"))
told_by_weights = share_interval(hits, n) if n > 1 else nothing_known
row("12.tree.survey", claim=f"Share of activation lost with the greatest cause, median of features {drawn_from}", paper=None, paper_source="5 (causal tree)", **numbers_of(Interval(*lost)),
    verdict="reproduced" if lost.low > luck.high else "partly" if lost.value > luck.value else "not",
    caveat=f"{n} features; the nearest other in activity there {middle.alike:.1%} ({luck.low:.1%} to {luck.high:.1%}), mean activation {middle.there:.1f} against {middle.alike_there:.1f}; above it for "
           f"{(survey['first'] > survey.alike).sum()}; first four together {middle.together:.0%}; greatest cause and target have a median cosine of {middle.cosine:.2f}; interval over features")
row("12.tree.weights", claim="Cosines of weights do not tell a feature's causes: share of features whose greatest cause has the greatest cosine", paper="no meaningful connections",
    paper_source="App. D (layer 4 to 5)", **numbers_of(Interval(*told_by_weights)), verdict="reproduced" if told_by_weights.high < 0.25 else "partly" if told_by_weights.low < 0.25 else "not",
    caveat=f"{hits} of {n} features {drawn_from}; Wilson's interval of a share; median rank correlation over all candidates {middle.encoder:.2f}; reproduced: below a quarter")

# %% [markdown]
# ## Key points
#
# - What a feature fires on and what it does are two measurements. Take both, and a ground truth that does not come from the feature.
# - An edit that does less breaks less. Compare edits where they do as much, and count what they break on all other tokens.
# - Causes are measured where they were not chosen, beside those that come nearest in activity there.
#
# **Exercises.** 1 · Search for a feature of ",", of a line break, of `self`: which truth would you write down first? 2 · Ablate a cause
# at the target's position only. Whose effect vanishes, and what does that say about attention? 3 · Grow the tree of a feature that you
# chose for its high activation on one document. What goes wrong?
#
# **What would change our mind.** If dictionaries of another seed had no apostrophe feature, or a tree of other causes, then these would
# be the dictionary's and not the model's. One seed cannot tell.
#
# **If you only take away one thing**: a story about a feature is worth what its controls are.
