"""sbi's posterior of a density estimator, for any prior."""

from __future__ import annotations

from typing import Any

from sbi.inference.posteriors import DirectPosterior
from sbi.utils import mcmc_transform
from torch.distributions import Distribution, Transform

__all__ = ["NO_BIJECTION", "AnyPriorPosterior", "transform_of"]

#: What sbi raises where torch has no bijection to the prior's support, or one of other dimensions.
NO_BIJECTION = (NotImplementedError, AssertionError)


class AnyPriorPosterior(DirectPosterior):
    """sbi's `DirectPosterior`, also where there is no bijection to the prior's support.

    Only `map` uses the bijection; without one, `map` climbs in the space of θ itself.

    Args:
        **kwargs: As for `DirectPosterior`.
    """

    def __init__(self, **kwargs: Any) -> None:
        try:
            super().__init__(**kwargs)
        except NO_BIJECTION:
            kwargs["enable_transform"] = False
            super().__init__(**kwargs)


def transform_of(prior: Distribution, device: str) -> Transform:
    """sbi's transform from the prior's support to ℝᴰ; the identity where there is none."""
    try:
        return mcmc_transform(prior, device=device)
    except NO_BIJECTION:
        return mcmc_transform(prior, device=device, enable_transform=False)
