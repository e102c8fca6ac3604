"""Training: recipe, resampling by hand, exact resume, and what goes wrong."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae_lib.errors import StudyError
from sae_lib.metrics import mmcs
from sae_lib.recipe import l1_at, learning_rate
from sae_lib.sae import SAEConfig
from sae_lib.seeds import generator
from sae_lib.train import BIRTH_NORM, SCALE_SAMPLE, TrainConfig, initial_state, resample, train_sae

pytestmark = pytest.mark.usefixtures("one_thread")


class Toy:
    """Rows made of 3 of `n` known unit directions, plus an offset."""

    def __init__(self, batch_size=256, d_in=24, n=40, fail_at=None):
        self.batch_size, self.fail_at, rng = batch_size, fail_at, generator(0, "toy")
        truth = torch.randn(n, d_in, generator=rng)
        self.truth, self.offset = truth / truth.norm(dim=1, keepdim=True), torch.rand(d_in, generator=rng)

    def rows(self, n, rng):
        code = torch.zeros(n, len(self.truth))
        which = torch.rand(n, len(self.truth), generator=rng).topk(3).indices
        code.scatter_(1, which, 1 + torch.rand(n, 3, generator=rng))
        return code @ self.truth + self.offset

    def batches(self, start_step=0):
        while True:
            if start_step == self.fail_at:
                yield torch.full((self.batch_size, self.truth.shape[1]), float("nan"))
            yield self.rows(self.batch_size, generator(0, "batch", start_step))
            start_step += 1

    def sample(self, n, purpose="sample", step=0):
        return self.rows(n, generator(0, purpose, step))


SAE_CONFIG = SAEConfig(d_in=24, d_sae=64, seed=1)
CONFIG = TrainConfig(n_activations=256 * 200, batch_size=256, l1_coefficient=4.0, lr=3e-3, resample_inputs=2000, seed=1,
                     resample_at=(0.2, 0.4, 0.6), dead_window=0.01, log_every=25, checkpoint_every=20)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def without_time(log):
    return log.drop(columns="seconds")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_finds_the_true_directions(precision):
    toy, config = Toy(), replace(CONFIG, n_activations=256 * 1500, precision=precision, lr_decay=0.3, l1_coefficient=1.0)
    sae, log = train_sae(toy, SAE_CONFIG, config)
    assert mmcs(toy.truth, sae.W_dec) > 0.95
    # The dictionary reads activations as they are: three directions a row, and most of the variance.
    x = toy.sample(4000, "held-out")
    features, x_hat = sae(x)
    assert 1 - (x - x_hat).square().sum() / (x - x.mean(0)).square().sum() > 0.8
    assert 2.5 < (features > 0).sum(1).float().mean() < 8
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    assert log.step.tolist()[-1] == 1500 and log.activations.iloc[-1] == 256 * 1500
    assert log.loss.iloc[-1] == pytest.approx(log.mse.iloc[-1] + log.l1.iloc[-1])
    assert log.loss.iloc[-1] < 0.5 * log.loss.iloc[0]


def test_both_precisions_end_at_the_same_loss():
    losses = [train_sae(Toy(), SAE_CONFIG, replace(CONFIG, precision=p))[1].loss.iloc[-1] for p in ("float32", "bfloat16")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_training_200_steps_is_training_100_stopping_and_training_100_more(tmp_path):
    path = tmp_path / "sae.ckpt"
    whole, log = train_sae(Toy(), SAE_CONFIG, CONFIG)
    train_sae(Toy(), SAE_CONFIG, CONFIG, path, stop_after=100)
    resumed, resumed_log = train_sae(Toy(), SAE_CONFIG, CONFIG, path)
    assert same(whole, resumed)
    assert without_time(log).equals(without_time(resumed_log))
    assert log.resampled.sum() > 0
    # A finished training is not done again.
    again, _ = train_sae(Toy(fail_at=0), SAE_CONFIG, CONFIG, path)
    assert same(whole, again)


def test_training_killed_with_kill_9_goes_on_to_the_same_weights(tmp_path):
    script = """
import os, signal, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_train import CONFIG, SAE_CONFIG, Toy, train_sae

class Killed(Toy):
    def batches(self, start_step=0):
        for i, batch in enumerate(super().batches(start_step)):
            if i == 57:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

train_sae(Killed(), SAE_CONFIG, CONFIG, Path(sys.argv[1]))
"""
    path = tmp_path / "sae.ckpt"
    ended = subprocess.run([sys.executable, "-c", script, str(path), str(Path(__file__).parent)], capture_output=True)
    assert ended.returncode == -9, ended.stderr.decode()
    resumed, _ = train_sae(Toy(), SAE_CONFIG, CONFIG, path)
    assert same(resumed, train_sae(Toy(), SAE_CONFIG, CONFIG)[0])


def test_training_again_gives_the_same_bits_and_another_seed_does_not():
    short = replace(CONFIG, n_activations=256 * 20)
    one, again = (train_sae(Toy(), SAE_CONFIG, short)[0] for _ in range(2))
    assert same(one, again)
    assert not same(one, train_sae(Toy(), replace(SAE_CONFIG, seed=2), short)[0])


class Fixed:
    """Three inputs, of which only the third has a loss worth speaking of."""

    x = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 3.0, 4.0]])

    def batches(self, start_step=0):
        raise AssertionError("resampling takes no batches")

    def sample(self, n, purpose="sample", step=0):
        return self.x[torch.randint(3, (n,), generator=generator(0, purpose, step))]


def resampled_by_hand(birth_density=None):
    sae_config = SAEConfig(d_in=3, d_sae=4)
    config = TrainConfig(n_activations=1000, batch_size=10, l1_coefficient=0.0, resample_inputs=600, dead_window=0.1,
                         birth_density=birth_density)
    state = initial_state(Fixed(), sae_config)
    state.scale, state.step = 2.0, 50
    state.last_fired[:] = torch.tensor([50, 40, 41, 0])  # with a window of 10 the second and fourth are dead
    # Inputs 1 and 2 are rebuilt exactly by the living features 0 and 2.
    state.p.W_dec[:] = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    state.p.W_enc_T[:] = torch.tensor([[1.0, 0.0, 0.0], [7.0, 7.0, 7.0], [0.0, 1.0, 0.0], [7.0, 7.0, 7.0]])
    state.p.b_enc[:] = torch.tensor([0.0, -99.0, 0.0, -99.0])
    state.p.b_dec[:] = torch.tensor([0.0, 0.0 if birth_density is None else 2.0, 0.0])
    for moments in (state.m, state.v):
        for t in moments:
            t.fill_(1.0)
    state.age[:] = 50
    before = [t.clone() for t in state.p]
    return state, before, resample(state, Fixed(), config)


def test_resampling_by_hand():
    state, before, n = resampled_by_hand()
    assert n == 2
    dead, alive = torch.tensor([1, 3]), torch.tensor([0, 2])
    # Input 3 is (0, 6, 8) scaled, of which (0, 0, 8) is not rebuilt: direction (0, 0.6, 0.8).
    direction = torch.tensor([[0.0, 0.6, 0.8]]).expand(2, 3)
    torch.testing.assert_close(state.p.W_dec[dead], direction)
    torch.testing.assert_close(state.p.W_enc_T[dead], 0.2 * 1.0 * direction)  # living encoders have norm 1
    assert state.p.b_enc[dead].tolist() == [0, 0]
    for moments in (state.m, state.v):
        assert not moments.W_dec[dead].any() and not moments.W_enc_T[dead].any() and not moments.b_enc[dead].any()
        assert moments.W_dec[alive].all() and moments.W_enc_T[alive].all() and moments.b_enc[alive].all()
        assert moments.b_dec.all()
    assert state.age.tolist() == [50, 0, 50, 0] and state.last_fired.tolist() == [50, 50, 41, 50]
    for now, then in zip(state.p[:3], before[:3], strict=True):
        assert torch.equal(now[alive], then[alive])
    assert torch.equal(state.p.b_dec, before[3])


def test_resampling_with_a_density_by_hand():
    state, _, _ = resampled_by_hand(birth_density=0.5)
    # (0, 6, 8) - (0, 2, 0) = (0, 4, 8).
    expected = torch.tensor([0.0, 1.0, 2.0]) / 5 ** 0.5
    torch.testing.assert_close(state.p.W_dec[3], expected)
    torch.testing.assert_close(state.p.W_enc_T[3], 0.2 * expected)
    # A third of the inputs are (0, 6, 8), less than half; so the bias is that of the runner-up, (0, 2, 0) or (2, 0, 0).
    runner_up = max(0.2 * (torch.tensor(x) * 2 - state.p.b_dec) @ expected for x in ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0]))
    torch.testing.assert_close(state.p.b_enc[3], -runner_up)


def test_features_born_with_a_density_begin_along_inputs_and_as_rare_as_told():
    toy, p = Toy(), initial_state(Toy(), SAE_CONFIG, birth_density=0.1).p
    scale = initial_state(toy, SAE_CONFIG).scale
    centred = toy.sample(SCALE_SAMPLE, "scale") * scale - p.b_dec
    fired = (centred @ p.W_enc_T.T + p.b_enc > 1e-5).float().mean(0)
    torch.testing.assert_close(fired, torch.full((64,), 0.1), atol=2e-3, rtol=0)
    torch.testing.assert_close(p.W_enc_T, BIRTH_NORM * p.W_dec)
    towards = toy.sample(64, "birth") * scale - p.b_dec
    torch.testing.assert_close(p.W_dec, towards / towards.norm(dim=1, keepdim=True))


def test_inputs_are_drawn_by_their_loss_squared_also_across_chunks(monkeypatch):
    monkeypatch.setattr("sae_lib.train.RESAMPLE_CHUNK", 64)

    class TwoLosses(Fixed):
        # Nothing is rebuilt; losses 1 and 2, so weights 1 and 4.
        x = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0 ** 0.5, 0.0], [1.0, 0.0, 0.0]])

    sae_config, config = SAEConfig(3, 6000), TrainConfig(1000, 10, l1_coefficient=0.0, resample_inputs=6400)
    state = initial_state(TwoLosses(), sae_config)
    state.scale, state.step = 1.0, 50
    state.p.b_dec.zero_()
    state.p.b_enc.fill_(-99.0)
    assert resample(state, TwoLosses(), config) == 6000
    # Two thirds of the inputs weigh 1, one third weighs 4.
    assert (state.p.W_dec[:, 1] > 0.5).float().mean().item() == pytest.approx(4 / 6, abs=0.03)


def test_resampling_happens_at_its_shares_of_the_run():
    toy, config = Toy(), replace(CONFIG, l1_coefficient=30.0, log_every=1000)
    _, log = train_sae(toy, SAE_CONFIG, config)
    # A coefficient that silences everything: all 64 features are dead at 20, 40 and 60 % of 200 steps.
    assert log[log.resampled > 0].step.tolist() == [40, 80, 120]
    assert log.dead.iloc[-1] > 0.5


def test_schedules():
    config = TrainConfig(n_activations=1000, batch_size=10, lr=1.0, lr_warmup=0.1, lr_decay=0.2, lr_final=0.1, l1_warmup=0.05,
                         l1_coefficient=2.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:81] == [1.0] * 72
    assert rates[90] == pytest.approx(0.55) and rates[99] == pytest.approx(0.1 + 0.9 / 20)
    assert [l1_at(config, step) for step in (0, 1, 4, 5, 99)] == pytest.approx([0.4, 0.8, 2.0, 2.0, 2.0])
    constant = TrainConfig(n_activations=1000, batch_size=10, lr=0.5)
    assert {learning_rate(constant, step) for step in range(100)} == {0.5}
    assert {l1_at(constant, step) for step in range(100)} == {5.0}


def test_a_loss_that_is_not_finite_ends_the_training_and_keeps_the_checkpoint(tmp_path):
    path = tmp_path / "sae.ckpt"
    with pytest.raises(StudyError, match=r"at step 58; lower its learning rate \(0.003\).*last checkpoint"):
        train_sae(Toy(fail_at=57), SAE_CONFIG, CONFIG, path)
    rescued, _ = train_sae(Toy(), SAE_CONFIG, CONFIG, path)
    assert same(rescued, train_sae(Toy(), SAE_CONFIG, CONFIG)[0])


def test_a_learning_rate_that_breaks_the_weights_is_noticed():
    with pytest.raises(StudyError, match="no longer a finite number"):
        train_sae(Toy(), SAE_CONFIG, replace(CONFIG, lr=1e30))


def test_a_lower_learning_rate_may_go_on_from_a_checkpoint_but_other_settings_may_not(tmp_path):
    path = tmp_path / "sae.ckpt"
    train_sae(Toy(), SAE_CONFIG, CONFIG, path, stop_after=40)
    train_sae(Toy(), SAE_CONFIG, replace(CONFIG, lr=1e-3), path, stop_after=60)
    with pytest.raises(StudyError, match="other settings"):
        train_sae(Toy(), SAE_CONFIG, replace(CONFIG, l1_coefficient=2.0), path)


@pytest.mark.parametrize("source, config, message", [
    (Toy(), replace(CONFIG, precision="float8"), "no precision 'float8'"),
    (Toy(d_in=25), CONFIG, "width 25"),
    (Toy(batch_size=100), CONFIG, "100 rows"),
])
def test_what_does_not_fit_is_refused(source, config, message):
    with pytest.raises(StudyError, match=message):
        train_sae(source, SAE_CONFIG, config)


def test_activations_that_are_all_zero_are_refused():
    toy = Toy()
    toy.truth, toy.offset = torch.zeros(40, 24), torch.zeros(24)
    with pytest.raises(StudyError, match="nothing to train on"):
        train_sae(toy, SAE_CONFIG, CONFIG)


def test_metadata_says_how_it_was_trained():
    sae, log = train_sae(Toy(), SAE_CONFIG, replace(CONFIG, n_activations=256 * 30))
    assert sae.metadata["training"]["steps"] == 30 and sae.metadata["training"]["l1_coefficient"] == 4.0
    norm = Toy().sample(16384, "scale").norm(dim=1).mean().item()
    assert sae.metadata["training"]["activation_scale"] == pytest.approx(math.sqrt(24) / norm)
    assert sae.metadata["l0"] == log.l0.iloc[-1]
