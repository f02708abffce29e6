"""llama.cpp: checkpoints to GGUF and back."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.engines.llamacpp.reader import import_gguf
    from abreast.engines.llamacpp.writer import export

attach(__name__)
