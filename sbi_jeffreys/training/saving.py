"""Saving, loading, pickling and describing a trainer."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sbi.utils.torchutils import process_device

from sbi_jeffreys import _sbi
from sbi_jeffreys.networks.builders import MainBuilder, UnconstrainedDensityEstimator
from sbi_jeffreys.training import persistence
from sbi_jeffreys.training.description import describe
from sbi_jeffreys.training.training import Training

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SavedTrainer"]


class SavedTrainer(_sbi.RoundsTrainer):
    """sbi's trainer with `save`, `load`, `load_weights` and a `repr`; pickles keep the builder."""

    _builder: Callable[..., Any]  # builds the main
    _training: Training  # the record of the symmetric part

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one file: simulations, networks, optimisers, random state.

        After `load`, posteriors are the same, and training resumes as if it had never stopped. Two
        things are not kept. One is the tracker: the loaded object has a new default tracker without
        the logs that sbi's `plot_summary` reads (use `plots.plot_training(inference.summary)`). The
        other is a `density_estimator` that cannot be pickled, such as sbi's `posterior_nn(...)`,
        without which `train(retrain_from_scratch=True)` raises.

        Args:
            path: File to write, complete or not at all; an existing one is replaced.

        Raises:
            TypeError: If something in the object cannot be pickled.
        """
        main, tensors = _sbi.network_of(self), {}
        if main is not None:
            theta, x, _ = self.get_simulations()
            tensors = {"theta": theta, "x": x, "train": self.train_indices, "val": self.val_indices}
            tensors["main"] = dict(main.state_dict())
            tensors["unconstrained"] = isinstance(main, UnconstrainedDensityEstimator)
        persistence.save(self, path, tensors)

    def load_weights(self, path: str | os.PathLike[str]) -> Self:
        """Take simulations and the main's weights from a saved file; no code of the file is run.

        For a file that you do not trust: make an `NPE_Jeffreys` with the same prior and
        `density_estimator`, call this method, and build posteriors. The proxy is not restored.

        Args:
            path: A file written by `save` after a training in one round.

        Returns:
            self.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is something else, or its weights do not fit the network.
            RuntimeError: If this object has simulations already.
        """
        if _sbi.latest_round(self) >= 0:
            raise RuntimeError(
                "load_weights needs an object without simulations; make a new NPE_Jeffreys."
            )
        saved = persistence.load_tensors(path, str(_sbi.device_of(self)))
        if "main" not in saved:
            raise ValueError(f"{path} holds no trained main; save it after train().")
        self.append_simulations(saved["theta"], saved["x"], exclude_invalid_x=False)
        self.train_indices, self.val_indices = saved["train"], saved["val"]
        rows, builder = saved["train"].cpu(), self._builder
        if isinstance(builder, MainBuilder) and not saved.get("unconstrained", True):
            builder = builder.with_prior(None)  # mutant: weights-of-another-space
        main = builder(saved["theta"].cpu()[rows], saved["x"].cpu()[rows])
        try:
            main.load_state_dict(saved["main"])
        except RuntimeError as error:
            raise ValueError(
                f"The weights of {path} do not fit the density_estimator of this object: {error}. "
                "Make it with the prior and density_estimator that the file was saved with. If "
                "simulations were appended after the first train(), the network was built for "
                "fewer of them: use load, for a file that you trust."
            ) from error
        _sbi.set_network(self, main.to(_sbi.device_of(self)).eval())
        return self

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | None = None) -> Self:
        """Read what `save` wrote. This runs code from the file: for a file that you do not trust,
        use `load_weights`.

        Args:
            path: The file.
            device: Device of the loaded object; None: the device that it was saved on.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is something else, damaged, of an unknown format, or of package
                versions that cannot be read here.

        Warns:
            JeffreysWarning: If the file was saved with other package versions.
        """
        device = None if device is None else process_device(device)
        inference = persistence.load(path, device)
        if not isinstance(inference, cls):
            raise ValueError(
                f"{path} holds a {type(inference).__name__}, not a {cls.__name__}; load it with "
                f"{type(inference).__name__}.load."
            )
        if device is not None:
            _sbi.set_device(inference, device)
            training = inference._training
            for owner in (inference, training.stage, training.unfinished):
                optimizer = getattr(owner, "optimizer", None)
                if optimizer is not None:
                    persistence.place_step_counters(optimizer)
        return inference

    def __repr__(self) -> str:
        """What this trainer is and what state it is in, in one to three lines."""
        if not hasattr(self, "_training"):  # the constructor has not finished
            return object.__repr__(self)
        return describe(self, self._training, self._builder)

    def __getstate__(self) -> dict[str, Any]:
        """The state that sbi pickles, with the builder if it can be pickled."""
        kept = persistence.is_picklable(self._builder)
        with warnings.catch_warnings():
            if kept:  # sbi would warn that retrain_from_scratch is lost
                warnings.filterwarnings("ignore", message="When the inference object is pickled")
            state = super().__getstate__()
        return state | {"_builder": self._builder if kept else None}

    def __setstate__(self, state_dict: dict[str, Any]) -> None:
        super().__setstate__(state_dict)
        _sbi.set_builder(self, self._builder)
