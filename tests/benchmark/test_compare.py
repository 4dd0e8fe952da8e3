"""The command that compares both methods on simulations from a file."""

import io
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sbi_jeffreys import JeffreysWarning
from sbi_jeffreys.__main__ import main
from sbi_jeffreys.benchmark import compare
from sbi_jeffreys.benchmark._running import quiet
from sbi_jeffreys.benchmark.simulation_file import MIN_SIMULATIONS, read_simulations

_NUM = 120


def good(**changes):
    """Arrays of a file that can be used, with changes; None removes a key."""
    rng = np.random.default_rng(0)
    theta = rng.uniform(-1, 1, (_NUM, 2))
    x = theta + 0.2 * rng.normal(size=theta.shape)
    arrays = {"theta": theta, "x": x, "x_o": x[0], "low": -np.ones(2), "high": np.ones(2)}
    return {key: value for key, value in (arrays | changes).items() if value is not None}


def write(path: Path, arrays) -> Path:
    np.savez(path, **arrays)
    return path


def run(*argv):
    return main([str(argument) for argument in argv])


@pytest.fixture
def compared(tmp_path, capsys):
    """What a smoke run on a file prints, and its folder of figures."""

    def compare(**changes):
        file, out = write(tmp_path / "sims.npz", good(**changes)), tmp_path / "outputs"
        assert run("compare", file, "--fast", "--quiet", "--out", out) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out, out

    return compare


def test_both_are_judged_side_by_side_and_drawn(compared):
    text, out = compared()
    header, rule, *rows = text[text.index("on held-out") :].splitlines()
    assert header.split()[-2:] == ["NPE", "NPE_Jeffreys"]
    for title in ("NLL", "coverage of 50 %", "coverage of 90 %", "mass outside the prior"):
        row = next(line for line in rows if line.startswith(title))
        assert len(row) == len(rule)  # aligned
    assert "Verdict on NPE:\n  - " in text
    assert "Verdict on NPE_Jeffreys:\n  - " in text
    assert "Held-out negative log density" in text
    assert "70 to train on, 50 held out" in text
    for name in ("coverage.png", "posteriors.png"):
        assert (out / name).stat().st_size > 5000


class Undrawable:
    """A trainer whose posterior ends in a bare assertion of nflows far from its simulations."""

    def build_posterior(self):
        return self

    def sample(self, *_, **__):
        raise AssertionError


def test_a_posterior_that_cannot_be_drawn_is_left_out_of_the_figure(tmp_path, capsys, monkeypatch):
    figures = tmp_path / "outputs"
    figures.mkdir()
    (figures / "posteriors.png").touch()  # of an earlier file
    monkeypatch.setattr(compare, "saved", lambda path, draw: path)
    trained = {"NPE": SimpleNamespace(report=None, inference=Undrawable())}
    data = read_simulations(write(tmp_path / "sims.npz", good()))
    written = compare.write_figures(data, trained, figures, 0)  # type: ignore[arg-type]
    assert [path.name for path in written] == ["coverage.png"]
    assert not (figures / "posteriors.png").exists()
    assert "NPE is left out of posteriors.png: its network cannot" in capsys.readouterr().out


def test_quiet_drops_all_warnings_but_ours():
    with warnings.catch_warnings(record=True) as found, quiet(ours=True):
        warnings.warn("theirs", stacklevel=1)
        warnings.warn("ours", JeffreysWarning, stacklevel=1)
        assert not found  # but when the block ends
    assert [str(one.message) for one in found] == ["ours"]
    with warnings.catch_warnings(record=True) as found, quiet():
        warnings.warn("ours", JeffreysWarning, stacklevel=1)
    assert not found


def test_without_bounds_no_prior_is_used_and_said(compared):
    meta = np.array({"by": "us"}, dtype=object)  # which could not be read
    text, out = compared(low=None, high=None, x_o=None, note=np.zeros(1), meta=meta)
    assert "no prior is used" in text
    assert "empirical prior" in text
    assert "Keys that are not used: meta, note." in text
    assert (out / "coverage.png").exists()
    assert not (out / "posteriors.png").exists()


def test_a_single_parameter_is_drawn(compared):
    data = good()
    _, out = compared(theta=data["theta"][:, :1], low=-np.ones(1), high=np.ones(1))
    assert (out / "posteriors.png").stat().st_size > 5000


def test_both_train_on_the_same_split(tmp_path, monkeypatch):
    from sbi_jeffreys.benchmark import compare

    kept = {}
    judged = compare._judged

    def remember(inference, *args):
        kept[type(inference).__name__] = inference
        warnings.warn("said in spite of --quiet", JeffreysWarning, stacklevel=1)
        return judged(inference, *args)

    monkeypatch.setattr(compare, "_judged", remember)
    file = write(tmp_path / "sims.npz", good(x_o=None))
    with pytest.warns(JeffreysWarning, match="in spite of --quiet"):
        assert run("compare", file, "--fast", "--quiet", "--out", tmp_path / "o") == 0
    ours, theirs = kept["NPE_Jeffreys"], next(kept[k] for k in kept if k != "NPE_Jeffreys")
    for name in ("train_indices", "val_indices"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    for mine, other in zip(ours.get_simulations(), theirs.get_simulations()):
        assert torch.equal(mine, other)


def test_what_is_read_is_what_was_written(tmp_path):
    arrays = good(x_o=good()["x_o"][None], theta=good()["theta"].astype(np.float32))
    data = read_simulations(write(tmp_path / "sims.npz", arrays))
    assert np.array_equal(data.theta.numpy(), arrays["theta"])
    assert np.allclose(data.x.numpy(), arrays["x"], rtol=1e-6)
    assert data.x_o.shape == (2,)
    assert data.bounds[1].tolist() == [1.0, 1.0]
    assert data.unused == ()


def test_offsets_that_float32_resolves_and_constants_are_read(tmp_path):
    rounding = 0.3 + 1e-17 * np.arange(_NUM)  # constant but for float64's rounding
    rounding[::2] = np.nextafter(0.3, 1)
    counts = 2**23 + np.arange(_NUM) % 3  # whole numbers that float32 holds
    x = np.c_[good()["x"][:, 0] + 1e4, rounding, np.ones(_NUM), counts]
    read = read_simulations(write(tmp_path / "sims.npz", good(x=x, x_o=x[0])))
    assert read.x[:, 3].tolist() == counts.tolist()


def changed(key, row, value):
    """The array of a key with one entry replaced."""
    values = good()[key].copy()
    values[row] = value
    return values


_MALFORMED = {
    "no theta": ({"theta": None}, "add theta: write it with numpy.savez"),
    "no x": ({"x": None}, r"expected the keys theta and x, got high, low, theta, x_o; add x"),
    "neither": ({"theta": None, "x": None, "x_o": None, "low": None, "high": None}, "got none"),
    "theta is a vector": ({"theta": np.zeros(_NUM)}, r"theta.*\(120,\).*theta\.reshape\(-1, 1\)"),
    "theta is a scalar": ({"theta": np.zeros(())}, r"theta.*\(N, D\), got \(\)"),
    "theta without columns": (
        {"theta": np.zeros((_NUM, 0))},
        r"\(N, D\), got \(120, 0\); pass at least one column",
    ),
    "theta that float32 rounds to zero": (
        {"theta": 1e-50 * good()["theta"], "low": None, "high": None},
        "no value larger than 9.9e-51 in column 0; rescale column 0, in theta, low",
    ),
    "x of images": ({"x": np.zeros((_NUM, 4, 4))}, r"\(N, K\), got \(120, 4, 4\).*embedding_net"),
    "lengths": ({"x": np.zeros((_NUM - 1, 2))}, "as many rows in both, got 120 and 119"),
    "too few": (
        {"theta": np.zeros((99, 2)), "x": np.zeros((99, 2))},
        f"at least {MIN_SIMULATIONS} simulations.*got 99; run more",
    ),
    "a fixed parameter": ({"theta": np.ones((_NUM, 2))}, "the same value in every row of column 0"),
    "NaN": ({"x": changed("x", 3, np.nan)}, "x: .*got NaN or inf in 1 of 120 rows; drop"),
    "inf": ({"theta": changed("theta", 3, np.inf)}, "theta: .*NaN or inf in 1 of 120"),
    "too large": ({"x": changed("x", 3, 1e300)}, "x: .*too large for float32 in 1 .*rescale"),
    "NaN in x_o": (
        {"x_o": np.array([0.0, np.nan])},
        "x_o: expected finite numbers, got NaN or inf in 1 of 2 entries; x_o needs every output",
    ),
    "an infinite bound": ({"high": np.array([1.0, np.inf])}, "high: .*; give finite bounds, or"),
    "offset theta": (
        {"theta": 2459000.5 + 0.5 * good()["theta"], "low": None, "high": None},
        "theta: .*2459000.*spacing is 0.25; subtract the mean of column 0, from theta, low",
    ),
    "offset theta, one float32": ({"theta": 1e8 + 0.5 * good()["theta"]}, "mean of column 0, from"),
    "offset x": (
        {"x": good()["x"] + np.array([0.0, 1.7e9])},
        "x: .*column 1, where.*spacing is 1.3e.02; subtract .* from x and x_o alike",
    ),
    "offset of milliseconds": (
        {"x": good()["x"] + np.array([0.0, 1.7e12])},
        "x: .*column 1, where.*spacing is 1.3e.05; subtract .* from x and x_o alike",
    ),
    "objects": ({"x": np.array([[1], [2, 3]], dtype=object)}, "x: .*Python objects"),
    "strings": ({"theta": np.full((_NUM, 2), "a")}, "theta: .*real numbers, got dtype <U1"),
    "complex": ({"x": np.zeros((_NUM, 2), complex)}, "x: .*dtype complex128; pass real and"),
    "x_o of another size": ({"x_o": np.zeros(3)}, r"x_o: expected .*\(2,\).*got \(3,\)"),
    "several x_o": ({"x_o": np.zeros((2, 2))}, r"x_o: .*got \(2, 2\)"),
    "one bound": ({"high": None}, "both bounds of the prior or neither, got low alone"),
    "bounds of another size": ({"low": np.zeros(1) - 1}, r"low: expected .*\(2,\).*got \(1,\)"),
    "bounds exchanged": ({"low": np.ones(2), "high": -np.ones(2)}, r"low < high.*exchange"),
    "no width": ({"low": np.array([-1.0, 1.0])}, r"low < high for every parameter"),
    "theta outside": ({"theta": changed("theta", 7, 2.0)}, r"1 of 120 rows outside.*row 7: \(2, 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", _MALFORMED)
def test_a_malformed_file_is_a_value_error_and_ends_with_code_2(case, tmp_path, capsys):
    changes, message = _MALFORMED[case]
    file = write(tmp_path / "sims.npz", good(**changes))
    with pytest.raises(ValueError, match=message):
        read_simulations(file)
    assert run("compare", file, "--out", tmp_path / "outputs") == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert len(printed.err.splitlines()) == 1  # no traceback
    assert not (tmp_path / "outputs").exists()


def single_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def archive_of_text(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "hello")
    return buffer.getvalue()


def encrypted() -> bytes:
    """An archive whose members say that they need a password."""
    buffer = io.BytesIO()
    np.savez(buffer, **good())
    content = bytearray(buffer.getvalue())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.find(mark)
        while place >= 0:
            content[place + flags] |= 1
            place = content.find(mark, place + 1)
    return bytes(content)


def damaged() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **good())
    content = bytearray(buffer.getvalue())
    content[200:400] = bytes(200)
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got an empty file"),
        (b"theta,x\n1,2\n", "got one that begins with b'theta,'"),
        (single_array(), r"got a single array \(\.npy\)"),
        (archive_of_text("readme.txt"), "got readme.txt; add theta and x"),
        (
            archive_of_text("theta", "x"),
            "theta: expected an array, got a file that is none; write it",
        ),
        (encrypted(), "cannot be read at theta .*encrypted"),
        (damaged(), "got one that cannot be read at theta"),
        (damaged()[:300], "got one that begins with"),
    ],
    ids=["empty", "text", "npy", "zip", "no array", "encrypted", "damaged", "cut"],
)
def test_what_is_no_npz_is_a_value_error(content, message, tmp_path, capsys):
    file = tmp_path / "sims.npz"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_simulations(file)
    assert run("compare", file) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(("name", "what"), [("nope.npz", "nothing"), (".", "a folder")])
def test_a_file_that_is_not_there_is_said(name, what, tmp_path, capsys):
    assert run("compare", tmp_path / name) == 2
    assert f"got {what}" in capsys.readouterr().err


def test_too_many_held_out_are_refused(tmp_path, capsys):
    file = write(tmp_path / "sims.npz", good())
    assert run("compare", file, "--held-out", 100) == 2
    assert "at most 70 of the 120 simulations" in capsys.readouterr().err
