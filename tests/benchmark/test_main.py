"""The command line, end to end on smoke budgets."""

import argparse
import builtins
import json

import pytest
import torch

from sbi_jeffreys.__main__ import main
from sbi_jeffreys.benchmark import main_job, methods
from sbi_jeffreys.benchmark._arguments import add_run_arguments, positive_int, seed_range
from sbi_jeffreys.benchmark.main_job import plot_posteriors
from sbi_jeffreys.benchmark.tasks import known_tasks


def run(*argv):
    return main([str(argument) for argument in argv])


def test_main_job_prints_one_table_and_writes_two_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SBI_JEFFREYS_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "outputs"
    code = run("--fast", "--quiet", "--simulations", 60, "--observations", 1, "--out", out)
    assert code == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    header = next(line for line in lines if line.startswith("method"))
    assert header.split()[1:4] == ["C2ST", "NLL", "coverage"]
    for label in ("NPE ", "NPE_Jeffreys ", "NPE_Jeffreys corrected"):
        row = next(line for line in lines if line.startswith(label))
        assert len(row) == len(header)  # aligned
    assert any(line.startswith("Proxy (likelihood: vector x): used") for line in lines)
    assert "†" not in printed.out
    for name in ("posteriors.png", "training.png"):
        assert (out / name).stat().st_size > 5000
    assert not (tmp_path / "sbi-logs").exists()


def test_benchmark_then_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SBI_JEFFREYS_CACHE", str(tmp_path / "cache"))
    arguments = ("--tasks", "two_moons", "--methods", "npe_maf,npe_nsf", "--simulations", 50)
    small = ("--seeds", 1, "--observations", 1, "--fast", "--quiet", "--out", tmp_path / "r")
    assert run("benchmark", *arguments, *small) == 0
    assert "Cells: 2 computed, 0 there already, 0 failed" in capsys.readouterr().out
    assert run("benchmark", *arguments, *small) == 0
    assert "Cells: 0 computed, 2 there already" in capsys.readouterr().out
    assert run("report", "--results", tmp_path / "r", "--out", tmp_path / "rep", "--quiet") == 0
    page = (tmp_path / "rep" / "report.md").read_text()
    assert "## Cost" in page
    assert "## Wins" not in page  # one seed has no interval
    assert "## Where" not in page  # nothing of ours was run


def test_fewer_samples_of_a_smoke_run_are_those_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("SBI_JEFFREYS_CACHE", str(tmp_path / "cache"))
    one = ("--tasks", "two_moons", "--methods", "npe_maf", "--simulations", 50, "--seeds", 1)
    small = ("--observations", 1, "--fast", "--num-samples", 33, "--quiet", "--out", tmp_path)
    assert run("benchmark", *one, *small) == 0
    (record,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert record["settings"]["num_samples"] == 33


def test_more_than_two_parameters_are_drawn_in_pairs(tmp_path):
    reference, npe, ours = torch.randn(3, 60, 6)
    plot_posteriors(reference, [npe, ours], tmp_path / "pairs.png", "six parameters")
    assert (tmp_path / "pairs.png").stat().st_size > 5000


def test_tasks_are_listed_under_headers(capsys):
    assert run("tasks") == 0
    header, rule, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["task", "parameters", "outputs", "reference", "posterior"]
    assert set(rule) == {"-", " "}
    assert any(row.split() == ["two_moons", "2", "2", "exact"] for row in rows)
    assert [row.split()[0] for row in rows] == sorted(known_tasks())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--task", "nope"), "argument --task: expected one of "),
        (("--task", "nope"), "two_moons, got 'nope'"),
        (("--simulations", "few"), "whole number of at least 20, got 'few'"),
        (("--observations", "0"), "at least 1, got '0'"),
        (("--simulations", "1e13"), "a whole number of at most 10,000,000, got '1e13'"),
        (("benchmark", "--observations", "1e30"), "at most 10,000,000, got '1e30'"),
        (("--seed", "x"), "argument --seed: expected a whole number of at least 0, got 'x'"),
        (("benchmark", "--first-seed", "3e9"), "a whole number of at most 2,147,483,647, got"),
        (("benchmark", "--methods", "npe_nsf,magic"), "got 'magic'"),
        (("benchmark", "--tasks", ","), "comma-separated list"),
        (("benchmark", "--backend", "threads"), "invalid choice"),
        (("--fast", "benchmark"), "command benchmark before its options, got --fast before it"),
        (("--out", "compare", "compare", "f.npz"), "write options after the command: python -m"),
    ],
)
def test_bad_values_end_in_a_message_and_code_2(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(*argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_dask_that_is_not_there_is_said(tmp_path, capsys, monkeypatch):
    original = builtins.__import__

    def without_dask(name, *args, **kwargs):
        if name.startswith("dask"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_dask)
    code = run("benchmark", "--fast", "--backend", "dask", "--quiet", "--out", tmp_path / "r")
    assert code == 2
    assert "pip install 'dask[distributed]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "failure",
    [
        ImportError("cannot import name 'Client' from 'dask.distributed'"),
        ModuleNotFoundError("No module named 'msgpack'", name="msgpack"),
        AttributeError("module 'dask' has no attribute 'config'"),
    ],
)
def test_dask_that_is_broken_is_not_called_missing(tmp_path, capsys, monkeypatch, failure):
    original = builtins.__import__

    def broken_dask(name, *args, **kwargs):
        if name.startswith("dask"):
            raise failure
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken_dask)
    code = run("benchmark", "--fast", "--backend", "dask", "--quiet", "--out", tmp_path / "r")
    assert code == 2
    printed = capsys.readouterr().err
    assert "not installed" not in printed
    assert f"Dask is installed, but importing it fails with {type(failure).__name__}" in printed
    assert str(failure) in printed


def test_whole_numbers_may_be_written_with_an_exponent():
    parse = positive_int(20)
    assert [parse(text) for text in ("1e3", "1000", "2.5e2")] == [1000, 1000, 250]
    for text in ("1e1", "20.5", "-inf", "nan", "1e-3", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="whole number of at least 20"):
            parse(text)
    for text in ("1e8", "inf"):
        with pytest.raises(argparse.ArgumentTypeError, match="whole number of at most 10,000,000"):
            parse(text)


def test_further_seeds_can_be_asked_for():
    parser = argparse.ArgumentParser()
    add_run_arguments(parser, "results", seeds=5)
    assert list(seed_range(parser.parse_args([]))) == [0, 1, 2, 3, 4]
    asked = parser.parse_args(["--first-seed", "2", "--seeds", "3"])
    assert list(seed_range(asked)) == [2, 3, 4]
    with pytest.raises(SystemExit):
        parser.parse_args(["--first-seed", "-1"])


@pytest.mark.slow
def test_the_main_job_names_trainings_only_where_something_is_trained(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("SBI_JEFFREYS_CACHE", str(tmp_path / "cache"))
    for module in (methods, main_job):  # and say so where plain NPE is kept
        monkeypatch.setattr(module, "proxy_is_usable", lambda inference: False)
    arguments = ("--fast", "--simulations", 60, "--observations", 1, "--out", tmp_path / "o")
    assert run(*arguments) == 0
    printed = capsys.readouterr()
    for text in ("NPE_Jeffreys † ", "NPE_Jeffreys corrected † ", "\n† no proxy was used: plain"):
        assert text in printed.out
    assert "NPE † " not in printed.out
    said = printed.err
    assert "NPE: training on 60 simulations" in said
    assert "NPE_Jeffreys: training on 60 simulations" in said
    assert "corrected: training" not in said
    assert "corrected: evaluating" in said


def test_without_any_word_the_main_job_runs(monkeypatch):
    """As the README's first command does."""
    seen = []
    monkeypatch.setattr(main_job, "run", lambda args: seen.append(args) or 0)
    assert main([]) == 0
    assert seen[0].task == "two_moons"
    assert not seen[0].fast
