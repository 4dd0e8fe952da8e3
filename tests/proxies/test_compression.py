"""A signal in white noise is compressed to the directions that depend on θ; other x is not."""

import pytest
import torch
from sbi.utils import BoxUniform
from torch import Tensor

from sbi_jeffreys import LikelihoodProxy, RegressionExpert
from sbi_jeffreys.networks.fitting import FitConfig
from sbi_jeffreys.proxies import compression
from sbi_jeffreys.proxies.compression import fit_compressed
from sbi_jeffreys.proxies.experts import NeuralRegressionExpert
from sbi_jeffreys.proxies.experts.base import ExpertData, scales_of

PRIOR = BoxUniform(-torch.ones(2), torch.ones(2))
TIMES = torch.linspace(0, 1, 60)
SHAPES = torch.stack([TIMES, (6 * TIMES).sin()])
TRAIN, VAL = torch.arange(360), torch.arange(360, 420)


@pytest.fixture(autouse=True)
def few_experts(monkeypatch):
    experts = (RegressionExpert(1), NeuralRegressionExpert(hidden_features=32, num_layers=2))
    monkeypatch.setattr(compression, "_EXPERTS", experts)
    torch.manual_seed(0)


def curves(num: int = 420, noise: float = 0.2) -> tuple[Tensor, Tensor]:
    """x = θ₁ t + θ₂ sin 6t + noise."""
    theta = PRIOR.sample((num,))
    return theta, theta @ SHAPES + noise * torch.randn(num, 60)


def data(theta: Tensor, x: Tensor) -> ExpertData:
    return ExpertData(theta, x, TRAIN, VAL, FitConfig(max_epochs=60), scales_of(x[TRAIN]))


def proxy_of(theta: Tensor, x: Tensor) -> LikelihoodProxy:
    proxy = LikelihoodProxy(PRIOR, config=FitConfig(max_epochs=60), num_folds=1)
    return proxy.fit(theta, x, TRAIN, VAL)


def test_the_two_directions_of_two_shapes_are_found_and_hardly_more():
    found = fit_compressed(data(*curves()))
    assert found is not None
    directions = found[0].summaries.directions * found[0].summaries.scale.unsqueeze(1)
    assert 2 <= directions.shape[1] <= 6
    basis = torch.linalg.qr(found[0].summaries.directions)[0]
    white = (SHAPES / found[0].summaries.scale).T
    left = white - basis @ (basis.T @ white)
    assert float(left.norm() / white.norm()) < 0.1


def test_the_likelihood_is_the_exact_one_up_to_what_a_fit_costs(monkeypatch):
    monkeypatch.setattr(compression, "_EXPERTS", (RegressionExpert(1),))
    theta, x = curves()
    proxy = proxy_of(theta, x)
    assert "linear summaries" in proxy.remark
    assert proxy.can_be_tempered
    # Ratios of likelihoods of θ within the posterior: all that a posterior needs.
    other = theta[VAL] + 0.1 * torch.randn(60, 2)
    pairs = torch.stack([theta[VAL], other])
    ours = proxy.log_factor(pairs, x[VAL])
    exact = -((x[VAL] - pairs @ SHAPES) ** 2).sum(-1) / (2 * 0.2**2)
    slope = ((ours[0] - ours[1]) @ (exact[0] - exact[1])) / (exact[0] - exact[1]).square().sum()
    assert 0.8 < float(slope) < 1.2
    correlation = torch.corrcoef(torch.stack([ours[0] - ours[1], exact[0] - exact[1]]))[0, 1]
    assert float(correlation) > 0.9


def test_draws_have_the_signal_of_their_theta_and_the_noise_of_simulations():
    theta, x = curves()
    drawn, y = proxy_of(theta, x).sample_joint(2_000)
    residual = y - drawn @ SHAPES
    assert y.shape[1] == 60
    assert float(residual.mean(0).abs().max()) < 0.05
    assert abs(float(residual.std()) / 0.2 - 1) < 0.1
    assert float((residual[:, 1:] * residual[:, :-1]).mean()) / 0.2**2 < 0.1  # still white


def test_the_size_of_the_noise_is_a_summary():
    """θ₂ is the logarithm of the noise alone: no direction of x depends on it."""
    theta = PRIOR.sample((420,))
    x = theta[:, :1] * SHAPES[:1] + 0.2 * theta[:, 1:].exp() * torch.randn(420, 60)
    proxy = proxy_of(theta, x)
    assert proxy.compression is not None
    up, down = theta[VAL].clone(), theta[VAL].clone()
    up[:, 1] += 0.5
    down[:, 1] -= 0.5
    value = proxy.log_factor(torch.stack([theta[VAL], up, down]), x[VAL]).mean(1)
    assert value[0] > value[1] + 1
    assert value[0] > value[2] + 1


def test_x_whose_noise_is_correlated_is_not_compressed():
    """A drift that the whole curve shares: what is left of it tells about the summaries' noise."""
    theta, x = curves()
    drift = 3 * torch.randn(420, 3) @ torch.stack([TIMES.sqrt(), TIMES**2, (5 * TIMES).cos()])
    assert fit_compressed(data(theta, x + drift)) is None


def test_two_series_with_noise_levels_of_their_own_are_not_compressed():
    """The size of the rest alone would not tell one level from the other."""
    theta = PRIOR.sample((420,))
    noise = 0.2 * torch.randn(420, 60)
    levels = theta.exp().repeat_interleave(30, dim=1)
    assert fit_compressed(data(theta, theta @ SHAPES + levels * noise)) is None
    assert fit_compressed(data(theta, theta @ SHAPES + levels[:, :1] * noise)) is not None


def test_what_seems_to_have_several_noise_levels_needs_clear_evidence(monkeypatch):
    """Where held-out x do not decide, summaries are for noise that is alike everywhere."""
    monkeypatch.setattr(compression, "paired_gain", lambda theirs, ours: 0.0)
    theta = PRIOR.sample((420,))
    noise = 0.2 * torch.randn(420, 60)
    levels = theta.exp().repeat_interleave(30, dim=1)
    assert fit_compressed(data(theta, theta @ SHAPES + levels * noise)) is None
    assert fit_compressed(data(theta, theta @ SHAPES + noise)) is not None
    monkeypatch.setattr(compression, "paired_gain", lambda theirs, ours: -3.0)
    assert fit_compressed(data(theta, theta @ SHAPES + levels * noise)) is not None


def test_narrow_x_counts_pure_noise_and_folds_are_not_compressed():
    theta, x = curves()
    assert fit_compressed(data(theta, x[:, :30])) is None
    assert fit_compressed(data(theta, (5 * x).round().clamp_min(0))) is None
    assert fit_compressed(data(theta, torch.randn(420, 60))) is None
    few = torch.arange(200), torch.arange(200, 240)
    fit = FitConfig(max_epochs=2)
    assert LikelihoodProxy(PRIOR, config=fit).fit(theta, x, *few).compression is None
    chosen = LikelihoodProxy(PRIOR, (RegressionExpert(1),), fit, 1).fit(theta, x, TRAIN, VAL)
    assert chosen.compression is None


def test_many_parameters_do_not_make_white_noise_look_uneven():
    """61 regressors explain a fifth of the variance of 270 numbers by chance."""
    torch.manual_seed(0)
    assert compression._unevenness(torch.randn(270, 30), torch.randn(270, 100)) < 0.15


def test_nearly_as_many_directions_as_outputs_are_no_compression(monkeypatch):
    """36 outputs that are sums of 16 waves of θ, whatever held-out x say of the two densities."""
    monkeypatch.setattr(compression, "paired_gain", lambda theirs, ours: -3.0)
    theta = PRIOR.sample((420,))
    waves = (theta @ (3 * torch.randn(2, 16)) + torch.arange(16)).sin()
    x = waves @ torch.randn(16, 36) + 0.1 * torch.randn(420, 36)
    _, directions = compression._directions(
        NeuralRegressionExpert().fit(data(theta, x), (), torch.inf).net,
        data(theta, x).scales[0](x),
        data(theta, x),
    )
    assert 12 <= directions.shape[1] < 30
    assert fit_compressed(data(theta, x)) is None
