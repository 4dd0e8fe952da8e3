r"""Tests on ranks, and the findings that follow where they fail.

Every threshold follows from the number of pairs N: under the exact posterior ranks are independent
uniforms, so a coverage is binomial, the mean of N ranks has standard deviation √(1/12N), and the
mean of their distance |u − ½| has √(1/48N). All tests of a report share one false-alarm
probability of 1 % (Bonferroni).

Ranks cannot show everything: a posterior that ignores part of x (at the extreme, the prior itself)
is calibrated and passes. The reverse KL to a proxy shows such a fault, and so does a forward NLL
that is worse than that of another method on the same pairs.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from scipy.stats import binom
from torch import Tensor

from sbi_jeffreys._checks import check_float, check_int, check_tensor
from sbi_jeffreys.diagnostics.findings import Finding, FindingKind, Measurement, Statistic

__all__ = ["FAMILYWISE", "healthy_words", "judge"]

#: Probability that a report on an exact posterior finds anything.
FAMILYWISE = 0.01
_LEVELS = (0.5, 0.8, 0.9, 0.95)
# An exact posterior leaks nothing, so this bound does not follow from N. Above it, rejected draws
# and a density that integrates to less than one inside the prior start to matter.
_TOLERATED_LEAKAGE = 0.05
# Main and proxy are two fits and never agree exactly. One nat is a factor e in density.
_LOW_SAMPLE_SIZE = 0.1
_LARGE_DIVERGENCE = 1.0


def judge(
    ranks: Tensor,
    marginals: Tensor,
    leakage: float,
    num_samples: int,
    against_proxy: tuple[float, float, float] | None = None,
    by_ranks: bool = True,
) -> tuple[Finding, ...]:
    """What is wrong with a posterior; empty if no test fails.

    Args:
        ranks: Ranks of the true parameters by density, 0 the densest, `(N,)`; ∞ where there was
            no draw inside the prior.
        marginals: Ranks by coordinate, `(N, D)`.
        leakage: Mass outside the prior, in [0, 1].
        num_samples: Draws S that the ranks are among.
        against_proxy: Reverse KL in nats, its standard error, and the effective sample size in
            [0, 1], where there is a proxy.
        by_ranks: Whether the ranks can be relied on.
    """
    check_tensor("ranks", ranks, ("N",))
    check_tensor("marginals", marginals, (len(ranks), "D"))
    check_float("leakage", leakage, 0.0, 1.0)
    check_int("num_samples", num_samples, 1)
    ranks, marginals = ranks.double().cpu(), marginals.double().cpu()
    alpha = _alpha(marginals.shape[1])
    findings: list[Finding] = []
    if by_ranks:
        width = _width_by_density(ranks, alpha) or _width_by_marginals(marginals, alpha)
        findings = width + _missed(ranks, num_samples, alpha) + _shifted(marginals, alpha)
    if leakage > _TOLERATED_LEAKAGE:
        found = Measurement(Statistic.LEAKAGE, leakage, 0.0, 0.0, _TOLERATED_LEAKAGE)
        findings.append(Finding(FindingKind.LEAKS, (found,)))
    if against_proxy is not None:
        findings += _disagreement(*against_proxy, alpha)
    return tuple(findings)


def healthy_words(num_pairs: int, num_parameters: int, with_proxy: bool) -> str:
    """The verdict where nothing was found: how small a fault so many pairs would have shown."""
    alpha = _alpha(num_parameters)
    resolution = 100 * NormalDist().inv_cdf(1 - alpha / 2) * math.sqrt(0.09 / num_pairs)
    # 1/√(4π) is how fast a Gaussian's mean rank moves with its mean, per standard deviation.
    shift = _bound(alpha, 1 / 12, num_pairs) * math.sqrt(4 * math.pi)
    blind = "; only a proxy or the NLL of another method can show whether it uses all of x"
    return (
        f"healthy within what {num_pairs} pairs can show: the 90 % region's coverage is within "
        f"{resolution:.0f} points of nominal, and no parameter is off by more than about "
        f"{shift:.2f} posterior standard deviations throughout{'' if with_proxy else blind}"
    )


def _alpha(num_parameters: int) -> float:
    """False-alarm probability of each of a report's tests."""
    return FAMILYWISE / (len(_LEVELS) + 2 + 2 * num_parameters)


def _bound(alpha: float, variance: float, num: int) -> float:
    """Two-sided bound on a mean of `num` values of that variance."""
    return NormalDist().inv_cdf(1 - alpha / 2) * math.sqrt(variance / num)


def _width_by_density(ranks: Tensor, alpha: float) -> list[Finding]:
    """Overconfident or too wide, by coverage at the level that shows it most clearly."""
    num = len(ranks)
    found: list[Measurement] = []
    for level in _LEVELS:
        hits = int((ranks <= level).sum())
        low, high = (int(binom.ppf(q, num, level)) for q in (alpha / 2, 1 - alpha / 2))
        if not low <= hits <= high:
            shares = (hits / num, level, low / num, high / num)
            found.append(Measurement(Statistic.COVERAGE, *shares))
    if not found:
        mean, bound = float(ranks.clamp(max=1).mean()), _bound(alpha, 1 / 12, num)
        if abs(mean - 0.5) <= bound:
            return []
        interval = (mean, 0.5, 0.5 - bound, 0.5 + bound)
        return [_width(mean > 0.5, Measurement(Statistic.MEAN_DENSITY_RANK, *interval))]
    too_narrow = {m.value < m.expected for m in found}
    if len(too_narrow) > 1:
        return [Finding(FindingKind.WRONG_SHAPE, tuple(found))]
    # In standard deviations of a coverage, up to a factor √N.
    off = [abs(m.value - m.expected) / math.sqrt(m.expected * (1 - m.expected)) for m in found]
    return [_width(too_narrow.pop(), found[off.index(max(off))])]


def _width(too_narrow: bool, *measurements: Measurement) -> Finding:
    return Finding(FindingKind.OVERCONFIDENT if too_narrow else FindingKind.TOO_WIDE, measurements)


def _width_by_marginals(marginals: Tensor, alpha: float) -> list[Finding]:
    """The width of single parameters, where the joint region looks right."""
    bound = _bound(alpha, 1 / 48, len(marginals))
    distance = (marginals.clamp(max=1) - 0.5).abs().mean(0)
    findings = []
    for too_narrow, wrong in ((True, distance > 0.25 + bound), (False, distance < 0.25 - bound)):
        found = _of_parameters(Statistic.RANK_DISTANCE, distance, wrong, 0.25, bound)
        findings += [_width(too_narrow, *found)] if found else []
    return findings


def _missed(ranks: Tensor, num_samples: int, alpha: float) -> list[Finding]:
    """True parameters where the posterior has no mass, to which the forward KL is sensitive."""
    num, expected = len(ranks), 1 / (num_samples + 1)
    count = int((ranks > 1 - expected).sum())
    most = int(binom.ppf(1 - alpha, num, expected))
    if count <= most:
        return []
    found = Measurement(Statistic.MISSED_PAIRS, count / num, expected, 0.0, most / num)
    return [Finding(FindingKind.MISSES_MASS, (found,))]


def _shifted(marginals: Tensor, alpha: float) -> list[Finding]:
    """Parameters whose mean rank is off the centre."""
    bound = _bound(alpha, 1 / 12, len(marginals))
    # A rank of ∞ (no draw inside the prior) has no direction: it counts as central.
    mean = torch.where(torch.isfinite(marginals), marginals, 0.5).mean(0)
    wrong = (mean - 0.5).abs() > bound
    found = _of_parameters(Statistic.MEAN_RANK, mean, wrong, 0.5, bound)
    return [Finding(FindingKind.BIASED, found)] if found else []


def _of_parameters(
    statistic: Statistic, values: Tensor, wrong: Tensor, expected: float, bound: float
) -> tuple[Measurement, ...]:
    """A measurement for every parameter whose value, of `(D,)`, is wrong."""
    interval = (expected, expected - bound, expected + bound)
    return tuple(
        Measurement(statistic, float(values[k]), *interval, parameter=int(k))
        for k in torch.where(wrong)[0]
    )


def _disagreement(reverse: float, error: float, size: float, alpha: float) -> list[Finding]:
    """A finding if main and proxy are far from each other: at least one of them is wrong."""
    lower_end = reverse - NormalDist().inv_cdf(1 - alpha) * error
    if lower_end <= _LARGE_DIVERGENCE and size >= _LOW_SAMPLE_SIZE:
        return []
    found = (
        Measurement(Statistic.REVERSE_KL, reverse, 0.0, -math.inf, _LARGE_DIVERGENCE),
        Measurement(Statistic.EFFECTIVE_SAMPLE_SIZE, size, 1.0, _LOW_SAMPLE_SIZE, 1.0),
    )
    return [Finding(FindingKind.DISAGREES_WITH_PROXY, found)]
