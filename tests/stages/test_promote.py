# SPDX-License-Identifier: Apache-2.0
"""Promotion of sensitive layers."""

from __future__ import annotations

import tiny
from conftest import hasty

import dtq


def test_sensitive_layers_are_promoted_within_the_budget():
    always = {"to": "int8-row", "max_error": 0.0, "budget": 6.0}
    pipe = dtq.quantize(tiny.pipeline(), hasty("w4a8", promote=always), progress=False)
    report = pipe.transformer.hf_quantizer.report
    promoted = [x for x in report.layers if x.promoted]
    assert promoted
    assert all(x.weight_format == "int8-row" and x.error < x.error_before for x in promoted)
    assert 5.0 < report.plan.bits(report.plan.gemm()) <= 6.0
    worst = max(x.error_before for x in promoted)
    kept = [x.error for x in report.layers if not x.promoted and x.role != "adaln"]
    assert worst > max(kept)
    calm = dtq.quantize(tiny.pipeline(), hasty("w4a8"), progress=False).transformer
    assert not any(x.promoted for x in calm.hf_quantizer.report.layers)
