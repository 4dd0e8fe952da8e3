r"""nflows' rational-quadratic spline with its derivative in closed form.

A training step of a neural spline flow (Durkan et al. 2019, arXiv 1906.04032), sbi's `nsf`, is
mostly spent on splines: some sixty small operations, each with its own backward. Here the same
function is one node of the graph with its gradient in closed form, which halves the time of a
gradient step on one thread. Tensors have the bins as first dimension.

In bin k, with w, h its width and height, δ = h/w, d₀, d₁ the derivatives at its two knots,
ξ = (x − x_k)/w and β = d₀ + d₁ − 2δ,

    y = y_k + h A/B,   dy/dx = δ² C/B²,
    A = δ ξ² + d₀ ξ(1 − ξ),   B = δ + β ξ(1 − ξ),   C = d₁ ξ² + 2δ ξ(1 − ξ) + d₀ (1 − ξ)².

`with_fast_splines` replaces the coupling layers of a network that nflows built.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch
from nflows.transforms import PiecewiseRationalQuadraticCouplingTransform
from nflows.transforms.splines import unconstrained_rational_quadratic_spline
from torch import Tensor, nn

from sbi_jeffreys.networks.replacing import with_replaced

__all__ = ["FastSplineCoupling", "Spline", "with_fast_splines"]

_Net = TypeVar("_Net", bound=nn.Module)


@dataclass(frozen=True)
class Spline:
    """Monotone splines of K bins on [−T, T], the identity outside.

    Attributes:
        num_bins: K.
        tail_bound: T.
        min_bin_width: Smallest width of a bin, as a share of the interval.
        min_bin_height: Smallest height, likewise.
        min_derivative: Smallest derivative at a knot.
        scale: Factor of the unnormalised widths and heights.

    Example:
        >>> spline = Spline(num_bins=10, tail_bound=3.0)
        >>> y, log_det = spline(torch.tensor([0.5]), torch.zeros(1, 29))
        >>> round(y.item(), 3), round(spline(y, torch.zeros(1, 29), inverse=True)[0].item(), 3)
        (0.519, 0.5)
    """

    num_bins: int
    tail_bound: float
    min_bin_width: float = 1e-3
    min_bin_height: float = 1e-3
    min_derivative: float = 1e-3
    scale: float = 1.0

    def __call__(
        self, inputs: Tensor, parameters: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Values and log |derivative|, shape `(N,)` each.

        Args:
            inputs: Shape `(N,)`.
            parameters: Unnormalised widths, heights and inner derivatives, `(N, 3K − 1)`.
            inverse: Whether to apply the inverse.
        """
        out: Any = _RationalQuadratic.apply(inputs, parameters, self, inverse)
        return out

    def by_nflows(self, inputs: Tensor, parameters: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """The same values, computed by nflows."""
        sizes = [self.num_bins, self.num_bins, self.num_bins - 1]
        widths, heights, derivatives = parameters.split(sizes, dim=-1)
        minima = asdict(self)
        del minima["num_bins"], minima["scale"]
        return unconstrained_rational_quadratic_spline(
            inputs, widths * self.scale, heights * self.scale, derivatives, inverse, **minima
        )


@lru_cache(maxsize=32)
def _constants(spline: Spline, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """base `(2, K + 1, 1)`, sums `(2, K + 1, K)`, ranges `(2, 1)`, smallest bins `(2, 1)`.

    Knots are base + sums @ shares, where shares of widths and heights are scaled by the ranges.
    """
    bins, length = spline.num_bins, 2 * spline.tail_bound
    minima = torch.tensor([[spline.min_bin_width], [spline.min_bin_height]], dtype=torch.float64)
    smallest, ranges = length * minima, length * (1 - bins * minima)
    before = torch.ones(bins + 1, bins, dtype=torch.float64).tril(-1)
    base = smallest.unsqueeze(-1) * torch.arange(bins + 1).unsqueeze(-1) - spline.tail_bound
    made = base, ranges.unsqueeze(-1) * before, ranges, smallest
    return tuple(tensor.to(device, dtype) for tensor in made)


class _RationalQuadratic(torch.autograd.Function):
    """The spline as one differentiable function; nflows computes second derivatives."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, parameters: Tensor, spline: Spline, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        bins, num = spline.num_bins, len(inputs)
        base, sums, _, _ = _constants(spline, inputs.dtype, inputs.device)
        raw = parameters.new_empty(3 * bins, num)
        raw[:-1].copy_(parameters.t())
        raw[-1].fill_(math.log(math.expm1(1 - spline.min_derivative)))  # derivative 1 at both ends
        shares = torch.softmax(spline.scale * raw[: 2 * bins].view(2, bins, num), dim=1)
        knots = torch.baddbmm(base, sums, shares)
        inside = (inputs >= -spline.tail_bound) & (inputs <= spline.tail_bound)
        x = torch.where(inside, inputs, 0.0)
        k = (x >= knots[int(inverse), 1:-1]).sum(dim=0)
        left = knots.gather(1, k.expand(2, 1, num))[:, 0]
        (w, h) = size = knots.gather(1, (k + 1).expand(2, 1, num))[:, 0] - left
        # Row K − 1 of the derivatives, reached from the first bin's left and the last one's right.
        ends = torch.stack([(k - 1).remainder(bins), k])
        slopes = raw[2 * bins :].gather(0, ends)
        (d0, d1) = d = spline.min_derivative + nn.functional.softplus(slopes)
        delta = h / w
        beta = d0 + d1 - 2 * delta
        if inverse:
            z = x - left[1]
            b, c = h * d0 - z * beta, -delta * z
            root = (b * b - 4 * (z * beta + h * (delta - d0)) * c).clamp_min(0.0).sqrt()
            xi = -2 * c / (b + root)
        else:
            xi = (x - left[0]) / w
        rest = 1 - xi
        product = xi * rest
        denominator = delta + beta * product
        curve = d1 * xi * xi + 2 * delta * product + d0 * rest * rest
        if inverse:
            outputs = left[0] + w * xi
        else:
            outputs = left[1] + h * (delta * xi * xi + d0 * product) / denominator
        log_det = 2 * torch.log(delta / denominator) + torch.log(curve)
        ctx.spline, ctx.inverse = spline, inverse
        saved = (inputs, parameters, inside, shares, k, left, size, ends, slopes, d, xi)
        ctx.save_for_backward(*saved)
        # mutant: spline-log-det-of-the-inverse
        log_det = torch.where(inside, -log_det if inverse else log_det, 0.0)
        return torch.where(inside, outputs, inputs), log_det

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # a graph of the gradient is asked for
            saved = ctx.saved_tensors[:2]
            wanted = [tensor for tensor in saved if tensor.requires_grad]
            values = ctx.spline.by_nflows(*saved, ctx.inverse)
            found = iter(torch.autograd.grad(values, wanted, grads, create_graph=True))
            return (*(next(found) if t.requires_grad else None for t in saved), None, None)
        return (*_gradients(ctx, grads[0], grads[1]), None, None)


def _gradients(ctx: Any, g_out: Tensor, g_log: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of inputs `(N,)` and parameters `(N, 3K − 1)` from those of value and log det."""
    inside, shares, k, _, (w, h), ends, slopes, (d0, d1), xi = ctx.saved_tensors[2:]
    g_y, g_log = torch.where(inside, g_out, 0.0), torch.where(inside, g_log, 0.0)
    rest = 1 - xi
    product, skew, delta = xi * rest, rest - xi, h / w
    beta = d0 + d1 - 2 * delta
    per_b = 1 / (delta + beta * product)
    ratio = (delta * xi * xi + d0 * product) * per_b  # A/B
    curve = d1 * xi * xi + 2 * delta * product + d0 * rest * rest
    derivative = curve * (delta * per_b).square()
    per_c, twice = 1 / curve, 2 * per_b
    log_by_xi = 2 * (d1 * xi + delta * skew - d0 * rest) * per_c - beta * skew * twice
    if ctx.inverse:  # y fixed, x moves: dx = −(∂y/∂·) / (dy/dx); and log det has the other sign
        g_log = -g_log
        g_y = -(g_y + g_log * log_by_xi / w) / derivative
        g_in = -g_y
    else:
        g_in = g_y * derivative + g_log * log_by_xi / w
    g_xi = g_y * derivative * w + g_log * log_by_xi
    scaled, by_product = g_y * h * per_b, 1 - 2 * product
    g_delta = scaled * (xi * xi - ratio * by_product) + g_log * (
        2 / delta + 2 * product * per_c - by_product * twice
    )
    g_d0 = scaled * product * (1 - ratio) + g_log * (rest * rest * per_c - product * twice)
    g_d1 = g_log * (xi * xi * per_c - product * twice) - scaled * product * ratio
    g_left = torch.stack([-g_xi / w, g_y])
    # mutant: spline-heights-without-slope
    g_size = torch.stack([-(g_xi * xi + g_delta * delta) / w, g_y * ratio + g_delta / w])
    g_raw = shares.new_empty(3 * len(shares[0]), len(k))
    _through_softmax(ctx, g_left, g_size, out=g_raw[: 2 * len(shares[0])].view_as(shares))
    slope = torch.stack([g_d0, g_d1]) * torch.sigmoid(slopes)
    g_raw[2 * len(shares[0]) :].zero_().scatter_add_(0, ends, slope)
    return torch.where(inside, g_in, g_out), g_raw[:-1].t()  # mutant: spline-gradient-outside


def _through_softmax(ctx: Any, g_left: Tensor, g_size: Tensor, out: Tensor) -> None:
    """Gradient of unnormalised widths and heights `(2, K, N)` from a bin's left knot and size."""
    _, shares, k, left, size = ctx.saved_tensors[2:7]
    spline: Spline = ctx.spline
    _, _, ranges, smallest = _constants(spline, shares.dtype, shares.device)
    own = (size - smallest) / ranges
    before = (left + spline.tail_bound - smallest * k.to(shares.dtype)) / ranges
    g_left, g_size = spline.scale * ranges * g_left, spline.scale * ranges * g_size
    after = -(g_left * before + g_size * own)  # softmax: s (g − Σ s g)
    is_before = torch.arange(spline.num_bins, device=k.device).unsqueeze(-1) < k
    # mutant: spline-bins-before
    grad = torch.where(is_before, (g_left + after).unsqueeze(1), after.unsqueeze(1))
    grad.scatter_(1, k.expand(2, 1, len(k)), (g_size + after).unsqueeze(1))
    torch.mul(shares, grad, out=out)


class FastSplineCoupling(PiecewiseRationalQuadraticCouplingTransform):
    """nflows' coupling layer with the gradient of the spline in closed form."""

    @classmethod
    def like(cls, layer: PiecewiseRationalQuadraticCouplingTransform) -> FastSplineCoupling:
        """A layer that computes the same as nflows' (linear tails) and shares its conditioner."""
        transformed: Any = layer.transform_features
        mask = torch.zeros(layer.features)
        mask[transformed.cpu()] = 1
        return cls(
            mask,
            lambda *sizes: layer.transform_net,
            num_bins=layer.num_bins,
            tails=layer.tails,
            tail_bound=layer.tail_bound,
            min_bin_width=layer.min_bin_width,
            min_bin_height=layer.min_bin_height,
            min_derivative=layer.min_derivative,
        ).to(transformed.device)

    def _piecewise_cdf(
        self, inputs: Tensor, transform_params: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        minima = (self.min_bin_width, self.min_bin_height, self.min_derivative)
        hidden: Any = self.transform_net.hidden_features
        spline = Spline(self.num_bins, self.tail_bound, *minima, 1 / math.sqrt(hidden))
        parameters = transform_params.reshape(-1, transform_params.shape[-1])
        outputs, log_det = spline(inputs.reshape(-1), parameters, inverse)
        return outputs.view(inputs.shape), log_det.view(inputs.shape)


def with_fast_splines(net: _Net) -> _Net:
    """Replace the rational-quadratic coupling layers of `net` by faster ones, and return `net`.

    Values and gradients agree to rounding; weights and state dicts are unchanged. Layers of another
    kind, with other tails or another conditioner than sbi's, are not replaced.

    Example:
        >>> from sbi.neural_nets import posterior_nn
        >>> net = posterior_nn("nsf")(torch.randn(50, 3), torch.randn(50, 2))
        >>> with_fast_splines(net) is net
        True
    """
    return with_replaced(net, _faster)


def _faster(layer: nn.Module) -> FastSplineCoupling | None:
    """The faster form of a layer; None of another kind."""
    if (
        type(layer) is PiecewiseRationalQuadraticCouplingTransform
        and layer.unconditional_transform is None
        and layer.tails == "linear"
        and hasattr(layer.transform_net, "hidden_features")
    ):
        return FastSplineCoupling.like(layer)
    return None
