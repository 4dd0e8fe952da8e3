r"""Which few directions of a wide x depend on θ, as a neural regression finds them.

Errors of a thousand regression means add up as if they were independent, and flows of a thousand
outputs are out of reach. The means of a smooth signal span a few directions, though. Their
principal components, in units of the noise, are kept as far as they predict held-out x. The
coordinates in these directions and the size of the rest, which is noise, are ten or twenty numbers,
and a density of them is fitted in place of one of x (`networks.summaries`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sbi_jeffreys.networks.summaries import LinearSummaries
from sbi_jeffreys.networks.transforms import MarginalTransform
from sbi_jeffreys.proxies.experts import REGRESSIONS, FlowExpert, RegressionExpert
from sbi_jeffreys.proxies.experts.base import ExpertData, FittedExpert
from sbi_jeffreys.proxies.experts.fit import fit_to
from sbi_jeffreys.proxies.experts.neural import NeuralRegression, NeuralRegressionExpert
from sbi_jeffreys.proxies.experts.regression import CLEARLY, paired_gain
from sbi_jeffreys.proxies.screening import WIDE, sums_of_squares
from sbi_jeffreys.proxies.stacking import stacking_weights

__all__ = ["Compression", "fit_compressed"]

#: Regressions of x itself that, with the neural one, must not predict x better than summaries do.
_RIVALS = (RegressionExpert(1, kernel=True), NeuralRegressionExpert(own_noise=True))
#: Experts of the summaries. Most weight goes to regressions, and each flow takes several seconds.
_EXPERTS = (
    *REGRESSIONS,
    NeuralRegressionExpert(weight_decay=0.3),
    NeuralRegressionExpert(hidden_features=256, num_layers=2),
    FlowExpert("maf", weight_decay=0.3, around_regression=True),
    FlowExpert("maf", weight_decay=0.3),
)

_FEW = 3  # outputs for each direction, at least: nearly as many directions save nothing
# R² above which the direction of the rest is taken to depend on θ: R² is .01 to .19 for curves in
# white noise, and .4 for two series each of which has a noise level of its own.
_UNEVEN = 0.3
_LEAST = 1e-12


class Compression(nn.Module):
    """x ↔ linear summaries of T(x), and the direction of the rest, the part outside their span.

    Args:
        transform: T, without cells.
        summaries: Linear summaries of T(x).
        x: Training simulations `(N, dim_x)`; draws take the direction of the rest from them.
    """

    rest: Tensor

    def __init__(self, transform: MarginalTransform, summaries: LinearSummaries, x: Tensor) -> None:
        super().__init__()
        self.transform, self.summaries = transform, summaries
        self.register_buffer("rest", summaries.split(transform(x))[1])

    def forward(self, x: Tensor) -> Tensor:
        """Summaries of x `(*B, dim_x)`, `(*B, k + 1)`."""
        return self.summaries(self.transform(x))

    def draw(self, summaries: Tensor) -> Tensor:
        """An x `(B, dim_x)` with each of these summaries `(B, k + 1)`."""
        rows = torch.randint(len(self.rest), (len(summaries),), device=summaries.device)
        return self.transform.inverse(self.summaries.join(summaries, self.rest[rows]))

    def log_det(self, x: Tensor) -> Tensor:
        """log density of x over that of its summaries, `(*B,)`."""
        return self.summaries.log_det(self.transform(x)) + self.transform.log_det(x)


@torch.no_grad()
def _directions(net: NeuralRegression, y: Tensor, data: ExpertData) -> tuple[Tensor, Tensor]:
    """The outputs' scales `(D,)`, and the directions that predict held-out y, `(D, k)`.

    There are as many as give the predictions their largest gain in likelihood over constants.
    """
    scale = net.log_scale.exp() * net.scale_y
    mean, deviation = net.moments(data.z)
    noise = (deviation / scale)[:, :1]  # factor of each simulation, for all outputs
    signal = (mean - net.centre_y) / scale / noise
    white = (y - net.centre_y) / scale / noise
    basis = torch.linalg.svd(signal[data.train].double(), full_matrices=False)[2].T.to(y)
    observed, predicted = white[data.val] @ basis, signal[data.val] @ basis
    residual, observed = observed - predicted, observed - observed.mean(dim=0)
    before, after = observed.square().mean(dim=0), residual.square().mean(dim=0)
    gains = 0.5 * (before / after).log()
    gains = gains + 0.5 * (observed.square() / before - residual.square() / after)
    total = gains[:, : 2 * WIDE].mean(dim=0).cumsum(dim=0)
    num = int(total.argmax()) + 1 if float(total.max()) > 0 else 0
    return scale, basis[:, :num]


def _compression(data: ExpertData) -> tuple[Compression, FittedExpert] | None:
    """Summaries of x, and the regression whose means they follow; None: see `fit_compressed`."""
    transform = data.scales[0]
    y = transform(data.x)
    if y.shape[1] <= WIDE or bool(transform.has_cells.any()):
        return None
    expert = NeuralRegressionExpert().fit(data, (), math.inf)
    scale, directions = _directions(expert.net, y, data)
    # mutant: nearly-all-directions-kept
    if not 0 < directions.shape[1] < min(WIDE, y.shape[1] / _FEW):
        return None
    summaries = LinearSummaries(expert.net.centre_y.clone(), scale, directions.clone())
    compression = Compression(transform, summaries, data.x[data.train])
    return compression, expert


def _unevenness(z: Tensor, rest: Tensor) -> float:
    """How well z explains in which quarter of the outputs the rest is large, as an adjusted R².

    The regressors are first powers and squares of z `(N, D)`. A quarter's size is the logarithm of
    its length in the direction of the rest `(N, dim_x)`, less the mean over the four quarters. The
    largest R² of the four is returned.
    """
    sizes = [part.square().sum(dim=1).clamp_min(_LEAST).log() for part in rest.chunk(4, dim=1)]
    target = torch.stack(sizes, dim=1).double()
    target = target - target.mean(dim=1, keepdim=True)
    scaled = ((z - z.mean(dim=0)) / z.std(dim=0).clamp_min(_LEAST)).double()
    features = torch.cat([torch.ones_like(scaled[:, :1]), scaled, scaled**2], dim=1)
    explained, total = sums_of_squares(features, target)
    num, used = features.shape
    # mutant: many-parameters-explain-anything
    excess = (num - 1) / max(1, num - used)
    return float((1 - (1 - explained / total) * excess).max())


def fit_compressed(data: ExpertData) -> tuple[Compression, list[FittedExpert]] | None:
    """Summaries of x and experts of them, where summaries can replace x.

    None for at most 30 outputs, for outputs with cells (integers, atoms), where no direction
    depends on θ or more than 29 or a third of the outputs' number do, and where regressions of x
    itself predict held-out x clearly better, as with correlated noise, where the rest is
    informative about the noise of the summaries. Where the noise of some outputs seems to depend on
    θ in another way than that of others, summaries have to be clearly better.
    """
    found = _compression(data)
    if found is None:
        return None
    compression, neural = found
    even = _unevenness(data.z[data.train], compression.rest) <= _UNEVEN
    summaries = compression(data.x)
    # No transform is chosen: the noise of the summaries is additive on their own scale.
    scale = MarginalTransform.fit(summaries[data.train], choose=False, atoms=False)
    own = replace(data, x=summaries, scales=(scale, scale))
    experts = fit_to(_EXPERTS, own)
    rivals = [neural, *(spec.fit(data, (), math.inf) for spec in _RIVALS)]
    ours, theirs = _stacked(experts), _stacked(rivals)
    if ours is None:
        return None
    if theirs is not None:
        gain = paired_gain(theirs, ours + compression.log_det(data.x[data.val]))
        # mutant: correlated-noise-compressed, two-noise-levels-compressed
        if not gain <= (CLEARLY if even else -CLEARLY):
            return None
    return compression, experts


def _stacked(experts: Sequence[FittedExpert]) -> Tensor | None:
    """log density of held-out pairs under the stacked mixture, `(M,)`; None if none is finite."""
    held_out = [each.held_out for each in experts if bool(torch.isfinite(each.held_out).all())]
    if not held_out:
        return None
    log_density = torch.stack(held_out)
    return torch.logsumexp(log_density + stacking_weights(log_density).log().unsqueeze(1), dim=0)
