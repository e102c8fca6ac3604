# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 10 · Sparsity against fidelity
#
# **Question.** A dictionary should be faithful, and it should be sparse. How much of the one does the other cost, and is the paper's
# recipe the best bargain?
#
# **You will be able to** draw a front and say honestly whether one lies above another; write down a JumpReLU dictionary and its
# gradient; measure shrinkage; and tell from three training curves what went wrong.
#
# **Needs** transformer A. The dictionaries, some fifty, were trained on one harvest and are loaded as numbers; training them takes
# most of an hour. **Makes** ten figures and the rows 10 of the scorecard. **Time**: 35 minutes to read.
#
# Seven kinds compete: the paper's recipe; the same with features that are born rare (notebook 03); and five that came after the paper.
#
# | kind | what makes it sparse | dead features | what it is known to trip over, and what is done here |
# |---|---|---|---|
# | the paper's recipe, born rare | L1 penalty | resampled | the penalty shrinks what it should only select |
# | Gated | L1 penalty on gates, which say *whether* a feature is active; *how strongly* is measured apart | resampled | gates and magnitudes share one encoder; a frozen decoder keeps the gates honest |
# | TopK | the k largest of a token | AuxK: the largest of the dead ones rebuild what the others miss, and learn from it | AuxK must not rebuild the bias: here it rebuilds the residual only |
# | BatchTopK | the k largest a token, over a batch | AuxK | what a token gets must not depend on its batch: a threshold takes over after training |
# | Matryoshka | as BatchTopK; its first features are dictionaries of their own | AuxK | the inner ones have to be paid for |
# | JumpReLU | a threshold for each feature; a price on their number | resampled | thresholds that hardly move, in bfloat16 or as logarithms; a price that saturates: here float32, plain, and steered to a target L0 |

# %% tags=["parameters"]
PROFILE = "workshop"  # "smoke" (minutes) | "workshop" (a laptop) | "paper" (GPUs)
SEED = 0
ARTEFACTS = "auto"  # "auto": load what exists, else train | "load": never train | "train": never load the reference
CORPUS = ""  # "": the profile's own | "environment" | "files:DIR" | "hf:NAME"

# %%
import numpy as np
import pandas as pd
import torch

from sae_lib import fronts, study
from sae_lib.metrics import Interval, share_interval
from sae_lib.sae import JumpReLUSAE
from sae_lib.step import LossGradient
from sae_lib.study import faults, frontier_figures, scores
from sae_lib.study.frontier import ULTRALOW, frontier
from sae_lib.study.kinds import KINDS, MODERN, best_rates, compared, rates
from sae_lib.study.verdicts import at_least, at_most, numbers_of
from sae_lib.transformer import mlp_activations
from sae_lib.variants import JumpReLU

run = study.begin(PROFILE, SEED, ARTEFACTS, CORPUS)
draws, sizes = dict(n_boot=run.profile.bootstrap, seed=SEED), run.profile.frontier

# %% [markdown]
# ## 1 · A JumpReLU dictionary in a few lines
#
# **Claim.** Most of what came after the paper changes one thing: which pre-activations get through.
#
# A JumpReLU feature passes its pre-activation on if it is above a threshold of its own, and the loss counts how many do. A count is
# flat, so its gradient is zero almost everywhere; the trick is to *pretend* that the step has a width, and to ask only those
# pre-activations that are less than half a `bandwidth` away from the threshold.
#
# **Predict.** A pre-activation stands just above its threshold, and the price of being active is high. Which way does the
# threshold move?


# %%
class Jump(torch.autograd.Function):
    """f = z where z > threshold, and the step itself, with the pretended gradient."""

    @staticmethod
    def forward(ctx, z, threshold):
        ctx.save_for_backward(z, threshold)
        return z * (z > threshold), (z > threshold).float()

    @staticmethod
    def backward(ctx, to_f, to_step):
        z, threshold = ctx.saved_tensors
        near = ((z - threshold).abs() < 0.5).float()  # a bandwidth of 1
        return to_f * (z > threshold), -(near * (threshold * to_f + to_step)).sum(0)


def jumprelu_loss(x, W_enc_T, b_enc, W_dec, b_dec, threshold, price):
    f, active = Jump.apply((x - b_dec) @ W_enc_T.T + b_enc, threshold)
    return ((x - f @ W_dec - b_dec) ** 2).sum() + price * active.sum(), f


# %% [markdown]
# **Check yourself.** The library's gradient is written by hand, without automatic differentiation. Do the two agree, for every
# weight, on real activations?

# %%
model = run.transformer("A").model
x = mlp_activations(model, run.held_out("test").contexts[:2].long()).flatten(0, 1)
x = x * x.shape[1] ** 0.5 / x.norm(dim=1).mean()
rule, sae = JumpReLU(bandwidth=1.0), JumpReLUSAE(run.sae_config(), threshold=0.3)
p = rule.read(sae)
library = LossGradient(p, torch.float32, rule)
library.add(x, 2.0)
ours = {name: value.clone().requires_grad_() for name, value in p._asdict().items()}
value, f = jumprelu_loss(x, **ours, price=2.0)
value.backward()
assert torch.allclose(f, sae.encode(x), atol=1e-4), "the features differ: is the bias taken off before the encoder?"
for name, expected in library.grads._asdict().items():
    assert (ours[name].grad - expected).norm() < 1e-3 * expected.norm(), f"the gradients of {name} differ"
print("the same gradients of", ", ".join(ours))

# %% [markdown]
# ## 2 · A fair learning rate for each
#
# **Claim.** Which kind wins can depend on who chose the learning rate. So each kind has tried the same ones, in short trainings, and
# goes on with its best.
#
# A kind is judged by its squared error and, if it pays one, its L1 penalty, on rows that it meets for the first time. JumpReLU is
# told an L0 and gets there by and by; where it is not within 10 % of it yet, its error is that of another sparsity and is not
# compared. A short training likes a high rate better than a long one would.
#
# **Predict.** Which kind minds most?

# %% tags=["slow"]
trials = rates(run)
best = best_rates(trials)
fair = compared(trials)
trials.assign(objective=fair.objective).pivot(index="kind", columns="lr", values=["objective", "l0"]).loc[list(KINDS)].round(1)

# %%
spread = (fair.groupby("kind").objective.max() / fair.groupby("kind").objective.min() - 1).sort_values()
picky, easy = spread.index[-1], spread.index[0]
study.show(frontier_figures.rates_figure(fair), "10-learning-rates",
           claim=f"The worst rate tried costs {KINDS[picky]} {spread.iloc[-1]:.0%} of its objective, and {KINDS[easy]} {spread.iloc[0]:.0%}",
           alt="A line a kind, its objective over its best against the learning rate. Best rates: "
               + ", ".join(f"{KINDS[kind]} {lr:g}" for kind, lr in best.items()) + ".")

# %% [markdown]
# ## 3 · The fronts
#
# **Claim.** Every modern kind gives more fidelity at equal sparsity than the paper's recipe, under this budget.
#
# All dictionaries read the same activations in the same order and are measured on the same held-out text. A marker is a dictionary;
# the line is the front of its kind, through what no other of its kind beats. Small open markers are other seeds, which differ in
# initialisation and in the inputs that features are born along, not in the data.
#
# **Predict.** Ten active features or sixty: where do the kinds differ most?

# %% tags=["slow"]
found = frontier(run)
table = found.table
main, first = table.expansion.mode()[0], table.seed.min()
print(f"{len(table)} dictionaries of {sizes.training.n_activations:,} activations each; {len(found.common)} held-out documents, {found.common[:, -1].sum():,.0f} tokens")

# %%
matched = {kind: found.which(kind=kind, matched=True) for kind in KINDS}
at = lambda kind, measure: found.of(matched[kind], lambda values: values(measure).mean(-1), **draws)
recovered, l0, explained = ({kind: at(kind, measure) for kind in KINDS} for measure in ("recovered", "l0", "explained"))
ranked = sorted(KINDS, key=lambda kind: -recovered[kind].value)
study.show(frontier_figures.front_figure(found, "recovered", "loss recovered (zero ablation)", **draws), "10-front-loss",
           claim=f"With about {sizes.matched_l0} active features {KINDS[ranked[0]]} recovers {recovered[ranked[0]].value:.1%} of the loss, the paper's recipe {recovered['paper'].value:.1%}",
           alt=f"Loss recovered against L0, a line a kind. Means of {sizes.seeds} seeds at an L0 of about {sizes.matched_l0}: "
               + "; ".join(f"{KINDS[kind]} {recovered[kind].value:.1%} at {l0[kind].value:.1f}" for kind in ranked) + ".")

# %%
pd.DataFrame([{"kind": KINDS[kind], "L0": l0[kind].value, "loss recovered": recovered[kind].value, "low": recovered[kind].low, "high": recovered[kind].high,
               "least seed": found.each(matched[kind], "recovered", **draws).value.min(), "greatest seed": found.each(matched[kind], "recovered", **draws).value.max(),
               "against mean ablation": at(kind, "from_mean").value, "explained variance": explained[kind].value} for kind in ranked]).round(3)

# %% [markdown]
# Explained variance asks for the activations, not for what the model does with them. If the order of the kinds is another by this
# measure, then some spend their features on what the model does not need.

# %%
by_variance = sorted(KINDS, key=lambda kind: -explained[kind].value)
same = [KINDS[kind] for kind in ranked] == [KINDS[kind] for kind in by_variance]
study.show(frontier_figures.front_figure(found, "explained", "explained variance", **draws), "10-front-variance",
           claim=f"By explained variance {KINDS[by_variance[0]]} leads with {explained[by_variance[0]].value:.1%}; the order of kinds is {'the same' if same else 'not the same'} as by loss",
           alt="Explained variance against L0, a line a kind. " + "; ".join(f"{KINDS[kind]} {explained[kind].value:.1%}" for kind in by_variance) + ".")

# %% [markdown]
# **Above everywhere** has a meaning: between its points a front is a straight line in the logarithm of L0, and the difference of two
# fronts over the L0 that both have takes its least value at a point or an end of one of them. The interval draws the same documents
# for both kinds. To beat the paper's recipe under a short budget is no art, as so few activations are not enough to make its
# features rare; so the L1 dictionary whose features are *born* rare is the harder opponent.
#
# **Check yourself.** One front goes from 0.6 at L0 10 to 0.9 at 1000; another from 0.5 at 10 to 0.9 at 100. By how much is the first
# ahead, at worst?

# %%
a, b = fronts.front(np.array([10, 1000]), np.array([0.6, 0.9])), fronts.front(np.array([10, 100]), np.array([0.5, 0.9]))
print(fronts.lead(a, b))
assert np.isclose(fronts.lead(a, b).least, -0.15), "at 100, the first is half way up: 0.75"

# %%
def least_leads(other, measure):
    """The least lead of each kind's front over another's, with the mean lead and the L0 that both have."""
    rows = {}
    for kind in KINDS:
        if kind not in ("paper", other):
            interval, lead = found.lead(kind, other, measure, **draws)
            rows[kind] = {**interval._asdict(), "mean": lead.mean, "from L0": lead.low, "to L0": lead.high}
    return pd.DataFrame(rows).T


over = {(other, measure): least_leads(other, measure) for measure in ("recovered", "explained") for other in ("paper", "standard")}
leads = pd.concat(over, names=["over", "measure", "kind"]).reset_index()
leads.assign(over=leads.over.map(KINDS), kind=leads.kind.map(KINDS)).round(3)

# %%
by_loss = leads[leads.measure == "recovered"]
above = {other: sum(over[other, "recovered"].low[kind] > 0 for kind in MODERN) for other in ("paper", "standard")}
if by_loss.value.notna().any():
    study.show(frontier_figures.lead_figure(by_loss), "10-lead",
               claim=f"{above['paper']} of {len(MODERN)} modern fronts lie above the paper recipe's everywhere, {above['standard']} above that of L1 born rare",
               alt="A row a kind: the least lead in loss recovered, over the paper's recipe and over the L1 dictionary born rare. "
                   + "; ".join(f"{KINDS[r.kind]} over {KINDS[r.over]} {r.value:+.1%} ({r.low:+.1%} to {r.high:+.1%})" for r in by_loss.itertuples()) + ".")

# %%
row = run.scorecard.row
for kind, r in over["paper", "recovered"].iterrows():
    v, rare = over["paper", "explained"].loc[kind], over["standard", "recovered"].value.get(kind)
    row(f"10.front.{kind}", claim=f"The front of {KINDS[kind]} lies above the paper recipe's everywhere: least difference in loss recovered", paper=None,
        paper_source="no number (the modern kinds came later)", **numbers_of(Interval(r.value, r.low, r.high)), seeds=1,
        verdict="reproduced" if r.low > 0 else "partly" if r["mean"] > 0 else "not",
        caveat=f"L0 {r['from L0']:.0f} to {r['to L0']:.0f}; mean {r['mean']:+.3f}; least in explained variance {v.value:+.3f} ({v.low:+.3f} to {v.high:+.3f}); "
               + (f"least over L1 born rare {rare:+.3f}; " if rare is not None else "") + f"{sizes.training.n_activations / 1e6:.3g} million activations each, from which the paper's recipe suffers most")

# %% [markdown]
# The best of several, chosen on the text it is measured on, flatters itself. So the best modern kind is chosen on *validation* text,
# by explained variance, among those with an L0 of 32 or less there.

# %%
tried = table[table.matched & table.kind.isin(MODERN)].groupby("kind")[["validation", "validation_l0"]].mean()
winner = (tried[tried.validation_l0 <= 32] if (tried.validation_l0 <= 32).any() else tried).validation.idxmax()
r, n, seeds = recovered[winner], l0[winner], len(matched[winner])
spread = found.each(matched[winner], "recovered", **draws).value
row("10.best.loss_recovered", claim="The best modern dictionary recovers at least 90 % of the loss at an L0 of 32 or less", paper=None, paper_source="no number (0.79 for A/1, at L0 4.9)",
    **numbers_of(r), seeds=seeds, verdict=at_least(r, 0.9, fair=0.8),
    caveat=f"{KINDS[winner]}, chosen on validation text; seeds {spread.min():.3f} to {spread.max():.3f}; {at(winner, 'from_mean').value:.3f} against mean ablation")
row("10.best.l0", claim="... and its L0 on held-out text", paper=None, paper_source="no number (4.9 for A/1)", **numbers_of(n), seeds=seeds,
    verdict=at_most(n, 32, fair=35), caveat=f"{KINDS[winner]}, trained for {sizes.matched_l0}")
print(f"{KINDS[winner]}: {r.value:.1%} at L0 {n.value:.1f}")

# %% [markdown]
# ## 4 · Is there a natural sparsity?
#
# **Claim.** No. (C, Figure 6: as its L1 coefficient α grows, fidelity falls smoothly, without a bump or a knee.) A knee would have been
# a recommendation.
#
# A *bump* is a coefficient that another one beats at both. A *knee* is a single place where the front takes most of its turning. How
# much of all turning is the sharpest turn? All of it would be a knee; equal shares would be a curve as smooth as its points allow.

# %%
swept = found.which(kind="standard", expansion=main, seed=first, matched=False)
line = found.each(swept, "l0", **draws).value.to_numpy(), found.each(swept, "explained", **draws).value.to_numpy()
smooth = fronts.front(*line)
beaten = len(swept) - len(smooth.l0)
turning = lambda values: np.array([fronts.sharpest_turn(fronts.front(*points)) for points in zip(values("l0").reshape(-1, len(swept)),
                                                                                                 values("explained").reshape(-1, len(swept)), strict=True)]).reshape(values("l0").shape[:-1])
turn = found.of(swept, turning, **draws)
verdict = "not" if np.isnan(turn.value) or beaten > 1 else "reproduced" if beaten == 0 and turn.high < 0.75 else "partly"
row("10.alpha", claim="The sparsity-fidelity curve is smooth: share of its turning that the sharpest turn has", paper="figure only", paper_source="C Figure 6, Appendix E",
    **numbers_of(turn), seeds=1, verdict=verdict,
    caveat=f"L1, born rare, on MLP activations, {len(swept)} coefficients, explained variance; {beaten} beaten by another; equal turns would give {1 / max(1, len(smooth.l0) - 2):.2f}")
print(f"{beaten} of {len(swept)} coefficients beaten; the sharpest turn has {turn.value:.0%} of the turning")

# %% [markdown]
# ## 5 · Shrinkage
#
# **Claim.** The L1 penalty shrinks what it lets through; the others do not.
#
# A lone feature that should be active with $a$ costs $(a-f)^2 + \lambda f$, and the best $f$ is $a - \lambda/2$: it would have to be
# multiplied with $a / (a - \lambda / 2)$. Two gains are measured on held-out text: the one factor for *all* features that would
# reconstruct best, and for *each* feature the factor that would, if the others stayed.
#
# **Predict.** Which will have the larger gain: a feature that fires strongly, or one that fires weakly?

# %%
ordered = [i for kind in KINDS for i in matched[kind]]
gains = table.loc[ordered, ["kind", "gains"]].join(found.each(ordered, "gain", **draws))
gain = {kind: at(kind, "gain") for kind in KINDS}
study.show(frontier_figures.gain_figure(gains), "10-shrinkage",
           claim=f"Activations should be {gain['paper'].value:.2f} times as strong in the paper's recipe, {gain['standard'].value:.2f} times if born rare, {gain[winner].value:.2f} times in {KINDS[winner]}",
           alt="For each kind the factor that would suit all features, by seed, and quartiles of the factors that would suit each. "
               + "; ".join(f"{KINDS[kind]} {gain[kind].value:.3f}" for kind in KINDS) + ".")

# %%
for kind in KINDS:
    g, shrinks = gain[kind], kind in ("paper", "standard")
    row(f"10.shrinkage.{kind}", claim=f"{KINDS[kind]}: {'the penalty shrinks activations' if shrinks else 'activations are not shrunk'}; factor that would suit them", paper=None,
        paper_source="no number (Wright and Sharkey; Rajamanoharan et al. 2024)", **numbers_of(g), seeds=len(matched[kind]),
        verdict=at_least(g, 1.05, fair=1.0) if shrinks else
                "reproduced" if max(abs(g.low - 1), abs(g.high - 1)) < 0.05 else "partly" if abs(g.value - 1) < 0.1 else "not",
        caveat=f"L0 {l0[kind].value:.1f}; below 1: too strong")

# %% [markdown]
# ## 6 · A target that is met
#
# **Claim.** A JumpReLU dictionary can be told its L0: on held-out text it is within 10 % of what was asked. (The row below says
# whether it is.)
#
# With a fixed price the L0 has to be found by trial, and beyond some price nothing changes any more. Here the price is steered while
# training: it rises as long as too many features are active.
#
# **Predict.** A new dictionary has far too many active features. Will it come down from above, or shoot past?

# %%
jump = found.which(kind="jumprelu", expansion=main)
targets = table.loc[jump, ["control", "steps", "l0_curve"]].join(found.each(jump, "l0", **draws))
off = (targets.value / targets.control - 1).abs()
worst = targets.loc[off.idxmax()]
study.show(frontier_figures.target_figure(targets), "10-target", claim=f"JumpReLU's L0 is at most {off.max():.1%} off its target on held-out text",
           alt="Left, L0 on held-out text against its target: " + ", ".join(f"{r.value:.1f} for {r.control:g}" for r in targets.itertuples())
               + ". Right, L0 over its target as training goes on, a line a target.")
inside = all(abs(end / r.control - 1) <= 0.1 for r in targets.itertuples() for end in (r.low, r.high))
row("10.jumprelu.l0", claim="JumpReLU's L0 on held-out text follows its target: the worst of all, over its target", paper=None, paper_source="no number (Rajamanoharan et al. 2024)",
    ours=worst.value / worst.control, low=worst.low / worst.control, high=worst.high / worst.control, seeds=len(matched["jumprelu"]),
    verdict="reproduced" if inside else "partly" if off.max() <= 0.1 else "not", caveat=f"{len(targets)} dictionaries, targets {targets.control.min():g} to {targets.control.max():g}")

# %% [markdown]
# ## 7 · Alive
#
# **Claim.** Dead features are a matter of the kind: of how features are born, and of who revives them.
#
# *Ultralow* is here a density under 1 in 10,000: the text that all dictionaries are measured on is short. **Predict.** AuxK revives
# the dead at every step, resampling four times in the first tenth of the run. Which leaves fewer?

# %%
alive = table.loc[ordered, ["kind", "dead", "ultralow"]]
share = alive.groupby("kind", sort=False)[["dead", "ultralow"]].mean()
most, fewest = share.dead.idxmax(), share.dead.idxmin()
study.show(frontier_figures.alive_figure(alive), "10-alive", claim=f"{share.dead[most]:.1%} of the features of {KINDS[most]} are dead, {share.dead[fewest]:.1%} of those of {KINDS[fewest]}",
           alt="Stacked bars of the shares of dead and ultralow features, the mean over seeds, by kind. "
               + "; ".join(f"{KINDS[kind]} {r.dead:.1%} dead and {r.ultralow:.1%} ultralow" for kind, r in share.iterrows()) + ".")
n_features = int(main * run.profile.transformer.d_mlp * sizes.seeds)
for kind, r in share.iterrows():
    interval = share_interval(round(r.dead * n_features), n_features)._replace(value=r.dead)
    row(f"10.dead.{kind}", claim=f"Few features of {KINDS[kind]} are dead", paper=0.041 if kind == "paper" else None, paper_source="Global Analysis (168 of 4,096)" if kind == "paper" else "no number",
        **numbers_of(interval), seeds=sizes.seeds, verdict=at_most(interval, 0.05, fair=0.15),
        caveat=f"on {found.common[:, -1].sum():,.0f} tokens; {r.ultralow:.1%} more below a density of {ULTRALOW:g}; interval over features")

# %% [markdown]
# ## 8 · Width
#
# **Claim.** At an equal number of active features a wider dictionary is more faithful, even though it has had no more text.
#
# BatchTopK is told its L0; with the L1 penalty it depends on the width as well. (Notebook 08 looks at *what* a wider dictionary
# finds.) **Predict.** Left, both lines rise. What does the right panel say about the left?

# %%
chosen = [i for kind in ("standard", "batchtopk") for i in sorted((*found.which(kind=kind, seed=first, matched=True), *found.which(kind=kind, seed=first, matched=False)),
                                                                  key=lambda i: table.expansion[i]) if table.control[i] == table.control[matched[kind][0]]]
width = table.loc[chosen, ["kind", "expansion"]].join(found.each(chosen, "recovered", **draws).rename(columns={"value": "recovered"})).assign(l0=found.each(chosen, "l0", **draws).value)
told = [i for i in chosen if table.kind[i] == "batchtopk"]
gained = found.of([told[0], told[-1]], lambda values: values("recovered")[..., 1] - values("recovered")[..., 0], **draws)
ends = [int(table.expansion[i]) for i in (told[0], told[-1])]
study.show(frontier_figures.width_figure(width), "10-width", claim=f"From {ends[0]}x to {ends[1]}x BatchTopK recovers {100 * gained.value:+.1f} points of the loss with as many active features",
           alt="Two panels against width, for the L1 penalty and BatchTopK: loss recovered, and L0. "
               + "; ".join(f"{KINDS[r.kind]} {r.expansion}x {r.recovered:.1%} at L0 {r.l0:.1f}" for r in width.itertuples()) + ".")
row("10.width", claim=f"A {ends[1]}x dictionary recovers more than a {ends[0]}x one at the same L0: by how much", paper=None, paper_source="How much of the model (rises with width)", **numbers_of(gained),
    seeds=1, verdict=at_least(gained, 0.0), caveat="BatchTopK, the same activations; paired bootstrap")

# %% [markdown]
# ## 9 · Faithful, but can it be explained?
#
# **Claim.** Fidelity is not interpretability: the kind that rebuilds best need not be the one whose features are explained best.
#
# As in notebook 05, an explainer sees examples of what a feature fires on and has to predict others. It is the *pattern explainer*,
# which knows scripts, cases, digits and single tokens, and nothing of meaning; a language model would score higher on all kinds.
#
# The kinds are compared at about the same L0, one dictionary each.
#
# **Predict.** Does the most faithful kind have the best explained features? And the one with most dead features: are its living ones
# better or worse?

# %%
units = {kind: scores.Scores(found.scores[found.scores.kind == kind], None, None, []) for kind in KINDS}
medians = {score: scores.summary(units, score, **draws) for score in ("spearman", "logit")}
both = pd.DataFrame([{"kind": kind, "recovered": recovered[kind].value, **{f"{score}_{part}": medians[score].loc[kind, part] for score in medians for part in ("value", "low", "high")}} for kind in KINDS])
known = both.dropna(subset=["spearman_value"])
order = known.recovered.corr(known.spearman_value, method="spearman") if len(known) > 2 else np.nan
if len(known):
    top = known.loc[known.spearman_value.idxmax()]
    study.show(frontier_figures.explained_figure(known), "10-explained", claim=f"Best explained are features of {KINDS[top.kind]} (median {top.spearman_value:.2f}); rank correlation with loss recovered {order:+.2f}",
               alt="Median score of features' explanations, a row a kind: "
                   + "; ".join(f"{KINDS[r.kind]} {r.spearman_value:.2f} ({r.spearman_low:.2f} to {r.spearman_high:.2f}), on logits {r.logit_value:.2f}" for r in known.itertuples()) + ".")

# %%
apart = scores.differences(units, "spearman", of="standard", **draws)
for kind in [kind for kind in KINDS if kind != "standard"]:
    m, logit = medians["spearman"].loc[kind], medians["logit"].loc[kind]
    d = [-apart.loc[kind, part] for part in ("value", "high", "low")] if kind in apart.index else [np.nan] * 3
    row(f"10.autointerp.{kind}", claim=f"Features of {KINDS[kind]} are explained no worse than those of the L1 dictionary born rare: median score", paper=None, paper_source="no number", **numbers_of(Interval(m.value, m.low, m.high)), seeds=1, verdict="reproduced" if d[1] > -0.1 else "partly" if d[2] > 0 else "not",
        caveat=f"{found.explainer}, Spearman on activations, interval over {m.units:.0f} features, L0 {l0[kind].value:.0f}; against that one {d[0]:+.2f} ({d[1]:+.2f} to {d[2]:+.2f}); on logits {logit.value:.2f}")

# %% [markdown]
# ## 10 · Six broken training runs
#
# **Exercise.** Each of these trainings has *one* fault; the healthy one is in grey. Before you go on, write down a diagnosis for each
# letter. Some look very good, and are not.
#
# Candidates, in no order: learning rate too high · L1 coefficient too high · L1 coefficient too low · rows not shuffled · the same few
# batches again and again · whatever has been silent for one batch is resampled, to fire on every second token.

# %% tags=["slow"]
broken = faults.broken(run)
last = broken.logs.groupby("run").tail(1).set_index("run")
study.show(frontier_figures.broken_figure(broken), "10-broken", claim="Six training runs, each with one fault: which?",
           alt="Squared error, active features and silent features of six runs beside a healthy one. At the end: "
               + "; ".join(f"{name} error {r.mse:.0f}, L0 {r.l0:.1f}, {r.dead:.0%} silent" for name, r in last.iterrows()) + ".")

# %% [markdown]
# <details><summary>A hint for each sign</summary>
#
# Look at the end of each curve, then at its texture. Nothing active: too dear. Everything active: too cheap. A jagged error: what
# changes from batch to batch? An L0 that rises again: something keeps putting features back. An error far below the healthy one at the *same*
# number of active features: nobody gets that for nothing, so ask for held-out text. An error above the healthy one with few features
# left: what killed them, and when?
#
# </details>
#
# **Check yourself.** The answers, with the sign that gives each fault away, here and in the healthy run:

# %%
answers = faults.answers(broken)
shown = int(answers.shows.sum())
row("10.faults", claim="Of six faults the sign of so many shows in the numbers", paper=None, paper_source="no number", ours=shown, low=None, high=None, seeds=1,
    verdict="reproduced" if shown == len(answers) else "partly" if shown else "not", caveat=f"{sizes.fault_training.n_activations:,} activations, {sizes.fault_expansion}x")
pd.set_option("display.max_colwidth", None)
answers

# %% [markdown]
# ## Key points
#
# - Compare fronts, not points: any kind wins if you may choose its sparsity. And give all the same learning-rate search.
# - The L1 penalty pays twice, once for being active and once for being large. The second part is shrinkage, and the modern kinds
#   have in common that what is written into the reconstruction is not charged for its size.
# - A dictionary that is told its number of active features saves the search for a coefficient.
# - A better front is no better explanation. Measure both.
#
# **What would change our mind.** The budget is half a million activations a dictionary (in the workshop profile); the paper's was eight billion. Its recipe is the one
# that suffers most from a short training. Whether its front stays below after a long one is not measured here.
#
# **If you only take away one thing**: a number for fidelity means nothing without the number for sparsity beside it.
