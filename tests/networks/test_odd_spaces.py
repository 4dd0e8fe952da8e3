"""Priors, parameters and outputs that the transforms do not suit: plain sbi spaces, and a word."""

import copy
import math
import warnings

import pytest
import torch
from contract_tools import PRIOR, TINY, fresh, refused, train
from sbi.neural_nets import posterior_nn
from sbi.utils import BoxUniform, MultipleIndependent, RestrictedPrior, process_prior
from torch.distributions import (
    Bernoulli,
    Dirichlet,
    Distribution,
    Exponential,
    HalfNormal,
    Independent,
    Normal,
    Uniform,
    constraints,
)

from sbi_jeffreys import GivenProxy, JeffreysWarning, MainBuilder, NPE_Jeffreys
from sbi_jeffreys.networks.builders import UnconstrainedDensityEstimator, main_builder
from sbi_jeffreys.networks.prior_space import inside_support
from sbi_jeffreys.networks.transforms import MarginalTransform
from sbi_jeffreys.training.report import ProxyStatus

UNIT = BoxUniform(torch.zeros(2), torch.ones(2))
FAR = torch.tensor([50.0]), torch.tensor([10.0])


def draw(inference: NPE_Jeffreys, x: torch.Tensor) -> torch.Tensor:
    return inference.build_posterior().sample((20,), x=x, show_progress_bars=False)


@pytest.mark.parametrize("kind", ["clamped", "grid", "one"])
def test_parameters_on_the_edge_are_modelled_as_they_are(kind):
    torch.manual_seed(0)
    theta = torch.rand(300, 2)
    if kind == "clamped":
        theta = (1.2 * theta - 0.1).clamp(0, 1)
    if kind == "grid":
        theta = torch.cartesian_prod(*[torch.linspace(0, 1, 17)] * 2)
    if kind == "one":
        theta[7, 1] = 1.0
    x = theta + 0.15 * torch.randn_like(theta)
    inference = fresh(prior=UNIT).append_simulations(theta, x)
    with pytest.warns(JeffreysWarning, match="lie on the edge of the prior's support"):
        inference.train(max_num_epochs=2)
    assert not isinstance(inference._neural_net, UnconstrainedDensityEstimator)
    assert draw(inference, x[:1]).shape == (20, 2)
    assert inference.training_report.proxy_status is ProxyStatus.USED


def test_the_upper_bound_of_a_box_has_its_density():
    """torch's Uniform has none there, though its support has; one such pair refused a proxy."""
    proxy = GivenProxy(UNIT, lambda theta, x: torch.zeros(len(theta)))
    theta = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.5, 1.0], [0.5, 0.5], [0.5, 1.001]])
    assert proxy.log_prior(theta).tolist() == [0.0] * 4 + [-math.inf]
    assert proxy.log_prior(theta.requires_grad_()).tolist() == [0.0] * 4 + [-math.inf]


def test_later_rounds_with_a_parameter_on_the_edge():
    """The network is the first round's, so no word of another; no density is a clear error."""
    torch.manual_seed(0)
    prior = UNIT
    inference = fresh(prior=prior)
    theta = prior.sample((60,))
    train(inference.append_simulations(theta, theta + 0.2 * torch.randn_like(theta)))
    proposal = inference.build_posterior().set_default_x(theta[:1])
    later = prior.sample((40,))
    later[3, 0] = 0.0
    inference.append_simulations(later, later + 0.2 * torch.randn_like(later), proposal)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lie on the edge")
        inference.train(max_num_epochs=1)
    later[3, 0] = 1.0
    inference.append_simulations(later, later + 0.2 * torch.randn_like(later), proposal)
    refused(lambda: train(inference), ValueError, "1 of 140 without one", "row 103")


def test_discrete_parameters_leave_plain_npe():
    parts = [Bernoulli(torch.tensor([0.5])), BoxUniform(torch.zeros(1), torch.ones(1))]
    prior = MultipleIndependent(parts, validate_args=False)  # type: ignore[arg-type]
    theta = prior.sample((60,))
    inference = fresh(prior=prior).append_simulations(theta, theta + 0.3 * torch.randn(60, 2))
    with pytest.warns(JeffreysWarning, match=r"discrete parameters.*MNPE.*plain NPE was kept"):
        inference.train(max_num_epochs=2)
    assert inference.training_report.proxy_status is ProxyStatus.ABSENT


def test_the_mixed_estimator_of_sbi_leaves_plain_npe():
    theta = torch.stack([torch.rand(100), torch.bernoulli(torch.full((100,), 0.5))], dim=1)
    inference = fresh("mnpe", prior=None).append_simulations(theta, theta + 0.3)
    with pytest.warns(JeffreysWarning, match=r"discrete parameters.*MNPE"):
        inference.train(max_num_epochs=2)


@pytest.mark.parametrize("model", ["nsf", "zuko_maf"])
def test_noise_that_the_flow_maps_to_theta(model):
    """For sbi's `LC2ST_NF`: of draws of the flow it is standard normal."""
    torch.manual_seed(0)
    theta = UNIT.sample((200,))
    x = 50 + 20 * theta + torch.randn_like(theta)  # a flow of x that is not z-scored is another one
    main = MainBuilder(model).with_prior(UNIT)(theta, x).eval()
    with torch.no_grad():
        for parameter in main.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        drawn = main.sample(torch.Size((4_000,)), x[:1])[:, 0]
        noise = main.inverse_transform(drawn, x[:1].expand(4_000, -1))  # type: ignore[operator]
        one = main.inverse_transform(drawn, x[:1])  # type: ignore[operator]
    torch.testing.assert_close(one, noise)
    assert noise.shape == (4_000, 2)
    assert float(noise.mean(0).abs().max()) < 4.5 / 4_000**0.5
    assert float((noise.std(0) - 1).abs().max()) < 4.5 / 8_000**0.5


@pytest.mark.parametrize(
    "prior",
    [
        UNIT,
        MultipleIndependent([BoxUniform(torch.zeros(1), torch.ones(1)), Normal(*FAR)]),
        Independent(HalfNormal(torch.full((2,), 1e-9)), 1),
        Independent(Exponential(torch.full((2,), 1e-7)), 1),
    ],
    ids=["box", "box and normal", "tiny half-line", "long half-line"],
)
def test_draws_of_the_prior_do_not_lie_on_the_edge(prior):
    theta = prior.sample((20_000,))
    builder = MainBuilder().with_prior(prior)
    with warnings.catch_warnings():
        warnings.simplefilter("error", JeffreysWarning)
        assert builder.avoiding_edge(theta) is builder


def test_zero_on_a_half_line_is_on_the_edge():
    prior = Independent(Exponential(torch.ones(2)), 1)
    theta = (prior.sample((200,)) - 0.2).clamp(min=0)
    with pytest.warns(JeffreysWarning, match="lie on the edge of the prior's support"):
        MainBuilder().with_prior(prior).avoiding_edge(theta)


def test_an_offset_that_leaves_a_dozen_values_crashes_nothing():
    theta = PRIOR.sample((100,))
    x = 0.3 * (theta + 0.3 * torch.randn(100, 2)) + 1e6
    inference = fresh(options=TINY).append_simulations(theta, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inference.train(max_num_epochs=2)
    assert inference.training_report.proxy_status is ProxyStatus.USED


class Triangle(Distribution):
    """Uniform on 0 < θ₁ < θ₂ < 1."""

    class _Support(constraints.Constraint):
        event_dim = 1

        def check(self, value):
            return (value[..., 0] > 0) & (value[..., 0] < value[..., 1]) & (value[..., 1] < 1)

    arg_constraints: dict = {}  # noqa: RUF012

    def __init__(self):
        super().__init__(event_shape=torch.Size((2,)), validate_args=False)

    support = _Support()
    mean = torch.tensor([1 / 3, 2 / 3])
    variance = torch.tensor([1 / 18, 1 / 18])

    def sample(self, sample_shape=torch.Size()):
        return torch.rand(*sample_shape, 2).sort(dim=-1).values

    def log_prob(self, value):
        return torch.where(self.support.check(value), torch.log(torch.tensor(2.0)), -torch.inf)


@pytest.mark.parametrize(
    "prior",
    [
        Dirichlet(torch.tensor([1.0, 2.0, 3.0])),
        process_prior([Uniform(torch.zeros(1), torch.ones(1)), Dirichlet(torch.ones(2))])[0],
    ],
    ids=["dirichlet", "mixed"],
)
def test_a_prior_without_volume_is_refused(prior):
    """The posterior would be a density over all of ℝᴰ: no draw of it would be in the prior."""
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"lie in a hyperplane.*leave out a parameter"):
        fresh(prior=prior)
    assert torch.equal(state, torch.get_rng_state())


def test_a_support_without_unconstrained_space_is_no_obstacle():
    torch.manual_seed(1)
    prior = Triangle()
    theta = prior.sample((100,))
    x = theta + 0.1 * torch.randn_like(theta)
    with pytest.warns(JeffreysWarning, match="no unconstrained space"):
        inference = fresh(prior=prior)
    main = train(inference.append_simulations(theta, x))
    assert main.sample(torch.Size((20,)), x[:1]).shape == (20, 1, theta.shape[1])


class Corner:
    """Accepts the lower half; cannot be copied, as a trained classifier of sbi's cannot."""

    def __call__(self, theta):
        return theta[:, 0] < 0

    def __deepcopy__(self, memo):
        raise TypeError("cannot be copied")


def test_a_prior_that_cannot_be_copied(capsys):
    restricted = RestrictedPrior(PRIOR, Corner(), sample_with="rejection")
    torch.manual_seed(0)
    theta = restricted.sample((100,), print_rejected_frac=False)
    inference = fresh(prior=restricted).append_simulations(theta, theta + 0.1 * torch.randn(100, 2))
    capsys.readouterr()
    train(inference)
    assert capsys.readouterr().out == ""
    assert draw(inference, theta[:1]).shape == (20, 2)
    copy.deepcopy(inference._neural_net)
    inference.build_corrected_posterior(100)


def signal(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A noisy decay, 100 samples of one signal."""
    torch.manual_seed(3)
    theta = PRIOR.sample((num,))
    time = torch.linspace(0, 5, 100)
    mean = (2 + theta[:, :1]) * torch.exp(-time * (1.5 + theta[:, 1:]))
    return theta, mean + 0.05 * torch.randn(num, 100)


def test_the_samples_of_a_signal_share_one_transform():
    _, x = signal(200)
    assert len(set(MarginalTransform.fit(x).kinds)) == 1
    assert len(MarginalTransform.fit(x.exp()).kinds) == 100
    assert set(MarginalTransform.fit((3 * x).exp()).kinds) == {"log"}


def test_plain_npe_on_a_short_signal_is_sbis_network():
    """With nothing transformed, the network is sbi's own, in the prior's unconstrained space.

    That of more than thirty outputs sees combinations of them, `tests/networks/test_summaries.py`.
    """
    theta, x = signal(200)
    x = x[:, :30]
    torch.manual_seed(0)
    ours = MainBuilder("maf").with_prior(PRIOR)(theta, x)
    torch.manual_seed(0)
    u = ours.transform(theta)[0]
    theirs = posterior_nn("maf")(u, x)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(a, b)


def test_an_offset_that_float32_cannot_resolve():
    theta = PRIOR.sample((100,))
    x = theta + 0.1 * torch.randn(100, 2) + 1e8
    inference = fresh(options=TINY).append_simulations(theta, x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inference.train(max_num_epochs=2)
    assert any(w.category is JeffreysWarning and "x is constant" in str(w.message) for w in caught)
    losses = inference.summary["validation_loss"]
    assert losses[-1] < 5


class Square:
    """A prior as in sbi's documentation: the unit square, without declared bounds."""

    def sample(self, shape=torch.Size()):
        return torch.rand(*shape, 2)

    def log_prob(self, values):
        return torch.where(((values >= 0) & (values <= 1)).all(-1), 0.0, -torch.inf)


class Bell(Square):
    def sample(self, shape=torch.Size()):
        return torch.randn(*shape, 2)

    def log_prob(self, values):
        return -0.5 * (values**2).sum(-1)


@pytest.mark.filterwarnings("ignore:Prior is lacking", "ignore:Prior was provided")
def test_a_prior_of_ones_own_that_hides_its_bounds():
    prior = process_prior(Square())[0]
    outside = torch.tensor([[0.5, 0.5], [0.5, 1.5]])
    assert inside_support(prior, outside).tolist() == [True, False]
    with pytest.warns(JeffreysWarning, match=r"\(Square\) declares no bounds.*lower_bound"):
        main_builder("nsf", prior, True)
    bounds = {"lower_bound": torch.zeros(2), "upper_bound": torch.ones(2)}
    for fine in (process_prior(Square(), bounds)[0], process_prior(Bell())[0]):
        with warnings.catch_warnings():
            warnings.simplefilter("error", JeffreysWarning)
            main_builder("nsf", fine, True)
