"""Several rounds: measured per round, stalls told, resumable."""

import json

import pytest
import torch

from sbi_jeffreys import NPE_Jeffreys
from sbi_jeffreys.__main__ import main
from sbi_jeffreys.benchmark import rounds
from sbi_jeffreys.benchmark.methods import FitContext
from sbi_jeffreys.benchmark.rounds import METHODS, RoundsSettings, measure_rounds
from sbi_jeffreys.benchmark.rounds_page import LABELS, goal, tabulate, write_page
from sbi_jeffreys.benchmark.tasks import get_task

SETTINGS = RoundsSettings(rounds=2, simulations=60, raw_draws=200, num_samples=50, fast=True)


@pytest.mark.slow
def test_the_command_measures_every_method_and_resumes(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SBI_JEFFREYS_CACHE", str(tmp_path / "cache"))
    folder, methods = tmp_path / "out", ("nle_mcmc", "npe_jeffreys_truncated")
    arguments = ["rounds", "--tasks", "two_moons", "--rounds", "2", "--seeds", "1", "--fast"]
    arguments += ["--simulations-per-round", "60", "--quiet", "--out", str(folder)]
    arguments += ["--methods", ",".join(methods)]
    assert main(arguments) == 0
    assert "Measurements: 2 computed, 0 there already" in capsys.readouterr().out
    for method in methods:
        results = json.loads((folder / f"two_moons-s0-{method}.json").read_text())["results"]
        assert len(results["rounds"]) == 2
        for entry in results["rounds"]:
            assert (entry["acceptance"] is None) == (method == "nle_mcmc")
            assert entry["sampling_seconds"] > 0
            assert 0 < entry["c2st"] <= 1
        for name in ("corrected", "focused"):
            assert (results[name] is None) == ("jeffreys" not in method)
    text = (folder / "rounds.md").read_text()
    assert METHODS.keys() == LABELS.keys()
    assert all(LABELS[method] in text for method in methods)
    assert main(arguments) == 0
    assert "Measurements: 0 computed, 2 there already" in capsys.readouterr().out
    assert main([*arguments, "--rounds", "3"]) == 2
    assert "rounds=2 (now 3)" in capsys.readouterr().err
    assert main([*arguments, "--methods", "nle_mcmc"]) == 0
    assert "Measurements: 0 computed, 1 there already" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*arguments, "--methods", "npe_nsf,unheard_of"])
    assert "unheard_of" in capsys.readouterr().err


def test_a_stall_ends_the_measurement_and_is_recorded(monkeypatch):
    monkeypatch.setattr(rounds, "_samples", lambda posterior, num, max_seconds: None)
    found = measure_rounds(
        FitContext(fast=True), get_task("two_moons"), METHODS["npe_nsf"], 0, SETTINGS
    )["results"]
    (entry,) = found["rounds"]
    assert entry["c2st"] is None
    assert entry["sampling_seconds"] is None


@pytest.mark.slow
def test_corrected_draws_are_the_proposal_of_the_next_round(monkeypatch):
    proposals, append = [], NPE_Jeffreys.append_simulations

    def recorded(self, theta, x, proposal=None, **kwargs):
        proposals.append(type(proposal).__name__)
        return append(self, theta, x, proposal, **kwargs)

    monkeypatch.setattr(NPE_Jeffreys, "append_simulations", recorded)
    method = METHODS["npe_jeffreys_corrected"]
    found = measure_rounds(FitContext(fast=True), get_task("two_moons"), method, 0, SETTINGS)
    assert len(found["results"]["rounds"]) == 2
    assert proposals == ["NoneType", "CorrectedPosterior"]


def test_samples_that_take_too_long_are_none():
    class Leaking:
        def sample(self, shape, **kwargs):
            assert kwargs["return_partial_on_timeout"]
            return torch.zeros(shape[0] - 1, 2)

    assert rounds._samples(Leaking(), 5, 0.1) is None


def record(method, seed, acceptance, seconds=1.0, c2st=0.6):
    return {
        "format": 1,
        "study": "rounds",
        "command": "by hand",
        "settings": {"fast": True},
        "key": {"task": "two_moons", "seed": f"s{seed}", "method": method},
        "results": {
            "rounds": [
                {"acceptance": a, "sampling_seconds": seconds, "cpu_seconds": 2.0, "c2st": c2st}
                for a in acceptance
            ],
            "corrected": None,
            "focused": c2st - 0.05,
        },
    }


@pytest.mark.parametrize(
    ("acceptance", "seconds", "expected"),
    [
        ([0.99, 0.96], 1.0, "met, worst 0.960"),
        ([0.99, 0.94], 1.0, "MISSED, worst 0.940"),
        ([0.99], None, "MISSED: 1 of 1 stalled"),
    ],
)
def test_the_goal(tmp_path, acceptance, seconds, expected):
    found = record("npe_jeffreys", 0, acceptance, seconds)
    assert goal(tabulate([found])["two_moons"]["npe_jeffreys"]) == expected
    (tmp_path / "two_moons-s0-npe_jeffreys.json").write_text(json.dumps(found))
    path = write_page(tmp_path)
    assert path is not None
    assert expected in path.read_text()


def test_c2st_is_paired_with_npe(tmp_path):
    for seed in (0, 1, 2):
        for method, score in (("npe_nsf", 0.7), ("npe_jeffreys", 0.6 + 0.01 * seed)):
            found = record(method, seed, [1.0], c2st=score)
            (tmp_path / f"two_moons-s{seed}-{method}.json").write_text(json.dumps(found))
    path = write_page(tmp_path)
    assert path is not None
    assert "-0.090 [" in path.read_text()
    assert write_page(tmp_path / "nothing") is None
