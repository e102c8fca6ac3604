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
# **Needs** the model of three layers and a dictionary after each: loaded, or trained on the way (that takes long). **Makes** ten
# figures and the rows 12 of the scorecard. **Time**: 30 minutes to read.
#
# The paper is Cunningham et al. (2023), whose models are Pythia-70M and 410M. Ours has three layers, 128 numbers in its residual
# stream, and has read mostly code.

# %% tags=["parameters"]
PROFILE = "workshop"  # "smoke" (minutes) | "workshop" (a laptop) | "paper" (GPUs)
SEED = 0
ARTEFACTS = "auto"  # "auto": load what exists, else train | "load": never train | "train": never load the reference
CORPUS = ""  # "": the profile's own | "environment" | "files:DIR" | "hf:NAME"

# %%
import numpy as np
import pandas as pd
import torch

from sae_lib import effects, erasure, study
from sae_lib.interpret import unit_interval
from sae_lib.metrics import share_interval
from sae_lib.study import apostrophes, case_figures, cases, causes, deep, edits, layer_scores, parentheses
from sae_lib.study.case_figures import finite, spell
from sae_lib.study.cases import Unit
from sae_lib.study.scores import differences, explainer, summary

run = study.begin(PROFILE, SEED, ARTEFACTS, CORPUS)
row, last, words = run.scorecard.row, cases.layers(run)[-1], run.vocabulary

# %% [markdown]
# ## 1 · A dictionary after each layer
#
# **Claim.** With the reconstruction in place of the residual stream the model reads on, though worse: Pythia-70M's perplexity goes
# from 25 to 40.
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
by = {measure: part.set_index("after") for measure, part in quality.groupby("measure")}
clean, times = by["perplexity, untouched"].value.iloc[0], by["perplexity, times"]
said = ", ".join(f"{r.value:.1f} after layer {after}" for after, r in by["perplexity"].iterrows())
study.show(case_figures.quality_figure(quality), "12-quality", claim=f"Perplexity {clean:.1f} untouched; with the reconstruction in place {said}",
           alt="Three panels by layer. Active features a token: " + ", ".join(f"{v:.1f}" for v in by["l0"].value) + ". Loss recovered (zero ablation): "
               + ", ".join(f"{v:.1%}" for v in by["loss recovered (zero)"].value) + f". Perplexity: {clean:.1f} untouched, {said}.")

# %%
for after, r in times.iterrows():
    row(f"12.perplexity.{after}", claim=f"Perplexity rises when the residual stream after layer {after} is rebuilt from features: how many times", paper=1.6,
        paper_source="6.2 (25 to 40, after layer 2 of Pythia-70M)", ours=r.value, low=r.low, high=r.high, seeds=1,
        verdict="not" if r.low <= 1 else "reproduced" if r.value <= 1.6 else "partly",
        caveat=f"{clean:.1f} to {by['perplexity'].value[after]:.1f}, L0 {by['l0'].value[after]:.1f}, {by['loss recovered (zero)'].value[after]:.1%} of the loss recovered "
               f"(zero ablation); interval over documents; reproduced: it rises, and by no more than in the paper")

# %% [markdown]
# ## 2 · Which layers can be read?
#
# **Claim.** Features are explained better than any other way to cut the residual stream, most of all early on. (In the paper: far
# above the others in the first layers of Pythia-70M, like ICA's at layer 4, hardly above them in the last.)
#
# The paper's protocol: take the 20 fragments of 64 tokens on which a unit is strongest; explain it from five of them; let the
# explanation predict five others of the 20 and five random ones on which the unit varies. The score is the correlation of
# predicted and true activations over these 640 tokens. Units of seven kinds go through it: features; the stream's own numbers; random
# directions; PCA and ICA; and PCA and ICA with only the k largest of a token kept, k being the dictionary's L0. What is negative
# counts as 0. Explained by patterns, as in notebook 05, not by GPT-4: compare the numbers with each other.
#
# **Predict.** The stream's own numbers have no reason to mean anything, as a layer can turn them as it likes. Will they be above
# random directions?

# %% tags=["slow"]
scored, kinds, draws = layer_scores.scores(run), layer_scores.KINDS, {"seed": SEED, "n_boot": run.profile.bootstrap}
layers, by, units_each = cases.layers(run), explainer(words)[1], min(run.profile.scored_units, run.profile.deep.transformer.d_model)
by_layer = {after: layer_scores.of_layer(scored, after) for after in layers}
mean_scores = {after: summary(units, "top_random", np.mean, **draws) for after, units in by_layer.items()}

# %%
ahead = {after: differences(units, "top_random", statistic=np.mean, **draws) for after, units in by_layer.items()}
said = {after: ", ".join(f"{kinds[kind]} {m.value:.2f} ({m.low:.2f} to {m.high:.2f})" for kind, m in found.iterrows()) for after, found in mean_scores.items()}
nearest = {after: found.value.idxmin() for after, found in ahead.items() if len(found)}
told = "; ".join(f"{mean_scores[a].value['feature']:.2f} against {mean_scores[a].value[kind]:.2f} ({kinds[kind]}) after layer {a}" for a, kind in nearest.items())
study.show(case_figures.scores_figure(mean_scores, kinds), "12-scores", claim=f"Mean score of features and of the next best kind: {told or 'too few scores'}",
           alt="Mean scores by layer and kind, with intervals. " + " ".join(f"After layer {after}: {text}." for after, text in said.items()))

# %% [markdown]
# Random fragments alone are the harder question: there a strong firing is rare, and an explanation that only knows the strongest
# examples has little to say. The paper's control finds lower scores, and features still ahead.

# %%
control = {after: summary(units, "random_only", np.mean, **draws) for after, units in by_layer.items()}
pd.concat({f"after layer {a}": pd.DataFrame({"5 strong and 5 random": mean_scores[a].value, "random only": control[a].value, "units": mean_scores[a].units})
           .rename(index=kinds) for a in layers}, axis=1).round(2)

# %%
for after in layers:
    best = finite(*(ahead[after].loc[nearest[after], ["value", "low", "high"]] if after in nearest else (np.nan,) * 3))
    row(f"12.score.{after}", claim=f"After layer {after} features are explained better than the next best kind of unit: by how much", paper="figure only",
        paper_source="3, figure 2 (far above in early layers, like ICA late)", ours=best[0], low=best[1], high=best[2], seeds=1,
        verdict="not" if None in best or best[0] <= 0 else "reproduced" if best[1] > 0 else "partly",
        caveat=f"{by}, not GPT-4; up to {units_each} units a kind, interval over units; next best {kinds.get(nearest.get(after), 'unknown')}; {said[after]}")
lead = {after: control[after].value["feature"] - control[after].value.drop("feature").max() for after in layers}
of_first, same = finite(*control[layers[0]].loc["feature", ["value", "low", "high"]]), finite(mean_scores[layers[0]].value["feature"])[0]
row("12.score.random_only", claim="On random fragments alone features score lower, and are still ahead: their mean after layer 1", paper="figure only",
    paper_source="App. G", ours=of_first[0], low=of_first[1], high=of_first[2], seeds=1,
    verdict="not" if None in of_first or same is None or of_first[0] >= same else "reproduced" if of_first[2] < same and min(lead.values()) > 0 else "partly",
    caveat="features less the best other kind: " + ", ".join(f"after layer {a} {value:+.2f}" for a, value in lead.items()))

# %% [markdown]
# ## 3 · An apostrophe feature
#
# **Claim.** One feature fires on nearly only apostrophes, and its ablation mainly lowers the logit of "s". The number of the residual
# stream that it reads most fires on all kinds of things.
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
letter = max(i for i, word in enumerate(words) if word == b"s")
s, scale = effect.loc["feature", letter], found.scale
rank = {by: scale[f"feature {by}"] for by in ("probability", "logit")}
study.show(case_figures.lowered_figure(found.effect, words), "12-apostrophe-effect",
           claim=f"Ablating {name} takes {-100 * s.probability:.1f} points from the probability of 's' ({scale['probability of s']:.0%}): number {rank['probability']:,.0f} of the {len(words):,} tokens",
           alt=f"Two panels of the tokens whose probability falls most, mean over {scale['places']:.0f} apostrophes: with the feature ablated 's' is number {rank['probability']:.0f}; "
               f"with the dimension it reads most set to its mean 's' is number {scale['dimension it reads most probability']:.0f}.")

# %% [markdown]
# The paper has three apostrophe features: for *'s*, for *'ll* and for *'t*. So we search for each kind of apostrophe, told by what
# follows it.

# %%
kinds = list(apostrophes.KINDS)
own = np.array([r[r.kind] for _, r in found.kinds.iterrows()], dtype=float)
units = found.kinds[["after", "feature"]].drop_duplicates()
study.show(case_figures.kinds_figure(found.kinds, kinds), "12-apostrophe-kinds",
           claim=f"The searches for {len(kinds)} kinds of apostrophe end at {len(units)} feature{'s' * (len(units) != 1)}; at {int((own >= 0.5).sum())} of them most activation is on that kind",
           alt="A table in colours: for the best feature for each kind of apostrophe the share of its activation on each kind. "
               + "; ".join(f"{r.kind}: feature {r.feature} after layer {r.after}, correlation {r.pearson:.2f}" for r in found.kinds.itertuples()) + ".")
row("12.apostrophe.kinds", claim="Features of their own for 's, n't and the other endings: how many kinds have one", paper=3, paper_source="5 (two other apostrophe features)",
    ours=int((own >= 0.5).sum()), low=None, high=None, seeds=1, verdict="reproduced" if (own >= 0.5).all() and len(units) == 3 else "partly" if (own >= 0.5).sum() > 1 else "not",
    caveat="its own: at least half of the activation is on that kind; shares " + ", ".join(f"{kind} {value:.0%}" for kind, value in zip(kinds, own, strict=True)))

# %%
ends = lambda unit, measure: finite(*unit[[measure, f"{measure}_low", f"{measure}_high"]])
sign, share, of_dim, change = ends(best, "strong_wider"), ends(best, "strong"), ends(dim, "strong_wider"), finite(s.logit, s.logit_low, s.logit_high)
less, nearly = finite(s.probability, s.low, s.high), lambda found: "not" if None in found or found[0] < 0.5 else "reproduced" if found[1] >= 0.9 else "partly"
clear, mainly = None not in sign + of_dim and of_dim[2] < sign[1], None not in change and change[2] < 0
for which, claim, ours, verdict, caveat in (
        ("sign", "Share of the apostrophe feature's strong activations (above half of the maximum) that is on the sign, be it apostrophe or quotation mark: nearly all", sign, nearly(sign),
         f"{name}, chosen on validation text; of all its activation {best.wider:.0%} on the sign, {best.share:.0%} on apostrophes in words; correlation {best.pearson:.2f}, sensitivity {best.sensitivity:.0%}"),
        ("share", "Share of its strong activations that is on apostrophes in words: nearly all", share, nearly(share), "told from quotation marks by the letters on either side"),
        ("dimension", "Share on the sign of the strong activations of the dimension that it reads most: hardly any", of_dim, "not" if not clear else "reproduced" if of_dim[2] < sign[1] / 4 else "partly",
         f"{other}, above or below its mean; the best dimension of all correlates {fair.pearson[best.after]:.2f} with apostrophes in words"),
        ("s_logit", "Ablating the apostrophe feature mainly lowers the logit of 's': mean change", change, "not" if not mainly else "reproduced" if rank["logit"] <= 3 else "partly",
         f"beyond the mean logit's, which an ablation shifts too; number {rank['logit']:,.0f} of the lowered tokens; reproduced: among the first 3"),
        ("s_probability", "It mainly lowers the probability of 's': mean change", less, "not" if None in less or less[2] >= 0 else "reproduced" if rank["probability"] == 1 else "partly",
         f"of {scale['probability of s']:.1%}; number {rank['probability']:,.0f} of the lowered tokens, 't' changes by {effect.probability['feature', words.index(b't', letter)]:+.1%}")):
    row(f"12.apostrophe.{which}", claim=claim, paper="figure only", paper_source="5 (apostrophe feature, residual dimension 21)", ours=ours[0], low=ours[1], high=ours[2], seeds=1, verdict=verdict, caveat=f"{caveat}; interval over documents")

# %% [markdown]
# ## 4 · A closing-parenthesis feature
#
# **Claim.** A feature of the last layer writes ")" and its variants.
#
# Now the search is by weights: what each direction adds to the logits. No text is needed for that, so the text can be the test. The
# ground truth is again in the characters: whether a parenthesis is open after a token, and whether the next token closes one.
#
# **Predict.** A feature that writes ")" must not fire on "(", but where the parenthesis should end. Where would that be?

# %% tags=["slow"]
closing = parentheses.parenthesis(run)
shown = ["number", "sign", "closing", "active", "pearson", "share", "wider", "sensitivity"]
closing.units[shown].assign(raises=[spell(tokens, words, 10) for tokens in closing.units.raises]).rename(
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
shown = ("as it is", "ablated", "held at its maximum")
p = closing.effect.set_index(["place", "edit"])
told = "; ".join(f"{place}: {p.value[place, 'as it is']:.0%}, ablated {p.value[place, 'ablated']:.0%}, held {p.value[place, 'held at its maximum']:.0%}" for place in parentheses.PINNED_AT)
active, silent, nothing = (p.loc[place] for place in parentheses.PINNED_AT)
study.show(case_figures.probability_figure(closing.effect, parentheses.PINNED_AT, shown), "12-parenthesis-effect",
           claim=f"Ablated where it is active, feature {first.number} takes the probability of closing from {active.value['as it is']:.0%} to {active.value['ablated']:.0%}; held where nothing is open, "
                 f"from {nothing.value['as it is']:.0%} to {nothing.value['held at its maximum']:.0%}",
           alt=f"Bars of the probability that the next token closes a parenthesis. {told}.")

# %%
wide, down, up = (finite(*values) for values in (first[["wider", "wider_low", "wider_high"]], active.loc["ablated: change"], silent.loc["held at its maximum: change"]))
row("12.parenthesis.raises", claim="Of the ten tokens that the feature raises most, those that close a parenthesis", paper="no number", paper_source="App. D (feature 5_2027 unembeds to variants of ')')",
    ours=first.closing, low=None, high=None, seeds=1, verdict="reproduced" if first.closing >= 8 else "partly" if first.closing >= 4 else "not",
    caveat=f"feature {first.number} after layer {last}, chosen by these weights; {spell(first.raises, words, 10)}")
row("12.parenthesis.open", claim="Share of its activation where a parenthesis is open", paper=None, paper_source="", ours=wide[0], low=wide[1], high=wide[2], seeds=1,
    verdict="not" if None in wide or wide[1] <= base["open"] else "reproduced" if wide[1] >= 0.9 else "partly",
    caveat=f"{base['open']:.0%} of all tokens; {first.share:.0%} where it is closed next ({base['closed next']:.1%} of all tokens), sensitivity {first.sensitivity:.0%}; correlation {first.pearson:.2f}, "
           f"the best dimension's {rival.pearson:.2f}")
row("12.parenthesis.ablation", claim="Change of the probability of closing when it is ablated where it is active", paper=None, paper_source="", ours=down[0], low=down[1], high=down[2], seeds=1,
    verdict="reproduced" if None not in down and down[2] < 0 else "not", caveat=f"{told}; interval over documents")
row("12.parenthesis.pin", claim="Change of the probability of closing when it is held at its maximum where it is silent and a parenthesis open", paper=None, paper_source="", ours=up[0],
    low=up[1], high=up[2], seeds=1, verdict="reproduced" if None not in up and up[1] > 0 else "not", caveat=f"where nothing is open {nothing.value['held at its maximum: change']:+.1%}")

# %% [markdown]
# ## 5 · Less than rank one
#
# **Claim.** To take a feature away it is enough to move x back along its direction until the feature stops: *less* than a rank-one
# change, since wherever the feature is silent nothing is changed at all.
#
# How far is that? The feature's activation is relu(w · (x − b) + c). Each step along its direction d lowers what is inside by w · d.
# So from an activation f the end is at f / (w · d) steps. In the paper's tied dictionaries w = d, and this is the same as to subtract
# the feature's part f d; in ours it is not. **Check yourself** in the next cell.
#
# *Rank one* means: everywhere in the text the component along a direction is set to its mean. Beside the feature's direction we take
# LEACE's, the smallest edit after which no linear probe finds the concept, and a random direction. What an edit is *for* is measured
# where the model should go on with "s", or close the parenthesis; what it *breaks*, where the feature is not active.
#
# **Predict.** Which edits leave all other tokens exactly alone, after the last layer? And after an earlier one, whose outputs later
# positions read?

# %%
unit = Unit(int(best.after), int(best.number))
sae, model = deep.dictionary(run, unit.after).model, deep.transformer(run).model
x = torch.randn(1000, sae.config.d_in, generator=torch.Generator().manual_seed(SEED)) * sae.b_dec.norm() + sae.b_dec
f, w_d = sae.encode(x, [unit.number]), float(sae.W_enc[:, unit.number] @ sae.W_dec[unit.number])
stopped = x - f / w_d * sae.W_dec[unit.number]
assert sae.encode(stopped, [unit.number]).max() < 1e-3 * max(1, float(f.max())), "still active: did you divide by w . d?"
assert torch.equal(stopped[f[:, 0] == 0], x[f[:, 0] == 0]), "where the feature is silent nothing may change"
assert torch.allclose(stopped, erasure.silence(sae, unit.number)(x), atol=1e-4), "not what the library does"
left = float(sae.encode(effects.pin(sae, unit.number, 0.0)(x), [unit.number]).sum() / f.sum()) if f.any() else np.nan
print(f"w · d = {w_d:.2f}: subtracting the feature's part leaves {left:.0%} of its activation, moving back until it stops {float(sae.encode(stopped, [unit.number]).sum()):.1g}")

# %% tags=["slow"]
of_case = {"apostrophe": Unit(last, int(top.number[last])), "parenthesis": Unit(last, int(first.number)), "apostrophe, early": Unit(1, int(top.number[1]))}
compared = {case: edits.rank_one(run, case.split(",")[0], which) for case, which in of_case.items()}
named = {"until it stops": "until the feature stops<br>(less than rank one)", "its part": "the feature's part", "rank one": "rank one, its direction", "LEACE": "LEACE (rank one)",
         "a dimension": "the dimension it reads most", "rank one, random": "rank one, random direction"}
cell = {case: table.set_index("edit") for case, table in compared.items()}
told = {case: f"{t.wanted['until it stops']:+.2f} nats where wanted, KL {t.collateral['until it stops']:.2g} elsewhere; rank one {t.wanted['rank one']:+.2f} and {t.collateral['rank one']:.2g}"
        for case, t in cell.items()}
shown = {f"{case.split(',')[0]}, after layer {of_case[case].after}": table for case, table in compared.items()}
study.show(case_figures.edits_figure(shown, named), "12-rank-one", claim=f"Moved until the feature stops: {told['apostrophe']}",
           alt="Six edits in rows, three panels: change of log-likelihood where it is wanted, KL divergence where the feature is inactive, and how far the stream is moved. "
               + " ".join(f"{case}: {said}." for case, said in told.items()))

# %%
for case, t in cell.items():
    least, full = t.loc["until it stops"], t.loc["rank one"]
    wanted = finite(least.wanted, least.wanted_low, least.wanted_high)
    ratio = finite(least.collateral / full.collateral, least.collateral_low / full.collateral_high, least.collateral_high / full.collateral_low) if full.collateral_low else (None,) * 3
    key = case.replace(", ", "_")
    row(f"12.rank_one.wanted.{key}", claim=f"Moving back until the {case.split(',')[0]} feature after layer {of_case[case].after} stops lowers the log-likelihood of what it is for", paper=None, paper_source="5 (less-than-rank-one ablation)",
        ours=wanted[0], low=wanted[1], high=wanted[2], seeds=1, verdict="not" if None in wanted or wanted[2] >= 0 else "reproduced",
        caveat=f"nats; the feature's part alone {t.wanted['its part']:+.2f}, rank one {full.wanted:+.2f}, LEACE {t.wanted['LEACE']:+.2f}, a random direction {t.wanted['rank one, random']:+.2f}")
    row(f"12.rank_one.collateral.{key}", claim="Its KL where the feature is inactive, as a share of rank one's", paper=None, paper_source="5 (less-than-rank-one ablation)",
        ours=ratio[0], low=ratio[1], high=ratio[2], seeds=1, verdict="not" if None in ratio or ratio[2] >= 1 else "reproduced",
        caveat=f"{least.collateral:.2g} against {full.collateral:.2g} nats; {least.untouched:.1%} of tokens are left exactly as they are; after layer {of_case[case].after} of {last}; cautious interval")

# %% [markdown]
# ## 6 · What makes them fire
#
# **Claim.** A feature's causes in the layer before can be found by ablation, and their causes in turn: a tree that can be read.
#
# The paper's rule: with M the target's maximum, take 20 contexts where its activation is between M/2 and M; ablate each feature of
# the layer before, at all positions; rank by how much of the target's activation is lost; recurse. Of a thousand candidates the first
# is flattered, so our edges are measured in *other* contexts, of other documents, than those that ranked. The table below the trees
# has the number of the ranking too, and beside the first cause a feature drawn at random among those that are as often active.
#
# **Predict.** The residual stream carries everything along. How many of the causes are other features, and how many are the same
# feature a layer earlier?

# %% tags=["slow"]
roots = {case: of_case[case] for case in ("apostrophe", "parenthesis")}
trees = {case: causes.tree(run, case, root) for case, root in roots.items()}
summary, texts = {}, {}
for case, tree in trees.items():
    own = tree[tree.parent == 0]
    summary[case] = {kind: own[own.kind == kind].reset_index(drop=True) for kind in ("cause", "random", "together")}
    told = f"its greatest cause takes {own.value.iloc[0]:.0%} of it, the first {len(summary[case]['cause'])} together {summary[case]['together'].value[0]:.0%}" if len(own) else "too rare for a tree"
    texts[case] = (f"The {case} feature {roots[case].number} after layer {last}: {told}",
                   f"A tree from right to left: the target, its causes a layer before, and theirs, each with the tokens it fires on; {told}. "
                   + "; ".join(f"feature {r.feature} {r.value:.0%}" for r in (summary[case]["cause"].itertuples())) + ".")
claim, alt = texts["apostrophe"]
study.show(case_figures.tree_figure(trees["apostrophe"], words), "12-tree-apostrophe", claim=claim, alt=alt)
claim, alt = texts["parenthesis"]
study.show(case_figures.tree_figure(trees["parenthesis"], words), "12-tree-parenthesis", claim=claim, alt=alt)

# %%
pd.concat({case: tree[tree.parent >= 0].groupby(["parent", "kind"], sort=False)[["ranked", "value", "low", "high", "cosine"]].first() for case, tree in trees.items()}).round(3)

# %%
for case, parts in summary.items():
    known = len(parts["cause"]) > 0
    strongest, joint = (finite(*parts[kind][["value", "low", "high"]].iloc[0]) if known else (None,) * 3 for kind in ("cause", "together"))
    luck = parts["random"].high.max() if known else np.nan
    said = f"the like for random features at most {parts['random'].value.max():.1%}; where it was ranked {parts['cause'].ranked[0]:.0%}; cosine with the target {parts['cause'].cosine[0]:.2f}" if known else "too rare here"
    row(f"12.tree.first.{case}", claim=f"Share of the {case} feature's activation lost when its greatest cause in the layer before is ablated", paper="figure only", paper_source="5 (causal tree)",
        ours=strongest[0], low=strongest[1], high=strongest[2], seeds=1, verdict="not" if None in strongest or strongest[1] <= luck else "reproduced",
        caveat=f"{said}; measured in contexts other than those that ranked; interval over contexts; reproduced: above every random feature's interval")
    row(f"12.tree.together.{case}", claim="The same when its first causes are ablated together: most of it", paper=None, paper_source="", ours=joint[0], low=joint[1], high=joint[2], seeds=1,
        verdict="not" if None in joint or joint[1] <= luck else "reproduced" if joint[1] >= 0.5 else "partly", caveat=f"the first {len(parts['cause'])}; error of the dictionary left in place")

# %% [markdown]
# **The method that failed.** The paper first tried weights: the cosine of one layer's directions with the next layer's. It saw no
# meaningful connections. Two features chosen by hand prove nothing either way, so we draw features at random, rank their causes by
# ablation, and ask how well cosines would have ranked them.
#
# **Predict.** In a model of three layers, 128 numbers wide, will the weights fail too?

# %% tags=["slow"]
survey = causes.survey(run)
middle = survey.median(numeric_only=True)
study.show(case_figures.survey_figure(survey), "12-survey",
           claim=f"{len(survey)} features at random: the greatest cause takes {middle['first']:.0%}, a random one {middle['random']:.1%}; cosines rank the causes with {middle.encoder:.2f}" if len(survey) else
                 "No feature is strong in enough documents",
           alt=f"Boxes with a point a feature, by layer. Left: share of activation lost (medians: greatest cause {middle['first']:.1%}, first four together {middle.together:.1%}, random {middle['random']:.1%}). "
               f"Right: rank correlation with cosines (medians {middle.encoder:.2f} and {middle.decoder:.2f}).")

# %%
enough = len(survey) > 1
lost, luck, rho = (unit_interval(survey[column], seed=SEED) if enough else (None,) * 3 for column in ("first", "random", "encoder"))
hits = share_interval(int(survey.hit.sum()), len(survey)) if enough else (None,) * 3
row("12.tree.survey", claim="Share of activation lost with the greatest cause, median of features drawn at random", paper=None, paper_source="5 (causal tree)", ours=lost[0], low=lost[1], high=lost[2],
    seeds=1, verdict="reproduced" if enough and lost.low > luck.high else "not",
    caveat=f"{len(survey)} features; random causes {middle['random']:.1%}, first four together {middle.together:.0%}; greatest cause and target have a median cosine of {middle.cosine:.2f}; interval over features")
row("12.tree.weights", claim="Cosines of weights do not tell a feature's causes: median rank correlation", paper="no meaningful connections", paper_source="App. D (layer 4 to 5)", ours=rho[0],
    low=rho[1], high=rho[2], seeds=1, verdict="reproduced" if enough and rho.high < 0.2 else "partly" if enough and rho.high < 0.5 else "not",
    caveat=f"over all features active in the contexts; the greatest cosine is the greatest cause for {survey.hit.sum()} of {len(survey)} features; reproduced: below 0.2, partly: below 0.5")

# %% [markdown]
# ## Key points
#
# - What a feature fires on and what it does are two measurements. Take both, and a ground truth that does not come from the feature.
# - Change as little as will do: an edit that leaves silent places alone cannot break them.
# - Causes are measured where they were not chosen, beside features that are as often there.
#
# **Exercises.** 1 · Search for a feature of ",", of a line break, of `self`: which truth would you write down first? 2 · Ablate a cause
# at the target's position only. Whose effect vanishes, and what does that say about attention? 3 · Grow the tree of a feature that you
# chose for its high activation on one document. What goes wrong?
#
# **What would change our mind.** If dictionaries of another seed had no apostrophe feature, or a tree of other causes, then these would
# be the dictionary's and not the model's. One seed cannot tell.
#
# **If you only take away one thing**: a story about a feature is worth what its controls are.
