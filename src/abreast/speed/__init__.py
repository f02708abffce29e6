"""Speed: timing here, benchmarks, and estimates for other hardware."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.speed.backends import device_or_cpu, run
    from abreast.speed.benchmark import bench
    from abreast.speed.hardware import Hardware, HardwareError, hardware_of
    from abreast.speed.prediction import (
        Estimate,
        Setting,
        estimate,
        fastest_way,
        forward_cost,
        stage_cost,
        stage_seconds,
        ways,
    )
    from abreast.speed.shape import read_config, shape_of, typical_plan
    from abreast.speed.timing import (
        ORIGINAL,
        BenchResult,
        Case,
        Contender,
        Job,
        Report,
        verdict,
    )

attach(__name__)
