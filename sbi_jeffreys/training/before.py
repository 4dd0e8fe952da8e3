"""The state of a trainer before a call of `train`, restored if the call fails at once."""

from __future__ import annotations

from typing import Any

__all__ = ["Before"]


class Before:
    """The attributes of a trainer and of its record before a call of `train`.

    Until the first epoch, sbi and this package bind attributes anew and change no value in place,
    so a shallow copy is enough to restore the split, the network, the random stream, the proxy and
    the report.

    Args:
        trainer: The trainer.
        training: Its record of the symmetric part.

    Attributes:
        swapped: Set where the call, which resumes a training, gave the trainer back an earlier
            network.
    """

    def __init__(self, trainer: Any, training: Any) -> None:
        self._attributes = [(owner, dict(vars(owner))) for owner in (trainer, training)]
        self._trainer, self._optimizer = trainer, getattr(trainer, "optimizer", None)
        self._epochs = len(trainer.summary["training_loss"])
        self.swapped = False

    @property
    def over(self) -> bool:
        """Whether training has begun since then.

        sbi makes a new optimiser after all checks, where its loop over epochs begins. A call that
        resumes a training makes none: there, training counts as begun once an epoch is over if an
        earlier network was given back, and otherwise this property is always False.
        """
        if self.swapped:
            return len(self._trainer.summary["training_loss"]) > self._epochs
        return getattr(self._trainer, "optimizer", None) is not self._optimizer

    def put_back(self) -> None:
        """Give trainer and record the attributes that they had."""
        for owner, attributes in self._attributes:
            for name in vars(owner).keys() - attributes.keys():
                delattr(owner, name)
            vars(owner).update(attributes)
