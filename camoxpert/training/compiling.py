"""Compiling the network, and going on without where the compiler fails."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from camoxpert import console
from camoxpert.errors import CamoXpertError
from camoxpert.models.camoxpert import CamoXpert

GRAPHS_PER_SIZE = 8


def compile_model(model: CamoXpert, *, sizes: int = 1) -> str:
    """Compile what compiles as one graph, in place and without new parameter names.

    Equal experts with gathered weights run the same program for any routing, so the whole network
    is one graph. Otherwise only the backbone is: reading the counts breaks the decoder's graph.
    Static shapes: block by block with dynamic shapes crashes Inductor on EdgeNeXt. Every training
    size is compiled once, and kept. Compilation happens in the first forward pass of each size;
    where it fails, the network runs without (see ``run_eagerly``).

    Args:
        model: changed in place.
        sizes: training sizes that will be seen.

    Returns:
        What was compiled, in words.
    """
    # Each size needs graphs for full and short batches, in training and evaluation; beyond
    # torch's default limit of eight it would stop compiling.
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS_PER_SIZE * sizes)
    if all(level.dispatch in ("gathered", "dense") for level in model.moe_levels):
        model.compile(dynamic=False, fullgraph=True)
        _guard(model, model)
        return "the whole network as one graph"
    model.backbone.compile(dynamic=False)
    _guard(model, model.backbone)
    return "the backbone (--expert-family uniform compiles as a whole)"


def run_eagerly(model: nn.Module, error: Exception) -> bool:
    """Take back the compilation of a model after an error, with a warning that names it.

    Returns:
        Whether there was one: the caller then repeats what failed. An error that the compiler did
        not cause comes back in the repetition.
    """
    if isinstance(error, (torch.OutOfMemoryError, CamoXpertError)):
        return False
    compiled = [m for m in model.modules() if m._compiled_call_impl is not None]
    for module in compiled:
        module._compiled_call_impl = None
    if compiled:
        console.warn(
            f"--compile failed and is off from here on: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}. The run continues without it."
        )
    return bool(compiled)


def _guard(model: nn.Module, module: nn.Module) -> None:
    """Let a compiled module run without compilation from its first error on."""
    compiled: Any = module._compiled_call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except Exception as error:
            if not run_eagerly(model, error):
                raise
        # Outside the handler: inside it, the traceback keeps tensors of the failed pass.
        return module._call_impl(*args, **kwargs)

    module._compiled_call_impl = call
