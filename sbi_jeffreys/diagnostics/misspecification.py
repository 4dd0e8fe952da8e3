r"""Could the simulator have produced this observation? A test that no posterior can replace.

A likelihood proxy has an evidence, p̂(x) = ∫ p(θ) p̂(x|θ) dθ. Its rank at x_o among new simulations
gives a prior predictive p-value (Box, JRSS A 143, 1980). Under the simulator it is uniform, however
good the proxy is, because x_o and the simulations are exchangeable then; how well it detects an
observation from elsewhere depends on the proxy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sbi_jeffreys import _sbi
from sbi_jeffreys._checks import check_instance, check_observations
from sbi_jeffreys._sbi import NPE, ConditionalDensityEstimator
from sbi_jeffreys.networks.atoms import find_atoms
from sbi_jeffreys.networks.embedding import check_missing
from sbi_jeffreys.posteriors.candidates import seeded
from sbi_jeffreys.proxies.base import Proxy
from sbi_jeffreys.proxies.normaliser import adapted_draws

__all__ = ["MisspecificationTest", "misspecification_test"]

_MIN_SIMULATIONS = 20  # p-values below 1 / 21 do not exist with fewer
_DRAWS, _ROWS = 512, 25  # draws of θ per x; x per network call
_ROUNDING = 1e-5  # relative error that the value of a constant output may have
_ALARM = 0.05


@dataclass(frozen=True)
class MisspecificationTest:
    """How probable B observations are beside N simulations; `str(test)` has it in words.

    Attributes:
        p_values: Share of the N simulations and the observation itself whose evidence is at most
            the observation's, `(B,)` in [1 / (N + 1), 1]. Several observations are several tests.
        log_evidence: log p̂(x_o) in nats, up to a constant that is the same for all x, `(B,)`.
        simulated: The same of the simulations, `(N,)`.
    """

    p_values: Tensor
    log_evidence: Tensor
    simulated: Tensor

    def __str__(self) -> str:
        """A line for each observation."""
        ends = torch.tensor([0.05, 0.95]).to(self.simulated)
        low, high = self.simulated.quantile(ends, interpolation="nearest")  # some may be -inf
        num = len(self.simulated)
        lines = [f"90 % of {num} simulations have a log evidence of {low:.1f} to {high:.1f} nats"]
        for k, (p_value, evidence) in enumerate(zip(self.p_values, self.log_evidence)):
            alarm = float(p_value) <= _ALARM
            words = "unlike the simulations: the posterior extrapolates" if alarm else "plausible"
            lines.append(f"  x_o[{k}]: {evidence:.1f} nats, p = {p_value:.2g}, {words}")
        return "\n".join(lines)


@torch.no_grad()
def misspecification_test(
    inference: NPE, x_o: Tensor, x: Tensor | None = None
) -> MisspecificationTest:
    """Test whether observations are such as the simulator produces under the prior.

    The test needs a likelihood proxy, which `NPE_Jeffreys` fits where x is a vector or a summary.
    Outputs that the proxy leaves out because they do not depend on θ are not tested. An energy has
    no evidence: use `sbi.diagnostics.calc_misspecification_mmd` there. The result is the same at
    every call.

    Args:
        inference: A trained `NPE_Jeffreys`.
        x_o: Observations, `(B, *x_shape)`.
        x: Simulations of parameters from the prior that training has not used, `(N, *x_shape)`,
            N ≥ 20. None: those that `train` held out, after a single round.

    Returns:
        p-values with the log evidences that they come from.

    Raises:
        TypeError, ValueError: Naming the argument, what was expected and what came; also if the
            proxy is an energy, or `x` is needed.
        RuntimeError: If there is no proxy, before training or because none suits this x.

    Example:
        >>> import torch
        >>> from sbi.utils import BoxUniform
        >>> from sbi_jeffreys import JeffreysOptions, NPE_Jeffreys, misspecification_test
        >>> _ = torch.manual_seed(0)
        >>> prior = BoxUniform(-torch.ones(2), torch.ones(2))
        >>> theta = prior.sample((300,))
        >>> x = theta + 0.1 * torch.randn_like(theta)
        >>> options = JeffreysOptions(num_steps=20, proxy_folds=1)
        >>> inference = NPE_Jeffreys(prior, options=options, show_progress_bars=False)
        >>> _ = inference.append_simulations(theta, x).train(max_num_epochs=5)
        >>> test = misspecification_test(inference, torch.tensor([[0.2, 0.1], [3.0, -3.0]]))
        >>> (test.p_values <= 0.05).tolist()
        [False, True]
    """
    check_instance("inference", inference, NPE, "pass a trained NPE_Jeffreys")
    main, proxy = _sbi.network_of(inference), getattr(inference, "proxy", None)
    if main is None or proxy is None:
        raise RuntimeError(
            "There is no proxy to compute an evidence with: call train() of an NPE_Jeffreys first. "
            "If it fell back to plain NPE, use sbi.diagnostics.calc_misspecification_mmd."
        )
    if not proxy.has_evidence:
        raise ValueError(
            f"inference: expected a likelihood proxy, got {type(proxy).__name__}, which has no "
            "evidence; use sbi.diagnostics.calc_misspecification_mmd."
        )
    device = next(main.parameters()).device
    shape = main.condition_shape
    x_o = check_observations(x_o, shape, "x_o", missing=True).to(device)
    simulations = _held_out(inference) if x is None else x
    simulations = check_observations(simulations, shape, missing=True).to(device)
    if len(simulations) < _MIN_SIMULATIONS:
        raise ValueError(
            f"x must be at least {_MIN_SIMULATIONS} simulations, got {len(simulations)}; simulate "
            "some more from the prior, and pass them as x."
        )
    both = check_missing(main, torch.cat([simulations, x_o]))
    with seeded(0, device):
        evidence = _log_evidence(main, proxy, both)
    # The limits come from simulations that x_o is not compared with. The simulations that it is
    # compared with could lie beyond these limits just as well, so that p-values stay uniform.
    beyond = _beyond_a_limit(both, _seen(inference, x is None).to(device))
    # mutant: beyond-a-limit-is-at-it
    evidence = torch.where(beyond, -torch.inf, evidence)
    simulated, observed = evidence[: len(simulations)], evidence[len(simulations) :]
    # mutant: the-probable-are-suspicious
    as_low = (simulated <= observed.unsqueeze(1)).sum(dim=1)
    return MisspecificationTest((1 + as_low) / (1 + len(simulated)), observed, simulated)


def _beyond_a_limit(x: Tensor, seen: Tensor) -> Tensor:
    """Which x lie beyond a limit of the simulations in `seen`, `(B,)`.

    A proxy takes a value beyond a limit, such as −999 for "missing", for the limit. Limits are zero
    where no simulation is negative, atoms that are the smallest or largest value, and the only
    value of an output that never varies.
    """
    x, seen = x.flatten(1), seen.flatten(1)
    low, high = seen.aminmax(dim=0)
    atoms = find_atoms(seen)
    beyond = (x < 0) & (low >= 0)
    beyond |= (atoms == low).any(dim=0) & (x < low)
    beyond |= (atoms == high).any(dim=0) & (x > high)
    # mutant: constant-outputs-may-be-anything
    beyond |= (low == high) & ((x - low).abs() > _ROUNDING * low.abs())
    return beyond.any(dim=1)


def _held_out(inference: NPE) -> Tensor:
    """The simulations that training held out, if they come from the prior."""
    if _sbi.latest_round(inference) > 0:
        raise ValueError(
            "x must be given after several rounds, whose simulations come from a proposal, got "
            "None; simulate parameters of the prior."
        )
    return inference.get_simulations(0)[1][inference.val_indices.cpu()]


def _seen(inference: NPE, without_held_out: bool) -> Tensor:
    """The simulations that were appended, or those of them that training did not hold out."""
    x = inference.get_simulations(0)[1]
    return x[inference.train_indices.cpu()] if without_held_out else x


def _log_evidence(main: ConditionalDensityEstimator, proxy: Proxy, x: Tensor) -> Tensor:
    """log Ẑ of the proxy at each x, `(N,)`; −∞ where the proxy has no density anywhere."""
    found = []
    for part in x.split(_ROWS):
        own = main.sample(torch.Size((1,)), part)[0]
        draws = adapted_draws(proxy, main, own, part, _DRAWS)
        found.append(draws.log_normaliser(proxy.inverse_temperature).lower)
    return torch.cat(found).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
