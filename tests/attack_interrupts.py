"""SIGINT at random moments of a training: the best weights must be left, in evaluation mode.

    python tests/attack_interrupts.py [REPETITIONS]     # not part of CI

One process trains again and again; a thread sends SIGINT after a random time.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
import warnings

import torch
from contract_tools import TINY, fresh, simulate


def attack(seconds: float) -> tuple[bool, str]:
    """One training, interrupted after so many seconds: whether its state is right; what it is."""
    inference = fresh(options=TINY).append_simulations(*simulate(100))
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        inference.train(max_num_epochs=8)
        outcome = "finished"
    except KeyboardInterrupt:
        outcome = "interrupted"
    finally:
        timer.cancel()
    if not torch.is_grad_enabled():
        return False, f"{outcome}: gradients are off"
    symmetric = inference._training.symmetric
    main = inference._training.set_aside or inference._neural_net  # the one that was interrupted
    if main is None:
        return True, f"{outcome} before there was a network"
    best = inference._best_model_state_dict if symmetric is None else symmetric.best.weights
    if best is None:
        return True, f"{outcome} before the first epoch"
    same = all(torch.equal(value, best[name]) for name, value in main.state_dict().items())
    right = same and not main.training
    return right, f"{outcome} in {'plain NPE' if symmetric is None else 'the stage'}, best: {same}"


def main() -> int:
    """Attack as often as asked for; 1 if a training was left in a wrong state."""
    warnings.simplefilter("ignore")
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    start = time.perf_counter()
    attack(60.0)  # imports and first calls are over, and we know how long a training takes
    length = time.perf_counter() - start
    start = time.perf_counter()
    attack(60.0)
    length = time.perf_counter() - start
    random.seed(0)
    survived = 0
    for number in range(repetitions):
        try:
            right, words = attack(random.uniform(0.02, 1.0) * length)
        except KeyboardInterrupt:  # the signal came just after the training
            right, words = True, "after the training"
        survived += right
        if not right:
            print(f"{number}: {words}", flush=True)
    print(f"{survived} of {repetitions} survived")
    return int(survived < repetitions)


if __name__ == "__main__":
    sys.exit(main())
