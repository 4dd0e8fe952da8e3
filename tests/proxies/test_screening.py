"""Outputs that do not depend on θ are found and left out, and no others."""

import torch
from sbi.utils import BoxUniform

from sbi_jeffreys import JeffreysOptions, LikelihoodProxy, NPE_Jeffreys, RegressionExpert
from sbi_jeffreys.networks.fitting import FitConfig
from sbi_jeffreys.proxies.screening import informative_outputs
from sbi_jeffreys.training.report import Kept

PRIOR = BoxUniform(-torch.ones(2), torch.ones(2))


def simulate(num: int = 600, wide: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """θ₁ moves output 3, |θ₂| spreads output 7; the others are heavy-tailed noise."""
    theta = PRIOR.sample((num,))
    x = torch.distributions.StudentT(2.0).sample((num, wide))
    x[:, 3] = theta[:, 0] + 0.3 * torch.randn(num)
    x[:, 7] = (0.2 + theta[:, 1].abs()) * torch.randn(num)
    return theta, x


def test_outputs_that_depend_on_theta_are_kept_and_nearly_all_others_are_not():
    for seed in range(5):
        torch.manual_seed(seed)
        kept = informative_outputs(*simulate()).tolist()
        assert 3 in kept
        assert 7 in kept
        assert len(kept) <= 2 + 5  # 58 others at 1 %: six or more once in ten thousand


def test_narrow_x_few_pairs_and_many_weak_dependences_are_left_alone():
    torch.manual_seed(0)
    theta, x = simulate(wide=30)
    assert len(informative_outputs(theta, x)) == 30
    theta, x = simulate(num=11)
    assert len(informative_outputs(theta, x)) == 60
    theta = PRIOR.sample((600,))
    x = 0.12 * theta[:, :1] + torch.randn(600, 60)  # each one weak, together strong
    assert len(informative_outputs(theta, x)) == 60


def test_the_proxy_is_a_density_of_the_informative_outputs_and_draws_all_of_them():
    torch.manual_seed(0)
    theta, x = simulate(900)
    train, val = torch.arange(800), torch.arange(800, 900)
    proxy = LikelihoodProxy(PRIOR, (RegressionExpert(1),), FitConfig(), num_folds=1)
    proxy.fit(theta, x, train, val)
    assert len(proxy.columns) < 10
    assert f"{len(proxy.columns)} of 60 outputs" in proxy.remark
    other = x.clone()
    rest = [column for column in range(60) if column not in proxy.columns.tolist()]
    other[:, rest] = 1e3
    at = theta[:50].unsqueeze(0)
    assert torch.equal(proxy.log_factor(at, x[:50]), proxy.log_factor(at, other[:50]))
    drawn, y = proxy.sample_joint(500)
    assert y.shape == (500, 60)
    # The other outputs of a draw are those of one simulation, together.
    distance = (y[:, None, rest] - x[None, train][:, :, rest]).abs().sum(-1)
    assert float(distance.amin(dim=1).max()) == 0.0
    assert float(torch.corrcoef(torch.stack([drawn[:, 0], y[:, 3]]))[0, 1]) > 0.7


def test_the_main_does_not_see_them_after_the_symmetric_stage_but_plain_npe_does():
    torch.manual_seed(0)
    theta, x = simulate(900)
    options = JeffreysOptions(
        experts=(RegressionExpert(2, mixture=True),), num_steps=60, proxy_draws=2_000, min_trust=0.0
    )
    inference = NPE_Jeffreys(PRIOR, "maf", options=options, show_progress_bars=False)
    main = inference.append_simulations(theta, x).train(max_num_epochs=10)
    assert inference.training_report.kept is not Kept.PLAIN_NPE
    proxy = inference.proxy
    assert isinstance(proxy, LikelihoodProxy)
    other = torch.randn(900, 60)
    other[:, proxy.columns] = x[:, proxy.columns]

    def differs(main) -> bool:
        return not torch.equal(*(main.log_prob(theta.unsqueeze(0), each) for each in (x, other)))

    assert not differs(main)
    plain = NPE_Jeffreys(
        PRIOR, "maf", options=JeffreysOptions(num_steps=0), show_progress_bars=False
    )
    assert differs(plain.append_simulations(theta, x).train(max_num_epochs=3))


def test_constant_and_sparse_outputs_count_as_noise():
    """Columns of ties in one order would all have the same p-value: Fisher's test of those fails.

    With noise in their place it fails once in a thousand, so once in 40 at 2.5 %.
    """
    for kind in ("constant", "sparse"):
        kept_all = 0
        for seed in range(20):
            torch.manual_seed(seed)
            theta, x = simulate(500, wide=62)
            idle = torch.arange(22, 62)
            x[:, idle] = 0.0 if kind == "constant" else (torch.rand(500, 40) < 0.03).float()
            kept = informative_outputs(theta, x)
            assert {3, 7} <= set(kept.tolist())
            kept_all += len(kept) == 62
        assert kept_all <= 1
