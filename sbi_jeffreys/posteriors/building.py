"""The posteriors of a trained `NPE_Jeffreys` beside sbi's own `build_posterior`."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from sbi.inference.posteriors.base_posterior import NeuralPosterior
from torch import Tensor
from torch.distributions import Distribution

from sbi_jeffreys import _sbi
from sbi_jeffreys._checks import check_bool, check_float, check_int, warn
from sbi_jeffreys._sbi import (
    NPE,
    ConditionalDensityEstimator,
    DirectPosteriorParameters,
    PosteriorParameters,
)
from sbi_jeffreys.posteriors.corrected import CorrectedPosterior
from sbi_jeffreys.posteriors.direct import NO_BIJECTION
from sbi_jeffreys.posteriors.focused import FocusedPosterior, focus
from sbi_jeffreys.posteriors.power import pooling_power, power_of_later_rounds
from sbi_jeffreys.posteriors.proxy import ProxyPosterior, SampleWith, proxy_posterior
from sbi_jeffreys.proxies import Proxy

__all__ = ["BuildsPosteriors"]


class BuildsPosteriors(NPE):
    """What `NPE_Jeffreys` offers beyond the main's own posterior; needs its proxy and report."""

    proxy: Proxy | None
    training_report: Any
    _shows_progress: bool

    def build_posterior(
        self,
        density_estimator: ConditionalDensityEstimator | None = None,
        prior: Distribution | None = None,
        sample_with: Any = "direct",
        *args: Any,
        **kwargs: Any,
    ) -> NeuralPosterior:
        """sbi's posterior of the main; the arguments are sbi's.

        Torch has no bijection to the support of some priors, such as mixtures. `map` climbs in the
        space of θ itself there, and the samplers that walk in the other space are not available.
        """
        given = (density_estimator, prior, sample_with)
        try:
            return super().build_posterior(*given, *args, **kwargs)
        except NO_BIJECTION:
            if sample_with != "direct" or args or kwargs:
                raise
        as_it_is = DirectPosteriorParameters(enable_transform=False)  # mutant: main-needs-bijection
        return super().build_posterior(*given, posterior_parameters=as_it_is)

    def build_corrected_posterior(
        self, num_candidates: int = 20_000, device: str | None = None, power: float | None = None
    ) -> CorrectedPosterior:
        """The main's posterior with its draws resampled by importance weights (q̃_ψ/p_φ)^β.

        It is not the default, because its accuracy depends on the proxy at the observation. See
        `CorrectedPosterior.effective_sample_size` and `training_report`.

        Args:
            num_candidates: Draws of the main that are weighted per observation.
            device: Device of the posterior; the trainer's if None.
            power: β in (0, 1], how far to go from the main to the proxy. None: the power with the
                best score on held-out simulations; after several rounds, on those of the latest
                rounds.

        Raises:
            RuntimeError: If there is no proxy, before training or because none suits this x.
            ValueError: If `num_candidates` or `power` is out of range.

        Warns:
            JeffreysWarning: If training refused the proxy.
        """
        main, proxy = self._main_and_proxy()
        self._warn_if_refused("The draws are corrected")
        return CorrectedPosterior(
            deepcopy(main),
            deepcopy(proxy),
            _sbi.prior_of(self),
            num_candidates,
            self._pooling_power() if power is None else power,  # mutant: power-not-chosen
            device=device or str(_sbi.device_of(self)),
        )

    def _pooling_power(self) -> float:
        """The best β on held-out simulations; after several rounds, on those of the latest."""
        # mutant: power-of-later-rounds
        choose = power_of_later_rounds if _sbi.latest_round(self) > 0 else pooling_power
        return choose(*self._main_and_proxy(), *self._deciding_pairs())

    def _deciding_pairs(self) -> tuple[Tensor, Tensor]:
        """The held-out pairs that decided how far the proxy was followed, on the main's device."""
        raise NotImplementedError

    def focus(
        self,
        x_o: Any,
        num_steps: int = 300,
        learning_rate: float = 2e-3,
        power: float | None = None,
        show_progress_bars: bool | None = None,
    ) -> FocusedPosterior:
        """A posterior for one observation, whose main is refined there against the proxy.

        Focusing takes seconds and needs no simulations. The trained main stays as it is, so any
        number of observations can be focused at, one after the other. Where the proxy's posterior
        at x_o is not known well enough, or the refinement does not help, the posterior is that of
        the main as it was, and its attribute `focus` says so.

        Args:
            x_o: The observation, `(*x_shape)` or `(1, *x_shape)`.
            num_steps: Gradient steps.
            learning_rate: Learning rate at the start, which is annealed to zero.
            power: β in (0, 1], how far to go from the main to the proxy. None: as for
                `build_corrected_posterior`.
            show_progress_bars: Whether to show progress; None: as the trainer does.

        Returns:
            A posterior of sbi's kind with x_o as its default x. It refuses other observations.

        Raises:
            RuntimeError: If there is no proxy, before training or because none suits this x.
            TypeError, ValueError: Naming the argument, what was expected and what came.

        Warns:
            JeffreysWarning: If training refused the proxy, or x_o cannot be focused at.
        """
        check_int("num_steps", num_steps, 1)
        check_float("learning_rate", learning_rate, 0.0, low_open=True)
        if power is not None:
            check_float("power", power, 0.0, 1.0, low_open=True)
        shown = self._shows_progress if show_progress_bars is None else show_progress_bars
        main, proxy = self._main_and_proxy()
        self._warn_if_refused("The main is refined")
        return focus(
            main,
            proxy,
            _sbi.prior_of(self),
            x_o,
            self._pooling_power() if power is None else power,
            num_steps,
            learning_rate,
            check_bool("show_progress_bars", shown),
        )

    def _warn_if_refused(self, what: str) -> None:
        """Warn if a result follows a proxy that training refused."""
        report = self.training_report
        if report is not None and report.refused:
            warn(
                f"{what} towards a proxy that training refused ({report.proxy_status.value}): "
                "prefer build_posterior().",
            )

    def build_proxy_posterior(
        self,
        sample_with: SampleWith = "importance",
        posterior_parameters: PosteriorParameters | None = None,
        device: str | None = None,
    ) -> ProxyPosterior:
        """The proxy's own posterior q_ψ(θ|x), sampled by sbi, for comparison with the main's.

        Args:
            sample_with: "importance" (the main is the proposal), "mcmc", or "rejection" (from the
                prior).
            posterior_parameters: sbi's parameters of that posterior, for instance
                `MCMCPosteriorParameters(num_chains=10)`.
            device: Device of the posterior; the trainer's if None.

        Raises:
            RuntimeError: If there is no proxy, before training or because none suits this x.
            ValueError, TypeError: If `sample_with` or `posterior_parameters` are not as above.
        """
        main, proxy = self._main_and_proxy()
        device = device or str(_sbi.device_of(self))
        return proxy_posterior(main, proxy, sample_with, posterior_parameters, device)

    def _main_and_proxy(self) -> tuple[ConditionalDensityEstimator, Proxy]:
        main = _sbi.network_of(self)
        if main is None or self.proxy is None:
            raise RuntimeError(
                "There is no proxy to build a posterior from. Call train() first; if it warned "
                "that it fell back to plain NPE, use build_posterior() instead."
            )
        return main, self.proxy
