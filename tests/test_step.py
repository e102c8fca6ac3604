"""The hand-written step against automatic differentiation in float64 and against torch's own Adam."""

import pytest
import torch

from sae_lib import step
from sae_lib.step import LossGradient, adam_step
from sae_lib.variants import Parameters

D_IN, D_SAE, BATCH, L1, SCALE = 33, 203, 2400, 0.7, 1.7  # nothing a multiple of anything; more than one group


def random_problem(l0=12.0, seed=0):
    """Random non-zero parameters, about `l0` of them active in a row of the data."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, D_IN, generator=rng)
    W_dec = torch.randn(D_SAE, D_IN, generator=rng)
    W_enc_T = torch.randn(D_SAE, D_IN, generator=rng)
    spread = SCALE * D_IN ** 0.5
    b_enc = spread * (torch.distributions.Normal(0, 1).icdf(torch.tensor(l0 / D_SAE)) + 0.1 * torch.randn(D_SAE, generator=rng))
    return x, Parameters(W_enc_T, b_enc, W_dec / W_dec.norm(dim=1, keepdim=True), 0.1 * torch.randn(D_IN, generator=rng))


def autograd(p, x):
    """Gradient of the summed loss, in float64, and the sums of its parts."""
    p = Parameters(*(t.double().requires_grad_() for t in p))
    x = SCALE * x.double()
    f = torch.relu((x - p.b_dec) @ p.W_enc_T.T + p.b_enc)
    error, l1 = (f @ p.W_dec + p.b_dec - x).square().sum(), f.sum()
    (error + L1 * l1).backward()
    return Parameters(*(t.grad for t in p)), error.item(), l1.item(), (f > 0).sum(0)


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_gradient_equals_autograd(dtype, tolerance, sparse):
    x, p = random_problem()
    expected, squared_error, l1, fired = autograd(p, x)
    gradient = LossGradient(p, dtype)
    sums = gradient.add(x, L1, SCALE, sparse)
    for name in Parameters._fields:
        assert relative_error(getattr(gradient.grads, name), getattr(expected, name)) < tolerance, name
    assert sums.squared_error == pytest.approx(squared_error, rel=tolerance)
    assert sums.l1 == pytest.approx(l1, rel=tolerance)
    # Rounding may turn a feature on or off only where it is next to its threshold.
    assert (sums.fired - fired).abs().sum() <= (0 if dtype == torch.float32 else 0.02 * fired.sum())


def test_gradients_add_up_over_batches_and_accept_bfloat16_rows():
    x, p = random_problem()
    x = x.bfloat16()
    whole, parts = LossGradient(p, torch.float32), LossGradient(p, torch.float32)
    whole.add(x, L1, SCALE, sparse=True)
    for rows in (x[:100], x[100:]):
        parts.add(rows, L1, SCALE, sparse=True)
    expected, *_ = autograd(p, x.float())
    for name in Parameters._fields:
        assert relative_error(getattr(whole.grads, name), getattr(expected, name)) < 2e-5
        torch.testing.assert_close(getattr(parts.grads, name), getattr(whole.grads, name), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_does_not_depend_on_the_number_of_threads(monkeypatch, dtype, sparse):
    monkeypatch.setattr("sae_lib.kernels.SMALLEST_SHARE", 100)  # so that threads have something to share
    x, p = random_problem()
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            gradient = LossGradient(p, dtype)
            gradient.add(x, L1, SCALE, sparse)
            found.append(gradient.grads)
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_too_many_active_features_are_done_densely(monkeypatch):
    x, p = random_problem(l0=60)
    monkeypatch.setattr(step, "SPARSE_L0", 30)
    dense, fallen_back = LossGradient(p, torch.float32), LossGradient(p, torch.float32)
    expected = dense.add(x, L1, SCALE)
    found = fallen_back.add(x, L1, SCALE, sparse=True)
    assert torch.equal(found.fired, expected.fired) and found.l1 == pytest.approx(expected.l1)
    for a, b in zip(fallen_back.grads, dense.grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-2)


def test_adam_equals_torch_on_weights_without_a_norm():
    _, p = random_problem()
    theirs = [t.clone().requires_grad_() for t in (p.W_enc_T, p.b_enc, p.b_dec)]
    optimizer = torch.optim.Adam(theirs, lr=0.01, betas=(0.8, 0.95))
    m, v, rng = p.zeros(), p.zeros(), torch.Generator().manual_seed(5)
    for n in range(1, 6):
        grads = Parameters(*(torch.randn(t.shape, generator=rng) for t in p))
        for ours, g in zip(theirs, (grads.W_enc_T, grads.b_enc, grads.b_dec), strict=True):
            ours.grad = g / 4
        optimizer.step()
        assert adam_step(p, grads, m, v, torch.full((D_SAE,), n), n, 0.25, 0.01, (0.8, 0.95))
        assert not any(g.any() for g in grads)
    for ours, other in zip((p.W_enc_T, p.b_enc, p.b_dec), theirs, strict=True):
        torch.testing.assert_close(ours, other.detach(), rtol=1e-5, atol=1e-6)


def test_dictionary_rows_keep_unit_norm_and_only_learn_across_themselves():
    _, p = random_problem()
    before, grads, m, v = p.W_dec.clone(), p.zeros(), p.zeros(), p.zeros()
    grads.W_dec.copy_(torch.randn(D_SAE, D_IN, generator=torch.Generator().manual_seed(6)))
    adam_step(p, grads, m, v, torch.ones(D_SAE, dtype=torch.int64), 1, 1.0, 0.05)
    torch.testing.assert_close(p.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert not torch.allclose(p.W_dec, before, atol=0.01)
    # What reached the moments had no component along the row.
    assert (m.W_dec * before).sum(1).abs().max() < 1e-6
    assert m.W_dec.norm(dim=1).min() > 0.1
    # A gradient along the rows alone leaves them where they are.
    grads, m, v, before = p.zeros(), p.zeros(), p.zeros(), p.W_dec.clone()
    grads.W_dec.copy_(3 * before)
    adam_step(p, grads, m, v, torch.ones(D_SAE, dtype=torch.int64), 1, 1.0, 1e-6)
    torch.testing.assert_close(p.W_dec, before, rtol=0, atol=2e-6)


def test_a_reset_feature_starts_as_a_new_one():
    _, p = random_problem()
    before, grads, m, v = p.W_enc_T.clone(), p.zeros(), p.zeros(), p.zeros()
    grads.W_enc_T.fill_(1e-3)
    age = torch.full((D_SAE,), 1000)
    age[7] = 1
    adam_step(p, grads, m, v, age, 1000, 1.0, 0.01)
    # Adam's first step has the length of the learning rate; with moments at zero but an old age it is 3 times as long.
    torch.testing.assert_close(before[7] - p.W_enc_T[7], torch.full((D_IN,), 0.01), rtol=1e-3, atol=0)
    assert (before[8] - p.W_enc_T[8]).min() > 0.02


def test_strides_that_would_be_ignored_are_refused():
    _, p = random_problem()
    transposed = p._replace(W_enc_T=p.W_enc_T.T.contiguous().T)
    assert torch.equal(transposed.W_enc_T, p.W_enc_T)
    with pytest.raises(ValueError, match="contiguous"):
        adam_step(transposed, p.zeros(), p.zeros(), p.zeros(), torch.ones(D_SAE, dtype=torch.int64), 1, 1.0, 0.01)


@pytest.mark.parametrize("name", Parameters._fields)
def test_weights_that_are_no_longer_finite_are_noticed(name):
    _, p = random_problem()
    grads = p.zeros()
    getattr(grads, name).view(-1)[-1] = float("nan")
    assert not adam_step(p, grads, p.zeros(), p.zeros(), torch.ones(D_SAE, dtype=torch.int64), 1, 1.0, 0.01)
