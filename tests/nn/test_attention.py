# SPDX-License-Identifier: Apache-2.0
"""int8 attention inside models: which modules, in which cases, and nowhere else."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from attention import Recorder, relative_error
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn

from dtq.errors import CheckpointError
from dtq.nn import attention as module_under_test
from dtq.nn.attention import (
    attention_modules,
    float_attention,
    int8_attention_modules,
    use_int8_attention,
)


class Cross(nn.Module):
    """Two modules with attention of diffusers, one of them cross attention."""

    def __init__(self) -> None:
        super().__init__()
        self.one = Attention(48, heads=2, dim_head=24, processor=AttnProcessor2_0())
        self.two = Attention(48, heads=2, dim_head=24, cross_attention_dim=32)

    def forward(self, x, text, mask=None):
        return x + self.two(self.one(x), encoder_hidden_states=text, attention_mask=mask)


def inputs():
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 40, 48, generator=g), torch.randn(2, 9, 32, generator=g)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Cross().eval().requires_grad_(False)


def test_attention_is_found_where_it_is_called(model):
    assert attention_modules(model, lambda: model(*inputs())) == ["one", "two"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_named_modules_run_the_op_and_the_others_do_not(model):
    want = model(*inputs())
    use_int8_attention(model, ["two"])
    assert int8_attention_modules(model) == ["two"]
    with Recorder() as recorder:
        got = model(*inputs())
    (call,) = recorder.calls  # of module one, whose keys are the tokens of x
    assert call[1].shape[2] == inputs()[0].shape[1]
    assert 0 < relative_error(got, want) < 1e-3
    use_int8_attention(model, ["one", "two"])
    assert not torch.equal(model(*inputs()), got)
    use_int8_attention(model, [])
    assert torch.equal(model(*inputs()), want)
    assert type(model.one) is Attention


def test_float_attention_returns_for_a_while(model):
    want = model(*inputs())
    use_int8_attention(model, ["one"])
    with float_attention(model):
        assert torch.equal(model(*inputs()), want)
    assert int8_attention_modules(model) == ["one"]


def test_copies_and_class_names_stay(model):
    use_int8_attention(model, ["one", "two"])
    want = model(*inputs())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(*inputs()), want)
    assert isinstance(twin.one, Attention)
    assert type(twin.one).__name__ == "Attention"
    use_int8_attention(twin, [])
    assert int8_attention_modules(model) == ["one", "two"]


def test_masks_reach_the_op(model):
    x, text = inputs()
    mask = torch.zeros(2, 1, 9)
    mask[:, :, 6:] = -10000.0
    want = model(x, text[:, :6])
    use_int8_attention(model, ["two"])
    assert relative_error(model(x, text, mask), want) < 1e-3


def test_training_keeps_float_attention(model):
    x, text = inputs()
    want = model(x, text)
    use_int8_attention(model, ["one", "two"])
    x.requires_grad_(True)
    got = model(x, text)
    assert torch.equal(got, want)
    got.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("shapes", [((3, 8, 16),) * 3, ((1, 2, 8, 300),) * 3])
def test_what_the_op_does_not_take_runs_in_float(shapes):
    qkv = [torch.randn(shape) for shape in shapes]
    with module_under_test._MODE:
        got = F.scaled_dot_product_attention(*qkv)
    assert torch.equal(got, F.scaled_dot_product_attention(*qkv))


def test_dropout_keeps_float_attention():
    qkv = [torch.randn(1, 2, 8, 16) for _ in range(3)]
    torch.manual_seed(1)
    want = F.scaled_dot_product_attention(*qkv, dropout_p=0.5)
    assert not torch.equal(want, F.scaled_dot_product_attention(*qkv))
    torch.manual_seed(1)
    with module_under_test._MODE:
        assert torch.equal(F.scaled_dot_product_attention(*qkv, dropout_p=0.5), want)


def test_a_mask_that_is_learned_keeps_float_attention():
    qkv = [torch.randn(1, 2, 8, 16) for _ in range(3)]
    mask = torch.zeros(8, 8, requires_grad=True)
    with module_under_test._MODE:
        got = F.scaled_dot_product_attention(*qkv, mask)
    assert torch.equal(got, F.scaled_dot_product_attention(*qkv, mask))
    got.sum().backward()
    assert mask.grad is not None


def test_a_mask_together_with_is_causal_is_left_to_torch():
    qkv = [torch.randn(1, 2, 8, 16) for _ in range(3)]
    mask = torch.randn(8, 8)
    want = F.scaled_dot_product_attention(*qkv, mask, is_causal=True)
    with module_under_test._MODE:
        assert torch.equal(F.scaled_dot_product_attention(*qkv, mask, is_causal=True), want)


def test_a_mask_that_does_not_fit_is_refused_by_torch():
    qkv = [torch.randn(1, 2, 8, 16) for _ in range(3)]
    with module_under_test._MODE, pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(*qkv, torch.zeros(3, 5))


def test_every_argument_of_torch_is_understood():
    q, k, v = (torch.randn(1, n, 20, 16) for n in (4, 2, 2))
    many = torch.randn(1, 4, 20, 16)
    mask = torch.rand(20, 20) > 0.5
    mask[:, 0] = True
    cases = [
        ((q, many, many), {"is_causal": True}),
        ((q, many, many), {"scale": 0.7}),
        ((q, k, v), {"enable_gqa": True}),
        ((q, many), {"value": many, "attn_mask": mask}),
        ((q, many, many, mask, 0.0), {}),
    ]
    for args, kwargs in cases:
        want = F.scaled_dot_product_attention(*args, **kwargs)
        with module_under_test._MODE:
            got = F.scaled_dot_product_attention(*args, **kwargs)
        assert 0 < relative_error(got, want) < 1e-3, kwargs


def test_compiled_models_have_the_op_in_one_graph(model):
    use_int8_attention(model, ["one", "two"])
    want = model(*inputs())
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    got = torch.compile(model, backend=backend, fullgraph=True)(*inputs())
    assert torch.equal(got, want)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum("int8_attention" in target for target in targets) == 2
    assert not any("scaled_dot_product" in target for target in targets)


def test_a_name_that_the_model_lacks_is_refused(model):
    for name in ("three", ""):
        with pytest.raises(CheckpointError, match="int8_attention"):
            use_int8_attention(model, [name])


def test_other_devices_run_in_float_and_say_so_once(caplog, monkeypatch):
    monkeypatch.setattr(module_under_test, "_POINTED", set())
    with caplog.at_level(logging.WARNING, "dtq"):
        for _ in range(2):
            module_under_test._point_to_diffusers("cuda")
    assert len(caplog.records) == 1
    assert "set_attention_backend" in caplog.text
    meta = torch.empty(1, 2, 8, 16, device="meta")
    with module_under_test._MODE:
        assert F.scaled_dot_product_attention(meta, meta, meta).shape == (1, 2, 8, 16)
