"""Runner and report: resumable, paired, and telling what failed."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sbi_jeffreys import NPE_Jeffreys
from sbi_jeffreys.__main__ import main
from sbi_jeffreys.benchmark import ablation, rounds
from sbi_jeffreys.benchmark import methods as methods_module
from sbi_jeffreys.benchmark._running import CommandError, measured
from sbi_jeffreys.benchmark.cells import FORMAT, Cell, cell_problem, read_results, write_record
from sbi_jeffreys.benchmark.evaluation import (
    EvaluationSettings,
    observations_for,
    pairs_for,
    simulations_for,
)
from sbi_jeffreys.benchmark.figures import style_of
from sbi_jeffreys.benchmark.fitted import FittedMethod
from sbi_jeffreys.benchmark.methods import (
    FitContext,
    Trained,
    get_method,
    proxy_is_usable,
    register_method,
)
from sbi_jeffreys.benchmark.report import write_report
from sbi_jeffreys.benchmark.runner import run_benchmark
from sbi_jeffreys.benchmark.statistics import collect, paired_difference, ratio, summarise
from sbi_jeffreys.benchmark.tasks import get_task
from sbi_jeffreys.diagnostics.drawing import method_style
from sbi_jeffreys.training.report import ProxyStatus

SETTINGS = EvaluationSettings(observations=1).smoke()


class PriorMethod:
    """The prior as a posterior; keeps what it was trained on."""

    training = "prior"

    def __init__(self, name="prior_method", label="Prior", broken=False):
        self.name, self.label, self.broken, self.seen = name, label, broken, []

    def fit(self, task, theta, x, seed, context):
        self.seen.append((theta, x))
        if self.broken:
            raise ArithmeticError("this method always fails")
        return PriorFit(info={"seconds": 1.0, "cpu_seconds": 1.0, "peak_mib": 1.0}, task=task)


class PriorFit(FittedMethod):
    def __init__(self, info, task):
        super().__init__(info=info)
        self.task = task

    def sample(self, x, num_samples):
        return self.task.prior.sample((num_samples,))


@pytest.fixture
def toys(monkeypatch, tmp_path):
    """Two methods that work and one that fails, registered for one test."""
    monkeypatch.setattr(methods_module, "METHODS", dict(methods_module.METHODS))
    monkeypatch.setenv("SBI_JEFFREYS_CACHE", str(tmp_path / "cache"))
    found = [PriorMethod(), PriorMethod("second", "Second"), PriorMethod("broken", "Broken", True)]
    for method in found:
        register_method(method)
    return found


def go(folder, methods, **kwargs):
    return run_benchmark(
        ["two_moons"], methods, [30], range(2), SETTINGS, folder, show_progress=False, **kwargs
    )


def test_a_deleted_cell_is_computed_again_and_only_that_one(tmp_path, toys):
    folder = tmp_path / "results"
    first = go(folder, ["prior_method"])
    assert (len(first.computed), first.failed) == (2, {})
    files = sorted(folder.iterdir())
    content = [json.loads(f.read_text()) for f in files]
    files[0].unlink()
    again = go(folder, ["prior_method"])
    assert again.computed == [files[0].name]
    assert again.present == [files[1].name]
    assert sorted(folder.iterdir()) == files  # and no temporary file is left
    repeated = json.loads(files[0].read_text())
    assert repeated["metrics"] == content[0]["metrics"]
    expected = {"python", "torch", "sbi", "sbi_jeffreys", "git_commit", "cpu", "cores", "threads"}
    assert expected | {"command"} <= set(repeated["provenance"])
    assert repeated["provenance"]["threads"] == 1


@pytest.mark.parametrize("damage", ["{ half a fi", '{"format": 0}', "[]", '{"format": 1}'])
def test_a_corrupt_file_is_named_and_computed_again(tmp_path, toys, damage):
    folder = tmp_path / "results"
    cell = Cell("two_moons", 30, 0, "prior_method")
    folder.mkdir()
    (folder / cell.file_name).write_text(damage)
    with pytest.warns(UserWarning, match=cell.file_name):
        assert cell.file_name in go(folder, ["prior_method"]).computed
    assert json.loads((folder / cell.file_name).read_text())["status"] == "done"


def test_a_failing_method_is_recorded_and_stops_nothing(tmp_path, toys):
    folder = tmp_path / "results"
    names = [Cell("two_moons", 30, seed, "broken").file_name for seed in (0, 1)]
    assert list(go(folder, ["prior_method", "broken"]).failed) == names
    record = json.loads((folder / names[0]).read_text())
    assert record["status"] == "failed"
    assert "always fails" in record["traceback"]
    again = go(folder, ["prior_method", "broken"])
    assert (again.computed, again.failed, again.failed_before) == ([], {}, names)
    toys[2].broken = False
    retried = go(folder, ["prior_method", "broken"], retry_failed=True)
    assert (retried.computed, retried.failed) == (names, {})


@pytest.mark.parametrize("name", ["prior_method", "broken"])
def test_other_settings_do_not_mix(tmp_path, toys, name):
    folder = tmp_path / "results"
    go(folder, [name])
    other = EvaluationSettings(observations=2).smoke()
    with pytest.raises(ValueError, match=r"observations=1 \(now 2\)"):
        run_benchmark(["two_moons"], [name], [30], range(1), other, folder)
    with pytest.raises(CommandError, match="choose another folder"):  # cells that are not there yet
        run_benchmark(["gaussian_linear"], [name], [30], range(1), other, folder)


def test_all_methods_see_the_same_simulations(tmp_path, toys):
    go(tmp_path / "results", ["prior_method", "second"])
    for (theta_a, x_a), (theta_b, x_b) in zip(toys[0].seen, toys[1].seen):
        assert torch.equal(theta_a, theta_b)
        assert torch.equal(x_a, x_b)
    assert not torch.equal(toys[0].seen[0][0], toys[0].seen[1][0])  # seeds differ


def test_observations_and_pairs_do_not_depend_on_the_callers_seed():
    task = get_task("two_moons")
    state = torch.get_rng_state()
    three = observations_for(task, EvaluationSettings(observations=3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    five = observations_for(task, EvaluationSettings(observations=5))
    assert torch.equal(five[:3], three)
    other = observations_for(task, EvaluationSettings(observations=3, observation_seed=1))
    assert not torch.equal(other, three)
    assert torch.equal(pairs_for(task, SETTINGS)[0], pairs_for(task, SETTINGS)[0])
    assert torch.equal(simulations_for(task, 9, 4)[1], simulations_for(task, 9, 4)[1])


@pytest.mark.slow
def test_parallel_workers_give_the_same_numbers(tmp_path, toys):
    go(tmp_path / "one", ["prior_method"])
    go(tmp_path / "two", ["prior_method"], jobs=2)
    name = Cell("two_moons", 30, 1, "prior_method").file_name
    one, two = (json.loads((tmp_path / d / name).read_text()) for d in ("one", "two"))
    assert one["metrics"] == two["metrics"]


def test_ensembles_and_corrected_draws_share_their_trainings():
    task = get_task("two_moons")
    theta, x = simulations_for(task, 60, 0)
    context = FitContext(fast=True)
    single = get_method("npe_nsf").fit(task, theta, x, 0, context)
    ensemble = get_method("ensemble2").fit(task, theta, x, 0, context)
    assert ensemble.posteriors[0] is single.posteriors[0]
    assert ensemble.info["seconds"] > single.info["seconds"]
    at, where = torch.zeros(3, 4, 2), x[:4]
    members = torch.stack([net.log_prob(at, where) for net in ensemble.estimators])
    expected = members.exp().mean(0).log()
    assert torch.allclose(ensemble.log_prob(at, where), expected, atol=1e-5)
    assert ensemble.sample(x[0], 20).shape == (20, 2)
    draws = ensemble.pair_draws(theta[:5], x[:5], 7)
    assert draws.theta.shape == (7, 5, 2)
    main = get_method("npe_jeffreys").fit(task, theta, x, 0, context)
    corrected = get_method("npe_jeffreys_corrected").fit(task, theta, x, 0, context)
    assert corrected.main.posteriors[0] is main.posteriors[0]
    assert corrected.sample(x[0], 20).shape == (20, 2)
    assert 0 < corrected.reports["ess"] <= 1
    assert corrected.pair_draws(theta[:5], x[:5], 7).log_weights.shape == (7, 5)


def test_proxy_alone_and_focused_share_the_training_of_the_main():
    task = get_task("two_moons")
    theta, x = simulations_for(task, 60, 0)
    context = FitContext(fast=True)
    names = ("npe_jeffreys", "npe_jeffreys_proxy", "npe_jeffreys_focused")
    main, proxy, focused = (get_method(n).fit(task, theta, x, 0, context) for n in names)
    assert len(context.shared) == 1
    assert proxy.main.posteriors[0] is main.posteriors[0]
    at, main_says = theta[:5, None], torch.randn(5, 1)
    trained = context.shared["npe_jeffreys", 0].inference
    with torch.no_grad():
        gap = proxy.posterior.log_potential(at, x[:1], main_says)
        gap = gap - trained.proxy.log_potential(at, x[:1])
    assert torch.allclose(gap, gap[0], atol=1e-4)  # whatever the main says
    assert focused.sample(x[0], 20).shape == (20, 2)
    assert focused.posterior_at(x[0]).x_o.equal(x[:1])
    assert focused.pair_draws(theta[:5], x[:5], 7) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fmpe", "npe_maf", "nle_vi"])
def test_other_methods_of_sbi_run(name):
    task = get_task("two_moons")
    theta, x = simulations_for(task, 60, 0)
    fitted = get_method(name).fit(task, theta, x, 0, FitContext(fast=True))
    assert fitted.sample(x[0], 5).shape == (5, 2)
    assert (fitted.pair_draws(theta[:3], x[:3], 4) is None) == (name != "npe_maf")


def test_unknown_and_incomplete_methods():
    with pytest.raises(ValueError, match=r"npe_jeffreys.*got 'nope'"):
        get_method("nope")
    with pytest.raises(TypeError, match="name, label, training"):
        register_method(object())


# ------------------------------------------------------------------------------------- report


def write_result(folder, cell, content):
    return write_record(
        folder / cell.file_name, {"format": FORMAT, "cell": asdict(cell), **content}
    )


def record(folder, seed, method, c2st, seconds, **metrics):
    content = {
        "status": "done",
        "label": {"npe_nsf": "NPE", "npe_jeffreys": "NPE_Jeffreys"}[method],
        "metrics": {"c2st": c2st, **metrics},
        "training": {
            "seconds": seconds,
            "cpu_seconds": seconds,
            "peak_mib": 10.0 * seconds,
            "resident_mib": 400.0 + 10.0 * seconds,
        },
        "settings": {"observations": 1},
    }
    return write_result(folder, Cell("two_moons", 100, seed, method), content)


@pytest.fixture
def results(tmp_path):
    """Three seeds: C2ST differences −0.1, −0.2, −0.3; NLL worse by exactly one nat."""
    folder = tmp_path / "results"
    for seed, npe, ours in ((0, 0.8, 0.7), (1, 0.9, 0.7), (2, 0.85, 0.55)):
        record(folder, seed, "npe_nsf", npe, 2.0, nll=1.0 + seed, coverage_90=0.8)
        record(folder, seed, "npe_jeffreys", ours, 8.0, nll=2.0 + seed, coverage_90=0.92)
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_measured_sees_memory_that_was_given_back():
    with measured() as cost:
        block = bytearray(b"x") * (64 << 20)
        del block
    assert 60 < cost.peak_mib < 80
    assert cost.resident_mib > cost.peak_mib + 100  # the interpreter and torch


def test_paired_statistics_are_the_textbook_ones(results):
    records = [json.loads(path.read_text()) for path in sorted(results.iterdir())]
    methods = collect(records)["two_moons", 100]
    ours, npe = methods["npe_jeffreys"], methods["npe_nsf"]
    mean = summarise(npe, "c2st")
    assert mean.mean == pytest.approx(0.85)
    assert mean.standard_error == pytest.approx(0.05 / math.sqrt(3))
    difference = paired_difference(ours, npe, "c2st")
    half = 4.302653 * 0.1 / math.sqrt(3)  # t quantile of 97.5 % with two degrees of freedom
    assert difference.mean == pytest.approx(-0.2)
    assert difference.low == pytest.approx(-0.2 - half, abs=1e-6)
    assert difference.high == pytest.approx(-0.2 + half, abs=1e-6)
    assert difference.verdict == "tie"  # three seeds do not show it: the interval contains zero
    assert paired_difference(ours, npe, "nll").verdict == "loss"
    assert paired_difference(ours, npe, "coverage_error_90").verdict == "win"
    assert paired_difference(ours, npe, "leakage") is None
    assert ratio(ours, npe, "train_seconds") == pytest.approx(4.0)


def test_one_seed_is_neither_a_win_nor_a_tie(results, tmp_path):
    methods = collect([json.loads(p.read_text()) for p in results.iterdir()])["two_moons", 100]
    single = paired_difference({0: methods["npe_jeffreys"][0]}, methods["npe_nsf"], "c2st")
    assert (single.count, single.verdict) == (1, "unknown")
    for path in results.glob("*-s[12]-*.json"):
        path.unlink()
    text = write_report(results, tmp_path / "report", show_progress=False).read_text()
    assert "## Wins" not in text
    assert (
        "NPE: 0 losses in 0 comparisons; worse in the mean, within noise, in 0; of 3 compa" in text
    )
    assert "- worse: two_moons, 100, NLL (nats): +1.000 (one seed)" in text


def test_report_says_what_was_won_and_lost_and_left_out(results, tmp_path):
    (results / "two_moons-n100-s9-npe_nsf.json").write_text("garbage")
    path = results / "two_moons-n100-s1-npe_jeffreys.json"
    entry = json.loads(path.read_text())
    entry["training"]["fell_back"] = True
    path.write_text(json.dumps(entry))
    failed = Cell("two_moons", 100, 8, "npe_nsf")
    write_result(results, failed, {"status": "failed", "error": "ValueError: no luck"})
    with pytest.warns(UserWarning, match="two_moons-n100-s9-npe_nsf"):
        path = write_report(results, tmp_path / "report", show_progress=False)
    text = " ".join(path.read_text().split())
    assert "| NPE | 3 | 0.850 ± 0.029 |" in text
    assert "| NPE_Jeffreys † | -0.200 [-0.448, +0.048] |" in text
    assert text.count("† no proxy was used: plain NPE, at some seeds") == 2  # overall, and the task
    assert "| NPE_Jeffreys | 0 / 1 / 0 | 0 / 0 / 1 | 1 / 0 / 0 |" in text
    assert "Against NPE: 1 losses in 3 comparisons" in text
    assert "- loses: two_moons, 100, NLL (nats): +1.000 [+1.000, +1.000]" in text
    assert "| NPE_Jeffreys | 100 | 4.00 × | 4.00 × | 1.14 × | 4.00 × |" in text
    assert "no luck" in text
    assert "corrupt, left out" in text
    assert len(list(path.parent.glob("*.png"))) == 5


def test_times_of_another_commit_are_not_compared(results, tmp_path):
    for path in results.glob("*npe_jeffreys.json"):
        entry = json.loads(path.read_text())
        entry["provenance"] = {**entry.get("provenance", {}), "git_commit": "an earlier one"}
        path.write_text(json.dumps(entry))
    text = write_report(results, tmp_path / "report", show_progress=False).read_text()
    text = " ".join(text.split())
    assert "## Cost" not in text
    assert "| NPE_Jeffreys | -0.200 [-0.448, +0.048] |" in text  # accuracy is


def test_report_without_results_says_so(tmp_path, capsys):
    assert main(["report", "--results", str(tmp_path), "--quiet"]) == 2
    assert "run `benchmark` first" in capsys.readouterr().err


@pytest.mark.parametrize("is_file", [False, True])
def test_report_of_a_folder_that_cannot_be_read_says_so(tmp_path, capsys, is_file):
    folder = tmp_path / "elsewhere"
    if is_file:
        folder.write_text("not a folder")
    assert main(["report", "--results", str(folder), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert f"results: expected a folder that can be read, got '{folder}'" in said
    assert ("Not a directory" if is_file else "No such file or directory") in said
    assert "pass another one with --results" in said


# ------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(
    ("place", "value", "field"),
    [
        (("metrics", "c2st"), math.nan, "metrics.c2st"),
        (("metrics", "c2st"), 7, "metrics.c2st"),
        (("metrics", "c2st"), True, "metrics.c2st"),
        (("metrics", "c2st"), None, "metrics.c2st"),
        (("metrics", "nll"), {"mean": 1.0}, "metrics.nll"),
        (("metrics", "nll"), 10**400, "metrics.nll"),
        (("metrics", "coverage_90"), -0.1, "metrics.coverage_90"),
        (("metrics",), [0.7], "metrics"),
        (("training", "seconds"), "long", "training.seconds"),
        (("training",), None, "training"),
        (("evaluation_seconds",), {"sampling": []}, "evaluation_seconds.sampling"),
        (("settings",), "default", "settings"),
        (("provenance",), 3, "provenance"),
        (("label",), ["NPE"], "label"),
        (("cell", "seed"), "0", "cell.seed"),
        (("cell", "seed"), True, "cell.seed"),
        (("cell",), {"task": "two_moons"}, "cell.simulations"),
        (("status",), ["done"], "status"),
    ],
)
def test_a_wrong_field_is_named_and_the_report_goes_on(results, tmp_path, place, value, field):
    path = results / "two_moons-n100-s0-npe_nsf.json"
    entry = json.loads(path.read_text())
    inner = entry
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path.write_text(json.dumps(entry))
    with pytest.warns(UserWarning, match=rf"{path.name}: expected .*{field}\b"):
        report = write_report(results, tmp_path / "report", show_progress=False)
    assert path.name in report.read_text()


def test_every_committed_result_is_valid_by_the_checks():
    folder = Path(__file__).parents[2] / "benchmark_results"
    if not folder.exists():
        pytest.skip("this checkout has no results")
    checks = {"ablation": ablation.CHECK, "rounds": rounds.CHECK}
    for inner in ("seven_tasks", "published_protocol", "structured", "ablation", "rounds"):
        found = list(read_results(folder / inner, checks.get(inner, cell_problem)))
        assert found
        assert all(isinstance(record, dict) for record in found)


@pytest.mark.parametrize("command", ["benchmark", "ablation", "rounds", "main job"])
def test_an_output_folder_that_cannot_be_used_is_said_before_anything_is_trained(
    tmp_path, capsys, monkeypatch, command
):
    (tmp_path / "file").write_text("I was here first.")
    monkeypatch.setattr("sbi.inference.NPE.train", lambda *_, **__: pytest.fail("trained"))
    arguments = [] if command == "main job" else [command]
    assert main([*arguments, "--fast", "--quiet", "--out", str(tmp_path / "file")]) == 2
    assert "expected a folder that can be written to" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "I was here first."


def test_a_full_disk_is_said_before_anything_is_trained(tmp_path, toys, monkeypatch):
    def full_disk(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full_disk)
    with pytest.raises(CommandError, match=r"No space left on device.*--out, or make room"):
        go(tmp_path / "results", ["prior_method"])
    assert toys[0].seen == []


def test_corrected_draws_need_a_proxy_that_was_trusted():
    for status in ProxyStatus:
        report = SimpleNamespace(proxy_status=status)
        usable = proxy_is_usable(SimpleNamespace(training_report=report))
        assert usable == (status is ProxyStatus.USED)
    assert not proxy_is_usable(SimpleNamespace(training_report=None))


def test_a_training_without_a_proxy_says_that_it_fell_back():
    context = FitContext(fast=True)
    trained = NPE_Jeffreys(get_task("two_moons").prior, **context.trainer_kwargs)
    cost = {"seconds": 1.0}
    assert Trained(trained, None, cost).info["fell_back"] is True
    assert "fell_back" not in Trained(SimpleNamespace(summary={}), None, cost).info


def test_one_seed_has_no_standard_error_to_show():
    assert f"{summarise({0: {'c2st': 0.5213}}, 'c2st'):.3f}" == "0.521"
    two = summarise({0: {"c2st": 0.5}, 1: {"c2st": 0.6}}, "c2st")
    assert f"{two:.2f}" == "0.55 ± 0.05"


def test_a_method_looks_the_same_in_every_figure():
    styles = {name: style_of(name) for name in methods_module.METHODS}
    looks = {(style["color"], style["marker"]) for style in styles.values()}
    assert len(looks) == len(styles)
    for k, name in enumerate(("npe_nsf", "npe_jeffreys")):  # as `plots` draws a first and second
        assert styles[name].items() >= method_style(k).items()
