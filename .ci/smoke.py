"""A short training with an installed package: run it outside the repository.

    python .ci/smoke.py

from another folder, in an environment that has the wheel. Prints what it does and fails if the
package that is imported is the checkout's, if its types are not shipped, or if anything raises.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import metadata
from pathlib import Path

import numpy as np
import torch
from sbi.utils import BoxUniform

import sbi_jeffreys
from sbi_jeffreys import JeffreysOptions, NPE_Jeffreys, held_out_report


def check_installation() -> None:
    """The package is the installed one, with its types and its metadata."""
    folder = Path(sbi_jeffreys.__file__).parent
    assert "site-packages" in folder.parts, f"{folder} is not the installed package"
    assert (folder / "py.typed").exists()
    found = metadata("sbi_jeffreys")
    assert found["Version"] == sbi_jeffreys.__version__
    assert found["License-Expression"] == "Apache-2.0"


def train() -> None:
    """Train, save, load, sample, report."""
    torch.manual_seed(0)
    prior = BoxUniform(-torch.ones(2), torch.ones(2))
    theta = prior.sample((300,))
    x = theta + 0.1 * torch.randn_like(theta)
    options = JeffreysOptions(num_steps=100, proxy_folds=1)
    inference = NPE_Jeffreys(prior, options=options, show_progress_bars=False)
    inference.append_simulations(theta[:200], x[:200]).train(max_num_epochs=50)
    with tempfile.TemporaryDirectory() as folder:
        inference.save(Path(folder) / "trained.pt")
        inference = NPE_Jeffreys.load(Path(folder) / "trained.pt")
    print(inference)
    print(held_out_report(inference, theta[200:], x[200:]))
    corrected = inference.build_corrected_posterior()
    drawn = corrected.sample((500,), x=x[0], show_progress_bars=False)
    assert drawn.shape == (500, 2)
    assert float((drawn.mean(0) - x[0]).abs().max()) < 0.1


def compare() -> None:
    """The command on a file, where its extra is installed."""
    try:
        from sbi_jeffreys.__main__ import main
    except SystemExit:  # it has said what to install
        return
    rng = np.random.default_rng(0)
    theta = rng.uniform(-1, 1, (120, 2))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "simulations.npz"
        np.savez(file, theta=theta, x=theta + 0.1 * rng.normal(size=theta.shape))
        assert main(["compare", str(file), "--fast", "--quiet", "--out", folder]) == 0


if __name__ == "__main__":
    check_installation()
    train()
    compare()
    print(
        f"sbi_jeffreys {sbi_jeffreys.__version__} works from {Path(sbi_jeffreys.__file__).parent}"
    )
