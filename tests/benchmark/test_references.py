"""The cache of reference posterior samples."""

from pathlib import Path

import joblib
import pytest
import torch
from torch import Tensor

from sbi_jeffreys.benchmark import references
from sbi_jeffreys.benchmark.references import reference_samples
from sbi_jeffreys.benchmark.tasks.gaussian_linear import GaussianLinear


class Counting(GaussianLinear):
    """A task that counts how often its reference is drawn."""

    calls = 0

    def sample_reference(self, x: Tensor, num_samples: int) -> Tensor:
        self.calls += 1
        return super().sample_reference(x, num_samples)


@pytest.fixture
def task() -> Counting:
    return Counting()


X = torch.linspace(-0.5, 0.5, 10)


def entries(folder: Path) -> list[Path]:
    """The files with samples; nothing else that looks like one is there."""
    return [path for path in folder.rglob("output.pkl*") if path.name == "output.pkl"]


def test_second_call_reads_the_cache(task: Counting, tmp_path: Path):
    first = reference_samples(task, X, 50, cache_dir=tmp_path)
    second = reference_samples(task, X[None], 50, cache_dir=tmp_path)
    assert first.shape == (50, 10)
    assert first.dtype == torch.float32
    assert torch.equal(first, second)
    assert task.calls == 1
    assert len(entries(tmp_path)) == 1


def test_everything_the_samples_depend_on_is_in_the_key(
    task: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base = reference_samples(task, X, 50, cache_dir=tmp_path)
    other_seed = reference_samples(task, X, 50, seed=1, cache_dir=tmp_path)
    assert not torch.equal(base, other_seed)
    assert len(reference_samples(task, X, 51, cache_dir=tmp_path)) == 51
    reference_samples(task, X + 1e-6, 50, cache_dir=tmp_path)
    task.name = "another"
    reference_samples(task, X, 50, cache_dir=tmp_path)
    monkeypatch.setattr(references, "REFERENCE_VERSION", -1)
    reference_samples(task, X, 50, cache_dir=tmp_path)
    assert task.calls == len(entries(tmp_path)) == 6


def test_samples_depend_on_the_seed_alone_and_leave_the_global_state(
    task: Counting, tmp_path: Path
):
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = reference_samples(task, X, 50, seed=3, cache_dir=tmp_path / "a")
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(first, reference_samples(task, X, 50, seed=3, cache_dir=tmp_path / "b"))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def _garble(path: Path) -> None:
    path.write_bytes(b"not a file of torch")


def _change_a_value(path: Path) -> None:
    samples, digest = joblib.load(path)
    samples[3, 4] += 1.0
    joblib.dump((samples, digest), path)


def _change_the_shape(path: Path) -> None:
    samples, digest = joblib.load(path)
    joblib.dump((samples[:-1], digest), path)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_cut, _garble, _change_a_value, _change_the_shape, _empty])
def test_a_corrupt_file_is_named_and_drawn_again(task: Counting, tmp_path: Path, damage):
    truth = reference_samples(task, X, 50, cache_dir=tmp_path)
    (path,) = entries(tmp_path)
    damage(path)
    with pytest.warns(UserWarning, match=rf"{path.parent.name} .* drawn again"):
        again = reference_samples(task, X, 50, cache_dir=tmp_path)
    assert torch.equal(again, truth)
    assert task.calls == 2
    assert torch.equal(reference_samples(task, X, 50, cache_dir=tmp_path), truth)
    assert task.calls == 2, "the repaired file is used"


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(
    task: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    truth = reference_samples(task, X, 50, cache_dir=tmp_path / "fine")

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    backend = "joblib._store_backends.FileSystemStoreBackend._move_item"
    monkeypatch.setattr(backend, staticmethod(full_disk))
    with pytest.warns(UserWarning, match="drawn again"):
        assert torch.equal(reference_samples(task, X, 50, cache_dir=tmp_path / "full"), truth)
    assert entries(tmp_path / "full") == []
    monkeypatch.undo()
    assert torch.equal(reference_samples(task, X, 50, cache_dir=tmp_path / "full"), truth)
    assert len(entries(tmp_path / "full")) == 1


def test_directory_comes_from_the_environment(
    task: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SBI_JEFFREYS_CACHE", str(tmp_path / "mine"))
    reference_samples(task, X, 50)
    assert len(entries(tmp_path / "mine")) == 1
    monkeypatch.delenv("SBI_JEFFREYS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    reference_samples(task, X, 50)
    assert len(entries(tmp_path / "home/.cache/sbi_jeffreys")) == 1


def test_what_does_not_fit_is_refused(task: Counting, tmp_path: Path):
    with pytest.raises(ValueError, match="num_samples: expected a positive count, got 0"):
        reference_samples(task, X, 0, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="x: expected one observation of gaussian_linear"):
        reference_samples(task, X[:3], 50, cache_dir=tmp_path)
