"""Fitting a main again, to the proxy's draws, once it gets summaries of x as its input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sbi_jeffreys._sbi import ConditionalDensityEstimator
from sbi_jeffreys.networks.fitting import FitConfig, FitResult, fit_network
from sbi_jeffreys.proxies import Proxy, hand_over_summaries
from sbi_jeffreys.training.held_out import HeldOut
from sbi_jeffreys.training.pool import Pool

__all__ = ["fit_to_pool", "restored_if_interrupted", "summarise"]

_DRAWS = 20_000
_STANDARDISED = 5_000  # draws by which the summaries are standardised
_CONFIG = FitConfig(learning_rate=1e-2, batch_size=200, max_epochs=5)


@contextmanager
def restored_if_interrupted(
    main: ConditionalDensityEstimator, weights: dict[str, Tensor]
) -> Iterator[None]:
    """Load these weights into the main again if an exception or interrupt ends the block."""
    try:
        yield
    except BaseException:
        main.load_state_dict(weights)  # mutant: half-fitted-main-left
        raise


def summarise(
    proxy: Proxy,
    main: ConditionalDensityEstimator,
    pool: Pool,
    held_out: HeldOut,
    npe_nll: float,
    show_progress_bars: bool = False,
) -> bool:
    """Give the main the proxy's linear summaries of x as its input, and fit it again.

    With hundreds of outputs, plain NPE fits the noise of the simulations that it has seen. Where
    the main is worse on held-out simulations afterwards, it is left as it was.

    Args:
        proxy: A fitted proxy.
        main: Plain NPE, in evaluation mode.
        pool: The proxy's draws.
        held_out: The held-out pairs.
        npe_nll: Plain NPE's held-out value.
        show_progress_bars: Whether to show progress.

    Returns:
        Whether the main gets summaries now; False where its held-out loss was not lower with them,
        where the proxy has none, where the main's input does not transform x as the proxy does,
        and in later rounds, whose pools are no draws of the joint.
    """
    if held_out.atomic or pool.grouped:
        return False
    before = deepcopy(main.state_dict())
    if not hand_over_summaries(proxy, main, pool.x[:_STANDARDISED]):
        return False
    fit_to_pool(main, pool, held_out, show_progress_bars)
    # mutant: summaries-whatever-they-cost
    if not held_out.mean(held_out.main_losses(main)) < npe_nll:
        main.load_state_dict(before)
        return False
    return True


def fit_to_pool(
    main: ConditionalDensityEstimator,
    pool: Pool,
    held_out: HeldOut,
    show_progress_bars: bool = False,
) -> FitResult:
    """Minimise −log p_φ(θ̃|x̃) over a pool of the joint; held-out simulations decide when to stop.

    Args:
        main: Fitted in place, and left in evaluation mode.
        pool: A pool with one θ̃ for each observation.
        held_out: The held-out pairs.
        show_progress_bars: Whether to show progress.
    """
    rows = pool.draw(_DRAWS)
    theta, x = torch.cat([pool.theta[rows], held_out.theta]), torch.cat([pool.x[rows], held_out.x])
    indices = torch.arange(len(theta), device=theta.device)

    def loss(net: nn.Module, batch: Tensor, training: bool) -> Tensor:
        assert isinstance(net, ConditionalDensityEstimator)
        return -net.log_prob(theta[batch].unsqueeze(0), x[batch])[0]

    train, val = indices[:_DRAWS], indices[_DRAWS:]
    epochs, silent = _CONFIG.max_epochs, not show_progress_bars
    with tqdm(total=epochs, desc="Fitting main to summaries", disable=silent) as bar:
        result = fit_network(main, loss, train, val, _CONFIG, lambda epoch, value: bar.update())
    main.eval()
    return result
