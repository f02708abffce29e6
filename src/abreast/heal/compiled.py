"""Training with torch.compile, branch by branch.

What is compiled are the attentions, FFNs and norms, which grouped execution calls one by one; the
layers of a kind share one program (regional compilation), so that compiling takes as long for
eighty layers as for one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from abreast.errors import AbreastError
from abreast.model import branches_of, decoder_layers

_PROGRAMS = 64  # of a class: with and without gradients, for every shape of windows and weights


def check_compiler() -> None:
    """Raise AbreastError where torch.compile finds no C++ compiler."""
    if not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++", "c++"))):
        raise AbreastError("--compile needs a C++ compiler; install g++, or leave it out")


@contextmanager
def compiled(*models: nn.Module) -> Iterator[None]:
    """Inside, the branches of these models' layers run compiled, for exactly the shapes met."""
    parts = [part for model in models for part in _parts(model)]
    with torch._dynamo.config.patch(recompile_limit=_PROGRAMS, accumulated_recompile_limit=1024):
        for part in parts:
            part.compile(dynamic=False)
        try:
            yield
        finally:
            for part in parts:
                part._compiled_call_impl = None


def _parts(model: nn.Module) -> Iterator[nn.Module]:
    names = branches_of(model)
    every = (names.attention, names.mlp, *names.before_attention, *names.after_attention)
    for layer in decoder_layers(model):
        for name in (*every, *names.before_mlp, *names.after_mlp):
            part = getattr(layer, name, None)
            if isinstance(part, nn.Module):
                yield part
