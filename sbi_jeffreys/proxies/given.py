r"""Given proxy: q̃(θ, x) = p(θ) ℓ(x|θ) with an ℓ that the user already has.

ℓ comes from a log-likelihood function, or from a trained estimator of sbi's: NLE (a density of x
given θ) or NRE (a log-ratio, which is a log-likelihood up to a function of x). With the exact
likelihood, q = π, and the reverse term is the true reverse KL divergence.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from sbi_jeffreys._checks import check_callable, failed_rows
from sbi_jeffreys.proxies.base import Proxy

__all__ = ["GivenProxy"]

_CHUNK = 20_000  # pairs per call of the given function: bounds memory
_MAX_CHECKED = 100  # simulations the function is tried on before training relies on it
_FAR = 10  # ranges of the simulated x; a draw further away is not like them

LogLikelihood = Callable[[Tensor, Tensor], Tensor]
Sampler = Callable[[Tensor], Tensor]


class GivenProxy(Proxy):
    """p(θ) times a likelihood that is handed over; nothing is fitted.

    Args:
        prior: Prior p(θ).
        log_likelihood: Maps θ `(N, D)` and x `(N, *x_shape)` to log p(x|θ) `(N,)`, up to a function
            of x. −∞ is allowed, NaN and +∞ are not. It is never called outside the prior's support.
            Pickling the trainer pickles the function, so it should be defined at the top level of
            a module, or be an `nn.Module`; a lambda cannot be pickled.
        sample_x: Maps θ `(N, D)` to x `(N, *x_shape)`, one draw from the same likelihood for each
            θ. With `sample_x`, the symmetric stage trains on unlimited pairs; leave it out where
            drawing x is expensive.

    Raises:
        TypeError: If either is not callable.

    Example:
        >>> import torch
        >>> from torch.distributions import MultivariateNormal
        >>> prior = MultivariateNormal(torch.zeros(2), torch.eye(2))
        >>> proxy = GivenProxy(prior, lambda theta, x: -0.5 * ((x - theta) ** 2).sum(-1))
        >>> proxy.log_potential(torch.zeros(5, 3, 2), torch.zeros(3, 2)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self, prior: Distribution, log_likelihood: LogLikelihood, sample_x: Sampler | None = None
    ) -> None:
        super().__init__(prior)
        remedy = "for a trained sbi estimator use GivenProxy.from_nle or GivenProxy.from_nre"
        check_callable("log_likelihood", log_likelihood, "callable", remedy)
        if sample_x is not None:
            check_callable("sample_x", sample_x, "callable", remedy)
        self.log_likelihood, self.sample_x = log_likelihood, sample_x
        # A function without a sampler may be a likelihood up to a function of x, or a ratio.
        self.can_sample = self.has_evidence = sample_x is not None

    @classmethod
    def from_nle(cls, prior: Distribution, estimator: Any) -> GivenProxy:
        """Proxy from what sbi's NLE returns from `train`: a density estimator of x given θ.

        The estimator is copied and frozen. Where it gives NaN, as far outside its training data,
        the proxy has no mass.

        Raises:
            TypeError: If the estimator lacks `log_prob` or `sample`.
        """
        _require(estimator, ("log_prob", "sample"), "estimator", "NLE")
        likelihood = _NLELikelihood(estimator)
        return cls(prior, likelihood, likelihood.sample)

    @classmethod
    def from_nre(cls, prior: Distribution, ratio_estimator: Any) -> GivenProxy:
        """Proxy from what sbi's NRE returns from `train`: a ratio estimator of θ and x.

        The estimator is copied and frozen. Where it gives NaN, as far outside its training data,
        the proxy has no mass. The proxy cannot draw x.

        Raises:
            TypeError: If the estimator lacks `unnormalized_log_ratio`.
        """
        _require(ratio_estimator, ("unnormalized_log_ratio",), "ratio_estimator", "NRE")
        return cls(prior, _NRERatio(ratio_estimator))

    def log_factor(self, theta: Tensor, x: Tensor) -> Tensor:
        """log p(x|θ) as given, checked; see `Proxy.log_factor`.

        Raises:
            TypeError: If the function returns no tensor.
            ValueError: If the function returns another shape, NaN or +∞, or values without a
                gradient where one is asked for.
        """
        rows = max(1, _CHUNK // max(1, theta.shape[1]))
        parts = [self._evaluate(part, x) for part in theta.split(rows)]
        return torch.cat(parts)

    def _evaluate(self, theta: Tensor, x: Tensor) -> Tensor:
        num, batch = theta.shape[:2]
        flat = theta.reshape(num * batch, -1)
        values = self.log_likelihood(
            flat, x.expand(num, *x.shape).reshape(num * batch, *x.shape[1:])
        )
        _check_values(values, num * batch)
        if torch.is_grad_enabled() and theta.requires_grad and not values.requires_grad:
            raise ValueError(
                "log_likelihood returned values without a gradient to theta, which was asked "
                "for; write it in torch, or use a sampler without gradients (slice_np, rejection)."
            )
        return values.to(theta).reshape(num, batch)

    def fit(
        self,
        theta: Tensor,
        x: Tensor,
        train_indices: Tensor,
        val_indices: Tensor,
        on_epoch: Callable[[int, float], object] | None = None,
        max_epochs: int | None = None,
        patience: int | None = None,
    ) -> GivenProxy:
        """Nothing to fit; the functions are tried on some of the simulations. See `Proxy.fit`.

        Raises:
            ValueError: If `log_likelihood` gives none of these simulations a positive likelihood or
                fails the checks of `log_factor`, or if most draws of `sample_x` at their θ are far
                from all simulated x.
        """
        self.check_prior(theta[train_indices])
        rows = train_indices[:_MAX_CHECKED]
        if self.sample_x is not None:
            self._check_sampler(theta[rows], x)
        with torch.no_grad():
            values = self.log_potential(theta[rows].unsqueeze(0), x[rows])
        if not bool(torch.isfinite(values).any()):
            raise ValueError(
                f"log_likelihood is -inf at all of the {len(rows)} simulations it was tried on: it "
                "does not describe this simulator. Check the order and units of theta and x."
            )
        return self

    @torch.no_grad()
    def sample_joint(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Pairs θ̃ ∼ p(θ), x̃ ∼ p(x|θ̃): shapes `(≤ num_samples, D)`, `(≤ num_samples, *x_shape)`."""
        return self.sample_given(self.sample_prior(num_samples))

    @torch.no_grad()
    def sample_given(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs (θ̃, x̃ ∼ p(x|θ̃)) for given θ̃ `(N, D)`, failed draws dropped.

        Raises:
            NotImplementedError: If no `sample_x` was given.
            ValueError: If `sample_x` returns another number of rows.
        """
        if self.sample_x is None:
            raise NotImplementedError(
                "This GivenProxy cannot draw x: pass sample_x, or use GivenProxy.from_nle."
            )
        x = self._drawn_x(theta)
        usable = ~failed_rows(x)
        return theta[usable], x[usable]

    def _drawn_x(self, theta: Tensor) -> Tensor:
        """What `sample_x` returns, its type and number of rows checked."""
        assert self.sample_x is not None
        x = self.sample_x(theta)
        if not isinstance(x, Tensor) or x.ndim < 2 or len(x) != len(theta):
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"sample_x must return a tensor of shape ({len(theta)}, *x_shape), one x for each "
                f"theta, got {got}."
            )
        return x

    @torch.no_grad()
    def _check_sampler(self, theta: Tensor, x: Tensor) -> None:
        """Require that most draws at simulated θ are in a wide box about all simulations x."""
        with torch.random.fork_rng(devices=[]):
            drawn = self._drawn_x(theta)
        if drawn.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"sample_x must return x of the simulations' shape (N, {_listed(x)}), got "
                f"(N, {_listed(drawn)}); reshape what it returns."
            )
        values = x.flatten(1).nan_to_num(nan=torch.nan, posinf=torch.nan, neginf=torch.nan)
        low = values.nan_to_num(nan=torch.inf).amin(dim=0)
        high = values.nan_to_num(nan=-torch.inf).amax(dim=0)
        margin = _FAR * torch.maximum(high - low, 1e-3 * torch.maximum(low.abs(), high.abs()))
        draws = drawn.flatten(1)
        far = ((draws < low - margin) | (draws > high + margin)).any(dim=1)
        failed = torch.isinf(draws).any(dim=1) | torch.isnan(draws).all(dim=1)
        wrong = int((far | failed).sum())
        if wrong > 0.5 * len(theta):  # mutant: sampler-not-tried
            raise ValueError(
                f"sample_x must draw x like the simulations, got values that are not finite or far "
                f"from all of them ({_FAR} times their range) in {wrong} of {len(theta)} draws at "
                "simulated theta. Check its units and the order of its outputs."
            )


class _NLELikelihood(nn.Module):
    """log ℓ(x|θ) of a density estimator of x given θ, for pairs."""

    def __init__(self, estimator: nn.Module) -> None:
        super().__init__()
        self.estimator = _frozen_copy(estimator)

    def forward(self, theta: Tensor, x: Tensor) -> Tensor:
        log_prob = self.estimator.log_prob(x.unsqueeze(0), theta)  # type: ignore[operator]
        return _nan_to_no_mass(log_prob.reshape(len(theta)))

    def sample(self, theta: Tensor) -> Tensor:
        """One x for each θ, `(N, D)` → `(N, *x_shape)`."""
        shape = torch.Size((1,))
        chunks = [self.estimator.sample(shape, t)[0] for t in theta.split(_CHUNK)]  # type: ignore[operator]
        return torch.cat(chunks)


class _NRERatio(nn.Module):
    """log r(θ, x) of a ratio estimator, for pairs."""

    def __init__(self, ratio_estimator: nn.Module) -> None:
        super().__init__()
        self.ratio_estimator = _frozen_copy(ratio_estimator)

    def forward(self, theta: Tensor, x: Tensor) -> Tensor:
        ratio = self.ratio_estimator.unnormalized_log_ratio(theta, x)  # type: ignore[operator]
        return _nan_to_no_mass(ratio.reshape(len(theta)))


def _listed(x: Tensor) -> str:
    """The shape of one x, in words."""
    return ", ".join(str(size) for size in x.shape[1:])


def _frozen_copy(estimator: nn.Module) -> nn.Module:
    """A copy in evaluation mode without gradients: the user's own stays trainable."""
    return deepcopy(estimator).eval().requires_grad_(False)


def _nan_to_no_mass(values: Tensor) -> Tensor:
    """−∞ for NaN and +∞: a network that overflows far out is no evidence for θ there."""
    return torch.where(torch.isnan(values) | torch.isposinf(values), -torch.inf, values)


def _require(obj: Any, methods: tuple[str, ...], name: str, kind: str) -> None:
    missing = [m for m in methods if not callable(getattr(obj, m, None))]
    if not isinstance(obj, nn.Module) or missing:
        lacks = f"has no {' and no '.join(missing)}" if missing else "is no torch module"
        raise TypeError(
            f"{name} must be the network that sbi's {kind} returns from train(), but "
            f"{type(obj).__name__} {lacks}. A trainer or a posterior is not enough: pass "
            f"`{kind}(prior).append_simulations(theta, x).train()`."
        )


def _check_values(values: Any, num: int) -> None:
    """The contract of a log-likelihood function."""
    if not isinstance(values, Tensor):
        raise TypeError(
            f"log_likelihood must return a tensor of shape ({num},), got {type(values).__name__}; "
            "wrap its result in torch.as_tensor."
        )
    if values.shape != (num,):
        raise ValueError(
            f"log_likelihood must return shape ({num},), one value for each pair of theta and x, "
            f"got {tuple(values.shape)}; sum over the dimensions of x, and keep the batch."
        )
    wrong = torch.isnan(values) | torch.isposinf(values)
    if bool(wrong.any()):
        raise ValueError(
            f"log_likelihood must be finite or -inf, got NaN or +inf for {int(wrong.sum())} of "
            f"{num} pairs; return -inf where x is impossible given theta."
        )
