r"""Tests on ranks, and what to call their failures. Numbers in, words out.

Every threshold follows from the number of pairs N: under the exact posterior ranks are independent
uniforms, so a coverage is binomial, the mean of N ranks has standard deviation √(1/12N), and the
mean of their distance |u − ½| has √(1/48N). All tests of a report share one false-alarm
probability of 1 % (Bonferroni).

Ranks cannot see everything: a posterior that ignores part of x (at the extreme, the prior itself)
is calibrated, and passes. The reverse KL through a proxy sees it; so does a worse forward NLL than
that of another method on the same pairs.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

__all__ = ["FAMILYWISE", "judge"]

#: Probability that a report on an exact posterior finds anything.
FAMILYWISE = 0.01
_LEVELS = (0.5, 0.8, 0.9, 0.95)
# Not from N, since an exact posterior leaks nothing at all: where leaked mass starts to matter, as
# rejected draws and as a density that integrates to less than one inside the prior.
_TOLERATED_LEAKAGE = 0.05
# Nor these: main and proxy are two fits, and never agree exactly. One nat is a factor e in density.
_LOW_SAMPLE_SIZE = 0.1
_LARGE_DIVERGENCE = 1.0


def judge(
    ranks: Tensor,
    marginals: Tensor,
    leakage: float,
    num_samples: int,
    against_proxy: tuple[float, float, float] | None = None,
) -> list[str]:
    """Findings about a posterior, one sentence each; a single "healthy …" if there are none.

    Args:
        ranks: By density, 0 the densest, `(N,)`; ∞ where there was no draw.
        marginals: By coordinate, `(N, D)`.
        leakage: Mass outside the prior.
        num_samples: Draws S that the ranks are among.
        against_proxy: Reverse KL in nats, its standard error, and the effective sample size in
            [0, 1], where there is a proxy.
    """
    ranks, marginals = ranks.double().cpu(), marginals.double().cpu()
    num_tests = len(_LEVELS) + 2 + 2 * marginals.shape[1]
    alpha = FAMILYWISE / num_tests
    width = _width_by_density(ranks, alpha) or _width_by_marginals(marginals, alpha)
    findings = [width] if width else []
    findings += _missed(ranks, num_samples, alpha)
    findings += _shifted(marginals, alpha)
    if leakage > _TOLERATED_LEAKAGE:
        findings.append(
            f"leaks: {100 * leakage:.0f} % of the mass is outside the prior; its samples are "
            "rejected, and the density inside is too low by as much"
        )
    if against_proxy is not None:
        findings += _disagreement(*against_proxy, alpha)
    return findings or [_healthy(len(ranks), alpha, against_proxy is not None)]


def _width_by_density(ranks: Tensor, alpha: float) -> str | None:
    """Overconfident or too wide, by coverage at the level that shows it most clearly."""
    from scipy.stats import binom  # sbi depends on scipy

    num = len(ranks)
    found: list[tuple[float, str]] = []
    for level in _LEVELS:
        hits = int((ranks <= level).sum())
        low, high = (int(binom.ppf(q, num, level)) for q in (alpha / 2, 1 - alpha / 2))
        if not low <= hits <= high:
            word = "overconfident" if hits < low else "too wide"
            text = (
                f"{word}: the {100 * level:.0f} % region holds {100 * hits / num:.0f} % of the "
                f"true parameters ({100 * low / num:.0f}–{100 * high / num:.0f} % by chance)"
            )
            found.append((abs(hits - num * level) / math.sqrt(num * level * (1 - level)), text))
    mean, bound = float(ranks.clamp(max=1).mean()), _bound(alpha, 1 / 12, num)
    if not found and abs(mean - 0.5) > bound:
        word = "overconfident" if mean > 0.5 else "too wide"
        return (
            f"{word}: true parameters rank {mean:.2f} by density on average "
            f"(0.50 ± {bound:.2f} by chance)"
        )
    if len({text.split(":")[0] for _, text in found}) > 1:
        return "of the wrong shape: " + "; ".join(text for _, text in found)
    return max(found)[1] if found else None


def _width_by_marginals(marginals: Tensor, alpha: float) -> str | None:
    """The width of single parameters, where the joint region looks right."""
    bound = _bound(alpha, 1 / 48, len(marginals))
    spread = (marginals.clamp(max=1) - 0.5).abs().mean(0) - 0.25
    texts = []
    for word, wrong in (("overconfident", spread > bound), ("too wide", spread < -bound)):
        if bool(wrong.any()):
            texts.append(f"{word} in {_names(wrong)}: ranks of single parameters show it")
    return "; ".join(texts) or None


def _missed(ranks: Tensor, num_samples: int, alpha: float) -> list[str]:
    """True parameters where the posterior has no mass: the tail that the forward KL pays for."""
    from scipy.stats import binom

    num, expected = len(ranks), 1 / (num_samples + 1)
    count = int((ranks > 1 - expected).sum())
    if count <= int(binom.ppf(1 - alpha, num, expected)):
        return []
    return [
        f"misses mass: at {100 * count / num:.0f} % of the pairs the true parameter is less likely "
        f"than all {num_samples} draws ({100 * expected:.1f} % expected): a mode may be missing, "
        "or the posterior is much too narrow"
    ]


def _shifted(marginals: Tensor, alpha: float) -> list[str]:
    """Parameters whose mean rank is off the centre."""
    bound = _bound(alpha, 1 / 12, len(marginals))
    texts = []
    # A rank of ∞ (no draw inside the prior) says nothing about direction: it counts as central.
    offset = torch.where(torch.isfinite(marginals), marginals, 0.5).mean(0) - 0.5
    for word, wrong in (("too low", offset > bound), ("too high", offset < -bound)):
        if bool(wrong.any()):
            ranks = ", ".join(f"{0.5 + float(value):.2f}" for value in offset[wrong])
            texts.append(
                f"biased: {_names(wrong)} {word} (mean rank of the true parameter {ranks}; "
                f"0.50 ± {bound:.2f} by chance)"
            )
    return texts


def _disagreement(reverse: float, error: float, size: float, alpha: float) -> list[str]:
    """Main and proxy far from each other: one of them is wrong."""
    surely = reverse - NormalDist().inv_cdf(1 - alpha) * error
    if surely <= _LARGE_DIVERGENCE and size >= _LOW_SAMPLE_SIZE:
        return []
    return [
        f"disagrees with its proxy: reverse KL {reverse:.1f} nats, importance weights keep "
        f"{100 * size:.0f} % of the draws; coverage, and the held-out NLL of both, tell which of "
        "the two to doubt"
    ]


def _healthy(num: int, alpha: float, with_proxy: bool) -> str:
    """With the resolution: what would have been found."""
    resolution = 100 * NormalDist().inv_cdf(1 - alpha / 2) * math.sqrt(0.09 / num)
    # 1/√(4π) is how fast a Gaussian's mean rank moves with its mean, per standard deviation.
    shift = _bound(alpha, 1 / 12, num) * math.sqrt(4 * math.pi)
    blind = "" if with_proxy else "; that it uses all of x, only a proxy or a lower NLL could tell"
    return (
        f"healthy within what {num} pairs can show: the 90 % region's coverage is within "
        f"{resolution:.0f} points of nominal, no parameter is off by more than about {shift:.2f} "
        f"posterior standard deviations throughout{blind}"
    )


def _bound(alpha: float, variance: float, num: int) -> float:
    """Two-sided bound on a mean of `num` values of that variance."""
    return NormalDist().inv_cdf(1 - alpha / 2) * math.sqrt(variance / num)


def _names(wrong: Tensor) -> str:
    return ", ".join(f"θ{int(k) + 1}" for k in torch.where(wrong)[0])
