"""Typed configs, which sbi has after 0.27: what is accepted, and that their settings are kept.

`Config` stands for one of sbi's where the installed sbi has none.
"""

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from contract_tools import PRIOR, fresh, refused, simulate, train
from sbi import neural_nets
from sbi.neural_nets import posterior_nn
from sbi.neural_nets.embedding_nets import FCEmbedding

from sbi_jeffreys import JeffreysWarning, MainBuilder, NPE_Jeffreys
from sbi_jeffreys.networks import configs
from sbi_jeffreys.networks.builders import UnconstrainedDensityEstimator
from sbi_jeffreys.networks.standardised import StandardisedInput

Base: Any = getattr(neural_nets, "DensityConfigBase", object)
with_sbis_own = pytest.mark.skipif(Base is object, reason="this sbi has no typed configs")


@dataclasses.dataclass(frozen=True, eq=False)
class Config(Base):
    """What sbi's typed configs of a density look like."""

    z_score_input: str = "independent"
    z_score_condition: str = "independent"
    embedding_net: torch.nn.Module = dataclasses.field(default_factory=torch.nn.Identity)
    hidden_features: int = 20
    x_dist: Any = None
    model: str = "maf"

    def build(self, batch_input, batch_condition):
        more = {} if self.x_dist is None else {"x_dist": self.x_dist}
        builder = posterior_nn(
            self.model,
            hidden_features=self.hidden_features,
            embedding_net=self.embedding_net,
            z_score_theta=self.z_score_input,
            z_score_x=self.z_score_condition,
            **more,
        )
        return builder(batch_input, batch_condition)


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """What a config of another family looks like."""

    hidden_features: int = 20

    def build(self, batch_input, batch_condition):
        raise AssertionError("not to be built")


def skewed() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    theta, x = simulate(300)
    return theta, (2 * x).exp()


def standardises(net: torch.nn.Module) -> bool:
    """Whether the net sees x through our marginal transform."""
    return any(isinstance(module, StandardisedInput) for module in net.modules())


def built(model: Any) -> torch.nn.Module:
    return MainBuilder(model).with_prior(PRIOR)(*skewed())


def test_a_typed_config_is_built_like_a_name():
    theta, x = skewed()
    for config in (Config(), Config(embedding_net=FCEmbedding(2, 2))):
        net = built(config)
        assert isinstance(net, UnconstrainedDensityEstimator)
        assert bool(torch.isfinite(net.log_prob(theta[:5].unsqueeze(0), x[:5])).all())
    with warnings.catch_warnings():
        warnings.simplefilter("error", JeffreysWarning)
        inference = fresh(Config())
    assert isinstance(inference._builder, MainBuilder)


def test_the_z_scoring_of_x_in_a_config_is_kept():
    assert standardises(built(Config()))
    assert not standardises(built(Config(z_score_condition="structured")))
    assert not standardises(built(Config(z_score_condition="none")))


def test_theta_that_a_config_transforms_is_not_transformed_twice():
    config = Config(z_score_input="transform_to_unconstrained", x_dist=PRIOR, model="zuko_nsf")
    assert not isinstance(built(config), UnconstrainedDensityEstimator)


def test_a_second_network_does_not_start_from_the_trained_embedding_of_a_config():
    embedding = FCEmbedding(2, 2)
    builder = MainBuilder(Config(embedding_net=embedding))
    before = embedding.state_dict()["net.0.weight"].clone()
    with torch.no_grad():
        for parameter in builder(*skewed()).embedding_net.parameters():
            parameter.add_(1.0)
    assert torch.equal(embedding.state_dict()["net.0.weight"], before)


@pytest.mark.parametrize("door", [fresh, MainBuilder])
def test_a_config_of_another_family_is_refused(door, monkeypatch):
    if Base is object:
        monkeypatch.setattr(configs, "DensityConfigBase", Config)
    refused(lambda: door(ClassifierConfig()), TypeError, "must be", "DensityConfigBase", "got Cla")
    assert door(Config()) is not None


@pytest.mark.parametrize("door", [fresh, MainBuilder])
def test_the_class_of_a_config_is_refused(door):
    refused(lambda: door(Config), TypeError, "must be", "got Config", "not an instance", "Config()")


@pytest.mark.parametrize("name", ["tabpfn", "TabPFN"])
def test_a_model_that_is_not_trained_is_refused(name):
    refused(lambda: fresh(name), TypeError, "density_estimator", f"got '{name}'", "NPE_PFN")


def test_a_builder_of_your_own_may_be_a_dataclass_with_a_method_build():
    @dataclasses.dataclass
    class Own:
        def build(self):
            raise AssertionError("not a config")

        def __call__(self, theta, x):
            return posterior_nn("maf")(theta, x)

    own = Own()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JeffreysWarning)
        inference = NPE_Jeffreys(PRIOR, own, show_progress_bars=False)  # type: ignore[arg-type]
    assert inference._build_neural_net is own


SBIS_OWN = (
    "MixedConfig",
    "TabPFNConfig",
    "ResNetClassifierConfig",
    "MarginalNSFConfig",
    "VectorFieldEstimatorBuilder",
)


@with_sbis_own
@pytest.mark.parametrize("name", SBIS_OWN)
def test_sbis_own_configs_of_other_families_are_refused(name):
    config = getattr(neural_nets, name)()
    refused(lambda: fresh(config), TypeError, "density_estimator", "DensityConfigBase", name)


@with_sbis_own
@pytest.mark.parametrize("name", ["MAFConfig", "NSFConfig", "MDNConfig", "MADEConfig"])
def test_sbis_own_configs_are_trained(name):
    torch.manual_seed(0)
    inference = fresh(getattr(neural_nets, name)()).append_simulations(*simulate(60))
    net = train(inference)
    assert isinstance(net, UnconstrainedDensityEstimator) == (name != "MDNConfig")
    assert inference.build_posterior().sample((3,), x=torch.zeros(2)).shape == (3, 2)
