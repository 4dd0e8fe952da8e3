r"""What to report about a trained posterior, from simulations that it was not trained on.

    report = held_out_report(inference, theta, x)
    print(report)

Each finding is a failed test. Together the tests raise a false alarm on an exact posterior in one
report of a hundred. "Healthy" means that the pairs show no fault, and the report states how small a
fault they would have shown. `sbi_jeffreys.diagnostics.verdicts` says what ranks cannot show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from sbi.inference.posteriors import DirectPosterior, EnsemblePosterior
from torch import Tensor

from sbi_jeffreys._checks import check_bool, check_instance, check_int, check_tensor
from sbi_jeffreys._sbi import NPE, prior_of
from sbi_jeffreys.diagnostics.calibration import (
    CoverageCurve,
    PairDraws,
    coverage_curve,
    held_out_nll,
    hpd_ranks,
    inside_prior,
    leakage,
    marginal_ranks,
    mean_and_error,
)
from sbi_jeffreys.diagnostics.evaluation import evaluate
from sbi_jeffreys.diagnostics.findings import Finding
from sbi_jeffreys.diagnostics.verdicts import FAMILYWISE, healthy_words, judge
from sbi_jeffreys.objective import effective_sample_size
from sbi_jeffreys.proxies.base import Proxy

__all__ = ["HeldOutReport", "held_out_report"]

_MIN_PAIRS = 50
_MIN_SAMPLES = 20
_EFFECTIVE = 50  # draws at a pair, from which on ranks among weighted ones are nearly uniform

Subject: TypeAlias = NPE | DirectPosterior | EnsemblePosterior


@dataclass(frozen=True)
class HeldOutReport:
    """Diagnostics of a posterior on N held-out pairs; `str(report)` has them in words.

    Attributes:
        num_pairs: N.
        num_samples: Draws of the posterior per pair, S.
        forward: E[−log p_φ(θ*|x)] in nats: KL(π‖p_φ) up to the entropy of π, which is unknown.
        forward_error: Its standard error.
        reverse: KL(p_φ‖q_ψ) to the proxy in nats, of the main truncated to the prior's support;
            None without a proxy. It is as informative about π as the proxy is accurate. For a
            `CorrectedPosterior` it is that of the main that is corrected.
        reverse_error: Its standard error over observations.
        effective_sample_size: Effective sample size of the weights q̃_ψ/p_φ, as a fraction of the
            draws, averaged over observations. It is 1 if main and proxy agree *where the main has
            mass*, even if the main misses a mode.
        coverage: Expected coverage of the HPD regions.
        marginal_ranks: Rank of each coordinate of θ* among the draws', `(N, D)`, for histograms.
        leakage: Mass of the raw density estimator outside the prior, in [0, 1].
        findings: Faults of the posterior, each with its kind and numbers; empty if there are none.
        effective_draws: Median over pairs of the effective number of draws. Those of a
            `CorrectedPosterior` are weighted draws of the main here; where fewer than 50 are
            effective, they say little of the draws of its `sample`, whose proposal adapts, and
            nothing is concluded from ranks among them.
    """

    num_pairs: int
    num_samples: int
    forward: float
    forward_error: float
    reverse: float | None
    reverse_error: float | None
    effective_sample_size: float | None
    coverage: CoverageCurve
    marginal_ranks: Tensor
    leakage: float
    findings: tuple[Finding, ...]
    effective_draws: float

    @property
    def unreliable(self) -> bool:
        """Whether so few draws are effective that ranks among them are no evidence."""
        return self.effective_draws < _least_effective(self.num_samples)

    @property
    def healthy(self) -> bool:
        """Whether no fault was found, with enough effective draws to find one."""
        return not self.findings and not self.unreliable

    @property
    def verdict(self) -> list[str]:
        """The findings as sentences; without findings, one sentence on what the pairs can show."""
        if self.findings or self.unreliable:
            words = [str(finding) for finding in self.findings]
            return words + [self._unreliable_words()] * self.unreliable
        num_parameters, with_proxy = self.marginal_ranks.shape[1], self.reverse is not None
        return [healthy_words(self.num_pairs, num_parameters, with_proxy)]

    def __str__(self) -> str:
        """All numbers and the verdict, a few lines."""
        lines = [
            f"{self.num_pairs} held-out pairs, {self.num_samples} posterior samples each",
            f"  forward NLL   {self.forward:.3f} ± {self.forward_error:.3f} nats",
            f"  reverse KL    {self._reverse_words()}",
            f"  coverage      {self._coverage_words()}",
            f"  leakage       {100 * self.leakage:.1f} % of the mass outside the prior",
            f"verdict (false alarms: {100 * FAMILYWISE:g} % of reports on an exact posterior)",
        ]
        return "\n".join(lines + [f"  - {sentence}" for sentence in self.verdict])

    def _reverse_words(self) -> str:
        if self.reverse is None:
            return "not known without a proxy"
        return (
            f"{self.reverse:.3f} ± {self.reverse_error:.3f} nats through the proxy, effective "
            f"sample size {100 * (self.effective_sample_size or 0.0):.0f} %"
        )

    def _unreliable_words(self) -> str:
        return (
            f"NLL and coverage are unreliable: of {self.num_samples} draws that are weighted at a "
            f"pair, {self.effective_draws:.0f} are effective; raise num_samples to "
            f"{math.ceil(_EFFECTIVE * self.num_samples / max(self.effective_draws, 1.0))}"
        )

    def _coverage_words(self) -> str:
        curve, parts = self.coverage, []
        for wanted in (0.5, 0.9):
            k = int((curve.levels - wanted).abs().argmin())
            numbers = (curve.values[k], curve.levels[k], curve.lower[k], curve.upper[k])
            share, level, low, high = (f"{100 * float(number):.0f}" for number in numbers)
            parts.append(f"{share} % at {level} % ({low}–{high} by chance)")
        return ", ".join(parts)


@torch.no_grad()
def held_out_report(
    inference_or_posterior: Subject,
    theta: Tensor,
    x: Tensor,
    num_samples: int = 200,
    proxy: Proxy | None = None,
    show_progress_bars: bool = False,
) -> HeldOutReport:
    """Diagnose a posterior on held-out simulations.

    The pairs must be new to the posterior and drawn from the joint: θ from the prior, also after
    several rounds. A posterior trained for one x_o is then judged away from it. Draws and ranks
    are random, so results depend on torch's generator.

    Args:
        inference_or_posterior: A trained `NPE_Jeffreys` (or sbi NPE), a `CorrectedPosterior`, an
            sbi `DirectPosterior`, or an `EnsemblePosterior` whose members are of that class.
        theta: True parameters, `(N, D)`, N ≥ 50; some hundreds show more.
        x: Their simulations, `(N, *x_shape)`.
        num_samples: Posterior draws per pair, at least 20.
        proxy: For the reverse KL; taken from an `NPE_Jeffreys` or `CorrectedPosterior` if None.
        show_progress_bars: Whether to show progress over the pairs.

    Raises:
        ValueError: If the pairs are too few, of wrong shape, or not finite, or an argument is out
            of range.
        TypeError: If an argument is of another type.
        RuntimeError: If the inference is not trained yet.

    Example:
        >>> import torch
        >>> from sbi.inference import NPE
        >>> from sbi.utils import BoxUniform
        >>> from sbi_jeffreys import held_out_report
        >>> _ = torch.manual_seed(0)
        >>> prior = BoxUniform(-torch.ones(2), torch.ones(2))
        >>> theta = prior.sample((300,))
        >>> x = theta + 0.3 * torch.randn_like(theta)
        >>> inference = NPE(prior, density_estimator="mdn", show_progress_bars=False)
        >>> _ = inference.append_simulations(theta[:200], x[:200]).train(max_num_epochs=5)
        >>> report = held_out_report(inference, theta[200:], x[200:])
        >>> report.num_pairs
        100
        >>> report.reverse is None  # there is no proxy to measure it with
        True
    """
    _check_pairs(theta, x)
    check_int("num_samples", num_samples, _MIN_SAMPLES)
    check_bool("show_progress_bars", show_progress_bars)
    if proxy is not None:
        check_instance("proxy", proxy, Proxy, "pass inference.proxy, a GivenProxy, or None")
    draws, by_proxy = evaluate(
        inference_or_posterior, theta, x, num_samples, proxy, show_progress_bars
    )
    theta = theta.to(draws.theta)
    if bool(torch.isnan(draws.log_prob_true).any()):
        raise ValueError(
            "x: the posterior's density is NaN at some of the pairs; drop simulations that failed "
            "or are far outside what it was trained on."
        )
    inside = inside_prior(prior_of(inference_or_posterior), draws.theta)
    marginals = marginal_ranks(draws, theta, inside)
    leaked = 0.0 if draws.log_weights is not None else leakage(inside)
    effective = _effective_draws(draws)
    by_ranks = effective >= _least_effective(num_samples)  # mutant: ranks-among-a-few-draws
    ranks = hpd_ranks(draws, inside)
    forward, forward_error = held_out_nll(draws.log_prob_true)
    against = None
    if by_proxy is not None:
        reverse, sizes = (values[torch.isfinite(values)] for values in by_proxy)
        against = (*mean_and_error(reverse), mean_and_error(sizes)[0])
    # A corrected posterior follows the proxy: that its main disagrees with it is no fault.
    judged = against if draws.log_weights is None else None  # mutant: main-judged-for-corrected
    reverse, reverse_error, size = against or (None, None, None)
    return HeldOutReport(
        num_pairs=len(theta),
        num_samples=num_samples,
        forward=forward,
        forward_error=forward_error,
        reverse=reverse,
        reverse_error=reverse_error,
        effective_sample_size=size,
        coverage=coverage_curve(ranks),
        marginal_ranks=marginals.cpu(),
        leakage=leaked,
        findings=judge(ranks, marginals, leaked, num_samples, judged, by_ranks),
        effective_draws=effective,
    )


def _effective_draws(draws: PairDraws) -> float:
    """Median over pairs of the effective number of draws; their number without weights."""
    if draws.log_weights is None:
        return float(len(draws.theta))
    return float(effective_sample_size(draws.log_weights).median())


def _least_effective(num_samples: int) -> float:
    """How many draws should be effective for ranks among them to be nearly uniform."""
    return min(_EFFECTIVE, num_samples / 2)


def _check_pairs(theta: Tensor, x: Tensor) -> None:
    """Refuse pairs that cannot be diagnosed, with the remedy."""
    check_tensor("theta", theta, ("N", "D"), remedy="for a single parameter, theta.reshape(-1, 1)")
    check_tensor("x", x)
    if x.ndim < 2 or len(theta) != len(x):
        raise ValueError(
            "theta and x must have the same number of rows, got shapes "
            f"{tuple(theta.shape)} and {tuple(x.shape)}; pass row i of x `(N, ...)` as the "
            "simulation of row i of theta."
        )
    if len(theta) < _MIN_PAIRS:
        raise ValueError(
            f"theta and x must be at least {_MIN_PAIRS} held-out pairs, got {len(theta)}, too "
            "few to show a fault; simulate more, or hold out more of the simulations you have."
        )
    # Missing trials are encoded as NaN; a row of nothing else is a failed simulation.
    flat = x.flatten(1)
    failed = torch.isinf(flat).any(1) | torch.isnan(flat).all(1)
    bad = int((failed.cpu() | ~torch.isfinite(theta).all(1).cpu()).sum())
    if bad:
        raise ValueError(
            f"theta and x must be finite, but {bad} of {len(theta)} pairs are not finite; drop "
            "them, or let the simulator return a finite value for failed simulations."
        )
