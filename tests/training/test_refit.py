"""Of a curve, the main looks at the proxy's summaries, where that is better on held-out pairs."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from contract_tools import TINY, fresh, train
from sbi.utils import BoxUniform

from sbi_jeffreys import LikelihoodProxy, MainBuilder, RegressionExpert
from sbi_jeffreys.networks.fitting import FitConfig
from sbi_jeffreys.networks.standardised import StandardisedInput
from sbi_jeffreys.proxies import compression
from sbi_jeffreys.training import preparation, refit
from sbi_jeffreys.training.held_out import HeldOut
from sbi_jeffreys.training.pool import Pool
from sbi_jeffreys.training.refit import summarise

PRIOR = BoxUniform(-torch.ones(2), torch.ones(2))
TIMES = torch.linspace(0, 1, 50)
SHAPES = torch.stack([TIMES, (6 * TIMES).sin()])
FIT = FitConfig(max_epochs=30)
OPTIONS = replace(TINY, experts=None, proxy_fit=FIT, num_steps=12, steps_per_epoch=4)


def curves(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    theta = PRIOR.sample((num,))
    return theta, theta @ SHAPES + 0.3 * torch.randn(num, 50)


@pytest.fixture
def curve(monkeypatch):
    """A main of random weights, a fitted proxy, its pool, and held-out pairs."""
    monkeypatch.setattr(compression, "_EXPERTS", (RegressionExpert(1),))
    monkeypatch.setattr(refit, "_DRAWS", 4_000)
    torch.manual_seed(0)
    theta, x = curves(440)
    train_indices, val = torch.arange(340), torch.arange(340, 440)
    proxy = LikelihoodProxy(PRIOR, config=FIT, num_folds=1)
    proxy.fit(theta, x, train_indices, val)
    main = MainBuilder("maf", hidden_features=16).with_prior(PRIOR)(theta[:340], x[:340]).eval()
    drawn = proxy.sample_joint(4_000)
    held_out = HeldOut(theta[val], x[val], torch.ones(100))
    return main, proxy, Pool(*drawn, torch.ones(len(drawn[1]))), held_out


def summarises(main) -> bool:
    parts = [part for part in main.modules() if isinstance(part, StandardisedInput)]
    return bool(parts[0].summarises)


def test_a_main_of_summaries_is_fitted_to_the_proxys_draws(curve):
    main, proxy, pool, held_out = curve
    before = held_out.mean(held_out.main_losses(main))
    assert summarise(proxy, main, pool, held_out, before)
    assert summarises(main)
    assert not main.training
    after = held_out.mean(held_out.main_losses(main))
    # The exact posterior's loss; a standard normal's entropy is 1.42 per parameter.
    precision = torch.linalg.slogdet(SHAPES @ SHAPES.T / 0.3**2)[1]
    exact = 1 + torch.log(torch.tensor(2 * torch.pi)) - 0.5 * precision
    assert after < before - 0.5
    assert after < float(exact) + 0.7


def test_a_main_that_is_worse_for_it_is_left_as_it_was(curve):
    main, proxy, pool, held_out = curve
    plain = deepcopy(main.state_dict())
    assert not summarise(proxy, main, pool, held_out, npe_nll=-100.0)
    assert not summarises(main)
    for name, value in main.state_dict().items():
        assert torch.equal(value, plain[name])


def test_an_interrupt_leaves_plain_npe(monkeypatch):
    monkeypatch.setattr(compression, "_EXPERTS", (RegressionExpert(1),))

    def interrupted(main, *arguments):
        assert summarises(main)
        raise KeyboardInterrupt

    monkeypatch.setattr(refit, "fit_to_pool", interrupted)
    torch.manual_seed(0)
    inference = fresh("maf", OPTIONS, prior=PRIOR).append_simulations(*curves(400))
    with pytest.raises(KeyboardInterrupt):
        train(inference, 30)
    for name, value in inference._neural_net.state_dict().items():
        assert torch.equal(value, inference._best_model_state_dict[name])


def test_later_rounds_grouped_pools_and_other_inputs_are_left_alone(curve, monkeypatch):
    main, proxy, pool, held_out = curve
    monkeypatch.setattr(refit, "fit_to_pool", None)  # would raise
    held_out.atomic = True
    assert not summarise(proxy, main, pool, held_out, 100.0)
    held_out.atomic = False
    grouped = Pool(pool.theta[:20].reshape(2, 10, 2), pool.x[:10], torch.ones(10))
    assert not summarise(proxy, main, grouped, held_out, 100.0)
    theta, x = curves(50)
    embedded = MainBuilder("maf", embedding_net=torch.nn.Linear(50, 4))(theta, x)
    assert not summarise(proxy, embedded, pool, held_out, 100.0)
    other = MainBuilder("maf").with_prior(PRIOR)(theta, x.exp())  # another transform of x
    assert not summarise(proxy, other, pool, held_out, 100.0)


def test_the_stage_and_later_rounds_start_from_it(monkeypatch, tmp_path):
    monkeypatch.setattr(compression, "_EXPERTS", (RegressionExpert(1),))
    monkeypatch.setattr(refit, "_DRAWS", 2_000)
    seen = []
    original = preparation.summarise

    def summarise_here(*arguments):
        seen.append(original(*arguments))
        return seen[-1]

    monkeypatch.setattr(preparation, "summarise", summarise_here)
    torch.manual_seed(0)
    longer = replace(OPTIONS, num_steps=80, steps_per_epoch=10)  # or plain NPE may be kept
    inference = fresh("maf", longer, prior=PRIOR).append_simulations(*curves(400))
    train(inference, 30)
    assert seen == [True]
    assert "linear summaries" in inference.proxy.remark
    symmetric = inference._training.symmetric
    assert float(symmetric.start[next(n for n in symmetric.start if "summarises" in n)]) == 1.0
    # Weights fit into a main that is built anew, and later rounds go on with it.
    theta, x = curves(40)
    main = inference._neural_net
    inference.save(tmp_path / "trainer.pt")
    other = fresh("maf", longer, prior=PRIOR).load_weights(tmp_path / "trainer.pt")
    expected = main.log_prob(theta.unsqueeze(0), x)
    assert torch.equal(other._neural_net.log_prob(theta.unsqueeze(0), x), expected)
    proposal = inference.build_posterior().set_default_x(x[:1])
    theta = proposal.sample((40,), show_progress_bars=False)
    x = theta @ SHAPES + 0.3 * torch.randn(40, 50)
    assert summarises(train(inference.append_simulations(theta, x, proposal=proposal)))
