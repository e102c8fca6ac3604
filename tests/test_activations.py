from itertools import islice

import pytest
import torch

from sae_lib.activations import ActivationStream, Harvest, Skip, StreamConfig
from sae_lib.errors import StudyError
from sae_lib.transformer import TransformerConfig, build, mlp_activations

TINY = TransformerConfig(n_tokens=1, d_vocab=50, n_ctx=16, d_model=16, n_heads=2, d_mlp=24)


@pytest.fixture
def stream():
    # No token comes twice at one position, so that all rows differ.
    contexts = (1 + (torch.arange(24)[:, None] + torch.arange(16)) % 49).int()
    contexts[:, 5] = ActivationStream.END_OF_TEXT
    config = StreamConfig(tokens_per_context=15, chunk_contexts=8)
    return ActivationStream(build(TINY), contexts, 20, config)


def rows(batches):
    return {tuple(row) for row in torch.cat(batches).float().tolist()}


def test_batches_are_deterministic_and_start_anywhere(stream):
    first = list(islice(stream.batches(), 20))
    assert all(torch.equal(a, b) for a, b in zip(first, islice(stream.batches(), 20), strict=True))
    for start in (1, 6, 7, 19):
        assert torch.equal(next(stream.batches(start)), first[start])


def test_a_pass_has_no_repeated_row_and_no_end_of_text(stream):
    n = stream.activations_per_pass // 20
    one_pass = list(islice(stream.batches(), n))
    acts = mlp_activations(stream.model, stream.contexts.long(), None, stream.parameters).float()
    allowed = rows([acts[:, [i for i in range(16) if i != 5]].flatten(0, 1)])
    assert n == 18
    assert len(rows(one_pass)) == 360
    assert rows(one_pass) <= allowed


def test_what_is_skipped():
    tokens, acts = torch.tensor([[7, 2, 0, 3], [1, 7, 4, 4]]), torch.ones(2, 4, 2)
    acts[1, 3] = torch.tensor([3.0, 4.0])
    assert Skip().mask(tokens, acts).nonzero().tolist() == [[0, 2]]
    assert Skip((7, 3), first=1).mask(tokens).nonzero().tolist() == [[0, 0], [0, 3], [1, 0], [1, 1]]
    assert Skip((), above=4.9).mask(tokens, acts).nonzero().tolist() == [[1, 3]]
    assert not Skip((), above=4.9).mask(tokens).any() and not Skip((), above=5.1).mask(tokens, acts).any()
    edited = Skip((7,), above=4.9).sparing(tokens, torch.zeros_like)(acts)
    assert (edited != 0).any(-1).nonzero().tolist() == [[0, 0], [1, 1], [1, 3]]


def test_a_pass_has_nothing_that_is_to_be_skipped(stream):
    """By token, place and length; with the limit no activation is in the way, rows are the same as without one."""
    lengths = mlp_activations(stream.model, stream.contexts.long()).norm(dim=-1)
    limit = lengths.quantile(0.9).item()
    config = StreamConfig(tokens_per_context=6, chunk_contexts=8)
    skip = Skip((0,), first=2, above=limit)
    given = ActivationStream(stream.model, stream.contexts, 16, config, skip=skip)
    batches = list(islice(given.batches(), given.activations_per_pass // 16))
    acts = mlp_activations(stream.model, stream.contexts.long(), None, given.parameters).float()
    assert rows(batches) <= rows([acts[~skip.mask(stream.contexts, acts)]])
    far, none = (ActivationStream(stream.model, stream.contexts, 16, config, skip=Skip(above=limit))
                 for limit in (1e9, float("inf")))
    assert torch.equal(next(far.batches()), next(none.batches()))


def test_a_batch_mixes_contexts(stream):
    acts = mlp_activations(stream.model, stream.contexts.long(), None, stream.parameters).float()
    context_of = {tuple(row): i for i, context in enumerate(acts.tolist()) for row in context}
    batch = next(stream.batches())
    assert len({context_of[tuple(row)] for row in batch.float().tolist()}) > 4


def test_samples_depend_on_purpose_and_step(stream):
    a, again = stream.sample(100), stream.sample(100)
    assert a.shape == (100, 24)
    assert a.dtype == torch.float32
    assert torch.equal(a, again)
    assert not torch.equal(a, stream.sample(100, "resample", 1))


def test_too_few_contexts_are_refused():
    with pytest.raises(StudyError, match="fewer activations than one batch"):
        ActivationStream(build(TINY), torch.ones(2, 16, dtype=torch.int32), 64, StreamConfig())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_gives_the_same_batches_and_is_not_waited_for_within_a_chunk(stream):
    on_gpu = ActivationStream(stream.model, stream.contexts, 20, stream.config, device="cuda")
    batches = on_gpu.batches()
    found = [next(batches)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found += list(islice(batches, on_gpu.batches_per_chunk - 1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for batch, expected in zip(found, stream.batches(), strict=False):
        torch.testing.assert_close(batch.float().cpu(), expected.float(), rtol=0.05, atol=0.02)
    torch.testing.assert_close(on_gpu.sample(50), stream.sample(50), rtol=0.05, atol=0.02)


def test_a_harvest_keeps_the_first_batches_of_a_stream_and_repeats_them(stream):
    harvest = Harvest.of(stream, 3 * stream.batch_size + 5)
    for kept, expected in zip(islice(harvest.batches(), 3), stream.batches(), strict=False):
        assert torch.equal(kept, expected)
    assert torch.equal(next(harvest.batches(4)), next(stream.batches(1)))
    again = harvest.reseeded(1)
    assert torch.equal(next(again.batches(2)), next(harvest.batches(2)))
    a, b = (source.sample(40, "birth") for source in (harvest, again))
    assert a.dtype == torch.float32 and not torch.equal(a, b) and torch.equal(a, harvest.sample(40, "birth"))
    assert len(harvest.sample(10 ** 6)) == len(harvest.rows)  # at most all, none twice


def test_a_harvest_of_less_than_a_batch_is_refused():
    with pytest.raises(StudyError, match="fewer than one batch"):
        Harvest(torch.zeros(9, 4), 10)
