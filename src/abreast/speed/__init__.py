"""Speed: timing here, benchmarks, and estimates for other hardware."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.speed.benchmark import BenchResult, bench, verdict
    from abreast.speed.jobs import (
        ORIGINAL,
        Case,
        Contender,
        Job,
        Report,
        conclusion,
        device_or_cpu,
        run,
    )
    from abreast.speed.prediction import (
        Estimate,
        Setting,
        estimate,
        hardware_of,
        read_config,
        stage_cost,
        stage_seconds,
    )

attach(__name__)
