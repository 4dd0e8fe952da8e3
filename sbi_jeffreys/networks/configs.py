"""Typed configs of sbi's networks, which sbi has after 0.27, and which of them can be the main."""

from __future__ import annotations

import dataclasses
from typing import Any

from sbi_jeffreys._sbi import DensityConfigBase

__all__ = ["check_trainable", "is_config", "own_setting"]


def is_config(model: Any) -> bool:
    """Whether `model` is a typed config of a density that is trained (`NSFConfig()`, …).

    Where sbi has no such configs, as in 0.27, any dataclass with a method `build` counts as one.
    """
    known = DensityConfigBase is None or isinstance(model, DensityConfigBase)
    return known and _looks_like_one(model) and not callable(model)


def own_setting(config: Any, name: str) -> Any:
    """The user's value of a config's field; None if it is the default or there is no such field."""
    default = next((f.default for f in dataclasses.fields(config) if f.name == name), None)
    value = getattr(config, name, default)
    return None if value == default else value


def check_trainable(name: str, model: Any) -> None:
    """Refuse TabPFN, the class of a config, and a config of another family than densities.

    Args:
        name: The argument's name.
        model: What was passed for it; anything that is neither a config nor "tabpfn" is accepted.

    Raises:
        TypeError: If the model cannot be the main.
    """
    remedy = _remedy(model)
    if remedy is not None:  # mutant: any-config-accepted
        kind = getattr(model, "__name__", type(model).__name__)
        got = repr(model) if isinstance(model, str) else kind
        raise TypeError(
            f"{name} must be a model that is trained, such as the configs of sbi's "
            f"DensityConfigBase, got {got}; {remedy}."
        )


def _remedy(model: Any) -> str | None:
    """What to pass in place of a model that cannot be the main; None for any other."""
    if isinstance(model, str):
        return _NO_TABPFN if model.lower() == "tabpfn" else None
    if not _looks_like_one(model) or is_config(model):
        return None
    if isinstance(model, type):
        return f"this is the class and not an instance, write {model.__name__}()"
    if callable(model):  # a builder of the user's own
        return None
    if type(model).__name__ == "TabPFNConfig":
        return _NO_TABPFN
    return "this config belongs to another kind of inference, pass for instance NSFConfig()"


_NO_TABPFN = "TabPFN has no loss to train with. Use NPE_PFN instead"


def _looks_like_one(model: Any) -> bool:
    """Whether this is a dataclass with a method `build`, or an instance of one."""
    return dataclasses.is_dataclass(model) and callable(getattr(model, "build", None))
