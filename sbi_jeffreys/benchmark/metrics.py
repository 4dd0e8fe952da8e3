r"""How good an approximate posterior p_φ(θ|x) is, by several measures because each can mislead.

Per observation, against reference samples: C2ST (0.5 is perfect) and the mass per mode. Over fresh
pairs (θ*, x) from the joint: held-out NLL, expected coverage of HPD regions, leakage, and, since
the tasks have likelihoods, the true Jeffreys divergence.

C2ST does not distinguish overconfident from conservative (Hermans et al. 2022, arXiv 2110.06581);
the report always shows it with coverage. Draws are `(S, B, D)`, S of them for each of B x.
"""

from __future__ import annotations

import math

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

_DRAWS_FOR_DIVERGENCE = 100  # per pair; two of the likelihoods solve an ODE for every draw


def c2st(reference: Tensor, samples: Tensor, seed: int = 1, classifier: str = "rf") -> float:
    """Accuracy of a classifier between two sets of samples, 5-fold: sbi's, z-scored, seeded.

    Args:
        reference: Samples of the true posterior, `(N, D)`; they set the z-score, so that it is
            the same for every method.
        samples: Samples of the approximation, `(M, D)`.
        seed: Seed of the classifier and of the folds.
        classifier: "rf" (random forest, sbi's default) or "mlp" (sbi's MLP, which
            stops early where sbibm's does not; slower).

    Returns:
        Between 0 and 1; 0.5 where the classifier cannot distinguish them.

    Raises:
        ValueError: If the shapes differ, or a value is not finite.
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


def mode_l1(task: Task, x: Tensor, reference: Tensor, samples: Tensor) -> float:
    """L1 distance, 0 to 2, of the mass per mode to the reference's; NaN on unimodal tasks.

    Args:
        task: Assigns each θ to a mode.
        x: One observation, `(dim_x,)`.
        reference: Samples of the true posterior, `(N, D)`.
        samples: Samples of the approximation, `(M, D)`.
    """
    labels = [task.modes(theta, x) for theta in (reference, samples)]
    known = [found for found in labels if found is not None]
    if len(known) < 2:
        return math.nan
    num_modes = int(torch.cat(known).max()) + 1
    expected, found = (
        torch.bincount(modes, minlength=num_modes).double() / len(modes) for modes in known
    )
    return float((found - expected).abs().sum())


def true_divergences(
    task: Task, theta_true: Tensor, x: Tensor, draws: PairDraws, inside: Tensor
) -> dict[str, float]:
    """Forward, reverse and Jeffreys divergence from the exact posterior, by its likelihood.

    The approximation is what the user samples from: the estimator cut to the prior, p̄. Per pair
    log p(θ*) p(x|θ*) − log p̄(θ*|x) estimates KL(π‖p̄) + log p(x), and over draws θ ∼ p̄,
    log p̄ − log p(θ) p(x|θ) estimates KL(p̄‖π) − log p(x): the unknown evidence cancels in the sum.

    Args:
        task: The task, with its likelihood.
        theta_true: θ* of the pairs, `(B, D)`.
        x: Their observations, `(B, dim_x)`.
        draws: Normalised draws at the same x.
        inside: Whether they lie in the prior's support, `(S, B)`.

    Returns:
        Averages over the pairs, in nats. `kl_forward`: KL(π‖p̄) + E log p(x), comparable between
        methods on the same pairs. `kl_reverse`: KL(p̄‖π) − E log p(x), over the draws with positive
        likelihood. `jeffreys`: the true Jeffreys divergence, their sum over the pairs with such a
        draw: over different pairs, log p(x) would not cancel. `zero_likelihood`: share of draws
        with likelihood zero, where KL(p̄‖π) is in fact infinite.
    """
    num_draws = min(_DRAWS_FOR_DIVERGENCE, len(draws.theta))
    # Without a draw inside, the mass is below what S draws resolve, and is taken as half of one.
    share = inside.double().mean(0).clamp_min(0.5 / len(inside))
    log_true = draws.log_prob_true.double() - share.log()
    forward = task.log_posterior_unnormalised(theta_true, x).double() - log_true
    theta, kept = draws.theta[:num_draws], inside[:num_draws]
    log_joint = task.log_posterior_unnormalised(theta, x).double()
    log_draws = draws.log_prob[:num_draws].double() - share.log()
    usable = kept & torch.isfinite(log_joint)
    reverse = torch.where(usable, log_draws - log_joint, 0.0).sum(0) / usable.sum(0)
    pairs = usable.any(0)
    zero = float((kept & ~torch.isfinite(log_joint)).sum() / kept.sum().clamp_min(1))
    return {
        "kl_forward": float(forward.mean()),
        "kl_reverse": float(reverse[pairs].mean()),
        "jeffreys": float((forward + reverse)[pairs].mean()),
        "zero_likelihood": zero,
    }


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
        values |= true_divergences(task, theta_true, x, draws, inside)
    return values
