import torch

from sae_lib.sae import SAE, SAEConfig
from sae_lib.shrinkage import GAINS, Correction, apply_correction, fit_correction, own_gains


def orthogonal(bias=0.0):
    """Features that read and write one neuron each, the encoder too weakly by half of the second."""
    sae = SAE(SAEConfig(d_in=4, d_sae=4))
    with torch.no_grad():
        sae.W_enc.copy_(torch.diag(torch.tensor([1.0, 0.5, 1.0, 1.0])))
        sae.W_dec.copy_(torch.eye(4))
        sae.b_enc.zero_()
        sae.b_dec.fill_(bias)
    return sae.requires_grad_(False)


def test_a_feature_let_in_at_half_gets_gain_two():
    x = torch.rand(5000, 4)
    correction = fit_correction(orthogonal(), x)
    torch.testing.assert_close(correction.gain, torch.tensor([1.0, 2.0, 1.0, 1.0]), atol=0.05, rtol=0)


def test_a_constant_error_goes_into_the_shift_and_moves_no_feature():
    sae, x = orthogonal(0.0), torch.rand(5000, 4)
    correction = Correction(torch.ones(4), torch.tensor([0.3, 0.0, -0.2, 0.1]))
    corrected = apply_correction(sae, correction)
    torch.testing.assert_close(corrected.encode(x), sae.encode(x))
    torch.testing.assert_close(corrected(x).reconstruction, sae(x).reconstruction + correction.shift)


def test_the_same_features_are_active_and_reconstruct_better():
    sae = SAE(SAEConfig(d_in=16, d_sae=48)).requires_grad_(False)
    sae.b_enc -= 0.2
    x = torch.rand(4000, 16)
    corrected = apply_correction(sae, fit_correction(sae, x))
    before, after = sae(x), corrected(x)
    assert torch.equal(before.features > 0, after.features > 0)
    assert (x - after.reconstruction).square().sum() < (x - before.reconstruction).square().sum()
    torch.testing.assert_close(corrected.W_dec.norm(dim=1), torch.ones(48))


def test_a_feature_that_never_fires_keeps_a_usable_gain():
    sae = orthogonal()
    sae.b_enc[2] = -10
    correction = fit_correction(sae, torch.rand(1000, 4))
    assert correction.gain[2] == 1
    assert ((correction.gain >= GAINS[0]) & (correction.gain <= GAINS[1])).all()


def test_an_l1_penalty_shrinks_an_orthogonal_dictionary_by_half_of_it():
    # The best activation of a lone feature is a - l1 / 2, so its gain is a / (a - l1 / 2).
    sae = orthogonal()
    sae.W_enc[1, 1], l1 = 1.0, 0.4
    sae.b_enc.fill_(-l1 / 2)
    x = torch.diag(torch.tensor([1.0, 0.5, 2.0, 0.1]))
    gains = torch.tensor([1 / 0.8, 0.5 / 0.3, 2 / 1.8, torch.nan])
    torch.testing.assert_close(own_gains(sae, x), gains, equal_nan=True)
    assert own_gains(sae, x, min_active=2).isnan().all()


def test_the_gain_of_one_feature_leaves_the_others_as_they_are():
    sae = orthogonal()
    sae.W_dec[2] = torch.tensor([0.6, 0.0, 0.8, 0.0])  # writes on what the first one has to rebuild as well
    x = torch.rand(500, 4)
    gain = own_gains(sae, x)
    f, reconstruction = sae(x)
    for i in range(4):
        factors = torch.linspace(gain[i] - 0.1, gain[i] + 0.1, 3)
        errors = [(x - reconstruction - (factor - 1) * f[:, i:i + 1] * sae.W_dec[i]).square().sum() for factor in factors]
        assert min(errors) == errors[1]
