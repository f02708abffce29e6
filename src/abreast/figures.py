"""matplotlib, where it is installed."""

from __future__ import annotations

from typing import Any

from abreast.errors import AbreastError


def figure_class() -> Any:
    """matplotlib's Figure. Raises AbreastError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise AbreastError(
            "drawing needs matplotlib: pip install 'abreast[report]', or use --no-plots"
        ) from None
    return Figure
