r"""Energy proxy: q̃_ψ(θ, x) = p(θ) e^{f_ψ(θ, s(x))}, for x that has no tractable density.

It is for images, time series, sets of trials, and anything else with an embedding net: f_ψ is one
of sbi's classifier networks of θ and a summary of x, and the prior is exact. f_ψ is fitted to
simulated pairs, with contrasts θ_k from a *defensive mixture* m(θ|x) of the main (¾) and the prior
(¼), by ranking noise-contrastive estimation: the loss is −log softmax of the true θ's
v = log q̃_ψ − log m among those of the contrasts (Ma & Collins 2018, arXiv 1809.01812), which is
bounded below, and consistent for any m that covers the posterior.

In later rounds the pairs come from a proposal p̃(θ), and the loss would fit the posterior under p̃
instead of the prior. Contrasts that follow p̃ as well, the θ of other pairs, cancel it (the atomic
loss of Greenberg et al. 2019, arXiv 1905.07488).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from sbi_jeffreys._checks import check_instance
from sbi_jeffreys._sbi import ConditionalDensityEstimator
from sbi_jeffreys.networks.embedding import check_summaries, summaries_of, summary_net
from sbi_jeffreys.networks.fitting import FitResult, fit_network
from sbi_jeffreys.objective import effective_sample_size as kish_sample_size
from sbi_jeffreys.objective import ranking_nce_losses
from sbi_jeffreys.proxies.base import Proxy
from sbi_jeffreys.proxies.energy_net import EnergyConfig, EnergyNet
from sbi_jeffreys.proxies.partition import Contrasts, draw_atoms, draw_contrasts

__all__ = ["EnergyConfig", "EnergyProxy"]

_MAX_EVALUATIONS = 100_000  # evaluations of the energy per held-out value


class EnergyProxy(Proxy):
    """p(θ) e^{f_ψ(θ, s(x))} with a classifier network for f_ψ, fitted against the main.

    Call `set_proposal` with a trained main before `fit`. The proposal is only referred to: no state
    dict, pickle or deep copy contains it.

    Args:
        prior: Prior p(θ).
        config: The network and its fit.
        embedding_net: x `(B, *x_shape)` → summaries `(B, ·)`, copied; None takes a copy of the
            proposal's at each `fit`.

    Attributes:
        effective_sample_size: Kish's effective sample size of the mixture proposal under the fitted
            energy, as a fraction of the draws in (0, 1], averaged over held-out x; NaN before
            `fit`. Near 0, the estimate of the partition function and the held-out value of the
            proxy are unreliable.
        result: Held-out loss and epochs of the best network of the last fit, or None.
        nets: The networks, best first, whose outputs are averaged.

    Raises:
        TypeError: If `config` is not an `EnergyConfig` or `embedding_net` not a module.
    """

    can_sample = False

    def __init__(
        self,
        prior: Distribution,
        config: EnergyConfig | None = None,
        embedding_net: nn.Module | None = None,
    ) -> None:
        super().__init__(prior)
        if config is not None:
            check_instance("config", config, EnergyConfig)
        if embedding_net is not None:
            remedy = "pass a torch module that maps x (B, *x_shape) to summaries (B, S), or None"
            check_instance("embedding_net", embedding_net, nn.Module, remedy)
        self.config = EnergyConfig() if config is None else config
        self.effective_sample_size = float("nan")
        self.result: FitResult | None = None
        self.nets = nn.ModuleList()
        # In a tuple, which nn.Module does not register as a part of this module.
        self._template = (deepcopy(embedding_net),)
        self._proposal: ConditionalDensityEstimator | None
        self.set_proposal(None)

    def set_proposal(self, main: ConditionalDensityEstimator | None, atomic: bool = False) -> None:
        """Set the main that contrasts are drawn from; it must not change during `fit`.

        Args:
            main: A trained density estimator of θ given x, or None to drop the reference.
            atomic: Whether the pairs come from a proposal instead of the prior (later rounds
                without `force_first_round_loss`): contrasts are then other pairs' θ, and `main`
                supplies its embedding net alone.

        Raises:
            TypeError: If `main` cannot be sampled or evaluated.
        """
        missing = [n for n in ("sample", "log_prob") if main is not None and not hasattr(main, n)]
        if missing:
            raise TypeError(
                f"main must be a trained density estimator of theta given x; {type(main).__name__} "
                f"has no {' and no '.join(missing)}. Pass what NPE's `train` returns."
            )
        # Without nn.Module's registration: the main belongs to the trainer.
        object.__setattr__(self, "_proposal", main)
        self._atomic = atomic

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_proposal": None}

    def log_factor(self, theta: Tensor, x: Tensor) -> Tensor:
        """f_ψ(θ, s(x)), the mean over the networks; see `Proxy.log_factor`."""
        factors = [net(theta, net.summarise(x)) for net in self._fitted()]
        return torch.stack(factors).mean(dim=0)  # mutant: one-energy-of-several

    def _fitted(self) -> list[EnergyNet]:
        if len(self.nets) == 0:
            raise RuntimeError("This EnergyProxy is not fitted: call set_proposal(main), then fit.")
        return [net for net in self.nets if isinstance(net, EnergyNet)]

    @property
    def net(self) -> EnergyNet | None:
        """The network with the best held-out loss; None before `fit`."""
        return self._fitted()[0] if len(self.nets) else None

    def fit(
        self,
        theta: Tensor,
        x: Tensor,
        train_indices: Tensor,
        val_indices: Tensor,
        on_epoch: Callable[[int, float], object] | None = None,
        max_epochs: int | None = None,
        patience: int | None = None,
    ) -> EnergyProxy:
        """Fit f_ψ from scratch against the proposal; see `Proxy.fit` for the arguments.

        Raises:
            RuntimeError: Without a proposal.
            ValueError: If summaries of x are not finite.
        """
        main = self._required_proposal()
        remedy = "pad x of varying length with NaN and use sbi's PermutationInvariantEmbedding"
        check_instance("x", x, Tensor, remedy)
        self.check_prior(theta[train_indices])
        embedding = self._embedding(main, theta).eval()
        summary = summaries_of(embedding, x)
        check_summaries(summary, x)
        config = self.config.fit.at_most(max_epochs, patience)
        num_held_out = max(16, min(256, _MAX_EVALUATIONS // len(val_indices)))
        held_out = self.draw(theta[val_indices], x[val_indices], num_held_out, main)
        cached = summary if self.config.share_embedding else None
        loss = _Loss(self, main, theta, x, cached, held_out)
        fits: list[tuple[FitResult, EnergyNet]] = []
        for _ in range(self.config.num_nets):
            parts = theta[train_indices], summary[train_indices]
            net = EnergyNet(deepcopy(embedding), *parts, self.config)
            result = fit_network(net, loss, train_indices, val_indices, config, on_epoch)
            fits.append((result, net))
        fits.sort(key=lambda fit: fit[0].held_out)
        self.result, self.nets = fits[0][0], nn.ModuleList([net for _, net in fits])
        self.requires_grad_(False)
        self._measure(held_out, x[val_indices])
        return self

    def _required_proposal(self) -> ConditionalDensityEstimator:
        if self._proposal is None:
            raise RuntimeError(
                "EnergyProxy.fit draws contrasts from the main: call set_proposal(main) with the "
                "trained density estimator first (again after unpickling or copying)."
            )
        return self._proposal

    def _embedding(self, main: ConditionalDensityEstimator, like: Tensor) -> nn.Module:
        """The embedding net to start from, a copy."""
        template = self._template[0]
        return summary_net(main) if template is None else deepcopy(template).to(like)

    @torch.no_grad()
    def _measure(self, contrasts: Contrasts, x: Tensor) -> None:
        """Effective sample size of the proposal on held-out x."""
        log_weights = self.log_factor(contrasts.theta, x) + contrasts.offset
        share = kish_sample_size(log_weights) / len(contrasts.theta)
        self.effective_sample_size = float(share.mean())

    def draw(
        self, theta: Tensor, x: Tensor, num: int, main: ConditionalDensityEstimator
    ) -> Contrasts:
        """`num` fresh contrasts for each pair."""
        if self._atomic:
            return draw_atoms(theta, num)
        return draw_contrasts(self, main, theta, x, num)

    def losses(
        self, net: EnergyNet, theta: Tensor, summary: Tensor, contrasts: Contrasts
    ) -> Tensor:
        """Losses of pairs θ `(B, D)` with summaries `(B, S)` against their contrasts, `(B,)`."""
        factor = net(torch.cat([theta.unsqueeze(0), contrasts.theta]), summary)
        return ranking_nce_losses(factor[0] + contrasts.offset_true, factor[1:] + contrasts.offset)


class _Loss:
    """The loss that `fit_network` calls, with its pool of contrasts.

    Drawing from the main costs far more than evaluating the energy. So a pool of twice as many
    contrasts as a step needs is drawn every few epochs, and each step picks half of it.
    """

    def __init__(
        self,
        proxy: EnergyProxy,
        main: ConditionalDensityEstimator,
        theta: Tensor,
        x: Tensor,
        summary: Tensor | None,
        held_out: Contrasts,
    ) -> None:
        self.proxy, self.main, self.theta, self.x = proxy, main, theta, x
        self.summary, self.held_out = summary, held_out
        self.pool: Contrasts | None = None
        self.epochs_left = 0

    def __call__(self, net: nn.Module, indices: Tensor, training: bool) -> Tensor:
        assert isinstance(net, EnergyNet)
        theta = self.theta[indices]
        summary = net.summarise(self.x[indices]) if self.summary is None else self.summary[indices]
        if not training:
            self.epochs_left -= 1
            return self.proxy.losses(net, theta, summary, self.held_out)
        num = self.proxy.config.num_contrasts
        # mutant: contrasts-never-drawn-anew
        if self.pool is None or self.epochs_left <= 0:
            self.pool = self.proxy.draw(self.theta, self.x, 2 * num, self.main)
            self.epochs_left = self.proxy.config.refresh_epochs
        return self.proxy.losses(net, theta, summary, self.pool.pick(indices, num))
