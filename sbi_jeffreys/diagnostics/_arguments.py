"""Checks of the arguments of figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sbi_jeffreys._checks import (
    check_float,
    check_instance,
    check_int,
    check_not_empty,
    check_tensor,
)


def by_name(name: str, given: Any, kinds: tuple[type, ...], single: str) -> dict[str, Any]:
    """One or several objects by the name of their method; a single one is called `single`."""
    listed = " or ".join(kind.__name__ for kind in kinds)
    check_instance(name, given, (*kinds, Mapping), f"pass a {listed}, or a dict of several by name")
    if not isinstance(given, Mapping):
        return {single: given}
    check_not_empty(name, given, "entry", f"pass a {listed}")
    for key, value in given.items():
        check_instance(f"the keys of {name}", key, str, "name every method by a string")
        check_instance(f"{name}[{key!r}]", value, kinds)
    return dict(given)


def c2st_scores(rows: Any) -> dict[str, dict[float, list[float]]]:
    """The C2ST values of rows, by method and number of simulations."""
    check_instance("rows", rows, Iterable, "pass a list of dicts")
    scores: dict[str, dict[float, list[float]]] = {}
    for k, row in enumerate(rows):
        check_instance(f"rows[{k}]", row, Mapping, "pass a list of dicts")
        missing = [key for key in ("method", "simulations", "c2st") if key not in row]
        if missing:
            raise ValueError(
                f"rows[{k}] must have method, simulations and c2st, got {sorted(map(str, row))}; "
                f"add {' and '.join(missing)}."
            )
        budget = check_float(f"rows[{k}]['simulations']", row["simulations"], 0.0, low_open=True)
        score = check_float(f"rows[{k}]['c2st']", row["c2st"], 0.0, 1.0)
        scores.setdefault(str(row["method"]), {}).setdefault(budget, []).append(score)
    check_not_empty("rows", scores, "entry", "pass dicts of method, simulations, c2st")
    return scores


def check_samples(samples: Any, reference: Any) -> int:
    """Require finite samples of the same number of parameters, which is returned."""
    check_instance("samples", samples, Mapping, "pass a dict of samples by the method's name")
    check_not_empty("samples", samples, "entry", "pass {'NPE': samples}")
    sets = {f"samples[{name!r}]": values for name, values in samples.items()}
    if reference is not None:
        sets["reference"] = reference
    width: int | str = "D"
    for name, values in sets.items():
        check_tensor(name, values, ("N", width), finite=True)
        if len(values) < 2 or values.shape[1] == 0:
            raise ValueError(
                f"{name} must be at least two draws of at least one parameter, got shape "
                f"{tuple(values.shape)}; draw more samples."
            )
        width = values.shape[1]
    return int(width)


def check_dims(dims: Any, width: int) -> list[int]:
    """Require distinct parameters in 0 … width − 1; the first five at most if None."""
    if dims is None:
        return list(range(min(width, 5)))
    check_instance("dims", dims, Sequence, "pass a tuple of ints")
    kept = [check_int("dims", dim, 0, width - 1) for dim in dims]
    if not kept or len(set(kept)) < len(kept):
        raise ValueError(f"dims must be distinct parameters, got {tuple(kept)}; pass (0, 1), say.")
    return kept


def check_labels(labels: Any, kept: Sequence[int]) -> list[str]:
    """Require a string for every parameter drawn; θ₁, θ₂, … if None."""
    if labels is None:
        return [f"$\\theta_{{{k + 1}}}$" for k in kept]
    for label in check_instance("labels", labels, (list, tuple), "pass a list of strings"):
        check_instance("labels", label, str, "pass a list of strings")
    if len(labels) != len(kept):
        raise ValueError(
            f"labels must be {len(kept)} strings, one per parameter drawn, got {len(labels)}; "
            "name the parameters in dims."
        )
    return list(labels)
