"""The report's tables of one row per task, from values that are known."""

import pytest

from sbi_jeffreys.benchmark.overview import task_by_task
from sbi_jeffreys.benchmark.statistics import average, paired_ratios

LABELS = {"npe_nsf": "NPE", "npe_jeffreys": "NPE_Jeffreys"}


def values(c2st, seconds, coverage=(0.5, 0.9)):
    return {
        "c2st": c2st,
        "train_cpu_seconds": seconds,
        "coverage_50": coverage[0],
        "coverage_90": coverage[1],
    }


@pytest.fixture
def table():
    """Two tasks at two seeds, one more at a third seed, and one that only NPE was run on."""
    return {
        ("slcp", 100): {
            "npe_nsf": {0: values(0.9, 1.0), 1: values(0.8, 2.0), 2: values(0.1, 1.0)},
            "npe_jeffreys": {0: values(0.6, 30.0), 1: values(0.8, 20.0), 2: values(0.1, 5.0)},
        },
        ("sir", 100): {
            "npe_nsf": {0: values(0.7, 1.0), 1: values(0.8, 1.0)},
            "npe_jeffreys": {0: values(0.5, 4.0, (0.4, 0.8)), 1: values(0.5, 2.0, (0.4, 0.6))},
        },
        ("two_moons", 100): {"npe_nsf": {0: values(1.0, 1.0)}},
    }


def flat(table):
    return [" ".join(block.split()) for block in task_by_task(table, LABELS, "npe_nsf")]


def test_every_task_has_a_row_with_its_worst_seed(table):
    (text,) = flat(table)
    assert "### 100 simulations" in text
    assert "| sir | 0.750 ± 0.050 (0.800) | 0.500 ± 0.000 (0.500) |" in text
    assert "| slcp | 0.600 ± 0.252 (0.900) | 0.500 ± 0.208 (0.800) |" in text
    assert "| two_moons | 1.000 | – |" in text  # one seed has neither an error nor a worst one
    assert "| sir | 0.50 / 0.90 | 0.40 / 0.70 |" in text


def test_the_mean_is_of_tasks_and_seeds_that_every_method_has(table):
    """Seed by seed, so that the error is that of a whole run: (.9 + .7) / 2 and (.8 + .8) / 2."""
    (text,) = flat(table)
    assert "| **mean of 2** | 0.800 ± 0.000 (0.800) | 0.600 ± 0.050 (0.650) |" in text
    assert "| **mean of 2** | 0.50 / 0.90 | 0.45 / 0.80 |" in text


def test_times_are_ratios_on_the_same_seed(table):
    (text,) = flat(table)
    assert "over NPE's, paired by seed" in text
    assert "| sir | 3.0 (2.0 to 4.0) |" in text
    assert "| slcp | 10.0 (5.0 to 30.0) |" in text
    assert "| **median** | 6.5 |" in text
    assert "| two_moons | – |" not in text


def test_what_was_not_measured_has_no_table():
    table = {("slcp", 10): {"npe_nsf": {0: {"coverage_50": 0.5, "coverage_90": 0.9}}}}
    (text,) = flat(table)
    assert "0.50 / 0.90" in text
    assert "C2ST" not in text
    assert "Processor time" not in text
    assert flat({("slcp", 10): {"npe_nsf": {0: {"nll": 1.0}}}}) == []


def test_budgets_stand_apart(table):
    table["slcp", 1000] = table["slcp", 100]
    assert [text[:20].split(" s")[0] for text in flat(table)] == ["### 100", "### 1,000"]


def test_averages_leave_out_what_one_task_lacks():
    tasks = [
        {0: {"c2st": 0.2, "nll": 1.0}, 1: {"c2st": 0.4}},
        {0: {"c2st": 0.6}, 2: {"c2st": 1.0}},
    ]
    assert average(tasks) == {0: {"c2st": pytest.approx(0.4)}}
    assert average([]) == {}


def test_ratios_need_two_positive_values():
    ours, npe = {0: {"s": 4.0}, 1: {"s": 1.0}, 2: {}}, {0: {"s": 2.0}, 1: {"s": 0.0}, 2: {"s": 1.0}}
    assert paired_ratios(ours, npe, "s") == [2.0]
