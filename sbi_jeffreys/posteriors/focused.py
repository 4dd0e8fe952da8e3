r"""A posterior for one observation: the main, refined there by the symmetric objective.

An amortised main is fitted to every x at once, and where the posterior is narrow the amortisation
error is the largest part of what remains. At one observation x_o the target, the log-linear pool
p_φ^{1−β} q_ψ^β of `posteriors.corrected`, can be evaluated as often as needed without new
simulations. A copy of the main minimises

    J = −E_target[log p(θ|x_o)] + E_p[log p(θ|x_o) − log target(θ)]

there. The forward half is the mean over draws that adaptive importance sampling resamples to the
target, so that modes which the main has are not lost. Half of these draws are kept back to judge
the refined main.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.utils.clip_grad import clip_grad_norm_
from torch.optim import Adam
from tqdm.auto import tqdm

from sbi_jeffreys._checks import check_observation, warn
from sbi_jeffreys._sbi import ConditionalDensityEstimator
from sbi_jeffreys.objective import effective_sample_size, forward_term, reverse_vargrad_loss
from sbi_jeffreys.posteriors.candidates import adapted_candidates
from sbi_jeffreys.posteriors.direct import AnyPriorPosterior
from sbi_jeffreys.posteriors.importance import ImportanceQuality, importance_quality
from sbi_jeffreys.posteriors.power import log_pool_at
from sbi_jeffreys.proxies.base import Proxy

__all__ = ["Focus", "FocusedPosterior", "focus"]

_DRAWS, _KEPT = 6_000, 4_000  # draws of the adaptive proposal; draws resampled to the target
_FEW = 100.0  # effective draws below which the target at x_o is not known well enough
_BATCH, _REVERSE_BATCH = 256, 64
_CHECK_EVERY = 50  # steps between two looks at the draws kept back
_JUDGED = 2_000  # draws from which effective sample sizes are computed
_BARRIER = 10.0
_ONE = torch.Size()
_WORTHWHILE = 1.05  # factor on the effective sample size that a refined main must gain


@dataclass(frozen=True)
class Focus:
    """What focusing found.

    Attributes:
        before: Quality of the main's importance weights to the target at x_o.
        after: The same of the posterior that is handed out.
        power: β in (0, 1] of the target.
        kept: Whether the refined main is handed out; else the main as it was.
    """

    before: ImportanceQuality
    after: ImportanceQuality
    power: float
    kept: bool

    def __str__(self) -> str:
        """One line."""
        shares = [
            f"{q.effective_sample_size:.2f} (k {q.pareto_k:.2f})" for q in (self.before, self.after)
        ]
        what = "refined" if self.kept else "not refined, the main as it was"
        return f"{what}; effective share of draws {shares[0]} before, {shares[1]} after"


class FocusedPosterior(AnyPriorPosterior):
    """sbi's posterior of a main that was refined at one observation, its default x.

    Attributes:
        focus: What focusing found.
    """

    def __init__(
        self, main: ConditionalDensityEstimator, prior: Distribution, x_o: Tensor, found: Focus
    ) -> None:
        super().__init__(posterior_estimator=main, prior=prior, device=str(x_o.device))
        self.focus = found
        self.set_default_x(x_o)

    @property
    def x_o(self) -> Tensor:
        """The observation, `(1, *x_shape)`, which moves between devices with the posterior."""
        x_o = self.default_x
        assert x_o is not None
        return x_o

    def sample(self, sample_shape: Any = _ONE, x: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """As for sbi's `DirectPosterior`; an x that is given must be the observation."""
        return super().sample(sample_shape, self._checked(x), *args, **kwargs)

    def log_prob(self, theta: Tensor, x: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """As for sbi's `DirectPosterior`; an x that is given must be the observation."""
        return super().log_prob(theta, self._checked(x), *args, **kwargs)

    def map(self, x: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """As for sbi's `DirectPosterior`; an x that is given must be the observation."""
        return super().map(self._checked(x), *args, **kwargs)

    def set_default_x(self, x: Any) -> Any:
        """Refuse any x but the observation, which is the default x already."""
        if self.default_x is not None:  # None at first, and while sbi's `to` moves the posterior
            self._checked(x)
        return super().set_default_x(x)

    def _checked(self, x: Any) -> Tensor | None:
        """Refuse another observation than the one that the main was refined at."""
        if x is None:
            return None
        given = check_observation(x, self.x_o.shape[1:]).to(self.x_o)
        if not torch.allclose(given, self.x_o):
            raise ValueError(
                "x must be the observation that this posterior was focused at, got another one; "
                "call focus(x) for that one, or use build_posterior()."
            )
        return given

    def sample_batched(self, *args: Any, **kwargs: Any) -> Tensor:
        """Not offered: this posterior is of one observation."""
        raise NotImplementedError(
            "A focused posterior is of one observation: use sample(), or build_posterior()."
        )

    def log_prob_batched(self, *args: Any, **kwargs: Any) -> Tensor:
        """Not offered: this posterior is of one observation."""
        raise NotImplementedError(
            "A focused posterior is of one observation: use log_prob(), or build_posterior()."
        )


# mutant: focused-without-gradients
@torch.inference_mode(False)  # with gradients, whatever the caller's mode
def focus(
    main: ConditionalDensityEstimator,
    proxy: Proxy,
    prior: Distribution,
    x_o: Any,
    power: float,
    num_steps: int,
    learning_rate: float,
    show_progress_bars: bool = True,
) -> FocusedPosterior:
    """Refine a copy of the main at one observation; see `NPE_Jeffreys.focus`."""
    x_o = check_observation(x_o, main.condition_shape).to(next(main.parameters()).device).clone()
    target = _Target(deepcopy(main), proxy, x_o, power)
    drawn, effective = target.draws()
    before = target.quality(main)
    if effective < _FEW:
        warn(
            f"The posterior at x_o was not focused: of {_DRAWS} adaptive draws only "
            f"{effective:.0f} are effective, so that its target is not known well enough. Use "
            "build_corrected_posterior(), more rounds, or ask misspecification_test() whether x_o "
            "is like the simulations.",
        )
        return FocusedPosterior(deepcopy(main), prior, x_o, Focus(before, before, power, False))
    refined = _refined(main, target, drawn, num_steps, learning_rate, show_progress_bars)
    after = target.quality(refined)
    # mutant: worse-main-handed-out
    kept = after.effective_sample_size > _WORTHWHILE * before.effective_sample_size
    found = Focus(before, after if kept else before, power, kept)
    return FocusedPosterior(refined if kept else deepcopy(main), prior, x_o, found)


class _Target:
    """log p_φ^{1−β} q̃_ψ^β at one observation, up to a constant."""

    def __init__(
        self, main: ConditionalDensityEstimator, proxy: Proxy, x_o: Tensor, power: float
    ) -> None:
        self.main, self.proxy, self.x_o = main, proxy, x_o
        self._pool = partial(log_pool_at, main, x_o, power)

    @torch.no_grad()
    def log_prob(self, theta: Tensor) -> Tensor:
        """The unnormalised log target of θ `(K, 1, D)`, `(K, 1)`."""
        return self._pool(theta, self.proxy.log_potential(theta, self.x_o))

    @torch.no_grad()
    def draws(self) -> tuple[Tensor, float]:
        """θ̃ `(K, 1, D)` of the target, and how many of the proposal's draws are effective.

        The first half of them is for the fit, and the second, without common draws, to judge it.
        """
        found = adapted_candidates(self.main, self.proxy, self._pool, self.x_o, _DRAWS)
        theta, log_w = found.theta, found.log_weights
        # mutant: judged-by-what-it-was-fitted-to
        halves = torch.randperm(len(theta), device=theta.device).chunk(2)
        if not all(bool(torch.isfinite(log_w[half]).any()) for half in halves):
            return theta, 0.0
        shares = [torch.softmax(log_w[half, 0], dim=0) for half in halves]
        kept = [half[share.multinomial(_KEPT // 2, True)] for half, share in zip(halves, shares)]
        return theta[torch.cat(kept)], float(effective_sample_size(log_w)[0])

    @torch.no_grad()
    def quality(self, main: ConditionalDensityEstimator) -> ImportanceQuality:
        """Quality of the importance weights from a main to the target."""
        theta = main.sample(torch.Size((_JUDGED,)), self.x_o)
        log_w = self.log_prob(theta) - main.log_prob(theta, self.x_o)
        return importance_quality(log_w[:, 0].nan_to_num(nan=-torch.inf, neginf=-torch.inf))


def _refined(
    main: ConditionalDensityEstimator,
    target: _Target,
    drawn: Tensor,
    num_steps: int,
    learning_rate: float,
    show_progress_bars: bool,
) -> ConditionalDensityEstimator:
    """A copy of the main at its best weights on the half of the draws that is kept back."""
    refined = deepcopy(main)
    fit, judge = drawn.chunk(2)
    weights = [w for w in refined.parameters() if w.requires_grad]
    optimizer = Adam(weights, lr=learning_rate)
    best, best_state = _forward(refined, judge, target.x_o), deepcopy(refined.state_dict())
    bar = tqdm(range(num_steps), desc="Focusing", disable=not show_progress_bars)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        optimizer.zero_grad()
        _loss(refined, target, fit).backward()
        norm = clip_grad_norm_(weights, 5.0)
        if bool(torch.isfinite(norm)):
            optimizer.step()
        if (step + 1) % _CHECK_EVERY == 0 or step + 1 == num_steps:
            value = _forward(refined, judge, target.x_o)
            bar.set_postfix(forward=f"{value:.3f}")
            if value < best:  # mutant: last-weights-of-a-focus
                best, best_state = value, deepcopy(refined.state_dict())
    refined.load_state_dict(best_state)
    refined.eval()
    return refined


def _loss(main: ConditionalDensityEstimator, target: _Target, fit: Tensor) -> Tensor:
    """A loss with the gradient of J: its halves on draws of the target and of the main."""
    rows = torch.randint(len(fit), (_BATCH,))
    with torch.no_grad():
        theta = main.sample(torch.Size((_REVERSE_BATCH,)), target.x_o)
    log_p = main.log_prob(torch.cat([fit[rows], theta]), target.x_o)
    # mutant: focus-without-reverse
    reverse = reverse_vargrad_loss(log_p[_BATCH:], target.log_prob(theta), _BARRIER)
    return forward_term(log_p[:_BATCH]) + reverse


@torch.no_grad()
def _forward(main: ConditionalDensityEstimator, drawn: Tensor, x_o: Tensor) -> float:
    value = float(forward_term(main.log_prob(drawn, x_o)))
    return value if math.isfinite(value) else math.inf
