"""Kernel regressions: against truth, against brute-force leave-one-out, and in nets around them."""

import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import MultivariateNormal

from sbi_jeffreys import FlowExpert, RegressionExpert
from sbi_jeffreys.networks.fitting import FitConfig
from sbi_jeffreys.proxies.experts import flow
from sbi_jeffreys.proxies.experts import kernel as _kernel
from sbi_jeffreys.proxies.experts.fit import fit_experts
from sbi_jeffreys.proxies.experts.gaussian import GaussianRegression
from sbi_jeffreys.proxies.experts.kernel import KernelRegression

NOISE = torch.tensor([[0.2, 0.0], [0.1, 0.1]])  # Cholesky factor


def mean(z: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.sin(2 * z[:, 0]) + z[:, 1], torch.exp(0.5 * z[:, 1])], dim=1)


def smooth(num: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = 4 * torch.rand(num, 2, generator=generator) - 2
    return z, mean(z) + torch.randn(num, 2, generator=generator) @ NOISE.T


def test_a_smooth_mean_is_found_where_a_polynomial_fails():
    z, y = smooth(500)
    nets = KernelRegression(2, 2).fit(z, y), GaussianRegression(2, 2, 2).fit(z, y)
    leave_one_out = [float(net.leave_one_out_log_prob(y, z).mean()) for net in nets]
    z, y = smooth(4000, seed=1)
    exact = float(MultivariateNormal(mean(z), scale_tril=NOISE).log_prob(y).mean())
    kernel, polynomial = (exact + float(net.loss(y, z).mean()) for net in nets)
    assert -0.02 < kernel < 0.15  # about 40 effective parameters per output for 500 pairs
    assert polynomial > 1.0
    for value, found in zip(leave_one_out, (kernel, polynomial)):
        assert value == pytest.approx(exact - found, abs=0.3)


def test_its_draws_have_its_mean_and_covariance():
    torch.manual_seed(0)
    net = KernelRegression(2, 2).fit(*smooth(500))
    z = torch.tensor([[0.5, -1.0]])
    draws = net.sample(torch.Size((20_000,)), z)[:, 0]
    covariance = net.cholesky @ net.cholesky.T
    torch.testing.assert_close(torch.cov(draws.T), covariance, atol=3e-3, rtol=0)
    torch.testing.assert_close(draws.mean(0), mean(z)[0], atol=0.15, rtol=0)
    torch.testing.assert_close(covariance, NOISE @ NOISE.T, atol=0.015, rtol=0)


def test_leave_one_out_residuals_are_those_of_fits_without_the_pair(monkeypatch):
    monkeypatch.setattr(_kernel, "_KERNEL_RIDGES", torch.tensor([0.1], dtype=torch.float64))
    torch.manual_seed(0)
    points, target = torch.randn(30, 2).double(), torch.randn(30, 3).double()
    gram = torch.exp(-0.5 * torch.cdist(points, points) ** 2)
    values, vectors = torch.linalg.eigh(gram)
    found, ridges = _kernel._leave_one_out_residuals(values, vectors, target)
    assert ridges.tolist() == [0.1] * 3
    for i in (0, 13, 29):
        rest = [j for j in range(30) if j != i]
        weights = torch.linalg.solve(gram[rest][:, rest] + 0.1 * torch.eye(29), target[rest])
        torch.testing.assert_close(found[i], target[i] - gram[i, rest] @ weights)


@pytest.mark.parametrize("kernel", [True, False])
def test_leave_one_out_residuals_look_like_those_to_come(kernel):
    """Fifty pairs in six dimensions: residuals of the fit itself are much smaller."""
    torch.manual_seed(0)
    z, y = torch.randn(50, 6), torch.randn(50, 3)
    net = (KernelRegression(6, 3) if kernel else GaussianRegression(6, 3, 2)).fit(z, y + z[:, :3])
    leave_one_out = net.whiten(y + z[:, :3], z, net.leave_one_out)
    assert float(leave_one_out.pow(2).mean()) == pytest.approx(1, abs=0.3)  # 150 squares: 0.115
    z, y = torch.randn(2000, 6), torch.randn(2000, 3)
    new = net.whiten(y + z[:, :3], z)
    assert float(new.pow(2).mean()) == pytest.approx(1, abs=0.3)


def test_each_output_has_its_own_ridge():
    """One output without noise, one of noise alone: a shared ridge would spoil one of them."""
    z, _ = smooth(300)
    torch.manual_seed(0)
    y = torch.stack([torch.sin(2 * z[:, 0]), torch.randn(300)], dim=1)
    net = KernelRegression(2, 2).fit(z, y)
    z, _ = smooth(1000, seed=1)
    found = net.mean(z)
    assert float((found[:, 0] - torch.sin(2 * z[:, 0])).pow(2).mean()) < 1e-3
    assert float(found[:, 1].pow(2).mean()) < 0.1


def test_many_pairs_are_thinned_and_the_others_predicted(monkeypatch):
    monkeypatch.setattr(_kernel, "_MOST", 60)
    torch.manual_seed(0)
    z, y = smooth(200)
    net = KernelRegression(2, 2).fit(z, y)
    assert net.points.shape == (60, 2)
    same = (net.leave_one_out - net.mean(z)).abs().max(dim=1).values < 1e-6
    assert int(same.sum()) == 140
    assert float(net.whiten(y, z, net.leave_one_out).pow(2).mean()) == pytest.approx(1, abs=0.5)


def test_gradients_reach_theta_also_at_the_points_of_the_fit():
    z, y = smooth(100)
    net = KernelRegression(2, 2).fit(z, y)
    z = z[:5].requires_grad_()
    net.log_prob(y[:5], z).sum().backward()
    assert z.grad is not None
    step = torch.tensor([[1e-2, 0.0]])
    with torch.no_grad():
        slope = (net.log_prob(y[:5], z + step) - net.log_prob(y[:5], z - step)) / 2e-2
    torch.testing.assert_close(z.grad[:, 0], slope, rtol=0.05, atol=0.1)


def test_a_net_takes_the_better_regression_and_trains_on_leave_one_out_residuals(monkeypatch):
    seen = []
    original = flow.FitTask

    def spy(net, batch, *rest):
        rows = train[:50]
        seen.append((rows, batch(rows, True)[0]))
        return original(net, batch, *rest)

    z, x = smooth(200)
    train = torch.arange(20, 200)
    specs = (FlowExpert("maf", num_transforms=1, around_regression=True),)
    monkeypatch.setattr(flow, "FitTask", spy)
    (expert,) = fit_experts(specs, FitConfig(max_epochs=1), z, x, train, torch.arange(20))
    monkeypatch.undo()
    regression = expert.net.regression
    assert isinstance(regression, KernelRegression)
    ((rows, residuals),) = seen
    y = expert.transform(x[rows])
    unseen = regression.whiten(y, z[rows], regression.leave_one_out[: len(rows)])
    torch.testing.assert_close(residuals, unseen)
    assert float((residuals - regression.whiten(y, z[rows])).abs().max()) > 1e-3
    # Where the mean is a quadratic, it is the polynomial.
    noise = 0.1 * torch.randn(200, 2, generator=torch.Generator().manual_seed(2))
    x = torch.stack([z[:, 0] * z[:, 1], z[:, 0] ** 2], dim=1) + noise
    (expert,) = fit_experts(specs, FitConfig(max_epochs=1), z, x, train, torch.arange(20))
    assert not isinstance(expert.net.regression, KernelRegression)
    assert math.isfinite(expert.result.held_out)


@pytest.mark.parametrize("seed", range(3))
def test_a_net_takes_the_simplest_regression_where_the_others_are_not_clearly_better(seed):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(300, 2, generator=generator)
    x = z + torch.randn(300, 2, generator=generator)  # a line: what the kernel finds is luck
    regressions = (RegressionExpert(1, kernel=True), RegressionExpert(2), RegressionExpert(1))
    specs = (*regressions, FlowExpert("maf", num_transforms=1, around_regression=True))
    config = FitConfig(max_epochs=1)
    experts = fit_experts(specs, config, z, x, torch.arange(20, 300), torch.arange(20))
    assert experts[-1].net.regression is experts[2].net


def test_a_net_takes_the_best_regression_that_is_fitted_already():
    z, x = smooth(200)
    around = FlowExpert("maf", num_transforms=1, around_regression=True)
    regressions = (RegressionExpert(1), RegressionExpert(1, kernel=True), RegressionExpert(2))
    train, val = torch.arange(20, 200), torch.arange(20)
    experts = fit_experts((*regressions, around), FitConfig(max_epochs=1), z, x, train, val)
    fitted = {expert.spec: expert.net for expert in experts}
    assert fitted[around].regression is fitted[regressions[1]]
    # On another scale of y none is fitted yet.
    plain = replace(around, marginal_transform=False)
    x = x.exp()  # positive and heavy-tailed: modelled on a log scale
    experts = fit_experts((*regressions, plain), FitConfig(max_epochs=1), z, x, train, val)
    assert all(experts[-1].net.regression is not expert.net for expert in experts)


def test_a_kernel_goes_with_a_line():
    with pytest.raises(ValueError, match="kernel=True goes with degree=1, got degree=2"):
        RegressionExpert(2, kernel=True)


def test_no_points_have_no_means():
    """An expert of little weight may get no draws of the proxy's pool: that is no failure."""
    net = KernelRegression(2, 2).fit(*smooth(50))
    assert net.mean(torch.zeros(0, 2)).shape == (0, 2)
