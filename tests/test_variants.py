"""Every kind of dictionary: its gradient against automatic differentiation of its loss in float64, its training, its files."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_step import BATCH, D_SAE, SCALE, random_problem, relative_error
from test_train import CONFIG, SAE_CONFIG, Toy, same, without_time

from sae_lib import step
from sae_lib.effects import pin
from sae_lib.errors import StudyError
from sae_lib.recipe import BatchTopKConfig, GatedConfig, JumpReLUConfig, MatryoshkaConfig, TopKConfig, TrainConfig
from sae_lib.sae import SAE, GatedSAE, JumpReLUSAE, SAEConfig, TopKSAE
from sae_lib.shrinkage import Correction, apply_correction
from sae_lib.step import GROUP, LossGradient
from sae_lib.train import train_sae
from sae_lib.variants import BatchTopK, Gated, GatedParameters, JumpReLU, JumpReLUParameters, Matryoshka, TopK

PENALTY, K, K_AUX, ALPHA, BANDWIDTH, INNER = 0.7, 9, 7, 0.3, 2.0, (31, 90)
DEAD = torch.arange(D_SAE) % 5 == 0
RULES = {"topk": TopK(K), "topk with AuxK": TopK(K, K_AUX, ALPHA), "batchtopk": BatchTopK(K, K_AUX, ALPHA),
         "matryoshka": Matryoshka(K, K_AUX, ALPHA, INNER), "jumprelu": JumpReLU(BANDWIDTH), "gated": Gated()}


def problem(name):
    """Random parameters, none of them zero, of a kind; and data."""
    x, p = random_problem()
    rng = torch.Generator().manual_seed(9)
    if name == "jumprelu":
        p = JumpReLUParameters(*p, 0.5 + 2 * torch.rand(D_SAE, generator=rng))
    if name == "gated":
        p = GatedParameters(*p, 0.3 * torch.randn(D_SAE, generator=rng), p.b_enc + torch.randn(D_SAE, generator=rng))
    return x, p


# --- losses, written out ---------------------------------------------------------------------------------------------


def keep_largest(z, k):
    """z where it is among the k largest of the row and positive."""
    cut = z.topk(k, dim=1).values[:, -1:]
    return z * ((z >= cut) & (z > 0))


def keep_largest_of_group(z, k):
    cut = z.relu().flatten().topk(k * len(z)).values[-1]
    return z * ((z >= cut) & (z > 0))


def pre_activations(p, c, dtype):
    """c @ W_enc, with derivatives as if it were exact. In bfloat16 factors and product are rounded, so that all that depends on
    pre-activations, above all which are active or near a threshold, is as in the step: one in fifty would be on the other side.
    """
    exact = c @ p.W_enc_T.T
    if dtype == torch.float32:
        return exact
    rounded = (c.detach().float().to(dtype) @ p.W_enc_T.detach().float().to(dtype).T).double()
    return exact + (rounded - exact).detach()


def group_loss(name, p, x, dtype):
    """The loss of one group of rows, and its activations."""
    projected = pre_activations(p, x - p.b_dec, dtype)
    z = projected + p.b_enc
    if name == "gated":
        gate = z.relu()
        f = (z > 0) * (projected * p.r_mag.exp() + p.b_mag).relu()
        frozen = (gate @ p.W_dec.detach() + p.b_dec.detach() - x).square().sum()
        return (f @ p.W_dec + p.b_dec - x).square().sum() + frozen + PENALTY * gate.sum(), f
    if name == "jumprelu":
        # Values as they are; at the threshold, derivatives of steps smoothed over the bandwidth.
        near, moves = ((z - p.threshold).abs() < BANDWIDTH / 2).detach() / BANDWIDTH, p.threshold - p.threshold.detach()
        open_ = (z > p.threshold).detach().double()
        f = z * open_ - near * p.threshold.detach() * moves
        return (f @ p.W_dec + p.b_dec - x).square().sum() + PENALTY * (open_ - near * moves).sum(), open_ * z
    f = keep_largest(z, K) if name.startswith("topk") else keep_largest_of_group(z, K)
    x_hat = f @ p.W_dec + p.b_dec
    loss = (x_hat - x).square().sum()
    if name == "matryoshka":
        for width in INNER:
            loss = loss + (f[:, :width] @ p.W_dec[:width] + p.b_dec - x).square().sum()
    if name != "topk":
        revived = keep_largest(z.masked_fill(~DEAD, -1.0), K_AUX)
        share = ALPHA * min(int(DEAD.sum()) / K_AUX, 1)
        loss = loss + share * (revived @ p.W_dec - (x - x_hat).detach()).square().sum()
    return loss, f


def autograd(name, p, x, dtype):
    """Gradient of the loss in float64, the rows each feature fires on, and the sum of squared errors."""
    p = type(p)(*(t.double().requires_grad_() for t in p))
    fired, squared_error = torch.zeros(D_SAE, dtype=torch.int64), 0.0
    for rows in (SCALE * x.double()).split(GROUP):
        loss, f = group_loss(name, p, rows, dtype)
        loss.backward()
        fired += (f > 0).sum(0)
        squared_error += (f @ p.W_dec + p.b_dec - rows).square().sum().item()
    return type(p)(*(t.grad for t in p)), fired, squared_error


# The sparse way is in float32 behind the pre-activations; in the dense one factors of all products are rounded.
@pytest.mark.parametrize("dtype, sparse, tolerance", [(torch.float32, False, 3e-6), (torch.float32, True, 3e-6),
                                                      (torch.bfloat16, False, 5e-3), (torch.bfloat16, True, 3e-4)])
@pytest.mark.parametrize("name", RULES)
def test_gradient_equals_autograd(name, dtype, sparse, tolerance):
    x, p = problem(name)
    expected, fired, squared_error = autograd(name, p, x, dtype)
    gradient = LossGradient(p, dtype, RULES[name])
    sums = gradient.add(x, PENALTY, SCALE, sparse, DEAD)
    for weight in p._fields:
        assert relative_error(getattr(gradient.grads, weight), getattr(expected, weight)) < tolerance, weight
    assert sums.squared_error == pytest.approx(squared_error, rel=tolerance)
    # Sums in another order may be rounded to another bfloat16, and turn a feature on or off that is next to what decides.
    assert (sums.fired - fired).abs().sum() <= (0 if dtype == torch.float32 else 2e-4 * fired.sum())


@pytest.mark.parametrize("name", RULES)
def test_both_ways_are_really_taken(name, monkeypatch):
    taken = []
    monkeypatch.setattr(step, "dense_gradient", lambda *_: taken.append("dense") or (0.0, 0.0, torch.zeros(D_SAE), 0.0))
    x, p = problem(name)
    gradient = LossGradient(p, torch.float32, RULES[name])
    gradient.add(x, PENALTY, SCALE, True, DEAD)
    assert not taken
    gradient.add(x, PENALTY, SCALE, False, DEAD)
    assert set(taken) == {"dense"}


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka", "gated", "jumprelu"])
def test_result_does_not_depend_on_the_number_of_threads(name, monkeypatch):
    monkeypatch.setattr("sae_lib.kernels.SMALLEST_SHARE", 100)  # so that threads have something to share
    x, p = problem(name)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            gradient = LossGradient(p, torch.float32, RULES[name])
            gradient.add(x, PENALTY, SCALE, True, DEAD)
            found.append(gradient.grads)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_batchtopk_let_through_before_only_saves_time():
    x, p = problem("batchtopk")
    found = []
    for cut in (0.0, 1.0, 1e6):  # the last is far too high: candidates have to be looked for again
        gradient = LossGradient(p, torch.float32, RULES["batchtopk"])
        sums = gradient.add(x, 0.0, SCALE, True, DEAD, cut)
        found.append((gradient.grads, sums))
    for grads, sums in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads, found[0][0], strict=True)) and sums.cut == found[0][1].cut
    z = ((SCALE * x - p.b_dec) @ p.W_enc_T.T + p.b_enc)
    cuts = [len(rows) * rows.flatten().topk(K * len(rows)).values[-1] for rows in z.split(GROUP)]
    assert found[0][1].cut == pytest.approx(float(sum(cuts)), rel=1e-5)
    assert found[0][1].fired.sum() == K * BATCH


# --- training --------------------------------------------------------------------------------------------------------

SHARED = {name: getattr(CONFIG, name) for name in ("n_activations", "batch_size", "lr", "resample_inputs", "seed", "dead_window",
                                                   "log_every", "checkpoint_every")}
CONFIGS = {"topk": TopKConfig(**SHARED, k=3, k_aux=8), "batchtopk": BatchTopKConfig(**SHARED, k=3, k_aux=8),
           "matryoshka": MatryoshkaConfig(**SHARED, k=3, k_aux=8, inner=(16, 40)),
           "jumprelu": JumpReLUConfig(**SHARED, l0=4.0, birth_density=0.1, resample_at=(0.4,)),
           "gated": GatedConfig(**SHARED, l1_coefficient=1.5, birth_density=0.1, resample_at=(0.4,))}
KINDS = {"topk": TopKSAE, "batchtopk": JumpReLUSAE, "matryoshka": JumpReLUSAE, "jumprelu": JumpReLUSAE, "gated": GatedSAE}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(one_thread):
    return {name: train_sae(Toy(), SAE_CONFIG, config) for name, config in CONFIGS.items()}


def held_out():
    return Toy().sample(4000, "held-out")


def explained(sae):
    x = held_out()
    return 1 - ((x - sae(x).reconstruction).square().sum() / (x - x.mean(0)).square().sum()).item()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_short_training_explains_most_and_gives_the_right_kind(name, trained):
    sae, log = trained[name]
    assert type(sae) is KINDS[name]
    assert explained(sae) > 0.6
    assert log.mse.iloc[-1] < 0.7 * log.mse.iloc[0]
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    assert sae.metadata["training"].get("architecture", name).startswith(name)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_200_steps_is_training_100_stopping_and_training_100_more(name, trained, tmp_path):
    whole, log = trained[name]
    train_sae(Toy(), SAE_CONFIG, CONFIGS[name], tmp_path / "sae.ckpt", stop_after=100)
    resumed, resumed_log = train_sae(Toy(), SAE_CONFIG, CONFIGS[name], tmp_path / "sae.ckpt")
    assert same(whole, resumed) and without_time(log).equals(without_time(resumed_log))


@pytest.mark.parametrize("name", CONFIGS)
def test_both_precisions_end_at_the_same_loss(name, trained):
    other = {torch.float32: "bfloat16", torch.bfloat16: "float32"}[CONFIGS[name].dtype]
    _, log = train_sae(Toy(), SAE_CONFIG, replace(CONFIGS[name], precision=other))
    assert log.mse.iloc[-1] == pytest.approx(trained[name][1].mse.iloc[-1], rel=0.1)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    train_sae(Toy(), SAE_CONFIG, CONFIGS["topk"], tmp_path / "sae.ckpt", stop_after=20)
    with pytest.raises(StudyError, match="other settings"):
        train_sae(Toy(), SAE_CONFIG, CONFIGS["batchtopk"], tmp_path / "sae.ckpt")


@pytest.mark.parametrize("target", [2.0, 6.0])
def test_jumprelu_follows_its_target(target):
    config = replace(CONFIGS["jumprelu"], n_activations=256 * 800, l0=target, lr_decay=0.3)
    sae, log = train_sae(Toy(), SAE_CONFIG, config)
    assert log.l0.iloc[-4:].mean() == pytest.approx(target, rel=0.1)
    assert (sae.encode(held_out()) > 0).sum(1).float().mean().item() == pytest.approx(target, rel=0.1)
    assert sae.threshold.min() >= 0


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka"])
def test_trained_batchtopk_encodes_rows_on_their_own_and_keeps_k_on_average(name, trained):
    sae, x = trained[name][0], held_out()
    together = sae.encode(x)
    torch.testing.assert_close(together[:100], torch.cat([sae.encode(row[None]) for row in x[:100]]), rtol=1e-4, atol=1e-4)
    assert (together > 0).sum(1).float().mean().item() == pytest.approx(3, rel=0.15)
    assert sae.threshold.unique().numel() == 1 and sae.threshold[0] > 0


def test_auxk_revives_dead_features():
    config = replace(CONFIGS["topk"], n_activations=256 * 400, dead_window=0.01)
    dead = [train_sae(Toy(n=60), SAE_CONFIG, replace(config, k_aux=k_aux))[1].dead.iloc[-1] for k_aux in (0, 16)]
    assert dead[1] < 0.7 * dead[0]


def test_the_first_features_of_a_matryoshka_dictionary_are_a_dictionary(trained):
    def explained_by(sae, width):
        x = held_out()
        f = sae.encode(x)[:, :width]
        x_hat = f @ sae.W_dec[:width] + sae.b_dec
        return 1 - ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item()

    assert explained_by(trained["matryoshka"][0], 16) > explained_by(trained["batchtopk"][0], 16) + 0.1


@pytest.mark.parametrize("make, message", [
    (lambda: TopK(0), "cannot have 0 active"),
    (lambda: Matryoshka(3, inner=(40, 20)).widths(64), "40, 20, 64 features do not lie in each other"),
    (lambda: Matryoshka(3, inner=(64,)).widths(64), "end below 64"),
    (lambda: TopKSAE(SAEConfig(4, 8), 9), "cannot keep 9"),
])
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(StudyError, match=message):
        make()


# --- the dictionaries themselves -------------------------------------------------------------------------------------


def random_sae(kind):
    """Non-zero parameters everywhere, so that a bias that is forgotten cannot hide."""
    config, rng = SAEConfig(6, 10, model_name="m", hook_name="h", context_size=7), torch.Generator().manual_seed(3)
    sae = TopKSAE(config, 3) if kind is TopKSAE else kind(config)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape, generator=rng))
    if kind is JumpReLUSAE:
        sae.threshold.data.abs_()
    return sae.requires_grad_(False)


def plain_features(sae, x, w):
    """As SAELens computes them from its files."""
    projected = (x - w["b_dec"]) @ w["W_enc"]
    if isinstance(sae, GatedSAE):
        return (projected + w["b_gate"] > 0) * torch.relu((x - w["b_dec"]) @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"])
    before = projected + w["b_enc"]
    if isinstance(sae, TopKSAE):
        kept = before.topk(3)
        return torch.zeros_like(before).scatter_(-1, kept.indices, kept.values.relu())
    return torch.relu(before) * (before > w["threshold"])


FIELDS = {TopKSAE: ("topk", {"k": 3, "rescale_acts_by_decoder_norm": False}, set()), JumpReLUSAE: ("jumprelu", {}, {"threshold"}),
          GatedSAE: ("gated", {}, {"b_gate", "b_mag", "r_mag"})}


@pytest.mark.parametrize("kind", FIELDS)
def test_files_have_the_saelens_layout_and_come_back(kind, tmp_path):
    sae, x = random_sae(kind), torch.randn(2, 30, 6, generator=torch.Generator().manual_seed(4))
    sae.save(tmp_path)
    architecture, settings, further = FIELDS[kind]
    cfg, w = json.loads((tmp_path / "cfg.json").read_text()), load_file(tmp_path / "sae_weights.safetensors")
    del cfg["metadata"]
    assert cfg == {"architecture": architecture, "d_in": 6, "d_sae": 10, "dtype": "float32", "device": "cpu",
                   "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"} | settings
    assert set(w) == {"W_enc", "W_dec", "b_dec"} | further | (set() if kind is GatedSAE else {"b_enc"})
    features, x_hat = sae(x)
    torch.testing.assert_close(features, plain_features(sae, x, w))
    torch.testing.assert_close(x_hat, features @ w["W_dec"] + w["b_dec"])
    assert 0 < (features > 0).float().mean() < 1
    loaded = SAE.load(tmp_path)
    assert type(loaded) is kind and torch.equal(loaded.encode(x), features)


@pytest.mark.parametrize("kind", FIELDS)
def test_some_features_are_columns_of_all(kind):
    sae, x = random_sae(kind), torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(sae.encode(x, [7, 0, 7]), sae.encode(x)[..., [7, 0, 7]])


@pytest.mark.parametrize("kind", FIELDS)
def test_folding_the_scale_gives_the_same_dictionary_for_unscaled_activations(kind):
    sae, x, scale = random_sae(kind), torch.randn(50, 6, generator=torch.Generator().manual_seed(4)), 2.7
    features, x_hat = sae(scale * x)
    folded_features, folded_x_hat = sae.fold_scale_(scale)(x)
    torch.testing.assert_close(folded_features * scale, features)
    torch.testing.assert_close(folded_x_hat * scale, x_hat)


@pytest.mark.parametrize("kind", [JumpReLUSAE, GatedSAE])
def test_a_correction_multiplies_activations_and_moves_reconstructions(kind):
    sae, x, rng = random_sae(kind), torch.randn(50, 6), torch.Generator().manual_seed(5)
    correction = Correction(0.5 + torch.rand(10, generator=rng), torch.randn(6, generator=rng))
    corrected = apply_correction(sae, correction)
    torch.testing.assert_close(corrected.encode(x), sae.encode(x) * correction.gain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(corrected.b_dec, sae.b_dec + correction.shift)


def test_a_topk_dictionary_cannot_be_corrected():
    with pytest.raises(StudyError, match="without changing which are kept"):
        apply_correction(random_sae(TopKSAE), Correction(torch.ones(10), torch.zeros(6)))


@pytest.mark.parametrize("kind", FIELDS)
def test_pinning_moves_along_the_feature_by_what_the_dictionary_itself_says_is_missing(kind):
    sae, acts = random_sae(kind), torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(4))
    moved = pin(sae, 7, 3.0)(acts) - acts
    torch.testing.assert_close(moved, (3.0 - sae.encode(acts)[..., 7:8]) * sae.W_dec[7])


def test_an_unknown_topk_without_k_is_refused(tmp_path):
    random_sae(TopKSAE).save(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({key: value for key, value in cfg.items() if key != "k"}))
    with pytest.raises(StudyError, match="damaged"):
        SAE.load(tmp_path)


def test_the_penalty_of_jumprelu_pushes_towards_the_target():
    config = JumpReLUConfig(1000, 10, l0=30.0, l0_coefficient=0.5, l1_warmup=0.1)
    assert config.penalty(99, 0.0, 30.0) == pytest.approx(0.5)
    assert config.penalty(4, 0.0, 30.0) == pytest.approx(0.25)
    assert config.penalty(99, 0.0, 36.0) == pytest.approx(0.5 * 1.2 ** 12)
    assert config.penalty(99, math.log(3), 25.0) == pytest.approx(0.5 * 3 / 1.2 ** 12)
    assert config.penalty(99, 0.0, 3000.0) == pytest.approx(0.5 * math.exp(4))
    assert config.controlled(1.0, 33.0) == pytest.approx(1 + 0.05 * math.log(1.1))
    assert config.controlled(1.0, 60.0) == pytest.approx(1.005)
    assert config.controlled(1.0, 15.0) == pytest.approx(0.995)
    assert config.controlled(1.0, 30.0) == 1.0 and TrainConfig(1).controlled(0.0, 9.0) == 0.0
