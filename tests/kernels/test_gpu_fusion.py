# SPDX-License-Identifier: Apache-2.0
"""Patterns whose fused kernel is estimated slower than its parts stay apart on a GPU."""

from __future__ import annotations

import pytest
import torch

from dtq.kernels import gpu_dispatch, gpu_fusion
from dtq.kernels.gpu_fusion import FUSIONS, PATTERNS, Fusion, fusion


def test_every_pattern_has_a_row_for_every_gpu():
    assert {row.pattern for row in FUSIONS} == set(PATTERNS)
    for pattern in PATTERNS:
        for capability in gpu_dispatch.ARCHS:
            row = fusion(pattern, capability.since)
            assert row.pattern == pattern
            assert row.since <= capability.since
    assert len({(row.pattern, row.since) for row in FUSIONS}) == len(FUSIONS)
    for row in FUSIONS:
        assert row.source
        assert row.is_faster == (row.fused < row.apart)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (12, 0)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_table_decides_on_a_gpu_alone(capability, pattern, monkeypatch):
    x = torch.ones(2, 16, dtype=torch.bfloat16)
    assert gpu_fusion.is_fused(pattern, x)
    monkeypatch.setattr(gpu_dispatch, "on_gpu", lambda x: True)
    assert not gpu_fusion.is_fused(pattern, x) or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    for fused, apart, faster in ((9, 10, True), (11, 10, False)):
        rows = tuple(Fusion(p, (8, 0), fused, apart, "as the test says") for p in PATTERNS)
        monkeypatch.setattr(gpu_fusion, "FUSIONS", rows)
        assert gpu_fusion.is_fused(pattern, x) == (faster and capability >= (8, 0))
