"""Processes that train together: the batch they share, and the weights and checkpoints of one process alone."""

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from sae_lib import pretrain, train
from sae_lib.activations import HARVEST_CONTEXTS, ActivationStream, StreamConfig
from sae_lib.checkpoint import load_checkpoint
from sae_lib.device_step import DeviceStep
from sae_lib.distributed import ALONE, Processes, joined
from sae_lib.errors import StudyError
from sae_lib.pretrain import train_transformer
from sae_lib.sae import SAEConfig
from sae_lib.step import LossGradient
from sae_lib.train import TrainConfig, train_sae
from sae_lib.transformer import TransformerConfig, build, parameters
from sae_lib.variants import Parameters

needs_gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")

N_CTX, KEPT, BATCH = 16, 15, 256
SAE_CONFIG = SAEConfig(d_in=24, d_sae=64)
# The coefficient silences features early, so that there are dead ones to resample at step 20.
CONFIG = TrainConfig(n_activations=30 * BATCH, batch_size=BATCH, l1_coefficient=12.0, lr=3e-3, resample_at=(2 / 3,),
                     dead_window=0.1, resample_inputs=500, birth_density=0.05, precision="float32", log_every=10,
                     checkpoint_every=10)
# Three micro-batches, the last a short one.
TRANSFORMER = TransformerConfig(n_tokens=20 * 20 * N_CTX, d_vocab=50, n_ctx=N_CTX, d_model=16, n_heads=2, d_mlp=24,
                                batch_contexts=20)


def stream(processes=ALONE, batch_size=BATCH):
    model = build(TransformerConfig(n_tokens=1, d_vocab=50, n_ctx=N_CTX, d_model=16, n_heads=2, d_mlp=24))
    contexts = torch.randint(1, 50, (200, N_CTX), generator=torch.Generator().manual_seed(0)).int()
    # Five runs of the model and a shorter sixth in each of two chunks; 30 steps take chunks of both passes.
    config = StreamConfig(tokens_per_context=KEPT, chunk_contexts=5 * HARVEST_CONTEXTS + 6)
    return ActivationStream(model, contexts, batch_size, config, processes)


# --- sharing batches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 6])
def test_processes_have_the_rows_of_one_alone(count):
    parts = [list(islice(stream(Processes(rank, count)).batches(3), 12)) for rank in range(count)]
    sizes = set()
    for i, whole in enumerate(islice(stream().batches(3), 12)):
        rows = torch.cat([part[i] for part in parts])
        assert sorted(rows.tolist()) == sorted(whole.tolist())
        sizes.add(len(parts[0][i]))
    # A process's part differs from batch to batch, around its share.
    assert len(sizes) > 1 and all(abs(size - BATCH / count) < 60 for size in sizes)


def test_a_process_holds_its_own_rows_only_and_samples_are_the_same_in_all():
    held = [stream(Processes(rank, 4)).rows_held for rank in range(4)]
    assert held == [KEPT * n for n in (32, 16 + 6, 16, 16)]
    assert torch.equal(stream(Processes(2, 4)).sample(100), stream().sample(100))


def test_a_part_may_be_empty():
    p = Parameters(torch.randn(64, 24), torch.randn(64), torch.randn(64, 24), torch.randn(24))
    for sparse in (False, True):
        gradient = LossGradient(p, torch.float32)
        sums = gradient.add(torch.empty(0, 24), 1.0, sparse=sparse)
        assert sums.squared_error == sums.l1 == 0 and sums.fired.tolist() == [0] * 64
        assert not any(grad.any() for grad in gradient.grads)


def test_more_processes_than_contexts_in_a_batch_are_refused():
    with pytest.raises(StudyError, match="A batch of 20 contexts is too small for 21 processes"):
        train_transformer(torch.ones(20, N_CTX, dtype=torch.int32), TRANSFORMER, processes=Processes(0, 21))


def test_more_processes_than_a_chunk_can_feed_are_refused():
    with pytest.raises(StudyError, match="too small for 7 processes; use at most 6"):
        stream(Processes(0, 7))


def test_one_process_alone_exchanges_nothing():
    t = torch.tensor([1.0, 2.0])
    ALONE.sum(t)
    ALONE.same(t)
    tensors, small = ALONE.tensors_from_first(lambda: ({"t": t}, "small"))
    assert tensors["t"] is t and small == "small" and t.tolist() == [1, 2]
    with joined() as processes:
        assert processes == ALONE


# --- training together -----------------------------------------------------------------------------------------------

# What each of two processes does; argv: the folder of the tests, and one to work in.
TOGETHER = """
import sys
import torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from test_distributed import joined, trained, train_and_stop, in_float32, as_one_graph, transformer
folder = Path(sys.argv[2])
in_float32()
with joined() as processes:
    ones = torch.full((2,), 1.0 + processes.rank)
    processes.sum(ones)
    assert ones.tolist() == [3, 3]
    assert processes.from_first(lambda: processes.rank + 5) == 5
    trained(folder / "together.safetensors", processes=processes)
    train_and_stop(folder / "of_two.ckpt", processes=processes)
    trained(folder / "resumed_by_two.safetensors", folder / "of_one.ckpt", processes=processes)
    transformer(folder / "model_together.safetensors", processes=processes)
    transformer(folder / "ignored", folder / "model_of_two.ckpt", processes, stop_after=10)
    transformer(folder / "model_resumed_by_two.safetensors", folder / "model_of_one.ckpt", processes)
    as_one_graph()
    trained(folder / "together_as_on_gpus.safetensors", processes=processes)
"""


def in_float32():
    pretrain.low_precision = lambda _: torch.float32


def as_one_graph():
    """The step that GPUs take."""
    train.HostStep = DeviceStep


def transformer(path, checkpoint=None, processes=ALONE, stop_after=None):
    """The transformer's weights, kept by the first process."""
    text = torch.randint(1, 50, (130, N_CTX), generator=torch.Generator().manual_seed(1)).int()
    model, log = train_transformer(text, TRANSFORMER, checkpoint, stop_after=stop_after, processes=processes)
    if processes.first:
        weights = {name: value.detach() for name, value in parameters(model).items()}
        save_file(weights | {name: torch.tensor(log[name].to_numpy()) for name in log if name == "loss"}, path)
    return load_file(path) if processes.first else None


def train_and_stop(checkpoint, processes=ALONE):
    train_sae(stream(processes), SAE_CONFIG, CONFIG, checkpoint, stop_after=15, processes=processes)


def trained(path, checkpoint=None, processes=ALONE):
    """Weights and what was resampled, kept by the first process."""
    sae, log = train_sae(stream(processes), SAE_CONFIG, CONFIG, checkpoint, processes=processes)
    resampled = torch.tensor(log.resampled.to_numpy())
    if processes.first:
        save_file(sae.state_dict() | {"resampled": resampled, "loss": torch.tensor(log.loss.to_numpy())}, path)
    return load_file(path) if processes.first else None


@needs_gloo
def test_two_processes_train_what_one_does_and_go_on_from_each_others_checkpoints(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(pretrain, "low_precision", lambda _: torch.float32)
    alone = trained(tmp_path / "alone.safetensors")
    train_and_stop(tmp_path / "of_one.ckpt")
    model_alone = transformer(tmp_path / "model_alone.safetensors")
    transformer(tmp_path / "ignored", tmp_path / "model_of_one.ckpt", stop_after=10)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python",
               sys.executable, "-c", TOGETHER, str(Path(__file__).parent), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    # Written by two, and gone on from by one.
    assert load_checkpoint(tmp_path / "of_two.ckpt")[1]["step"] == 15
    trained(tmp_path / "resumed_by_one.safetensors", tmp_path / "of_two.ckpt")
    assert load_checkpoint(tmp_path / "model_of_two.ckpt")[1]["step"] == 10
    transformer(tmp_path / "model_resumed_by_one.safetensors", tmp_path / "model_of_two.ckpt")
    torch.set_num_threads(threads)
    assert alone["resampled"].sum() > 5
    dictionaries, models = ("together", "resumed_by_two", "resumed_by_one", "together_as_on_gpus"), (
        "model_together", "model_resumed_by_two", "model_resumed_by_one")
    for name in (*dictionaries, *models):
        found = load_file(tmp_path / f"{name}.safetensors")
        for key, expected in (alone if name in dictionaries else model_alone).items():
            if key.endswith("attn.k.bias"):
                continue  # attention does not depend on it, so it moves by rounding errors alone
            torch.testing.assert_close(found[key], expected, rtol=1e-5, atol=1e-5, msg=lambda m, w=f"{name} {key}": f"{w}: {m}")
