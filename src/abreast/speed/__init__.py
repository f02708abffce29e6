"""Speed: timing here, benchmarks, and estimates for other hardware."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.speed.backends import device_or_cpu, run
    from abreast.speed.benchmark import bench
    from abreast.speed.prediction import (
        Estimate,
        HardwareError,
        Setting,
        estimate,
        forward_cost,
        hardware_of,
        read_config,
        stage_cost,
        stage_seconds,
        typical_plan,
    )
    from abreast.speed.shape import shape_of
    from abreast.speed.timing import (
        ORIGINAL,
        BenchResult,
        Case,
        Contender,
        Job,
        Report,
        conclusion,
        verdict,
    )

attach(__name__)
