"""What people would do instead of a searched plan, measured the same way."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.rivals.compare import compare_rivals
    from abreast.rivals.measured import (
        BASELINES_FILE,
        LEFT_OUT,
        METHODS,
        Measured,
        at_equal_speed,
        caption,
    )
    from abreast.rivals.work import Work, work_of

attach(__name__)
