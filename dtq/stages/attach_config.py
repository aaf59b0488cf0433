# SPDX-License-Identifier: Apache-2.0
"""Stage: attach the config and the report, so that the model saves as a loaded one does."""

from __future__ import annotations

import torch

from dtq.models import is_of_transformers
from dtq.stages.run import Run


def attach_config(run: Run) -> None:
    """Leave the model in the state of ``from_pretrained``, and drop what only stages needed."""
    dtype = run.config.compute_dtype
    assert isinstance(dtype, torch.dtype)  # set when the layers were replaced
    if is_of_transformers(run.model):
        from dtq.integrations.transformers import attach_quantizer
    else:
        from dtq.integrations.diffusers import attach_quantizer
    attach_quantizer(run.model, run.plan, run.edges, dtype, run.config)
    run.model.hf_quantizer.report = run.report  # type: ignore[union-attr, assignment]
    run.floats.clear()
    run.recorded.clear()
    run.statistics = None
