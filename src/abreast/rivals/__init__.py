"""What people would do instead of a searched plan, measured the same way."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.rivals.compare import compare_rivals
    from abreast.rivals.measured import BASELINES_FILE, METHODS, Measured, caption

attach(__name__)
