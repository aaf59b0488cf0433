# SPDX-License-Identifier: Apache-2.0
"""A short soak, and that it would notice a leak."""

from __future__ import annotations

import pytest
import soak


@pytest.mark.slow
def test_forty_cycles_leave_nothing():
    grows, sizes = soak.soak(40)
    # few cycles: what the allocator keeps is not spread thin yet
    assert grows < 10 * soak.LIMIT
    assert sizes[-1] - sizes[8] < 32e6


def test_a_leak_has_a_slope():
    flat = [10**9 + 4096 * (i % 3) for i in range(500)]
    assert abs(soak.slope(flat)) < 100
    assert soak.slope([s + 10**5 * i for i, s in enumerate(flat)]) > soak.LIMIT


def test_a_cycle_makes_the_same_picture(tmp_path):
    import torch

    folder = soak.made(tmp_path)
    first = soak.cycle(folder, tmp_path / "out")
    assert torch.equal(soak.cycle(tmp_path / "out", tmp_path / "again"), first)
