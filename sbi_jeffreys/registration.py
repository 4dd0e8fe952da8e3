"""Making `sbi.inference.infer(..., method="npe_jeffreys")` find `NPE_Jeffreys`."""

from __future__ import annotations

import sbi.inference

from sbi_jeffreys.npe import NPE_Jeffreys

__all__ = ["register"]


def register() -> None:
    """Let `sbi.inference.infer` know the method "npe_jeffreys"; calling it again changes nothing.

    `infer` looks methods up as upper-case attributes of `sbi.inference`. Setting one on somebody
    else's package is not what an import may do, hence this explicit call.

    Example:
        >>> import sbi.inference
        >>> from sbi_jeffreys import register
        >>> register()
        >>> sbi.inference.NPE_JEFFREYS.__name__
        'NPE_Jeffreys'
    """
    sbi.inference.NPE_JEFFREYS = NPE_Jeffreys  # type: ignore[attr-defined]
