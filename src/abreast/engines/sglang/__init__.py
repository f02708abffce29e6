"""SGLang: serves converted checkpoints, as the external package of models that it is told to use.

Not run on a GPU yet. SGLang imports every module of this folder to look for models.
"""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.engines.sglang.plugin import original_config, register

attach(__name__)
