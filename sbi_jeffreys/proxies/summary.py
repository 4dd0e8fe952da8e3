"""Likelihood of a user's summaries: q̃_ψ(θ, x) = p(θ) ℓ_ψ(s(x)|θ), s an embedding net that is fixed.

An embedding net without trainable parameters (a Fourier transform, principal components, a
pretrained network) is the user's choice of what matters about x, and the proxy uses it as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

from torch import Tensor, nn
from torch.distributions import Distribution

from sbi_jeffreys.networks.embedding import check_summaries, summaries_of
from sbi_jeffreys.networks.fitting import FitConfig
from sbi_jeffreys.networks.transforms import varying
from sbi_jeffreys.proxies.experts import Expert
from sbi_jeffreys.proxies.experts.base import OnEpoch
from sbi_jeffreys.proxies.likelihood import LikelihoodProxy

__all__ = ["SummaryLikelihoodProxy"]


class SummaryLikelihoodProxy(LikelihoodProxy):
    """A likelihood proxy of s(x), which can be evaluated at x but draws none.

    Args:
        prior: Prior p(θ).
        embedding: x `(B, *x_shape)` → summaries `(B, ·)`, copied.
        experts, config, num_folds: As for `LikelihoodProxy`.
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
        summaries = summaries_of(self.embedding, x)
        check_summaries(summaries, x)
        if not bool(varying(summaries[train_indices]).any()):
            raise ValueError(
                "x: expected the embedding net to give summaries that vary, got the same ones of "
                f"all {len(train_indices)} training simulations; use another embedding net."
            )
        super().fit(theta, summaries, train_indices, val_indices, on_epoch, max_epochs, patience)
        return self

    @property
    def remark(self) -> str:
        """What the likelihood is a density of, in words."""
        more = super().remark
        return "of the embedding net's summaries" + (f"; {more}" if more else "")

    def log_factor(self, theta: Tensor, x: Tensor) -> Tensor:
        """log ℓ_ψ(s(x)|θ); see `Proxy.log_factor`."""
        return super().log_factor(theta, summaries_of(self.embedding, x))

    def sample_joint(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Not available: summaries do not determine x."""
        raise NotImplementedError("A likelihood of summaries has no draws of x.")

    def sample_given(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Not available: summaries do not determine x."""
        raise NotImplementedError("A likelihood of summaries has no draws of x.")
