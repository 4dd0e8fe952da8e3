"""The random stream of a training, which is kept with the training's state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["RandomStream"]


class RandomStream:
    """Torch's random numbers for one training, so that resuming it continues where it stopped.

    The stream starts from torch's global generator, so `torch.manual_seed` governs it, and leaves
    that generator one draw further, however long training was. Trainings in several threads of one
    process share torch's generator and disturb each other's numbers; use processes.
    """

    def __init__(self) -> None:
        self._state: Tensor | None = None
        self._start: Tensor | None = None

    def from_start(self) -> RandomStream:
        """Another stream with the numbers of this one, from the first; this one stays where it is.

        Raises:
            RuntimeError: If this stream was not used yet.
        """
        if self._start is None:
            raise RuntimeError("The stream has no start; use it first.")
        twin = RandomStream()
        twin._start = twin._state = self._start
        return twin

    @contextmanager
    def active(self) -> Iterator[None]:
        """Draw from this stream inside, and from the global one again afterwards."""
        state = self._state
        if state is None:
            seed = int(torch.randint(2**31, (1,)))
            state = self._start = torch.Generator().manual_seed(seed).get_state()
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state.cpu())  # loading onto a device moved it there
            try:
                yield
            finally:
                self.mark()

    def at(self, state: Tensor) -> RandomStream:
        """Another stream, which goes on from `state`, a value of `torch.get_rng_state()`."""
        twin = RandomStream()
        twin._start, twin._state = self._start, state
        return twin

    def mark(self) -> None:
        """Remember where the stream is now."""
        self._state = torch.get_rng_state()
