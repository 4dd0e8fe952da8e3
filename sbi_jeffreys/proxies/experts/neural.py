r"""Neural regression: outputs that are independent given θ, about means that a network gives.

    ℓ(y|z) = Π_j N(y_j; m_j(z), e^{2 s_j(z)}),    m = MLP(z),  s_j(z) = a_j + b_j(z).

This is the right likelihood for a curve or a spectrum, a smooth signal in white noise: all outputs
of a simulation teach the same network, and the cost grows linearly with their number. By default b
is one function for all outputs, b_j = b, so that a single noise level is learned from all of them.
Where outputs have noise of several levels, as two signals do, each has a b_j of its own. An integer
output has the probability of its cell, the normal integrated from T(n) to T(n + 1). Where few
values were observed, the cell of the smallest is open below and that of the largest is open above:
this is an ordered probit, and for binary outputs probit regression. The cell of a smallest value of
zero is always open below. An atom has a probability, too, and its cell is open at a limit of x, as
in a tobit model (Tobin 1958).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sbi_jeffreys._checks import check_bool, check_float, check_int
from sbi_jeffreys.networks.fitting import FitResult
from sbi_jeffreys.networks.together import FitTask
from sbi_jeffreys.networks.transforms import MarginalTransform, scale_of
from sbi_jeffreys.proxies.experts.base import (
    FEW_VALUES,
    ExpertData,
    FittedExpert,
    NetworkExpert,
    Prepared,
)

__all__ = ["NeuralRegression", "NeuralRegressionExpert"]

_FLOOR = -40.0  # nats: the least log probability of a cell
_OPEN = 30.0  # standard deviations: beyond them a cell counts as open
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def _log_probability(low: Tensor, high: Tensor) -> Tensor:
    """log(Φ(high) − Φ(low)) for low < high, without cancellation in either tail."""
    flip = low > 0
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    upper, lower = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    return (upper + torch.log1p(-(lower - upper).exp().clamp_max(1 - 1e-7))).clamp_min(_FLOOR)


class NeuralRegression(nn.Module):
    """A density of y = T(x) given z; see the module.

    Args:
        z: Training parameters `(N, D)`.
        x: Training simulations `(N, dim_x)`.
        transform: T.
        hidden_features: Width of the hidden layers.
        num_layers: Number of hidden layers; with 0, the means are linear in z.
        own_noise: Whether each output has a function b_j of its own.
    """

    #: `log_prob` is that of the cell for integers and atoms, spread evenly over it.
    knows_cells = True
    low: Tensor
    high: Tensor
    centre_z: Tensor
    scale_z: Tensor
    centre_y: Tensor
    scale_y: Tensor

    def __init__(
        self,
        z: Tensor,
        x: Tensor,
        transform: MarginalTransform,
        hidden_features: int,
        num_layers: int,
        own_noise: bool = False,
    ) -> None:
        super().__init__()
        self.transform, y = transform, transform(x)
        for name, values in (("z", z), ("y", y)):
            self.register_buffer(f"centre_{name}", values.mean(dim=0))
            self.register_buffer(f"scale_{name}", scale_of(values))
        widths = [z.shape[1], *[hidden_features] * num_layers]
        layers: list[nn.Module] = []
        for pair in pairwise(widths):
            layers += [nn.Linear(*pair), nn.SiLU()]
        self.mean = nn.Sequential(*layers, nn.Linear(widths[-1], y.shape[1]))
        self.log_scale = nn.Parameter(torch.zeros(y.shape[1]))
        # mutant: one-noise-level-for-all
        width, functions = max(1, hidden_features // 4), y.shape[1] if own_noise else 1
        noise = nn.Sequential(nn.Linear(z.shape[1], width), nn.SiLU(), nn.Linear(width, functions))
        self.noise = noise if num_layers else None
        kept = x[:, transform.keep]
        low, high = kept.amin(dim=0), kept.amax(dim=0)
        # With few values, both extremes are limits, and a smallest zero always is one. Beyond the
        # extremes of other counts, there may be further counts.
        few = high - low < FEW_VALUES
        # mutant: lowest-count-open
        self.register_buffer("low", torch.where(few | (low == 0), low, -torch.inf))
        self.register_buffer("high", torch.where(few, high, torch.inf))
        self.to(z.device)

    def moments(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """m(z) `(*B, dim_y)`, and the standard deviations e^s, `(dim_y,)` or `(*B, dim_y)`."""
        scaled = (z - self.centre_z) / self.scale_z
        log_scale = self.log_scale
        if self.noise is not None:
            log_scale = log_scale + self.noise(scaled)
        return self.centre_y + self.scale_y * self.mean(scaled), log_scale.exp() * self.scale_y

    def cells(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """T at both ends of the cells that y is the middle of, and the log slope of T there.

        Args:
            y: T(x) at the middle of cells, `(*B, dim_y)`.

        Returns:
            Lower and upper ends, log |∂T/∂x|, and whether y is in a cell at all, for the outputs
            that can have cells, `(*B, outputs)` each.
        """
        has = self.transform.has_cells
        values = self.transform.inverse(y)[..., self.transform.keep]
        low, high = self.transform.cell(values)
        integer = self.transform.integer
        low = torch.where(integer & (values <= self.low), -torch.inf, low)
        high = torch.where(integer & (values >= self.high), torch.inf, high)
        slope, inside = self.transform.log_slopes(values), self.transform.in_cell(values)
        return low[..., has], high[..., has], slope[..., has], inside[..., has]

    def log_prob(
        self, y: Tensor, z: Tensor, cells: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    ) -> Tensor:
        """log ℓ(y|z) as a density of y, `(*B,)`, for y `(*B, dim_y)` and z `(B, dim_z)`."""
        mean, deviation = self.moments(z)
        has = self.transform.has_cells
        e = (y - mean) / deviation
        log_prob = -0.5 * e**2 - deviation.log() - _HALF_LOG_2PI
        if not bool(has.any()):
            return log_prob.sum(dim=-1)
        low, high, slope, inside = self.cells(y) if cells is None else cells
        mean, deviation = mean[..., has], deviation.expand_as(mean)[..., has]
        # Open ends are infinite: gradients there would be NaN.
        low, high = (
            torch.where(
                torch.isinf(end), end, (end.nan_to_num(posinf=0.0, neginf=0.0) - mean) / deviation
            ).clamp(-_OPEN, _OPEN)
            for end in (low, high)
        )
        mass = _log_probability(low, high) - slope  # mutant: cells-as-densities
        # mutant: atoms-without-tobit
        mass = torch.where(inside, mass, log_prob[..., has])
        return mass.sum(dim=-1) + log_prob[..., ~has].sum(dim=-1)

    def loss(self, y: Tensor, z: Tensor) -> Tensor:
        """−log ℓ of pairs, shape `(B,)`."""
        return -self.log_prob(y, z)

    def sample(self, sample_shape: torch.Size, z: Tensor) -> Tensor:
        """Draws of y, shape `(*sample_shape, B, dim_y)`; T⁻¹ takes cells to their value."""
        mean, deviation = self.moments(z)
        return mean + deviation * torch.randn(*sample_shape, *mean.shape, device=mean.device)


@dataclass(frozen=True)
class NeuralRegressionExpert(NetworkExpert):
    """A network's mean of every output, and noise that is independent between outputs.

    Attributes:
        hidden_features: Width of the network's hidden layers.
        num_layers: Number of hidden layers; with 0, the means are linear in θ.
        weight_decay: Decoupled weight decay of the fit.
        own_noise: Whether the noise level of each output depends on θ in its own way; otherwise
            those of all outputs depend on θ in the same way.

    Raises:
        TypeError, ValueError: Naming the field, what was expected and what came.
    """

    hidden_features: int = 128
    num_layers: int = 3
    weight_decay: float = 0.0
    own_noise: bool = False

    @property
    def name(self) -> str:
        """The expert's name in reports, which says what its mean is, and its noise."""
        if not self.num_layers:
            return "linear with independent noise"
        return "neural regression" + (" with several noise levels" if self.own_noise else "")

    def __post_init__(self) -> None:
        check_int("hidden_features", self.hidden_features, 1)
        check_int("num_layers", self.num_layers, 0)
        check_float("weight_decay", self.weight_decay, 0.0)
        check_bool("own_noise", self.own_noise)
        if self.own_noise and not self.num_layers:
            raise ValueError(
                "own_noise=True needs hidden layers, got num_layers=0; pass num_layers=1 or more."
            )

    def suits(self, data: ExpertData) -> bool:
        """Whether it is not the same as another expert.

        Without hidden layers it is a regression where x has no cells, and a single output has one
        noise level anyhow.
        """
        if self.own_noise:
            return len(data.scales[0].keep) > 1  # mutant: noise-levels-of-one-output
        return self.num_layers > 0 or bool(data.scales[0].has_cells.any())

    @property
    def architecture(self) -> Hashable:
        """Networks of one size are fitted to several parts of the data together."""
        return self.hidden_features, self.num_layers, self.own_noise

    def prepare(
        self, data: ExpertData, before: Sequence[FittedExpert], abandon_above: float
    ) -> Prepared:
        """Build the network and its targets; see `NetworkExpert.prepare`. No fit is abandoned."""
        transform = data.scales[0]
        z, train = data.z, data.train
        net = NeuralRegression(
            z[train],
            data.x[train],
            transform,
            self.hidden_features,
            self.num_layers,
            self.own_noise,
        )
        y = transform(data.x)
        cells = net.cells(y)
        log_det = float(transform.log_det(data.x[data.val]).mean())

        def batch(indices: Tensor, training: bool) -> tuple[Tensor, ...]:
            own = (y, z, *cells)
            return tuple(tensor[indices] for tensor in own)

        def finish(result: FitResult) -> FittedExpert:
            return data.fitted(self, net, transform, result)

        config = replace(data.config, weight_decay=self.weight_decay)
        return Prepared(FitTask(net, batch, _loss, train, data.val, config, -log_det), finish)


def _loss(net: Any, y: Tensor, z: Tensor, *cells: Tensor) -> Tensor:
    """−log ℓ of pairs with their cells, shape `(B,)`."""
    return -net.log_prob(y, z, cells)
