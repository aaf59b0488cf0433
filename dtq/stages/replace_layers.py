# SPDX-License-Identifier: Apache-2.0
"""Stage: replace the float linears by quantized ones."""

from __future__ import annotations

from dtq.models.tables import tied_modules
from dtq.nn.embedding import QuantEmbedding, put_table
from dtq.nn.swap import finalize
from dtq.stages.run import Run
from dtq.stages.solve import build_quantized


def replace_layers(run: Run) -> None:
    """Put every solved layer into the model; its result is dropped as it goes (memory).

    The float linears are kept only if a later stage compares with them.
    """
    recipe = run.recipe
    compute_dtype = run.loaded.dtype  # before the first layer is replaced
    run.config.compute_dtype = compute_dtype
    run.report.plan = run.plan
    keep_floats = recipe.finetune.name != "none" or run.check
    for layer in run.plan.quantized():
        result = run.results.pop(layer.name)
        run.report.layers.append(result.report)
        old = run.model.get_submodule(layer.name)
        new = build_quantized(result, old, run.plan.bins, compute_dtype)
        names = [layer.name]
        if isinstance(new, QuantEmbedding):
            names += tied_modules(run.model, layer.name)
        if keep_floats:
            run.floats |= {name: run.model.get_submodule(name) for name in names}
        if isinstance(new, QuantEmbedding):
            put_table(run.model, layer.name, new)
        else:
            run.model.set_submodule(layer.name, new)
    # the command line only writes the model, unless a stage runs it; then it runs as when loaded
    will_run = keep_floats or run.tasks.folder is None or bool(recipe.step_policy.precisions)
    finalize(run.model, run.edges, align=will_run)
