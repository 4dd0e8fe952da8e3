"""How much memory does NPE_Jeffreys take beside NPE? Peak of a training, each in its own process.

    python tests/attack_memory.py

Three configurations of 1,000 simulations: no prior, images with an embedding net, 500 outputs. What
Python and the libraries take before training is reported beside it.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import warnings

CONFIGURATIONS = ("no_prior", "images", "wide")


def train(configuration: str, method: str) -> None:
    """Train, and print the peak before and after in megabytes."""
    import torch
    from sbi.inference import NPE
    from sbi.neural_nets import posterior_nn
    from sbi.neural_nets.embedding_nets import CNNEmbedding
    from sbi.utils import BoxUniform

    from sbi_jeffreys import NPE_Jeffreys
    from sbi_jeffreys._sbi import NoTracker

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    prior, builder = BoxUniform(-torch.ones(3), torch.ones(3)), "nsf"
    theta = prior.sample((1_000,))
    if configuration == "images":
        x = theta[:, :1, None] * torch.ones(32, 32) + 0.5 * torch.randn(1_000, 32, 32)
        net = CNNEmbedding((32, 32), out_channels_per_layer=[6, 12], output_dim=10)
        builder = posterior_nn("nsf", embedding_net=net)
    elif configuration == "wide":
        times = torch.linspace(0, 6, 500)
        x = theta[:, :1] * torch.sin(times + theta[:, 1:2]) + 0.3 * torch.randn(1_000, 500)
    else:
        x = theta + 0.3 * torch.randn(1_000, 3)
    kind = NPE if method == "npe" else NPE_Jeffreys
    inference = kind(
        prior=None if configuration == "no_prior" else prior,
        density_estimator=builder,
        show_progress_bars=False,
        tracker=NoTracker(),
    )
    before = peak()
    inference.append_simulations(theta, x).train()
    print(f"\n{before:.0f} {peak():.0f}")  # after a line of sbi's that has no end


def peak() -> float:
    """Peak resident memory of this process so far, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    print("| configuration | before, MB | NPE | NPE_Jeffreys | ratio |\n|---|---|---|---|---|")
    for configuration in CONFIGURATIONS:
        found = {}
        for method in ("npe", "jeffreys"):
            command = [sys.executable, __file__, configuration, method]
            answer = subprocess.run(command, capture_output=True, text=True, check=True)
            found[method] = [float(word) for word in answer.stdout.split()[-2:]]
        before, npe = found["npe"]
        ours = found["jeffreys"][1]
        print(f"| {configuration} | {before:.0f} | {npe:.0f} | {ours:.0f} | {ours / npe:.2f} |")


if __name__ == "__main__":
    train(*sys.argv[1:]) if len(sys.argv) == 3 else main()
