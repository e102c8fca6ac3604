import math

import pytest
import torch
from texts import scrambled

from sae_lib.errors import StudyError
from sae_lib.pretrain import learning_rate, loss_gradients, train_transformer, unembed_gradients
from sae_lib.seeds import generator
from sae_lib.transformer import (
    TransformerConfig,
    build,
    load_transformer,
    mlp_activations,
    ngram_losses,
    parameters,
    sample,
    save_transformer,
    shuffle_weights,
    token_losses,
)

TINY = TransformerConfig(n_tokens=32 * 4 * 12, d_vocab=50, n_ctx=32, d_model=16, n_heads=2, d_mlp=24, batch_contexts=4)


def contexts(n=40, config=TINY):
    """Text that can be learned: each token is followed by its successor."""
    start = torch.randint(0, config.d_vocab, (n, 1), generator=generator(0, "test-contexts"))
    return ((start + torch.arange(config.n_ctx)) % config.d_vocab).int()


@pytest.mark.parametrize("n_layers", [1, 2])
def test_the_short_forward_pass_equals_the_bridge(n_layers):
    config = TransformerConfig(**{**vars(TINY), "n_layers": n_layers})
    model, tokens = scrambled(config), contexts(3, config).long()
    _, cache = model.run_with_cache(tokens, names_filter=config.hook_name)
    torch.testing.assert_close(mlp_activations(model, tokens), cache[config.hook_name], atol=1e-5, rtol=1e-4)
    expected = model(tokens, return_type="loss")
    torch.testing.assert_close(token_losses(model, tokens, {"clean": None})["clean"].mean(), expected, atol=1e-5, rtol=1e-5)


def test_edits_equal_hooks_on_the_bridge():
    model, tokens = scrambled(TINY), contexts(3).long()
    edit = lambda acts: acts * 0.5 + 1
    with model.hooks(fwd_hooks=[(TINY.hook_name, lambda acts, hook: edit(acts))]):
        expected = model(tokens, return_type="loss")
    losses = token_losses(model, tokens, {"clean": None, "edited": edit})
    torch.testing.assert_close(losses["edited"].mean(), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(losses["clean"], losses["edited"])


def test_kept_positions_are_gathered():
    model, tokens = scrambled(TINY), contexts(2).long()
    keep = torch.tensor([[3, 0], [31, 7]])
    everything = mlp_activations(model, tokens)
    torch.testing.assert_close(mlp_activations(model, tokens, keep), torch.stack([everything[0, [3, 0]], everything[1, [31, 7]]]))


def test_cross_entropy_and_its_gradients_equal_autograd():
    rng = generator(0, "test-cross-entropy")
    x, weight = (torch.randn(n, 8, generator=rng).requires_grad_() for n in (1500, 50))
    targets = torch.randint(0, 50, (1500,), generator=rng)
    loss, *ours = unembed_gradients(x.detach(), weight.detach(), targets)
    expected = torch.nn.functional.cross_entropy(x @ weight.T, targets, reduction="sum")
    theirs = torch.autograd.grad(expected, (x, weight))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(tuple(ours), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n_layers", [1, 2])
def test_loss_and_gradients_equal_the_bridge_in_float32_and_nearly_so_in_bfloat16(n_layers):
    config = TransformerConfig(**{**vars(TINY), "n_layers": n_layers})
    model, tokens = scrambled(config).requires_grad_(True), contexts(11, config).long()  # two micro-batches, unequal
    expected = model(tokens, return_type="loss")
    theirs = torch.autograd.grad(expected, list(parameters(model).values()))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        loss, grads = loss_gradients(parameters(model), tokens, 2, n_layers, dtype)
        assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
        ours = torch.cat([grads[name].flatten() for name in parameters(model)])
        exact = torch.cat([grad.flatten() for grad in theirs])
        assert (ours - exact).norm() <= 3 * tolerance * exact.norm(), dtype


def test_gradients_do_not_depend_on_the_number_of_threads():
    model, tokens, threads = scrambled(TINY), contexts(16).long(), torch.get_num_threads()
    found = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(loss_gradients(parameters(model), tokens, 2, 1, torch.bfloat16))
    finally:
        torch.set_num_threads(threads)
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


def test_training_learns():
    config = TransformerConfig(**{**vars(TINY), "n_tokens": 32 * 4 * 300})
    text = contexts()
    model, log = train_transformer(text, config)
    assert log.step.tolist() == list(range(50, 301, 50))
    assert token_losses(model, text.long(), {"clean": None})["clean"].mean() < 0.3 < math.log(50) * 0.5


def test_resumed_training_equals_uninterrupted_bit_for_bit(tmp_path):
    text = contexts()
    whole, whole_log = train_transformer(text, TINY)
    train_transformer(text, TINY, tmp_path / "a.safetensors", stop_after=5)
    resumed, resumed_log = train_transformer(text, TINY, tmp_path / "a.safetensors")
    for name, value in parameters(whole).items():
        assert torch.equal(value, parameters(resumed)[name]), name
    assert whole_log.loss.tolist() == resumed_log.loss.tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_training_on_a_gpu_goes_on_from_the_processors_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("sae_lib.pretrain.low_precision", lambda _: torch.float32)
    text = contexts()
    _, expected = train_transformer(text, TINY)
    train_transformer(text, TINY, tmp_path / "a.safetensors", stop_after=5)
    model, log = train_transformer(text, TINY, tmp_path / "a.safetensors", device="cuda")
    assert log.loss.iloc[-1] == pytest.approx(expected.loss.iloc[-1], rel=1e-3)
    assert not any(value.is_cuda for value in parameters(model).values())


def test_seeds_differ_and_repeat_without_touching_global_state():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a, again, b = (parameters(build(TransformerConfig(**{**vars(TINY), "seed": s})))["head.weight"] for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a, again)
    assert not torch.equal(a, b)


def test_learning_rate_warms_up_and_decays():
    config = TransformerConfig(n_tokens=32 * 256 * 1000, lr=1.0, warmup=0.1, lr_final=0.2)
    assert learning_rate(config, 0) == pytest.approx(0.01)
    assert learning_rate(config, 99) == pytest.approx(1.0)
    assert learning_rate(config, 550) == pytest.approx(0.6, abs=1e-6)
    assert learning_rate(config, 1000) == pytest.approx(0.2)


def test_a_loss_that_is_not_finite_stops_training_with_a_sentence():
    config = TransformerConfig(**{**vars(TINY), "n_tokens": 32 * 4 * 50, "lr": float("inf")})
    with pytest.raises(StudyError, match="lower its learning rate"):
        train_transformer(contexts(), config)


def test_too_little_text_is_refused():
    with pytest.raises(StudyError, match="fewer than one batch"):
        train_transformer(contexts(3), TINY)


def test_the_random_control_has_the_same_entries_in_another_order():
    model = scrambled(TINY)
    control, again = shuffle_weights(model, TINY, seed=0), shuffle_weights(model, TINY, seed=0)
    for name, value in parameters(model).items():
        shuffled = parameters(control)[name]
        assert torch.equal(value.flatten().sort().values, shuffled.flatten().sort().values)
        assert torch.equal(shuffled, parameters(again)[name])
        assert torch.equal(value, shuffled) == (value.ndim < 2)


def test_ngram_losses_by_hand():
    # Twice "0 1": unigram (2+1)/(4+3), and 0 is always followed by 1.
    losses = ngram_losses(torch.tensor([0, 1, 0, 1]), torch.tensor([[0, 1]]), d_vocab=3)
    assert losses["unigram"] == pytest.approx(-math.log(3 / 7))
    assert losses["bigram"] == pytest.approx(-math.log((2 + 3 * 3 / 7) / (2 + 3)))


def test_samples_repeat_continue_the_prompt_and_fit_the_context():
    model, prompt = scrambled(TINY), torch.tensor([1, 2, 3])
    a, b, c = (sample(model, prompt, 10, seed, n_samples=2) for seed in (0, 0, 1))
    assert a.shape == (2, 13)
    assert a[:, :3].tolist() == [[1, 2, 3]] * 2
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    with pytest.raises(StudyError, match="do not fit"):
        sample(model, prompt, 30, 0)


@pytest.mark.parametrize("n_layers", [1, 2])
@pytest.mark.parametrize("edit", [None, lambda acts: 2 - acts])
def test_samples_equal_a_plain_loop_that_computes_everything_anew(n_layers, edit):
    """The bridge, with the edit hooked in at every position; each token drawn with the same generator."""
    config = TransformerConfig(**{**vars(TINY), "n_layers": n_layers})
    model, prompt, rng = scrambled(config), torch.tensor([1, 2, 3]), generator(4, "sample")
    hooks, tokens = [(config.hook_name, lambda acts, hook: edit(acts))] if edit else [], prompt.repeat(3, 1)
    for _ in range(10):
        last = model.run_with_hooks(tokens, fwd_hooks=hooks)[:, -1]
        tokens = torch.cat([tokens, torch.multinomial((last / 0.7).softmax(-1), 1, generator=rng)], 1)
    assert torch.equal(sample(model, prompt, 10, 4, n_samples=3, temperature=0.7, edit=edit), tokens)


def test_an_edit_changes_what_is_sampled_and_sees_the_last_position_alone():
    model, prompt, seen = scrambled(TINY), torch.tensor([1, 2, 3]), []
    edited = sample(model, prompt, 10, 0, n_samples=2, edit=lambda acts: seen.append(acts.shape) or 5 - acts)
    assert set(seen) == {(2, 1, TINY.d_mlp)}
    assert not torch.equal(edited, sample(model, prompt, 10, 0, n_samples=2))


def test_files_round_trip_and_broken_ones_are_refused(tmp_path):
    model, path = scrambled(TINY), tmp_path / "model.safetensors"
    save_transformer(model, path)
    for name, value in parameters(load_transformer(path, TINY)).items():
        assert torch.equal(value, parameters(model)[name])
    with pytest.raises(StudyError, match="does not hold the weights"):
        load_transformer(path, TransformerConfig(**{**vars(TINY), "d_mlp": 48}))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(StudyError, match="does not hold the weights"):
        load_transformer(path, TINY)
