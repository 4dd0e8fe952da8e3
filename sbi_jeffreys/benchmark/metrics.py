r"""How good an approximate posterior p_φ(θ|x) is, by several measures because each can be fooled.

Per observation, against reference samples: C2ST (0.5 is perfect) and the mass per mode. Over fresh
pairs (θ*, x) from the joint: held-out NLL, expected coverage of HPD regions, leakage, and, since
the tasks know their likelihood, the true Jeffreys divergence.

C2ST cannot tell overconfident from conservative (Hermans et al. 2022, arXiv 2110.06581): the report
never shows it without coverage. Samples of θ come first: `(S, B, D)`, S draws for each of B x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sbi_jeffreys.benchmark.tasks import Task
from sbi_jeffreys.diagnostics.calibration import (
    PairDraws,
    expected_coverage,
    held_out_nll,
    inside_prior,
    leakage,
)

__all__ = [
    "Divergences",
    "c2st",
    "evaluate_pairs",
    "mode_l1",
    "mode_masses",
    "true_divergences",
]

_DRAWS_FOR_DIVERGENCE = 100  # per pair; two of the likelihoods solve an ODE for every draw


@dataclass(frozen=True)
class Divergences:
    """True divergences from the exact posterior π(θ|x), averaged over the pairs' x, in nats.

    Attributes:
        forward: KL(π‖p̄) + E log p(x): comparable between methods on the same pairs.
        reverse: KL(p̄‖π) − E log p(x), over the draws with positive likelihood.
        jeffreys: Their sum, in which the evidence cancels: the true Jeffreys divergence.
        zero_likelihood: Share of draws with likelihood zero, where KL(p̄‖π) is infinite really.
    """

    forward: float
    reverse: float
    jeffreys: float
    zero_likelihood: float


def c2st(reference: Tensor, samples: Tensor, seed: int = 1, classifier: str = "rf") -> float:
    """Accuracy of a classifier between two sets of samples, 5-fold: sbi's, z-scored, seeded.

    Args:
        reference: Samples of the true posterior, `(N, D)`; they set the z-score, so that it is
            the same for every method.
        samples: Samples of the approximation, `(M, D)`.
        seed: Of the classifier and of the folds.
        classifier: "rf" (random forest, sbi's default) or "mlp" (sbibm's; slower).

    Returns:
        Between 0 and 1; 0.5 where the classifier cannot tell them apart.
    """
    from sbi.utils.metrics import c2st as sbi_c2st  # scikit-learn: slow to import

    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise ValueError(
            f"samples: expected shape (M, {reference.shape[-1]}) like the reference, got "
            f"{tuple(samples.shape)}; pass the samples of one observation at a time."
        )
    for name, values in (("reference", reference), ("samples", samples)):
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name}: expected finite values, got NaN or infinite ones.")
    score = sbi_c2st(reference.double(), samples.double(), seed=seed, classifier=classifier)
    return float(score)


def mode_masses(labels: Tensor, num_modes: int) -> Tensor:
    """Share of samples in each mode: labels `(N,)` in 0 … num_modes − 1 → `(num_modes,)`."""
    return torch.bincount(labels, minlength=num_modes).double() / max(1, len(labels))


def mode_l1(task: Task, x: Tensor, reference: Tensor, samples: Tensor) -> float:
    """L1 distance, 0 to 2, of the mass per mode to the reference's; NaN on unimodal tasks.

    Args:
        task: Says which mode a θ belongs to.
        x: One observation, `(dim_x,)`.
        reference: Samples of the true posterior, `(N, D)`.
        samples: Samples of the approximation, `(M, D)`.
    """
    expected, found = task.modes(reference, x), task.modes(samples, x)
    if expected is None or found is None:
        return math.nan
    num_modes = int(torch.cat([expected, found]).max()) + 1
    difference = mode_masses(found, num_modes) - mode_masses(expected, num_modes)
    return float(difference.abs().sum())


def true_divergences(
    task: Task, theta_true: Tensor, x: Tensor, draws: PairDraws, inside: Tensor
) -> Divergences:
    """Forward, reverse and Jeffreys divergence from the exact posterior, by its likelihood.

    The approximation is what the user samples from: the estimator cut to the prior, p̄. Per pair
    log p(θ*) p(x|θ*) − log p̄(θ*|x) estimates KL(π‖p̄) + log p(x), and over draws θ ∼ p̄,
    log p̄ − log p(θ) p(x|θ) estimates KL(p̄‖π) − log p(x): the unknown evidence cancels in the sum.

    Args:
        task: With its likelihood.
        theta_true: θ* of the pairs, `(B, D)`.
        x: Their observations, `(B, dim_x)`.
        draws: Normalised draws at the same x.
        inside: Whether they lie in the prior's support, `(S, B)`.
    """
    num_draws = min(_DRAWS_FOR_DIVERGENCE, len(draws.theta))
    # No draw inside: the mass is below what S draws resolve, and is taken as half of one.
    share = inside.double().mean(0).clamp_min(0.5 / len(inside))
    log_true = draws.log_prob_true.double() - share.log()
    forward = task.log_posterior_unnormalised(theta_true, x).double() - log_true
    theta, kept = draws.theta[:num_draws], inside[:num_draws]
    log_joint = task.log_posterior_unnormalised(theta, x).double()
    log_draws = draws.log_prob[:num_draws].double() - share.log()
    usable = kept & torch.isfinite(log_joint)
    ratio = torch.where(usable, log_draws - log_joint, 0.0)
    per_x = ratio.sum(0) / usable.sum(0)
    reverse = float(per_x[usable.any(0)].mean())
    zero = float((kept & ~torch.isfinite(log_joint)).sum() / kept.sum().clamp_min(1))
    forward_mean = float(forward.mean())
    return Divergences(forward_mean, reverse, forward_mean + reverse, zero)


def evaluate_pairs(task: Task, theta_true: Tensor, x: Tensor, draws: PairDraws) -> dict[str, float]:
    """Everything measured on fresh pairs (θ*, x), `(B, D)` and `(B, dim_x)`, by name.

    Without a normalised density there are no divergences, and the NLL is NaN.
    """
    inside = inside_prior(task.prior, draws.theta)
    known = held_out_nll(draws.log_prob_true) if draws.normalised else (math.nan, math.nan)
    values = {"nll": known[0], "nll_se": known[1], "leakage": leakage(inside)}
    for entry in expected_coverage(draws, inside):
        name = f"coverage_{100 * entry.level:g}"
        values |= {name: entry.value, f"{name}_se": entry.standard_error}
    if draws.normalised:
        found = true_divergences(task, theta_true, x, draws, inside)
        values |= {"kl_forward": found.forward, "kl_reverse": found.reverse}
        values |= {"jeffreys": found.jeffreys, "zero_likelihood": found.zero_likelihood}
    return values
