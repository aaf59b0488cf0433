# SPDX-License-Identifier: Apache-2.0
"""Text encoders are calibrated on mixed prompts, too."""

from __future__ import annotations

import copy
from dataclasses import replace

import pipelines
import pytest
import torch

import dtq
from dtq.calibrate.engine import calibrate
from dtq.calibrate.mixed_prompts import MixedPrompts
from dtq.linalg.relative_error import relative_error
from dtq.pipelines.loading import LoadedModel, load_transformer, text_encoders_of
from dtq.pipelines.settings import SamplingSettings
from dtq.pipelines.tracing import scan_model

SETTINGS = SamplingSettings(prompts="prompts-64", samples=4, batch_size=2, steps=1)


def prompts(seed, count=4, tokens=20):
    """Ids like those of prompts: few of the words, a beginning, an end, padding."""
    ids = torch.randint(3, 30, (count, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    ids[:, 0], ids[0, -5:], mask[0, -4:] = 1, 0, 0
    ids[0, -5], ids[1:, -1] = 2, 2
    return ids, mask


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return pipelines.clip().eval()


def test_half_of_the_words_are_replaced_and_nothing_else(clip):
    mixed = MixedPrompts(clip, 1, seed=0)
    ids, mask = prompts(0, count=64)
    mixed.begin(3)
    got = mixed.mixed(ids, mask)
    assert got.dtype == ids.dtype
    kept = (ids < 3) | (mask == 0)
    assert torch.equal(got[kept], ids[kept])
    assert not torch.isin(got[~kept], torch.tensor([0, 1, 2])).any()
    assert 0.4 < (got != ids)[~kept].float().mean() < 0.6
    assert got[~kept].unique().numel() > 45  # not only the words of the prompts
    mixed.begin(3)
    assert torch.equal(mixed.mixed(ids, mask), got)
    mixed.begin(4)
    assert not torch.equal(mixed.mixed(ids, mask), got)


def test_the_statistics_have_the_rows_of_the_mixed_prompts():
    text = text_encoders_of(load_transformer(pipelines.flux()))[1]
    groups, counts = scan_model(text.model).input_groups, []
    for number in (0, 3):
        settings = replace(SETTINGS, mixed_prompts=number)
        found = calibrate(text, groups, settings, frozenset({"hessian"}), progress=False)
        counts.append([int(s.hessian.count) for s in found.inputs.values()])
        assert found.about.get("mixed_prompts", 0) == number
    assert counts[1] == [4 * count for count in counts[0]]
    assert not text.model._forward_hooks


def test_prompts_of_other_words_have_less_error():
    torch.manual_seed(0)
    model = pipelines.t5().eval()
    inputs = [dict(zip(("input_ids", "attention_mask"), prompts(i), strict=True)) for i in range(2)]
    ids = torch.randint(3, pipelines.WORDS, (32, 20), generator=torch.Generator().manual_seed(9))
    errors = []
    with torch.no_grad():
        want = model(input_ids=ids).last_hidden_state
        for number in (0, 4):
            changed = dtq.quantize(
                copy.deepcopy(model), "w4a16-hq", inputs=inputs, progress=False,
                sanity_check=False, calibration={"mixed_prompts": number},
            )  # fmt: skip
            errors.append(relative_error(changed(input_ids=ids).last_hidden_state, want))
    assert errors[1] < 0.8 * errors[0]


def test_few_rows_of_padding_are_observed(clip):
    ids, mask = prompts(0)
    mask[:, 5:] = 0
    group = scan_model(clip).input_groups[0]
    counts = []
    for call in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        found = calibrate(
            LoadedModel("clip", None, "text_encoder", clip), [group], SETTINGS,
            frozenset({"hessian"}), inputs=[call], progress=False,
        )  # fmt: skip
        counts.append(int(found.inputs[group.name].hessian.count))
    assert counts == [ids.numel(), 2 * int(mask.sum())]
    assert counts[1] < counts[0]
