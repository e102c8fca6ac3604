"""The memory plan: by hand, against what a training really takes, and what is refused."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae_lib import memory
from sae_lib.distributed import Processes
from sae_lib.errors import StudyError
from sae_lib.memory import MemoryPlan, fitting_plan, memory_plan
from sae_lib.recipe import GatedConfig, MatryoshkaConfig, TrainConfig
from sae_lib.sae import SAEConfig

CONFIG = TrainConfig(n_activations=1, batch_size=8192, precision="float32", resample_inputs=1000)


@pytest.fixture(autouse=True)
def fixed_machine(monkeypatch):
    monkeypatch.setattr(memory, "low_precision", lambda _: torch.bfloat16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def test_a_plan_by_hand():
    found = memory_plan(SAEConfig(d_in=10, d_sae=1000), CONFIG, rows_held=5000)
    weights = 4 * (10_000 + 1000 + 10_000 + 10)
    assert found == MemoryPlan(
        weights=weights, moments=2 * weights + 8 * 2000, gradients=weights, copies=0,
        # 2,048 rows of features, errors, their gradients and inputs; 8 micro-batches of counts and gradients.
        dense=4 * 2048 * (1000 + 10 + 1000 + 10) + 4 * 8 * (1000 + 1000 + 10),
        # Errors and inputs; room for 512 pairs a row of row or feature, activation and gradient, as found and in order; ends and
        # beginnings; two threads' pre-activations.
        sparse=4 * 2048 * 20 + 24 * 2048 * 512 + 8 * 8 * (257 + 1001) + 4 * 2 * 256 * 1000,
        activations=5000 * (2 * 10 + 24) + 8192 * 2 * 10,
        resampling=1000 * 10 * (2 + 2 + 4 + 4) + 1024 * 1000 * 4 + 3 * 4 * 10_000)
    assert found.total == sum(found)
    # In bfloat16 both matrices are copied, and twice more when resampling; without resampling there are no inputs for it.
    low = memory_plan(SAEConfig(d_in=10, d_sae=1000), replace(CONFIG, precision="bfloat16", resample_at=()), rows_held=5000)
    assert low.copies == 2 * 2 * 10_000 and low.resampling == 2 * 2 * 10_000 + 1024 * 1000 * 2 + 3 * 4 * 10_000
    assert low[:3] == found[:3]


def test_later_kinds_take_more():
    sizes = SAEConfig(d_in=10, d_sae=1000)
    shared = {"n_activations": 1, "batch_size": 8192, "precision": "float32", "resample_inputs": 1000}
    standard, found = (memory_plan(sizes, config, rows_held=5000) for config in (
        CONFIG, MatryoshkaConfig(**shared, k_aux=16, inner=(50, 200), resample_at=(0.1,))))
    # Errors of three dictionaries instead of one, and those of dead features with room for 16 pairs a row.
    assert found.sparse - standard.sparse == 4 * 2048 * 10 * (2 + 1) + 24 * 2048 * 16 + 8 * 8 * (257 + 1001)
    assert found.dense == 6 * 4 * 2048 * 1000 + 2 * 4 * 10_000
    assert found._replace(sparse=0, dense=0) == standard._replace(sparse=0, dense=0)
    gated = memory_plan(sizes, GatedConfig(**shared), rows_held=5000)
    assert gated.weights == standard.weights + 2 * 4 * 1000


def test_buffers_of_a_wide_dictionary_do_not_grow_with_the_batch():
    wide = SAEConfig(d_in=512, d_sae=131_072)
    plans = [memory_plan(wide, replace(CONFIG, batch_size=batch), rows_held=0) for batch in (2048, 8192)]
    assert plans[0].dense == plans[1].dense == 4 * 256 * 2 * (131_072 + 512) + 4 * (2 * 131_072 + 512)
    assert plans[0].sparse == plans[1].sparse


def test_a_gpu_has_one_way_and_memory_of_its_own():
    wide = SAEConfig(d_in=512, d_sae=131_072)
    plan = memory_plan(wide, CONFIG, 1000, "cuda")
    # 2,048 rows at once of about six arrays, and the matrices as factors.
    assert plan.dense == 6 * 4 * 2048 * 131_072 + 2 * 4 * 512 * 131_072 and plan.sparse == 0
    assert plan[:4] == memory_plan(wide, CONFIG, 1000)[:4]
    # Processes do not share it.
    assert fitting_plan(wide, CONFIG, 1000, Processes(0, 8, 8), plan.total, "cuda") == plan
    with pytest.raises(StudyError, match="the widest that fits"):
        fitting_plan(wide, CONFIG, 1000, available=plan.total - 1, device="cuda")


def test_what_does_not_fit_is_refused_with_the_width_that_does():
    wide, plan = SAEConfig(d_in=512, d_sae=131_072), lambda width: memory_plan(SAEConfig(512, width), CONFIG, 4096)
    assert fitting_plan(wide, CONFIG, 4096, available=plan(131_072).total) == plan(131_072)
    available = plan(131_072).total - 1
    with pytest.raises(StudyError, match=r"of 131,072 features needs \d\.\d\d GiB .*; the widest that fits has 130,560\.$"):
        fitting_plan(wide, CONFIG, 4096, available=available)
    # Two processes on one machine have half of it each.
    with pytest.raises(StudyError, match="the widest that fits has") as caught:
        fitting_plan(wide, CONFIG, 4096, Processes(0, 4, 2), available)
    width = int(str(caught.value).split()[-1].rstrip(".").replace(",", ""))
    assert plan(width).total <= available // 2 < plan(width + 512).total
    with pytest.raises(StudyError, match="end other programs"):
        fitting_plan(wide, CONFIG, 4096, available=1000)


def test_a_plan_is_one_line():
    line = str(memory_plan(SAEConfig(d_in=512, d_sae=4096), CONFIG, rows_held=512_000))
    assert line.startswith("memory of the training: 0.") and "activations 0.5" in line and "\n" not in line


# Two real steps, a dense and a sparse one, with a resampling, at 32 times the width; prints the plan, and their peak of memory
# above what the program took before, when its kernels had been used once.
TRAINING = """
import sys
import torch
from dataclasses import replace
from pathlib import Path
from sae_lib.activations import ActivationStream, StreamConfig
from sae_lib.memory import memory_plan
from sae_lib.sae import SAEConfig
from sae_lib.train import TrainConfig, train_sae
from sae_lib.transformer import TransformerConfig, build

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

torch.set_num_threads(1)
contexts = torch.randint(1, 50, (128, 256), generator=torch.Generator().manual_seed(0)).int()
model = build(TransformerConfig(n_tokens=1, d_vocab=50, n_ctx=256, d_model=32, n_heads=2, d_mlp=512))
stream = ActivationStream(model, contexts, 2048, StreamConfig(chunk_contexts=64))
config = TrainConfig(n_activations=2 * 2048, batch_size=2048, resample_at=(1.0,), resample_inputs=4096, birth_density=0.005)
train_sae(stream, SAEConfig(512, 512), config)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
train_sae(stream, SAEConfig(512, 16_384), config)
print(memory_plan(SAEConfig(512, 16_384), config, stream.rows_held).total, status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not tell the peak of a process's memory")
def test_the_plan_is_what_a_wide_training_takes():
    done = subprocess.run([sys.executable, "-c", TRAINING], text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    planned, taken = map(int, done.stdout.split())
    assert planned == pytest.approx(taken, rel=0.25)
