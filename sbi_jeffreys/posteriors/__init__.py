"""Posteriors besides the main model's own: corrected by the proxy, and the proxy's."""

from sbi_jeffreys.posteriors.corrected import CorrectedPosterior, pooling_power
from sbi_jeffreys.posteriors.proxy import (
    MainProposal,
    ProxyPosterior,
    ProxyPotential,
    SampleWith,
    proxy_posterior,
)

__all__ = [
    "CorrectedPosterior",
    "MainProposal",
    "ProxyPosterior",
    "ProxyPotential",
    "SampleWith",
    "pooling_power",
    "proxy_posterior",
]
