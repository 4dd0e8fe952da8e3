"""The ablation: variants that share their beginnings, a table that says what does not hold."""

import argparse
import json
import math
from dataclasses import replace

import pytest
import torch

from sbi_jeffreys import JeffreysOptions, NPE_Jeffreys
from sbi_jeffreys.__main__ import main
from sbi_jeffreys._sbi import NoTracker
from sbi_jeffreys.benchmark import ablation
from sbi_jeffreys.benchmark.ablation import Row, best_frozen, row_list, tabulate, verdict
from sbi_jeffreys.benchmark.evaluation import simulations_for
from sbi_jeffreys.benchmark.methods import FitContext
from sbi_jeffreys.benchmark.tasks import get_task
from sbi_jeffreys.benchmark.variants import CONDITIONS, VARIANTS, ForkableNPE
from sbi_jeffreys.proxies.experts import DEFAULT_EXPERTS, FlowExpert
from sbi_jeffreys.training.held_out import HeldOut

CONTEXT = FitContext(fast=True)
OPTIONS = CONTEXT.options()
TASK = get_task("two_moons")


def train(kind, options=None):
    torch.manual_seed(1)
    inference = kind(TASK.prior, show_progress_bars=False, tracker=NoTracker(), options=options)
    inference.append_simulations(*simulations_for(TASK, 80, 0)).train(**CONTEXT.train_kwargs)
    return inference


@pytest.fixture(scope="module")
def trainer():
    return train(ForkableNPE)


@pytest.fixture(scope="module")
def options(trainer):
    """With a proxy that the first fork fits."""
    return replace(OPTIONS, proxy=CONDITIONS["good"].build(TASK.prior, OPTIONS))


def weights(inference):
    return torch.cat([p.detach().flatten() for p in inference._neural_net.parameters()])


def test_the_default_fork_is_what_the_library_trains(trainer, options):
    before = weights(trainer)
    trainer.fork(replace(options, num_steps=1))  # somebody else is first
    fork, straight = trainer.fork(options), train(NPE_Jeffreys, OPTIONS)
    assert torch.equal(weights(fork), weights(straight))
    assert fork.summary["multiplier"] == straight.summary["multiplier"]
    assert torch.equal(weights(trainer), before)


@pytest.mark.slow
def test_every_variant_differs_from_the_default(trainer, options, monkeypatch):
    # So few pairs may favour no temperature, and then leaving it out changes nothing.
    monkeypatch.setattr(HeldOut, "inverse_temperature", lambda *_: 1.1)
    default = trainer.fork(options)
    for name, variant in VARIANTS.items():
        fork = trainer.fork(replace(options, **variant.changes), variant.edit)
        same = fork.summary["held_out_forward"] == default.summary["held_out_forward"]
        assert same == (name == "adaptive"), name
        if name.startswith("frozen"):
            kept = float(name.removeprefix("frozen_"))
            assert fork.summary["multiplier"] == pytest.approx([kept, kept])
            assert set(fork.summary["trust"]) == {1.0}


@pytest.mark.parametrize("name", ["forward", "generated", "reverse"])
def test_a_term_that_is_switched_off_has_no_weight(trainer, options, name):
    seen = {}

    def look(stage, owner):
        VARIANTS[f"without_{name}"].edit(stage, owner)
        terms = {key: torch.tensor(1.0) for key in ("forward", "generated", "reverse")}
        lam = torch.tensor(0.7)

        def loss(terms):
            stage.loss.loss.terms = lambda step, next_real: dict(terms)
            return float(stage.loss(0, lam, None)[0])

        for key in terms:
            seen[key] = loss(terms) - loss({**terms, key: terms[key] * 2})
        del stage.loss.loss.terms

    trainer.fork(replace(options, num_steps=1), look)
    assert {key for key, effect in seen.items() if effect == 0} == {name}


def test_r_at_real_x_reads_training_observations_and_only_there(trainer, options):
    seen = []

    def look(stage, owner):
        VARIANTS["real_x"].edit(stage, owner)
        for loss in (stage.loss.loss, stage.loss.real):
            samples = loss._samples
            loss._samples = lambda x, num, f=samples: (seen.append(x), f(x, num))[1]
        _, terms = stage.loss(0, torch.tensor(1.0), None)
        assert set(terms) == {"generated", "reverse"}
        assert len(seen) == 1
        del stage.loss.loss._samples, stage.loss.real._samples

    trainer.fork(replace(options, num_steps=1), look)
    x = trainer.get_simulations()[1][trainer.train_indices]
    assert all(bool((row == x).all(1).any()) for row in seen[0])


def test_a_proxy_fitted_to_shuffled_theta_is_worse_and_fitted_once(trainer):
    shuffled = CONDITIONS["shuffled"].build(TASK.prior, OPTIONS)
    fork = trainer.fork(replace(OPTIONS, proxy=shuffled))
    results = shuffled.results
    trainer.fork(replace(OPTIONS, proxy=shuffled))
    assert shuffled.results is results
    good = trainer.fork(OPTIONS).summary["proxy_held_out"][-1]
    assert fork.summary["proxy_held_out"][-1] > good


@pytest.mark.parametrize("name", sorted(CONDITIONS))
def test_every_condition_can_be_had_with_the_default_members(name):
    proxy = CONDITIONS[name].build(get_task("sir").prior, JeffreysOptions())
    assert proxy.experts is None or len(proxy.experts) > 0  # None: by the width of x


def test_an_undertrained_proxy_has_nothing_but_nets_of_two_epochs():
    proxy = CONDITIONS["undertrained"].build(TASK.prior, JeffreysOptions())
    assert proxy.config.max_epochs == 2
    assert proxy.experts == tuple(m for m in DEFAULT_EXPERTS if isinstance(m, FlowExpert))


def test_raw_counts_are_neither_dequantised_nor_transformed():
    task = get_task("sir")
    theta, x = simulations_for(task, 60, 0)
    raw = CONDITIONS["raw"].build(task.prior, OPTIONS)
    raw.fit(theta, x, torch.arange(50), torch.arange(50, 60))
    transform = raw.fitted[0].transform
    assert set(transform.kinds) == {"identity"}
    assert not bool(transform.integer.any())
    assert raw.log_factor(theta[None, :5], x[:5]).shape == (1, 5)
    draws, y = raw.sample_given(theta)
    assert len(draws) == len(y)


def test_rows_of_the_command_line():
    assert row_list("slcp, two_moons:raw") == [Row("slcp"), Row("two_moons", "raw")]
    assert [r.condition for r in row_list("two_moons")] == ["good", "shuffled", "undertrained"]
    frozen = {"frozen_0.3", "frozen_1", "frozen_10"}
    assert set(Row("sir", "raw").variants) == {"adaptive", "without_temper", *frozen}
    for text in ("moons", "sir:bad", "sir:"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"two_moons.*shuffled"):
            row_list(text)
    with pytest.raises(argparse.ArgumentTypeError, match="comma-separated"):
        row_list("")


def records(adaptive, frozen=(1.0, 1.1, 0.9), npe=(2.0, 2.1, 1.9), ran=("adaptive", "frozen_1")):
    """Hand-made cells of one row: NLL per seed of adaptive, the better frozen one, and NPE.

    The symmetric stage ran in the variants `ran`.
    """
    found = []
    for seed, values in enumerate(zip(adaptive, frozen, npe)):
        named = dict(zip(("adaptive", "frozen_1", "npe"), values))
        named["frozen_10"] = named["frozen_1"] + 0.5
        variants = {
            name: {
                "metrics": {"nll": value, "c2st": None},
                "training": {"cpu_seconds": 1.0, **({"multiplier": 1.0} if name in ran else {})},
            }
            for name, value in named.items()
        }
        found.append(
            {
                "format": 1,
                "study": "ablation",
                "command": "by hand",
                "settings": {"fast": True},
                "key": {"row": "sir:raw", "simulations": "n100", "seed": f"s{seed}"},
                "results": {
                    "variants": variants,
                    "proxy": {"held_out": None, "trust": 0.0},
                },
            }
        )
    return found


@pytest.mark.parametrize(
    ("adaptive", "against_frozen", "against_npe"),
    [
        ((0.9, 1.0, 0.8), "holds", "holds"),
        ((1.2, 1.0, 0.9), "within noise", "holds"),
        ((1.3, 1.41, 1.2), "BROKEN", "holds"),
        ((2.3, 2.4, 2.21), "BROKEN", "BROKEN"),
        ((2.0, 2.1, 1.9), "BROKEN", "holds"),  # fell back to NPE: not below it
    ],
)
def test_a_broken_promise_is_said(tmp_path, adaptive, against_frozen, against_npe):
    cells = records(adaptive)
    row = tabulate(cells)["sir:raw", "n100"]
    best = best_frozen(row, "nll")
    assert best == "frozen_1"
    assert verdict(row, best, "nll") == against_frozen
    assert verdict(row, "npe", "nll") == against_npe
    assert verdict(row, "npe", "c2st") == "–"
    for seed, cell in enumerate(cells):
        (tmp_path / f"sir_raw-n100-s{seed}.json").write_text(json.dumps(cell))
    path = ablation.write_table(tmp_path)
    assert path is not None
    text = " ".join(path.read_text().split())
    assert f"| sir:raw, 100 | {against_frozen} / {against_npe} |" in text
    assert "held-out NLL of the proxy not finite" in text


def test_a_refused_proxy_decides_nothing_and_is_said(tmp_path):
    npe = (2.0, 2.1, 1.9)
    untrusted = tabulate(records(npe, npe=npe, ran=("frozen_1",)))["sir:raw", "n100"]
    assert verdict(untrusted, "frozen_1", "nll") == "BROKEN"  # frozen weights followed the proxy
    assert verdict(untrusted, "npe", "nll") == "–"
    cells = records(npe, frozen=npe, npe=npe, ran=())
    cells[2] = records((1.0,))[0] | {"key": cells[2]["key"]}  # one seed of three is compared
    for seed, cell in enumerate(cells):
        status = "USED" if seed == 2 else "IMPLAUSIBLE"
        cell["results"]["proxy"] = {"held_out": -1.0, "trust": 1.0, "status": status}
        (tmp_path / f"sir_raw-n100-s{seed}.json").write_text(json.dumps(cell))
    text = ablation.write_table(tmp_path).read_text()
    assert "s0: held-out NLL of the proxy -1.000, refused, because its draws do not look" in text
    assert "s2: held-out NLL of the proxy -1.000, trust 1.000" in text
    assert "-1.000 (one seed)" in text
    (tmp_path / "sir_raw-n100-s2.json").unlink()
    summary = ablation.write_table(tmp_path).read_text()
    assert "sir:raw, 100" in summary
    assert "holds /" not in summary
    assert "/ holds" not in summary


def test_one_seed_decides_nothing():
    row = tabulate(records((1.5,)))["sir:raw", "n100"]
    assert verdict(row, "frozen_1", "nll") == "worse, one seed"
    assert math.isclose(row["npe"][0]["nll"], 2.0)


def run(folder, *more):
    arguments = ("--tasks", "two_moons:shuffled", "--simulations", "60", "--seeds", "1", "--fast")
    return main(["ablation", *arguments, "--quiet", "--out", str(folder), *more])


@pytest.mark.slow
def test_the_command_resumes_and_does_not_mix_settings(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SBI_JEFFREYS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "out"
    assert run(folder, "--c2st") == 0
    assert "Measurements: 1 computed, 0 there already" in capsys.readouterr().out
    assert "C2ST" in (folder / "ablation.md").read_text()
    file = folder / "two_moons_shuffled-n60-s0.json"
    record = json.loads(file.read_text())
    assert set(record["results"]["variants"]) == {"npe", *Row("two_moons", "shuffled").variants}
    assert {"nll", "coverage_90", "kl_reverse"} <= set(
        record["results"]["variants"]["adaptive"]["metrics"]
    )
    ran = "multiplier" in record["results"]["variants"]["adaptive"]["training"]
    assert ran == (record["results"]["proxy"]["status"] == "USED")
    assert sorted(f.name for f in folder.iterdir()) == ["ablation.md", file.name]
    assert run(folder, "--c2st") == 0
    assert "Measurements: 0 computed, 1 there already" in capsys.readouterr().out
    assert run(folder) == 2
    assert "c2st=True (now False)" in capsys.readouterr().err
    file.write_text("{ half a fi")
    monkeypatch.setattr(ablation, "measure_row", lambda *_, **__: {"results": record["results"]})
    with pytest.warns(UserWarning, match=file.name):
        assert run(folder, "--c2st") == 0
    assert "Measurements: 1 computed" in capsys.readouterr().out
    assert json.loads(file.read_text())["results"] == record["results"]


def test_a_failure_is_told_and_leaves_no_file(tmp_path, capsys, monkeypatch):
    def fail(*arguments):
        raise ArithmeticError("no luck")

    monkeypatch.setattr(ablation, "simulations_for", fail)
    assert run(tmp_path / "out") == 1
    printed = capsys.readouterr()
    assert "no luck" in printed.err
    assert "1 failed" in printed.out
    assert list((tmp_path / "out").iterdir()) == []


def test_unknown_rows_end_in_a_message(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["ablation", "--tasks", "nope"])
    assert exit_.value.code == 2
    assert "two_moons" in capsys.readouterr().err
