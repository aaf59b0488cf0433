# SPDX-License-Identifier: Apache-2.0
"""What learns gets nearer to the float model, what must not move does not, nothing gets worse."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import tiny
import torch
from torch import nn

from dtq.errors import InputError
from dtq.finetune import FINETUNE
from dtq.finetune.block_order import find, layers_of
from dtq.finetune.targets import examples_of
from dtq.finetune.trainable import TrainableLinear, TrainableVq, set_state, state_of
from dtq.formats import FORMATS
from dtq.formats.activations import ACTIVATION_FORMATS
from dtq.nn import QuantLinear
from dtq.nn.swap import temporarily_replaced
from dtq.nn.timestep_hook import install_clock
from dtq.pipelines.recorded_calls import RecordedCall
from dtq.pipelines.tracing import dummy_inputs
from dtq.plan.layers import LayerSpec
from dtq.runs.tasks import TaskStore
from dtq.transforms.choice import online_transform


def call(i, kwargs, args=()):
    return RecordedCall(i, args, kwargs, torch.empty(0))


def calls_of(model, count=6, batch=2):
    times = torch.linspace(900, 100, count).tolist()
    return [call(i, dummy_inputs(model, batch, t, i)) for i, t in enumerate(times)]


def quantized(model, weights, activations="none", only="blocks."):
    """Every linear of the blocks rounded to nearest; returns what they were."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and only in n]
    floats = {name: model.get_submodule(name) for name in names}
    for name, linear in floats.items():
        model.set_submodule(name, rounded(linear, LayerSpec(weights, activations)))
    return floats


def rounded(linear, spec):
    fmt, w = FORMATS[spec.weight_format], linear.weight.detach().float()
    layer = QuantLinear(linear.in_features, linear.out_features, linear.bias is not None, spec)
    parts = fmt.pack(w, fmt.compute_qparams(w))
    if ACTIVATION_FORMATS[spec.activation_format].static:
        parts["input_scale"] = torch.tensor([[0.03]])
    layer.fill(parts)
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    return layer.eval()


def parts_of(model):
    return {
        f"{name}.{part}": t.clone()
        for name, m in model.named_modules()
        if isinstance(m, QuantLinear)
        for part, t in state_of(m).items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a
    )


@torch.no_grad()
def distance(model, calls, want):
    got = [model(**c.kwargs)[0] for c in calls]
    return sum(
        float((a - b).square().sum() / b.square().sum()) for a, b in zip(got, want, strict=True)
    )


FAST = {"progress": False, "steps": 24}


@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        ("int4-row", "int8-row"),
        ("int4-asym-g64", "none"),
        ("int4-2l-g64", "int8-row"),
        ("fp8-row", "fp8-row"),
        ("nvfp4", "nvfp4"),
        ("mxfp4", "mxfp4"),
        ("lut4-row", "none"),
        ("twinlog3-g64", "none"),
        ("vq-256x4", "none"),
        ("vq-64x2-row", "none"),
        ("ternary-g64", "none"),
    ],
)
def test_blocks_get_nearer_and_codes_stay(weights, activations):
    model = tiny.dit(heads=2)
    calls, fresh = calls_of(model), calls_of(model, 4, 3)
    want = [model(**c.kwargs)[0].detach() for c in fresh]
    floats = quantized(model, weights, activations)
    before, start = distance(model, fresh, want), parts_of(model)
    report = FINETUNE["blocks"](model, floats, calls, **FAST)
    assert [b.name for b in report.blocks] == ["transformer_blocks.0", "transformer_blocks.1"]
    assert all(b.after < b.before for b in report.blocks if b.accepted)
    assert any(b.accepted for b in report.blocks)
    assert distance(model, fresh, want) < before
    after = parts_of(model)
    assert not same(start, after)
    codes = [k for k in start if k.endswith((".weight", "input_scale", "zero_point"))]
    assert codes
    assert same({k: start[k] for k in codes}, {k: after[k] for k in codes})
    assert all(start[k].dtype == after[k].dtype for k in start)


@pytest.mark.parametrize("name", tiny.TRANSFORMERS)
def test_blocks_of_every_family_in_the_order_in_which_they_run(name):
    model = tiny.TRANSFORMERS[name]()
    calls = calls_of(model, 4)
    floats = quantized(model, "int4-row", "int8-row")
    report = FINETUNE["blocks"](model, floats, calls, **FAST)
    names = [b.name for b in report.blocks]
    if name == "flux":
        assert names == ["transformer_blocks.0", "single_transformer_blocks.0"]
    assert names == find(model)
    assert all(b.accepted and b.after < b.before for b in report.blocks)
    json.dumps(report.to_json(), allow_nan=False)


def test_nothing_but_the_parts_is_touched():
    model = tiny.pixart()
    calls = calls_of(model, 3)
    floats = quantized(model, "int4-row")
    inside = layers_of(model, "transformer_blocks.0")
    model.transformer_blocks[0].scale_shift_table.requires_grad_(True)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    others = {k: v.clone() for k, v in model.state_dict().items() if "blocks." not in k}
    seen = torch.get_rng_state()
    table = model.transformer_blocks[0].scale_shift_table.detach().clone()
    with torch.no_grad():  # as a caller may have it
        FINETUNE["blocks"](model, floats, calls, **FAST)
    assert torch.equal(torch.get_rng_state(), seen)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(torch.equal(model.state_dict()[k], v) for k, v in others.items())
    assert torch.equal(model.transformer_blocks[0].scale_shift_table, table)
    assert layers_of(model, "transformer_blocks.0") == inside
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("weights", "activations", "more"),
    [
        ("int4-g64", "int8-row", {}),
        ("int8-row", "int8-static-timestep", {}),
        ("int4-asym-g64", "none", {"rank": 4}),
        ("nvfp4", "nvfp4", {"permutation": True, "num_rotations": 2, "rank": 4}),
        ("lut4-g64", "int4-g64", {}),
        ("vq-64x2-row", "none", {"rank": 4}),
    ],
)
def test_what_is_trained_is_what_runs(weights, activations, more, dtype):
    """The hardened layer gives what the trainee predicted, after any move of its parts."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(64, 128, generator=g) * 0.05
    order = torch.randperm(128, generator=g) if more.get("permutation") else None
    turn = online_transform(
        w, torch.rand(128, generator=g) + 0.5, 64, 0, order, more.get("num_rotations", 1)
    )
    spec = LayerSpec(weights, activations, 64, True, **more)
    layer = QuantLinear(128, 64, True, spec, compute_dtype=dtype)
    fmt = FORMATS[weights]
    parts = fmt.pack(turn.w(w), fmt.compute_qparams(turn.w(w)))
    parts["pre_quant_scale"] = turn.scale.reshape(1, -1)
    if order is not None:
        parts["pre_quant_perm"] = order.int().reshape(1, -1)
    if activations == "int8-static-timestep":
        parts["input_scale"] = torch.tensor([[0.02]])
        install_clock(nn.Sequential(layer), ())
    if spec.rank:
        parts["proj_down"] = torch.randn(4, 128, generator=g).bfloat16()
        parts["proj_up"] = 0.01 * torch.randn(64, 4, generator=g).bfloat16()
    layer.fill(parts)
    layer.bias = nn.Parameter(torch.randn(64, generator=g).to(dtype))
    x = torch.randn(2, 9, 128, generator=g).to(dtype)
    trainees = [TrainableLinear(layer)]
    if weights.startswith("vq"):
        trainees.append(TrainableVq(layer, w, 3))
    for trainee in trainees:
        for move in trainee.moves.values():
            move.data = torch.randn(move.shape, generator=g)
        if isinstance(trainee, TrainableVq):
            best = torch.randint(3, (len(trainee.logits), 1), generator=g)
            trainee.logits.data = torch.zeros(len(best), 3).scatter(1, best, 1000.0)
        predicted = trainee(x).detach()
        twin = copy.deepcopy(layer)
        twin.set_clock(layer.clock)
        set_state(twin, trainee.state())
        assert predicted.dtype == dtype
        assert not torch.allclose(twin(x).detach().float(), layer(x).detach().float(), rtol=0.01)
        # activations of 16 bits run in the model's dtype, training in float32
        loose = 0.02 if dtype == torch.bfloat16 else 1e-5
        error = (twin(x).detach().float() - predicted.float()).norm() / predicted.float().norm()
        assert error < loose


def test_gradients_reach_every_float_part():
    for weights in FORMATS:
        linear = nn.Linear(max(128, FORMATS[weights].group or 0), 64)
        layer = rounded(linear, LayerSpec(weights, "int8-row"))
        trainee = TrainableLinear(layer)
        trainee(torch.randn(3, linear.in_features)).square().sum().backward()
        learns = {n for n, s in layer.tensor_specs().items() if s.dtype.is_floating_point} - {
            "weight"
        }
        assert set(trainee.moves) == learns | {"bias"}
        assert all(p.grad is not None and p.grad.any() for p in trainee.moves.values()), weights


def test_a_scale_that_all_rows_share_stays_one():
    layer = rounded(nn.Linear(64, 48), LayerSpec("fp8-matrix", "fp8-row"))
    trainee, before = TrainableLinear(layer), layer.packed_tensor("weight_scale").clone()
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(trainee.parameters(), lr=1e-3)
    trainee(x).square().sum().backward()
    optimizer.step()
    scale = trainee.state()["weight_scale"]
    assert scale.shape == before.shape
    assert not torch.equal(scale, before)
    assert (
        FORMATS["fp8-matrix"].tensor_specs((48, 64))["weight_scale"].unsupported_reason(scale)
        is None
    )


def test_a_block_that_gets_worse_is_restored():
    model = tiny.dit(heads=2)
    floats = quantized(model, "int4-row")
    calls, start = calls_of(model, 4), parts_of(model)
    report = FINETUNE["blocks"](model, floats, calls, lr=300.0, lr_other=300.0, **FAST)
    assert not any(b.accepted for b in report.blocks)
    assert same(start, parts_of(model))


@pytest.mark.parametrize("broken", [0, 2], ids=["trained on", "held out"])
def test_a_block_that_becomes_non_finite_is_restored_and_said(caplog, broken):
    model = tiny.dit(heads=2)
    floats = quantized(model, "int4-row")
    calls, start = calls_of(model, 4), parts_of(model)
    calls[broken].kwargs["hidden_states"][0, 0, 0, 0] = torch.nan
    with caplog.at_level(logging.WARNING, "dtq"):
        report = FINETUNE["blocks"](model, floats, calls, **FAST)
    assert [(b.accepted, b.after) for b in report.blocks] == [(False, None)] * 2
    assert "non-finite" in report.blocks[0].note
    assert "transformer_blocks.0 is not finite" in caplog.text
    assert same(start, parts_of(model))
    assert all(type(m) is QuantLinear for m in layers_of(model, "transformer_blocks").values())
    json.dumps(report.to_json(), allow_nan=False)


def test_finished_blocks_are_loaded_and_give_the_same(tmp_path, caplog):
    first = tiny.dit(heads=2)
    floats = quantized(first, "vq-64x2-row")
    second, third, calls = copy.deepcopy(first), copy.deepcopy(first), calls_of(first, 4)
    how = {**FAST, "steps": 8, "tasks": TaskStore(tmp_path)}
    whole = FINETUNE["vq4dit"](first, floats, calls, **how)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"block-{i}.safetensors" for i in range(2)
    ]
    (tmp_path / "block-1.safetensors").unlink()  # as if interrupted in the second block
    with caplog.at_level(logging.INFO, "dtq"):
        again = FINETUNE["vq4dit"](second, floats, calls, **how)
    assert "transformer_blocks.0 was finished before" in caplog.text
    assert "transformer_blocks.1 was finished before" not in caplog.text
    assert again == whole
    assert same(parts_of(first), parts_of(second))
    caplog.clear()
    with caplog.at_level(logging.WARNING, "dtq"):
        FINETUNE["vq4dit"](third, floats, calls, **{**how, "steps": 9})
    assert "of another run" in caplog.text
    assert not same(parts_of(first), parts_of(third))


def test_vq4dit_beats_kmeans_and_training_the_codebook_alone():
    model = tiny.dit(blocks=1, heads=2)
    calls = calls_of(model, 16, 4)
    floats = quantized(model, "vq-256x4")
    errors, start = {}, parts_of(model)
    for name, method in FINETUNE.items():
        twin = copy.deepcopy(model)
        (block,) = method(twin, floats, calls, progress=False, steps=60).blocks
        assert block.accepted
        errors[name], last = block.after / block.before, parts_of(twin)
    assert errors["vq4dit"] < 0.6
    assert errors["vq4dit"] < errors["blocks"]
    codes = [k for k in start if k.endswith(".weight")]
    assert not all(torch.equal(start[k], last[k]) for k in codes)


def test_vq4dit_mixes_vector_formats_and_others():
    model = tiny.dit(heads=2)
    calls = calls_of(model, 4)
    floats = quantized(model, "vq-256x4", only="ff.net") | quantized(model, "int4-row", only="attn")
    report = FINETUNE["vq4dit"](model, floats, calls, candidates=3, **FAST)
    assert all(b.accepted for b in report.blocks)


def test_mixed_codewords_become_hard():
    linear = nn.Linear(128, 64)
    layer = rounded(linear, LayerSpec("vq-256x4-row", "none"))
    trainee = TrainableVq(layer, linear.weight, 3)
    fmt, k = layer.problem.weight_format, layer.packed_tensor("weight_lut")
    now = fmt.codes(layer.packed_tensors()).flatten()
    # the present word first, then the nearest others
    assert torch.equal(trainee.options[:, 0], now.long())
    unit = linear.weight.detach() / layer.packed_tensor("weight_scale").float()
    order = torch.cdist(unit.reshape(-1, 4), k.float()).argsort(1)[:, :3]
    assert torch.equal(trainee.options.sort(1).values, order.sort(1).values)
    # the hard matrix is the limit, and indecision is what is left on the way
    hard = layer.problem.weight_format.unpack(layer.packed_tensors())
    assert not torch.allclose(trainee.matrix(), hard, atol=1e-4)
    assert 0 < trainee.indecision() < 1
    trainee.logits.data *= 100
    torch.testing.assert_close(trainee.matrix(), hard)
    assert trainee.indecision() == 0
    # a sub-vector that is sure stays, whatever the optimizer does
    trainee.logits.data = torch.tensor([6.0, 0.0, 0.0]).repeat(len(now), 1)
    trainee.logits.data[1] = torch.tensor([0.0, 1.0, 0.0])
    trainee.fix()
    loss = trainee.matrix().square().sum() + trainee.indecision()
    loss.backward()
    assert torch.isfinite(trainee.logits.grad).all()
    assert trainee.logits.grad[1].any()
    assert not trainee.logits.grad[0].any()
    with torch.no_grad():
        trainee.logits += torch.tensor([-50.0, 0.0, 50.0])
    assert trainee.logits.argmax(1)[:3].tolist() == [0, 2, 0]
    trainee.fix(everything=True)
    best = trainee.options.gather(1, trainee.logits.argmax(1, True)).reshape(-1)
    twin = copy.deepcopy(layer)
    set_state(twin, trainee.state())
    assert torch.equal(fmt.codes(twin.packed_tensors()).flatten(), best)


def test_static_scales_follow_the_step_of_the_call():
    model = tiny.dit(heads=2)
    floats = quantized(model, "int4-row", "int8-static-timestep")
    for layer in layers_of(model, "transformer_blocks").values():
        layer.bins = 2
        layer._specs = layer.spec.tensor_specs(layer._shape, 2)
        layer.fill(layer.packed_tensors() | {"input_scale": torch.tensor([[0.03, 0.05]])})
    install_clock(model, (500.0,))
    calls = calls_of(model, 4)
    examples = examples_of(model, "transformer_blocks.0", floats, calls)
    assert [e.clock_state[0].item() for e in examples] == [1, 1, 0, 0]
    clock, block = model._dtq_clock, model.transformer_blocks[0]
    want = examples[0].loss(block)
    clock.set(torch.tensor([900.0, 100.0]))  # of a call that had other samples
    assert examples[0].loss(block) == want
    assert clock.samples is None
    report = FINETUNE["blocks"](model, floats, calls, **FAST)
    assert all(b.after < b.before for b in report.blocks if b.accepted)


def test_placed_restores_after_an_error():
    model = tiny.dit(heads=2)
    floats = quantized(model, "int4-row")
    name = next(iter(floats))
    before = model.get_submodule(name)

    def fail():
        with temporarily_replaced(model, floats):
            assert model.get_submodule(name) is floats[name]
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert model.get_submodule(name) is before


def test_layers_outside_blocks_and_blocks_that_do_not_run_are_left_alone(caplog):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.stages = nn.ModuleList([nn.ModuleList([nn.Linear(8, 8)]) for _ in range(3)])

        def forward(self, x):
            x = self.first(x)
            for (linear,) in self.stages[:2]:
                x = x + linear(x)
            return (x, None)

    torch.manual_seed(0)
    model = Odd().eval()
    floats = quantized(model, "int4-row", only="")
    start = parts_of(model)
    calls = [call(i, {}, (torch.randn(32, 8),)) for i in range(5)]
    with caplog.at_level(logging.WARNING, "dtq"):
        report = FINETUNE["blocks"](model, floats, calls, **FAST)
    assert [b.name for b in report.blocks] == ["stages.0.0", "stages.1.0"]
    assert "stages.2.0" in caplog.text
    changed = {k for k, t in parts_of(model).items() if not torch.equal(t, start[k])}
    assert changed
    assert all(k.startswith(("stages.0", "stages.1")) for k in changed)


def test_what_cannot_be_done_is_said():
    model = tiny.dit(blocks=1, heads=2)
    floats = quantized(model, "int4-row")
    with pytest.raises(InputError, match="recorded calls"):
        FINETUNE["blocks"](model, floats, [])
    with pytest.raises(InputError, match="at least one step"):
        FINETUNE["blocks"](model, floats, calls_of(model, 1), steps=0)
    with pytest.raises(InputError, match="at least 2, is 1"):
        FINETUNE["vq4dit"](model, floats, calls_of(model, 1), candidates=1)
