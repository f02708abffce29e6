"""llama.cpp: export a converted checkpoint as GGUF."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.engines.llamacpp.writer import export

attach(__name__)
