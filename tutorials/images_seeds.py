"""Repeat `07_images.ipynb` with five seeds, and write the scores to `data/images_seeds.json`.

    python tutorials/images_seeds.py

A seed decides which images are held out, the noise, and the training. The code that runs is the
notebook's own, up to and with the cell that scores the draws. Some minutes per seed.
"""

from __future__ import annotations

import json
import statistics

import matplotlib
from execute import FOLDER, names_of

NUM_SEEDS = 5


def scores_of(seed: int) -> dict[str, dict[str, float]]:
    """Run the notebook's cells with this seed and return its scores, by name and metric."""
    other = ("\nseed = 0\n", f"\nseed = {seed}\n")
    return names_of("07_images.ipynb", "scores", other)["scores"]


def main() -> None:
    """Write the scores of all seeds, and print means with standard errors and the paired gain."""
    matplotlib.use("Agg")
    found: list[dict[str, dict[str, float]]] = []
    for seed in range(NUM_SEEDS):
        found.append(scores_of(seed))
        text = json.dumps(found, indent=1, ensure_ascii=False)
        (FOLDER / "data" / "images_seeds.json").write_text(text + "\n", encoding="utf-8")
    for name in found[0]:
        for metric in found[0][name]:
            values = [scores[name][metric] for scores in found]
            print(f"{name:14}{metric:9}{_summary(values)}")
    gains = [scores["NPE"]["NLL"] - scores["NPE_Jeffreys"]["NLL"] for scores in found]
    print(f"gain in NLL, paired: {_summary(gains)}")


def _summary(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):7.3f} ± {error:.3f}"


if __name__ == "__main__":
    main()
