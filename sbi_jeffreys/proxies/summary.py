"""Likelihood of a user's summaries: q̃_ψ(θ, x) = p(θ) ℓ_ψ(s(x)|θ), s an embedding net that is fixed.

An embedding net without trainable parameters (a Fourier transform, principal components, a
pretrained network) is the user's choice of what matters about x, and the proxy uses it as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from sbi_jeffreys.networks.fitting import FitConfig
from sbi_jeffreys.proxies.experts import Expert
from sbi_jeffreys.proxies.experts.base import OnEpoch
from sbi_jeffreys.proxies.likelihood import LikelihoodProxy

__all__ = ["SummaryLikelihoodProxy"]

_CHUNK = 2_000  # observations embedded at once


class SummaryLikelihoodProxy(LikelihoodProxy):
    """A likelihood proxy of s(x), which can be evaluated at x but draws none.

    Args:
        prior: Prior p(θ).
        embedding: x `(B, *x_shape)` → summaries `(B, ·)`, copied.
        experts, config, num_folds: As of `LikelihoodProxy`.
    """

    can_sample = False

    def __init__(
        self,
        prior: Distribution,
        embedding: nn.Module,
        experts: Sequence[Expert] | None = None,
        config: FitConfig | None = None,
        num_folds: int | None = None,
    ) -> None:
        super().__init__(prior, experts, config, num_folds)
        self.embedding = deepcopy(embedding).eval()

    @torch.no_grad()
    def summarise(self, x: Tensor) -> Tensor:
        """s(x) of `(B, *x_shape)`, `(B, S)`."""
        return torch.cat([self.embedding(part).flatten(1) for part in x.split(_CHUNK)])

    def fit(
        self,
        theta: Tensor,
        x: Tensor,
        train_indices: Tensor,
        val_indices: Tensor,
        on_epoch: OnEpoch = None,
        max_epochs: int | None = None,
        patience: int | None = None,
    ) -> SummaryLikelihoodProxy:
        """Fit to summaries of the simulations; see `Proxy.fit` for the arguments.

        Raises:
            ValueError: If summaries of x are not finite, or constant.
        """
        summaries = self.summarise(x)
        bad = int((~torch.isfinite(summaries)).any(dim=1).sum())
        if bad:
            raise ValueError(
                f"x: expected the embedding net to give finite summaries, got NaN or inf for {bad} "
                f"of {len(summaries)} simulations; drop those, or mend the embedding net."
            )
        super().fit(theta, summaries, train_indices, val_indices, on_epoch, max_epochs, patience)
        return self

    @property
    def remark(self) -> str:
        """What the likelihood is of."""
        more = super().remark
        return "of the embedding net's summaries" + (f"; {more}" if more else "")

    def log_factor(self, theta: Tensor, x: Tensor) -> Tensor:
        """log ℓ_ψ(s(x)|θ); see `Proxy.log_factor`."""
        return super().log_factor(theta, self.summarise(x))

    def sample_joint(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Not available: summaries do not determine x."""
        raise NotImplementedError("A likelihood of summaries has no draws of x.")

    def sample_given(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Not available: summaries do not determine x."""
        raise NotImplementedError("A likelihood of summaries has no draws of x.")
