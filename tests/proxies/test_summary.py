"""A fixed embedding net is the user's summary: the proxy is a likelihood of it."""

import pytest
import torch
from contract_tools import TINY
from sbi.utils import BoxUniform
from torch import Tensor, nn

from sbi_jeffreys import MainBuilder, NPE_Jeffreys, RegressionExpert
from sbi_jeffreys.networks.fitting import FitConfig
from sbi_jeffreys.proxies.summary import SummaryLikelihoodProxy

PRIOR = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))


class Halves(nn.Module):
    """The means of both halves of 500 outputs; has no parameters, as a Fourier transform."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], 2, 250).mean(dim=-1)


def simulate(num: int) -> tuple[Tensor, Tensor]:
    theta = PRIOR.sample((num,))
    return theta, theta.repeat_interleave(250, dim=1) + 3 * torch.randn(num, 500)


def test_its_likelihood_is_that_of_the_summaries():
    torch.manual_seed(0)
    theta, x = simulate(600)
    proxy = SummaryLikelihoodProxy(
        PRIOR, Halves(), (RegressionExpert(1),), FitConfig(), num_folds=1
    )
    proxy.fit(theta, x, torch.arange(500), torch.arange(500, 600))
    std = 3 / 250**0.5
    truth = torch.distributions.Normal(theta, std).log_prob(Halves()(x)).sum(-1)
    missed = truth - proxy.log_factor(theta.unsqueeze(0), x)[0]
    assert abs(float(missed.mean())) < 0.1
    assert float(missed.std()) < 0.2
    assert not proxy.can_sample
    for draw in (lambda: proxy.sample_joint(3), lambda: proxy.sample_given(theta)):
        with pytest.raises(NotImplementedError, match="no draws of x"):
            draw()
    x[3, 7] = torch.nan
    with pytest.raises(ValueError, match="1 of 600 simulations"):
        proxy.fit(theta, x, torch.arange(500), torch.arange(500, 600))


def test_training_uses_it_and_says_so():
    torch.manual_seed(0)
    theta, x = simulate(200)
    builder = MainBuilder("maf", embedding_net=Halves())
    inference = NPE_Jeffreys(
        PRIOR, density_estimator=builder, options=TINY, show_progress_bars=False
    )
    inference.append_simulations(theta, x).train(max_num_epochs=5)
    assert isinstance(inference.proxy, SummaryLikelihoodProxy)
    assert "summaries" in inference.training_report.proxy
    assert inference._training.stage.pool.grouped


def test_our_own_scale_of_x_is_no_net_of_the_users():
    """Counts are transformed by a net with constants; the proxy is a density of x all the same."""
    torch.manual_seed(0)
    theta = PRIOR.sample((200,))
    x = torch.poisson((theta + 3).exp())
    inference = NPE_Jeffreys(PRIOR, options=TINY, show_progress_bars=False)
    main = inference.append_simulations(theta, x).train(max_num_epochs=5)
    assert any(not p.requires_grad for p in main.embedding_net.parameters())
    assert inference.proxy is not None
    assert inference.proxy.can_sample
