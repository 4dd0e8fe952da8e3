"""The energy's network f_ψ(θ, s(x)) and its settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from sbi.neural_nets import classifier_nn
from torch import Tensor, nn

from sbi_jeffreys._checks import check_bool, check_choice, check_instance, check_int
from sbi_jeffreys.networks.fitting import FitConfig
from sbi_jeffreys.networks.transforms import MarginalTransform

__all__ = ["EnergyConfig", "EnergyNet"]

_MAX_Z = 10.0  # bounds a summary that never varied in training, but does on a new x
_CLASSIFIERS = ("mlp", "resnet")


@dataclass(frozen=True)
class EnergyConfig:
    """What the energy is and how it is fitted.

    Attributes:
        classifier: sbi's `classifier_nn` model for f_ψ: "mlp" (with layer norm) or "resnet".
        hidden_features: Width of f_ψ.
        num_nets: Networks that are fitted one after the other, from different initial weights, and
            averaged.
        share_embedding: Whether s is the main's embedding net as it is, copied and fixed (every x
            is embedded once for the whole fit), or a copy that is trained further with the energy.
        num_contrasts: Contrasts K per pair and step.
        refresh_epochs: Epochs after which the pool of contrasts is drawn anew.
        fit: Optimiser, weight decay, averaging and stopping.
    """

    classifier: Literal["mlp", "resnet"] = "mlp"
    hidden_features: int = 64
    num_nets: int = 3
    share_embedding: bool = False
    num_contrasts: int = 32
    refresh_epochs: int = 10
    fit: FitConfig = field(
        default_factory=lambda: FitConfig(
            learning_rate=1e-3, weight_decay=0.1, max_epochs=100, patience_steps=None
        )
    )

    def __post_init__(self) -> None:
        check_choice("classifier", self.classifier, _CLASSIFIERS)
        check_int("hidden_features", self.hidden_features, 1)
        check_int("num_nets", self.num_nets, 1)
        check_bool("share_embedding", self.share_embedding)
        check_int("num_contrasts", self.num_contrasts, 4)
        check_int("refresh_epochs", self.refresh_epochs, 1)
        check_instance("fit", self.fit, FitConfig)


class _Standardise(nn.Module):
    """(v − mean) / std of the training values, bounded; dimensions that never vary get std 1."""

    mean: Tensor
    std: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        values = values.detach()
        std = values.std(dim=0) if len(values) > 1 else torch.ones_like(values[0])
        # sbi's FCEmbedding ends in a ReLU. Dead units are common, and sbi's own z-scoring would
        # divide their values at a new x by 1e-7.
        varies = std > 1e-6 * values.abs().amax(dim=0)
        self.register_buffer("mean", values.mean(dim=0))
        self.register_buffer("std", torch.where(varies, std, 1.0))

    def forward(self, v: Tensor) -> Tensor:
        return ((v - self.mean) / self.std).clamp(-_MAX_Z, _MAX_Z)


class EnergyNet(nn.Module):
    """f_ψ(θ, s(x)) with everything its input goes through.

    θ is standardised, and skewed dimensions are logged. It is not mapped to the prior's
    unconstrained space: a log-likelihood is as smooth at the edge of a box as elsewhere, and that
    map would send the edge to infinity.

    Args:
        embedding: x `(B, *x_shape)` → summaries; stays in evaluation mode, so that batch norm and
            dropout behave as in the main that it comes from.
        theta: Training parameters `(N, D)`.
        summary: Training summaries `(N, S)`.
        config: The classifier and whether the embedding is trained.
    """

    def __init__(
        self, embedding: nn.Module, theta: Tensor, summary: Tensor, config: EnergyConfig
    ) -> None:
        super().__init__()
        self.theta_transform = MarginalTransform.fit(theta, atoms=False)
        z = self.theta_transform(theta)
        self.scale_theta, self.scale_summary = _Standardise(z), _Standardise(summary)
        build = classifier_nn(
            config.classifier,
            z_score_theta="none",
            z_score_x="none",
            hidden_features=config.hidden_features,
        )
        self.head = build(z[:2].cpu(), summary[:2].cpu()).to(theta)
        self.embedding = embedding
        if config.share_embedding:
            self.embedding.requires_grad_(False)
        self.embedding.eval()

    def train(self, mode: bool = True) -> EnergyNet:
        super().train(mode)
        self.embedding.eval()
        return self

    def summarise(self, x: Tensor) -> Tensor:
        """s(x), shape `(B, S)`."""
        return self.embedding(x).flatten(1)

    def forward(self, theta: Tensor, summary: Tensor) -> Tensor:
        """f_ψ of θ `(K, B, D)` and summaries `(B, S)`, shape `(K, B)`."""
        z = self.scale_theta(self.theta_transform(theta))
        s = self.scale_summary(summary).expand(*z.shape[:2], -1)
        return self.head(z, s)
