"""What the tests of sbi's contract share: tiny options, a simulator, a quick training."""

import warnings
from dataclasses import replace

import pytest
import torch
from sbi.utils import BoxUniform

from sbi_jeffreys import EnergyConfig, FlowExpert, JeffreysOptions, NPE_Jeffreys
from sbi_jeffreys.networks.fitting import FitConfig

TINY = JeffreysOptions(
    experts=(FlowExpert("maf", num_transforms=2),),
    proxy_fit=FitConfig(max_epochs=4),
    proxy_folds=1,
    energy=EnergyConfig(hidden_features=10, num_contrasts=4, fit=FitConfig(max_epochs=2)),
    num_steps=4,
    steps_per_epoch=2,
    proxy_draws=60,
    proxy_batch_size=20,
    reverse_batch_size=5,
    min_trust=0.0,
)
PLAIN = replace(TINY, num_steps=0)
PRIOR = BoxUniform(-torch.ones(2), torch.ones(2))
X_O = torch.tensor([[0.3, -0.2]])


def simulator(theta: torch.Tensor) -> torch.Tensor:
    return theta + 0.3 * torch.randn_like(theta)


def simulate(num: int = 60, proposal=PRIOR) -> tuple[torch.Tensor, torch.Tensor]:
    theta = proposal.sample((num,))
    return theta, simulator(theta)


def fresh(estimator="maf", options: JeffreysOptions = TINY, prior=PRIOR, **kwargs) -> NPE_Jeffreys:
    """A trainer without simulations."""
    return NPE_Jeffreys(prior, estimator, show_progress_bars=False, options=options, **kwargs)


def train(inference: NPE_Jeffreys, max_num_epochs: int = 2, **kwargs) -> torch.nn.Module:
    """Train without the warnings that tiny budgets provoke."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return inference.train(max_num_epochs=max_num_epochs, **kwargs)


def trained(estimator="maf", options: JeffreysOptions = TINY, num: int = 60, **kwargs):
    """A trainer after one round."""
    inference = fresh(estimator, options)
    inference.append_simulations(*simulate(num))
    train(inference, **kwargs)
    return inference


def weights(inference: NPE_Jeffreys) -> torch.Tensor:
    """All parameters of the main in one vector."""
    return torch.cat([p.detach().flatten() for p in inference._neural_net.parameters()])


def refused(call, error, *parts: str) -> None:
    """The call raises that error, whose message has all parts, in this order, and a remedy."""
    with pytest.raises(error) as caught:
        call()
    message, place = str(caught.value), 0
    for part in parts:
        assert part in message[place:], f"{part!r} is not in {message!r}"
        place = message.index(part, place)
    assert ";" in message, f"no remedy in {message!r}"
