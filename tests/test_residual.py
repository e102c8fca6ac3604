"""The residual stream: read, edited, gone on from; harvested, tabulated and rebuilt like MLP activations."""

import pytest
import torch
from texts import pretrained

from sae_lib import residual
from sae_lib.activations import ActivationStream, StreamConfig
from sae_lib.errors import StudyError
from sae_lib.evaluate import Text, held_out_pass
from sae_lib.features import activation_table
from sae_lib.sae import SAE, SAEConfig
from sae_lib.transformer import (
    TransformerConfig,
    build,
    load_pretrained,
    load_transformer,
    mlp_activations,
    parameters,
    save_transformer,
    token_losses,
)

CONFIG = TransformerConfig(n_tokens=1, d_vocab=40, n_ctx=16, n_layers=3, d_model=16, n_heads=2, d_mlp=24)


@pytest.fixture(scope="module")
def model():
    return build(CONFIG).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(1, 40, (6, 16), generator=torch.Generator().manual_seed(1))


def test_it_is_what_the_bridge_caches_and_ends_in_its_logits(model, tokens):
    logits, cache = model.run_with_cache(tokens)
    for after in range(4):
        resid = residual.activations(model, tokens, after)
        torch.testing.assert_close(resid, cache[residual.hook_name(model, after)], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(residual.unembed(model, residual.go_on(model, resid, after)), logits, atol=1e-4, rtol=1e-4)
    assert residual.hook_name(model, 3) == "blocks.2.hook_resid_post"
    assert torch.equal(residual.activations(model, tokens, None), mlp_activations(model, tokens))
    assert residual.hook_name(model, None) == CONFIG.hook_name
    assert (residual.width(model, None), residual.width(model, 1)) == (24, 16)


def test_going_on_part_of_the_way_and_then_the_rest(model, tokens):
    half = residual.go_on(model, residual.activations(model, tokens, 0), 0, until=2)
    assert torch.equal(half, residual.activations(model, tokens, 2))
    assert torch.equal(residual.go_on(model, half, 2, until=2), half)


def test_the_last_position_alone(model, tokens):
    for after in range(3):
        resid = residual.activations(model, tokens, after) + after
        torch.testing.assert_close(residual.last_after_next(model, resid, after),
                                   residual.go_on(model, resid, after, until=after + 1)[:, -1], atol=1e-5, rtol=1e-4)
    with pytest.raises(StudyError, match="of a model that has 3"):
        residual.last_after_next(model, resid, 3)


def test_ends_are_where_each_row_ends(model, tokens):
    last = torch.tensor([15, 0, 3, 7, 14, 1])
    for after in range(4):
        resid = residual.activations(model, tokens, after)
        expected = residual.go_on(model, resid, after)[torch.arange(6), last]
        torch.testing.assert_close(residual.ends(model, resid, after, last), expected, atol=1e-5, rtol=1e-4)


def test_kept_positions(model, tokens):
    keep = torch.tensor([[3, 0]] * 6)
    found = residual.activations(model, tokens, 2, keep)
    assert torch.equal(found, residual.activations(model, tokens, 2)[:, [3, 0]])


def test_what_is_expected_next(model, tokens):
    at = torch.tensor([0, 3, 15, 7, 7, 1])
    edits = {"clean": None, "zero": torch.zeros_like}
    found = residual.next_token_log_probabilities(model, tokens, at, edits, 1)
    expected = torch.log_softmax(model(tokens), -1)[torch.arange(6), at]
    torch.testing.assert_close(found["clean"], expected, atol=1e-4, rtol=1e-4)
    assert (found["zero"] - expected).abs().max() > 1e-3
    torch.testing.assert_close(found["zero"].exp().sum(1), torch.ones(6))


def test_an_edit_reaches_later_positions_only(model, tokens):
    def edit(resid):
        edited = resid.clone()
        edited[:, 7] += torch.linspace(0, 3, 16)  # not the same everywhere, which a LayerNorm would take away
        return edited

    found = residual.losses(model, tokens, {"clean": None, "edited": edit}, 1)
    torch.testing.assert_close(found["clean"], token_losses(model, tokens, {"clean": None})["clean"], atol=1e-5, rtol=1e-5)
    changed = (found["edited"] - found["clean"]).abs() > 1e-6
    assert not changed[:, :7].any() and changed[:, 7:].any(1).all()


@pytest.mark.parametrize("after", [-1, 4])
def test_there_are_not_so_many_layers(model, tokens, after):
    with pytest.raises(StudyError, match="of a model that has 3"):
        residual.activations(model, tokens, after)


def test_streams_give_the_rows_of_the_residual_stream(model, tokens):
    stream = ActivationStream(model, tokens.int(), 32, StreamConfig(tokens_per_context=16), after=2)
    assert stream.d_in == 16
    rows = next(stream.batches()).float()
    whole = residual.activations(model, tokens, 2, p=stream.parameters).float().flatten(0, 1)
    assert rows.shape == (32, 16)
    assert ((rows[:, None] - whole).abs().amax(-1).amin(1) < 1e-2).all()


def test_tables_and_held_out_losses(model, tokens):
    table = activation_table(model, tokens, torch.relu, after=1)
    expected = residual.activations(model, tokens, 1).flatten(0, 1).relu()
    torch.testing.assert_close(torch.from_numpy(table.toarray()), expected)

    identity = SAE(SAEConfig(16, 32))
    with torch.no_grad():  # both signs of every number: nothing is lost
        identity.W_enc.copy_(torch.cat([torch.eye(16), -torch.eye(16)], 1))
        identity.W_dec.copy_(identity.W_enc.T)
        identity.b_enc.zero_()
    text = Text(tokens, torch.arange(6)[:, None].expand(6, 16), torch.zeros_like(tokens))
    found = held_out_pass(model, text, identity, after=1)
    torch.testing.assert_close(found.values["dictionary"], found.values["clean"], atol=1e-4, rtol=1e-4)
    assert (found.values["zero"] - found.values["clean"]).abs().max() > 1e-3
    assert found.loss_recovered("zero", seed=0, n_boot=20).value == pytest.approx(1, abs=1e-3)


@pytest.fixture(scope="module", params=["gpt_neox", "gpt2"])
def elsewhere(request, tmp_path_factory):
    """A tiny model of another kind, read from a folder as a downloaded one would be."""
    model, folder = pretrained(request.param, 40, 16, 3), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return load_pretrained(str(folder)), model


def test_models_that_were_trained_elsewhere(elsewhere, tokens):
    model, original = elsewhere
    assert not residual.is_own(model)
    logits = original(tokens).logits
    for after in range(4):
        resid = residual.activations(model, tokens, after)
        assert resid.shape == (6, 16, 16) and residual.width(model, after) == 16
        torch.testing.assert_close(residual.unembed(model, residual.go_on(model, resid, after)), logits, atol=1e-4, rtol=1e-4)
        for until in range(after, 4):
            torch.testing.assert_close(residual.go_on(model, resid, after, until), residual.activations(model, tokens, until),
                                       atol=1e-5, rtol=1e-4)
        if after < 3:
            torch.testing.assert_close(residual.last_after_next(model, resid, after),
                                       residual.activations(model, tokens, after + 1)[:, -1], atol=1e-5, rtol=1e-4)
    losses = residual.losses(model, tokens, {"clean": None, "zero": torch.zeros_like}, 2)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(losses["clean"], expected, atol=1e-4, rtol=1e-4)
    assert (losses["zero"] - losses["clean"]).abs().max() > 1e-3
    stream = ActivationStream(model, tokens.int(), 32, StreamConfig(tokens_per_context=16), after=2)
    assert next(stream.batches()).shape == (32, 16)
    with pytest.raises(StudyError, match="the study's own transformers only"):
        residual.activations(model, tokens, None)


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(StudyError, match="neither a folder with a model nor one that can be downloaded"):
        load_pretrained(str(tmp_path / "nothing"))


def test_half_precision_files_are_half_as_large_and_read_back(model, tmp_path):
    for dtype in (torch.float32, torch.float16):
        save_transformer(model, tmp_path / f"{dtype}.safetensors", dtype)
    size = [(tmp_path / f"{dtype}.safetensors").stat().st_size for dtype in (torch.float32, torch.float16)]
    assert size[1] < 0.6 * size[0]
    read = parameters(load_transformer(tmp_path / "torch.float16.safetensors", CONFIG))
    for name, value in parameters(model).items():
        torch.testing.assert_close(read[name], value, atol=1e-3, rtol=1e-3)
