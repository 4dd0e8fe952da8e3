"""Posteriors besides the main model's own: corrected by the proxy, and the proxy's."""

from sbi_jeffreys.posteriors.corrected import CorrectedPosterior
from sbi_jeffreys.posteriors.importance import ImportanceQuality, importance_quality, pareto_k
from sbi_jeffreys.posteriors.power import best_power, pooling_power
from sbi_jeffreys.posteriors.proxy import (
    ProxyPosterior,
    ProxyPotential,
    SampleWith,
    proxy_posterior,
)

__all__ = [
    "CorrectedPosterior",
    "ImportanceQuality",
    "ProxyPosterior",
    "ProxyPotential",
    "SampleWith",
    "best_power",
    "importance_quality",
    "pareto_k",
    "pooling_power",
    "proxy_posterior",
]
