"""Several networks fitted in one pass: the same result as one after the other."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from sbi.neural_nets import likelihood_nn

from sbi_jeffreys.networks.fitting import FitConfig
from sbi_jeffreys.networks.together import FitTask, fit_together

CONFIG = FitConfig(max_epochs=6, batch_size=20, patience=10, learning_rate=1e-2)


def loss(net, x, y):
    return ((net(x) - y) ** 2).sum(dim=-1)


def regression_tasks(num: int = 3, decays=(0.0, 0.5, 2.0), sizes=(100, 100, 100)):
    """Linear networks with different targets, weight decay and held-out pairs."""
    torch.manual_seed(0)
    x = torch.randn(140, 2)
    tasks = []
    for k in range(num):
        y = x @ torch.tensor([[1.0 + k], [-2.0]]) + 0.1 * torch.randn(140, 1)
        config = replace(CONFIG, weight_decay=decays[k])
        train, val = torch.arange(sizes[k]), torch.arange(sizes[k], 120 + 3 * k)

        def batch(rows, training, y=y):
            return x[rows], y[rows]

        net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        tasks.append(FitTask(net, batch, loss, train, val, config, constant=float(k)))
    return tasks


def in_order(monkeypatch) -> None:
    """Without shuffling, so that both ways take the same batches."""
    monkeypatch.setattr(torch, "randperm", lambda num: torch.arange(num))


def test_fits_together_are_those_one_after_the_other(monkeypatch):
    in_order(monkeypatch)
    apart, together = regression_tasks(), regression_tasks()
    expected = [task.fit() for task in apart]
    results = fit_together(together)
    for ours, theirs, a, b in zip(results, expected, together, apart):
        assert ours.epochs == theirs.epochs
        assert ours.held_out == pytest.approx(theirs.held_out, rel=1e-4)
        for p, q in zip(a.net.parameters(), b.net.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
        assert not a.net.training


def test_a_flow_of_sbi_is_fitted_as_alone(monkeypatch):
    in_order(monkeypatch)
    torch.manual_seed(1)
    z = torch.randn(80, 2)
    x = z @ torch.randn(2, 3) + torch.randn(80, 3)
    nets = [likelihood_nn("maf", num_transforms=2)(z, x * scale) for scale in (1.0, 3.0)]
    results = []
    for fit in (lambda tasks: [task.fit() for task in tasks], fit_together):
        tasks = [
            FitTask(
                deepcopy(net),
                lambda rows, training: (x[rows], z[rows]),
                lambda net, x, z: net.loss(x, z),
                torch.arange(60),
                torch.arange(60, 80),
                CONFIG,
            )
            for net in nets
        ]
        results.append([result.held_out for result in fit(tasks)])
    assert results[1] == pytest.approx(results[0], rel=1e-3)
    assert abs(results[0][0] - results[0][1]) > 1e-2


def test_a_network_that_fails_does_not_spoil_the_others(monkeypatch):
    in_order(monkeypatch)
    apart, together = regression_tasks(), regression_tasks()
    before = deepcopy(together[1].net.state_dict())
    broken = deepcopy(together[1])

    def batch(rows, training):
        x, y = broken.batch(rows, training)
        return x, y * math.nan

    together[1] = replace(together[1], batch=batch)
    results = fit_together(together)
    assert results[1].held_out == math.inf
    for name, value in together[1].net.state_dict().items():
        torch.testing.assert_close(value, before[name])
    for k in (0, 2):
        assert results[k].held_out == pytest.approx(apart[k].fit().held_out, rel=1e-4)


@pytest.mark.parametrize("failed", [1, 3])
def test_a_network_recovers_from_a_step_that_failed(failed):
    tasks = regression_tasks()
    own, calls = tasks[1].batch, []

    def batch(rows, training):
        calls.append(training)
        x, y = own(rows, training)
        return x, y * (math.nan if len(calls) == failed else 1.0)

    tasks[1] = replace(tasks[1], batch=batch)
    with torch.no_grad():
        untrained = float(loss(tasks[1].net, *own(tasks[1].val, False)).mean())
    result = fit_together(tasks)[1]
    assert calls[failed - 1]
    assert result.held_out - tasks[1].constant < untrained - 0.1


def test_a_network_stops_on_its_own_while_the_others_go_on():
    patient = replace(CONFIG, patience=2, patience_steps=None)
    tasks = [replace(task, config=patient) for task in regression_tasks()]
    own = tasks[0].batch

    def exact(rows, training):  # nothing to learn from, so no epoch after the first is better
        return (own(rows, training)[0], torch.zeros(len(rows), 1))

    with torch.no_grad():
        for parameter in tasks[0].net.parameters():
            parameter.zero_()
    tasks[0] = replace(tasks[0], batch=exact)
    epochs = []
    results = fit_together(tasks, lambda epoch, value: epochs.append(epoch))
    assert [result.epochs for result in results] == [3, 6, 6]
    assert epochs == [1, 2, 3, 4, 5, 6]
    assert all(float(p.abs().max()) == 0.0 for p in tasks[0].net.parameters())


@pytest.mark.parametrize("threshold", [-1.0, math.inf])
def test_an_abandoned_fit_ends_after_twenty_epochs(threshold):
    config = FitConfig(max_epochs=25, batch_size=20, patience=30)
    tasks = [
        replace(task, config=config, abandon_above=bar)
        for task, bar in zip(regression_tasks(), (math.inf, threshold, math.inf))
    ]
    epochs = [result.epochs for result in fit_together(tasks)]
    assert epochs == [25, 20 if threshold < 0 else 25, 25]


def test_different_numbers_of_pairs_are_counted_as_they_are():
    """The held-out value is the mean over a network's own pairs, however the others are padded."""
    tasks = regression_tasks(sizes=(100, 98, 95))
    results = fit_together(tasks)
    for task, result in zip(tasks, results):
        with torch.no_grad():
            own = loss(task.net, *task.batch(task.val, False)).mean() + task.constant
        assert result.held_out == pytest.approx(float(own), rel=1e-4)


def test_an_interrupt_leaves_the_best_weights():
    def value(task: FitTask) -> float:
        with torch.no_grad():
            return float(loss(task.net, *task.batch(task.val, False)).mean())

    def interrupt(epoch: int, value: float) -> None:
        if epoch == 4:
            raise KeyboardInterrupt

    tasks = regression_tasks()
    before = [value(task) for task in tasks]
    with pytest.raises(KeyboardInterrupt):
        fit_together(tasks, interrupt)
    for task, untrained in zip(tasks, before):
        assert not task.net.training
        assert value(task) < untrained - 0.1
