"""What every kind of expert offers: settings that can be fitted, and the fitted density of x."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sbi_jeffreys.networks.fitting import FitConfig, FitResult
from sbi_jeffreys.networks.together import FitTask, fit_together
from sbi_jeffreys.networks.transforms import MarginalTransform

__all__ = [
    "FEW_VALUES",
    "NARROW",
    "Expert",
    "ExpertData",
    "FittedExpert",
    "NetworkExpert",
    "OnEpoch",
    "Prepared",
    "fit_networks",
    "scales_of",
]

OnEpoch = Callable[[int, float], object] | None

FEW_VALUES = 10  # draws of an integer column that spans less are clamped to its observed range
NARROW = 10  # most columns of x of which every one has to be inside the box of `set_bounds`


def scales_of(x: Tensor) -> tuple[MarginalTransform, MarginalTransform]:
    """The marginal transform chosen for x `(N, dim_x)`, and the one that keeps the scale of x."""
    return MarginalTransform.fit(x), MarginalTransform.fit(x, choose=False)


class FittedExpert(nn.Module):
    """A density of x given the transformed parameters z, ℓ(x|z) = ℓ(T(x)|z) |∂T/∂x|.

    Args:
        net: Density estimator of y = T(x), with the methods `log_prob(y, z)`, y `(S, B, dim_y)`,
            and `sample(sample_shape, z)` of sbi's estimators.
        transform: T.
        result: Held-out loss and epochs of the fit.
        held_out: log ℓ(x|z) of the held-out pairs, shape `(M,)`.
        spec: The settings that it was fitted from.
    """

    lower: Tensor
    upper: Tensor
    few: Tensor
    values: Tensor

    def __init__(
        self,
        net: nn.Module,
        transform: MarginalTransform,
        result: FitResult,
        held_out: Tensor,
        spec: Expert,
    ) -> None:
        super().__init__()
        self.net: Any = net
        self.transform = transform
        self.result, self.held_out, self.spec = result, held_out, spec

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """log ℓ(x|z) as a density of x for pairs `(N, ·)`, shape `(N,)`."""
        return self.net.log_prob(self.transform(x).unsqueeze(0), z)[0] + self.transform.log_det(x)

    def log_probability(self, x: Tensor, z: Tensor, num_draws: int = 16) -> Tensor:
        """As `log_prob`, but averaged over the cells of integers and atoms, to compare experts.

        The density at the middle of a cell alone overrates a net that is peaked there.
        """
        # mutant: cells-by-their-middle
        if not bool(self.transform.has_cells.any()) or getattr(self.net, "knows_cells", False):
            return self.log_prob(x, z)
        draws = []
        for _ in range(num_draws):
            y, log_det = self.transform.dequantised(x)
            draws.append(self.net.log_prob(y.unsqueeze(0), z)[0] + log_det)
        return torch.logsumexp(torch.stack(draws), dim=0) - math.log(num_draws)

    def set_bounds(self, x: Tensor) -> None:
        """Take the support of draws from simulations x `(N, dim_x)`; see `sample`.

        The support is the box of T(x), once widened by a tenth and once by its own width, and, for
        integer columns with few values, their observed range.
        """
        low, high = self.transform.bounds(x)
        margins = (high - low) * torch.tensor([[0.1], [1.0]]).to(low)
        self.register_buffer("lower", low - margins)
        self.register_buffer("upper", high + margins)
        kept = x[:, self.transform.keep]
        values = torch.stack([kept.amin(dim=0), kept.amax(dim=0)])
        few = self.transform.integer & (values[1] - values[0] < FEW_VALUES)
        self.register_buffer("few", few)
        self.register_buffer("values", values[:, few])

    def sample(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """A draw of x for each row of z, and whether it is plausible.

        An estimator extrapolates outside the simulations, and the main would be trained on draws
        that resemble no simulation. Integer columns with few observed values, such as binary ones,
        are clamped to their observed range. A draw is plausible if every other column
        is inside the box widened by a tenth; of more than ten columns, a tenth may be outside that
        box, because simulations themselves often are in one column. No other column may be outside
        the box widened by its own width, and none may be NaN.

        Returns:
            Shapes `(N, dim_x)` and `(N,)`.
        """
        y = self.net.sample(torch.Size((1,)), z)[0]
        x = self.transform.inverse(y)
        columns = self.transform.keep[self.few]
        # mutant: binary-draws-not-clamped
        x[:, columns] = torch.minimum(torch.maximum(x[:, columns], self.values[0]), self.values[1])
        # A y beyond the smallest count, or beyond an atom at a limit, counts as that value, however
        # far out y is: what is judged is the value's own T. The same holds for a clamped value.
        # mutant: latent-counts-dropped
        y = torch.where(self.transform.in_cell(x[:, self.transform.keep]), self.transform(x), y)
        allowed = y.shape[1] // NARROW if y.shape[1] > NARROW else 0  # mutant: wide-draws-dropped
        outside = (y < self.lower[0]) | (y > self.upper[0])
        near = ((y >= self.lower[1]) & (y <= self.upper[1])).all(dim=1)
        return x, near & (outside.sum(dim=1) <= allowed)


@dataclass(frozen=True)
class ExpertData:
    """What experts are fitted to, and how.

    Attributes:
        z: Transformed parameters `(N, D)`.
        x: Simulations `(N, dim_x)`.
        train: Indices of training pairs.
        val: Indices of held-out pairs.
        config: How networks are fitted.
        scales: The marginal transform chosen for x, and the one that keeps its scale.
        on_epoch: Called after every epoch of a network.
    """

    z: Tensor
    x: Tensor
    train: Tensor
    val: Tensor
    config: FitConfig
    scales: tuple[MarginalTransform, MarginalTransform]
    on_epoch: OnEpoch = None

    def fitted(
        self,
        spec: Expert,
        net: nn.Module,
        transform: MarginalTransform,
        result: FitResult | None = None,
    ) -> FittedExpert:
        """A net after its fit, evaluated on held-out pairs; a closed form has no `result`."""
        expert = FittedExpert(net, transform, FitResult(0.0, 0), self.z.new_zeros(0), spec)
        with torch.no_grad():
            expert.held_out = expert.log_probability(self.x[self.val], self.z[self.val])
        expert.result = result or FitResult(-float(expert.held_out.mean()), 0)
        return expert


class Expert(ABC):
    """A kind of expert; its instances are frozen dataclasses of settings.

    A new kind is a subclass in a file of its own, and one line in `experts.EXPERT_KINDS`.
    """

    #: Whether the expert is fitted in closed form. Such experts are fitted first.
    closed_form: ClassVar[bool] = False
    #: Whether draws take as many passes as there are outputs, or the cost grows as the square of
    #: their number. Such experts come last and may be skipped.
    expensive: ClassVar[bool] = False
    #: Whether the density can be as steep as the edges of an atom's cell require.
    suits_atoms: bool = False
    #: Whether the expert models the residuals of one in closed form, in place of x itself.
    around_regression: bool = False

    @property
    def name(self) -> str:
        """The expert's name in reports."""
        return type(self).__name__.removesuffix("Expert").lower()

    @property
    def averaged(self) -> bool:
        """Whether fits to folds are averaged; if not, one more fit is to all training pairs."""
        return not self.closed_form

    @property
    def architecture(self) -> Hashable:
        """A key: networks whose keys are equal, and not None, can be fitted together."""
        return None

    @abstractmethod
    def fit(
        self, data: ExpertData, before: Sequence[FittedExpert], abandon_above: float
    ) -> FittedExpert:
        """Fit to the training pairs; `data.fitted(self, net, transform)` makes the result.

        Args:
            data: Pairs, scales and settings.
            before: The experts fitted to the same pairs so far.
            abandon_above: Held-out loss after twenty epochs above which the fit may be abandoned.
        """

    def suits(self, data: ExpertData) -> bool:
        """Whether the training pairs suffice for the expert, and it can model this kind of x."""
        return True

    def on_one_scale(self) -> Expert:
        """The settings where x keeps its own scale; experts that are then equal are fitted once."""
        return self


@dataclass(frozen=True)
class Prepared:
    """A network that is ready to be fitted.

    Attributes:
        task: The network and what it is fitted to.
        finish: Makes the expert, once the network is fitted, from the fit's result.
    """

    task: FitTask
    finish: Callable[[FitResult], FittedExpert]


class NetworkExpert(Expert):
    """An expert that is a network, fitted by gradient steps."""

    @abstractmethod
    def prepare(
        self, data: ExpertData, before: Sequence[FittedExpert], abandon_above: float
    ) -> Prepared:
        """Build the network and what it is fitted to; arguments as those of `fit`."""

    def fit(
        self, data: ExpertData, before: Sequence[FittedExpert], abandon_above: float
    ) -> FittedExpert:
        """Fit the network, or abandon the fit early; see `Expert.fit`."""
        (expert,) = fit_networks([self.prepare(data, before, abandon_above)], data.on_epoch)
        return expert


def fit_networks(
    prepared: Sequence[Prepared], on_epoch: OnEpoch = None, together: bool = True
) -> list[FittedExpert]:
    """Fit networks, which have one architecture if `together`, and make experts of them."""
    tasks = [one.task for one in prepared]
    # mutant: one-network-after-another
    results = fit_together(tasks, on_epoch) if together else [t.fit(on_epoch) for t in tasks]
    return [one.finish(result) for one, result in zip(prepared, results)]
