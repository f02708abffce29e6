"""A page on which the original and its conversions answer the same prompt."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.report.playground.models import open_models
    from abreast.report.playground.page import gradio, page, serve

attach(__name__)
