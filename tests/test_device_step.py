"""The step as one graph: against the processor's step, as a graph without a break, and on a GPU where there is one."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import CONFIG, SAE_CONFIG, Toy, without_time
from test_variants import CONFIGS

from sae_lib import device_step, train
from sae_lib.device_step import DeviceStep
from sae_lib.errors import StudyError
from sae_lib.host_step import HostStep
from sae_lib.state import TrainState
from sae_lib.train import initial_state, train_sae

STEPS = 8
# A window of two steps, so that there are dead features for AuxK.
KINDS = {name: replace(config, precision="float32", dead_window=0.01)
         for name, config in {"standard": CONFIG, **CONFIGS}.items()}


pytestmark = pytest.mark.usefixtures("one_thread")


def begun(config, device="cpu"):
    """A state after two steps, so that nothing in it is zero any more; every fourth feature passes for dead."""
    state = initial_state(Toy(), SAE_CONFIG, 0.1, config.rule)
    take_all(HostStep(state, config), 2)
    state.last_fired[::4] = 0
    assert state.dead(config.steps(config.dead_window))[::4].all()
    return TrainState.of_parts(config.rule, *state.parts(), device)


def take_all(step, n=STEPS):
    batches = Toy().batches(step.state.step)
    for _ in range(n):
        step.take(next(batches), 3e-3)
    step.settle()
    return step.state


def assert_same(found, expected, tolerance):
    """Weights nearly, moments and numbers a little less so, features' counts exactly."""
    tensors, values = expected.parts()
    for name, value in found.parts()[0].items():
        error = (value.cpu().double() - tensors[name].double()).norm()
        assert error <= (1 if name.startswith("p/") else 10) * tolerance * tensors[name].double().norm(), name
    assert torch.equal(found.age.cpu(), expected.age) and torch.equal(found.last_fired.cpu(), expected.last_fired)
    for name in ("step", "l0", "sums", "cut", "control"):
        assert getattr(found, name) == pytest.approx(values[name], rel=10 * tolerance), name


@pytest.mark.parametrize("name", KINDS)
def test_steps_equal_the_processors(name):
    config = KINDS[name]
    expected, found = take_all(HostStep(begun(config), config)), take_all(DeviceStep(begun(config), config))
    assert_same(found, expected, 1e-5)
    if name == "jumprelu":
        assert found.control != 0 and found.p.threshold.max() > 0


@pytest.mark.parametrize("name", ["standard", "batchtopk"])
def test_parts_of_a_batch_add_up(name, monkeypatch):
    config = replace(KINDS[name], batch_size=256)
    whole = take_all(DeviceStep(begun(config), config))
    monkeypatch.setattr(device_step, "FEATURES_AT_ONCE", 100 * 64)  # 100 rows at once; BatchTopK's selection is not cut up
    assert_same(take_all(DeviceStep(begun(config), config)), whole, 1e-5)


def test_numbers_are_known_only_once_settled():
    config = KINDS["standard"]
    step, batches = DeviceStep(begun(config), config), Toy().batches(2)
    before = step.state.l0, list(step.state.sums)
    step.take(next(batches), 3e-3)
    assert (step.state.l0, step.state.sums) == before and step.state.step == 3
    step.settle()
    assert step.state.l0 != before[0] and step.state.sums[3] == before[1][3] + 256
    known = list(step.state.sums)
    step.settle()
    assert step.state.sums == known


@pytest.fixture
def as_one_graph(monkeypatch):
    monkeypatch.setattr(train, "HostStep", DeviceStep)


@pytest.mark.parametrize("name", ["standard", "jumprelu", "batchtopk"])
def test_a_training_goes_on_from_the_processors_checkpoint(name, tmp_path, monkeypatch):
    config = replace(KINDS[name], resample_at=KINDS[name].resample_at and (0.15,), n_activations=256 * 40, log_every=10)
    expected, log = train_sae(Toy(), SAE_CONFIG, config)
    train_sae(Toy(), SAE_CONFIG, config, tmp_path / "sae.ckpt", stop_after=10)
    monkeypatch.setattr(train, "HostStep", DeviceStep)
    train_sae(Toy(), SAE_CONFIG, config, tmp_path / "sae.ckpt", stop_after=25)
    monkeypatch.setattr(train, "HostStep", HostStep)
    found, found_log = train_sae(Toy(), SAE_CONFIG, config, tmp_path / "sae.ckpt")
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm()
    assert without_time(found_log).to_numpy() == pytest.approx(without_time(log).to_numpy(), rel=1e-3)


def test_resumed_training_is_exact(as_one_graph, tmp_path):
    whole, log = train_sae(Toy(), SAE_CONFIG, CONFIG)
    train_sae(Toy(), SAE_CONFIG, CONFIG, tmp_path / "sae.ckpt", stop_after=90)
    resumed, resumed_log = train_sae(Toy(), SAE_CONFIG, CONFIG, tmp_path / "sae.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert without_time(log).equals(without_time(resumed_log)) and log.resampled.sum() > 0


def test_a_loss_that_is_not_finite_is_noticed_before_the_next_checkpoint_and_told_by_its_step(as_one_graph, tmp_path):
    path = tmp_path / "sae.ckpt"
    with pytest.raises(StudyError, match=r"at step 58; lower its learning rate \(0.003\).*last checkpoint"):
        train_sae(Toy(fail_at=57), SAE_CONFIG, CONFIG, path)
    assert train.load_checkpoint(path)[1]["step"] == 40


def test_batches_of_another_size_are_refused(as_one_graph):
    with pytest.raises(StudyError, match="100 rows instead of 256"):
        train_sae(Toy(batch_size=100), SAE_CONFIG, CONFIG)


# --- compiled: in a process of its own, where no shapes are checked in the middle of the graph --------------------------


def run(script):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])}
    done = subprocess.run([sys.executable, "-P", "-c", script], env=environment, text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


# `fullgraph` raises an error wherever the graph would have to be left, which is where the processor would wait for a value.
ONE_GRAPH = """
import torch
from torch._dynamo.utils import counters
from test_device_step import KINDS, DeviceStep, assert_same, begun, take_all
torch.set_num_threads(1)
compiler = lambda f: torch.compile(f, fullgraph=True, dynamic=False, backend="eager")
for name in ("standard", "matryoshka", "jumprelu", "gated"):
    counters.clear()
    config = KINDS[name]
    found = take_all(DeviceStep(begun(config), config, compiler=compiler))
    assert counters["stats"]["unique_graphs"] == 1, (name, counters["stats"])
    assert_same(found, take_all(DeviceStep(begun(config), config)), 1e-6)
"""


def test_the_step_is_one_graph_of_every_kind():
    run(ONE_GRAPH)


ON_A_GPU = """
import torch
from test_device_step import KINDS, STEPS, DeviceStep, HostStep, Toy, assert_same, begun, take_all
for name, config in KINDS.items():
    expected, step = take_all(HostStep(begun(config), config)), DeviceStep(begun(config, "cuda"), config)
    x = [few.cuda() for few, _ in zip(Toy().batches(2), range(STEPS))]
    step.take(x[0], 3e-3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # from here on nothing may wait for the GPU
    for few in x[1:]:
        step.take(few, 3e-3)
    torch.cuda.set_sync_debug_mode("default")
    step.settle()
    assert_same(step.state, expected, 1e-4)
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_takes_the_same_steps_without_being_waited_for():
    run(ON_A_GPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_training_on_a_gpu_ends_where_the_processors_does(tmp_path):
    config = replace(CONFIG, precision="float32", n_activations=256 * 60, resample_at=(0.4,), dead_window=0.2)
    run(f"""
import torch
from dataclasses import replace
from pathlib import Path
from test_train import CONFIG, SAE_CONFIG, Toy, train_sae
config = replace(CONFIG, precision="float32", n_activations=256 * 60, resample_at=(0.4,), dead_window=0.2)
train_sae(Toy(), SAE_CONFIG, config, Path({str(tmp_path / "sae.ckpt")!r}), stop_after=40, device="cuda")
""")
    expected, _ = train_sae(Toy(), SAE_CONFIG, config)
    found, _ = train_sae(Toy(), SAE_CONFIG, config, tmp_path / "sae.ckpt")
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        assert (a - b).norm() <= 1e-2 * b.norm()
