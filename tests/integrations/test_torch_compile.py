# SPDX-License-Identifier: Apache-2.0
"""Fusion in graphs of torch.compile: which patterns are fused, and that outputs do not change."""

from __future__ import annotations

import copy
import pickle

import pytest
import tiny
import torch
import torch.nn.functional as F
import zoo
from conftest import QUICK
from torch import nn

import dtq
from dtq.bench.layers import quantized
from dtq.integrations import torch_compile
from dtq.kernels import gpu_dispatch, gpu_fusion
from dtq.nn import QuantLinear
from dtq.nn.attention import use_int8_attention
from dtq.nn.shared_inputs import share_input_transforms
from dtq.plan.layers import LayerSpec


@pytest.fixture(autouse=True)
def _clean():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def everywhere(monkeypatch):
    """Fused ops count as compiled, and run as torch reference."""
    monkeypatch.setattr(torch_compile, "_is_compiled", lambda node, op: True)


def layer(columns, rows, weights="int8-row", rank=0, activations="int8-row"):
    """A quantized linear with random weights and a float32 bias."""
    plain = nn.Linear(columns, rows)
    new = quantized(plain, weights, activations)
    new.bias = nn.Parameter(plain.bias.detach().clone(), requires_grad=False)
    if rank:
        new.add_rank(torch.randn(rank, columns) / columns**0.5, torch.randn(rows, rank) / 4)
    return new


def run(call, *given, **options):
    """Output of a compiled function, and the rewrites in all of its graphs."""
    total = torch_compile.Fused()

    def backend(module, inputs):
        for name, count in vars(torch_compile.fuse(module)).items():
            setattr(total, name, getattr(total, name) + count)
        return module.forward

    return torch.compile(call, backend=backend, **options)(*given), total


class Block(nn.Module):
    """The ops of a DiT block, with a width divisible by the 4-bit group size."""

    def __init__(self, weights="int4-2l-g64", rank=0, activations="int8-row"):
        super().__init__()
        self.norm = nn.LayerNorm(128, elementwise_affine=False, eps=1e-6)
        self.q, self.k = (layer(128, 128, weights, rank, activations) for _ in range(2))
        self.up, self.down = (
            layer(128, 256, weights, rank, activations),
            layer(256, 128, weights, rank, activations),
        )

    def forward(self, x, shift, scale, gate):
        y = self.norm(x) * (1 + scale[:, None]) + shift[:, None]
        x = x + gate[:, None] * (self.q(y) * 0.5 + self.k(y))
        y = F.dropout(self.up(self.norm(x) * (1 + scale[:, None]) + shift[:, None]), 0.0)
        y = self.down(F.gelu(y, approximate="tanh")) / 1.0
        return gate.unsqueeze(1) * y + x


def block_inputs(images=2, tokens=9, dtype=torch.float32):
    given = torch.randn(images, tokens, 128), *(torch.randn(images, 128) * 0.5 for _ in range(3))
    return tuple(each.to(dtype) for each in given)


@pytest.mark.parametrize("weights", ["int8-row", "int4-2l-g64", "int4-asym-row"])
@pytest.mark.parametrize("rank", [0, 4])
def test_a_block_is_fused(everywhere, weights, rank):
    block, given = Block(weights, rank), block_inputs()
    with torch.no_grad():
        want = block(*given)
        got, fused = run(block, *given, fullgraph=True)
    # a low-rank branch is another user of the norm, and a separate sum where no kernel adds it
    assert fused == (
        torch_compile.Fused() if rank else torch_compile.Fused(norms=3, gelus=1, gates=1)
    )
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3 * float(want.abs().max()))


def test_a_block_with_int8_attention_is_fused(everywhere):
    # inside, Dynamo calls x / 1.0 by another name
    model, given = nn.ModuleDict({"block": Block()}), block_inputs()
    use_int8_attention(model, ["block"])
    with torch.no_grad():
        _, fused = run(model["block"], *given, fullgraph=True)
    assert fused == torch_compile.Fused(norms=3, gelus=1, gates=1)


def test_float_linears_of_a_few_rows_have_an_op_of_their_own(everywhere):
    linear = nn.Linear(24, 8)
    with torch.no_grad():
        for shape, few in ((2, 24), 1), ((2, 8, 24), 1), ((17, 24), 0):
            x = torch.randn(shape)
            got, fused = run(linear, x)
            assert fused.few == few, shape
            torch.testing.assert_close(got, linear(x))
            torch._dynamo.reset()
    _, fused = run(linear, torch.randn(2, 24))  # the weight needs a gradient
    assert fused.few == 0


@pytest.mark.parametrize("slower", ["norm", "gelu", "gate"])
def test_what_is_estimated_slower_stays_apart(everywhere, monkeypatch, slower):
    monkeypatch.setattr(gpu_fusion, "is_fused", lambda pattern, x: pattern != slower)
    block, given = Block(), block_inputs()
    with torch.no_grad():
        want = block(*given)
        got, fused = run(block, *given, fullgraph=True)
    counts = {"norm": fused.norms, "gelu": fused.gelus, "gate": fused.gates}
    assert counts == {"norm": 3, "gelu": 1, "gate": 1} | {slower: 0}
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3 * float(want.abs().max()))


def test_fp4_gemms_are_fused_too(everywhere, monkeypatch):
    monkeypatch.setattr(gpu_dispatch, "multiplies_fp4", lambda x, mx: True)
    block, given = Block("nvfp4", activations="nvfp4"), block_inputs()
    with torch.no_grad():
        want = block(*given)
        got, fused = run(block, *given, fullgraph=True)
    assert fused == torch_compile.Fused(gelus=1, gates=1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activations", ["e2m1-row", "nvfp4", "fp8-row", "int4-g64"])
@pytest.mark.parametrize("fp4", [False, True])
def test_inputs_are_quantized_once_in_every_format(everywhere, monkeypatch, activations, fp4):
    monkeypatch.setattr(gpu_dispatch, "multiplies_fp4", lambda x, mx: fp4)
    q, k = (layer(128, 128, "nvfp4", activations=activations) for _ in "qk")
    share_input_transforms(nn.ModuleDict({"q": q, "k": k}))
    x = torch.randn(2, 9, 128)
    with torch.no_grad():
        got, fused = run(lambda x: (q(x), k(x)), x)
        assert torch.equal(got[0], q(x))
        assert torch.equal(got[1], k(x))
    assert fused.shared == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "norms", "gelus", "gates"),
    [
        ("DiTTransformer2DModel", 4, 1, 2),
        ("FluxTransformer2DModel", 12, 3, 5),
        ("SD3Transformer2DModel", 28, 7, 14),
        ("WanTransformer3DModel", 8, 2, 4),
        ("HunyuanVideoTransformer3DModel", 8, 3, 7),
        ("QwenImageTransformer2DModel", 16, 4, 8),
        ("Flux2Transformer2DModel", 9, 0, 5),
        ("LTXVideoTransformer3DModel", 0, 1, 2),
    ],
)
def test_models_of_every_kind_are_fused(everywhere, name, norms, gelus, gates):
    model = zoo.model(name)
    for where, old in list(model.named_modules()):
        inside = "blocks" in where and "norm" not in where
        if isinstance(old, nn.Linear) and inside and old.in_features >= 8:
            new = quantized(old, "int8-row")
            if old.bias is not None:
                new.bias = nn.Parameter(old.bias.detach(), requires_grad=False)
            model.set_submodule(where, new)
    given = zoo.inputs(name)
    with torch.no_grad():
        want = model(**given)[0]
        got, fused = run(lambda: model(**given)[0])
    assert (fused.norms, fused.gelus, fused.gates) == (norms, gelus, gates)
    assert (got - want).norm() < 1e-3 * want.norm()


def test_fusion_rounds_bfloat16_less(everywhere):
    block, given = Block(), block_inputs(tokens=40)
    exact = nn.Module.__call__(_in_float(block), *given)
    half = tuple(each.bfloat16() for each in given)
    with torch.no_grad():
        apart = block(*half)
        got, fused = run(block, *half)
    assert (fused.norms, fused.gates) == (3, 1)
    assert got.dtype == torch.bfloat16
    errors = [float((y.float() - exact).norm() / exact.norm()) for y in (got, apart)]
    assert errors[0] < errors[1]


def _in_float(block):
    """The same block with float linears of the same weights."""
    float_block = Block()
    float_block.load_state_dict(block.state_dict())
    for name in ("q", "k", "up", "down"):
        float_block.set_submodule(name, getattr(block, name).unquantized().float())
    return float_block


def test_dynamic_sizes_are_fused(everywhere):
    block, total = Block(), []

    def backend(module, inputs):
        total.append(torch_compile.fuse(module))
        return module.forward

    compiled = torch.compile(block, backend=backend, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for images, tokens in ((2, 9), (3, 20), (4, 11)):
            given = block_inputs(images, tokens)
            want = block(*given)
            torch.testing.assert_close(
                compiled(*given), want, rtol=0, atol=2e-3 * float(want.abs().max())
            )
    assert [(f.norms, f.gelus, f.gates) for f in total] == [(3, 1, 1)]


def test_a_common_input_is_quantized_once():
    # without smoothing vectors, q and k quantize in the same way
    q, k = (
        QuantLinear.in_place_of(nn.Linear(64, 64), LayerSpec("int8-row", "int8-row")) for _ in "qk"
    )
    for each in (q, k):
        w = torch.randn(64, 64)
        each.fill(each.problem.weight_format.pack(w, each.problem.weight_format.compute_qparams(w)))
        nn.init.zeros_(each.bias)
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        got, fused = run(lambda x: (q(x), k(x)), x)
        assert torch.equal(got[0], q(x))
        assert torch.equal(got[1], k(x))
        assert fused.shared == 1

        def between(x):
            first = q(x)
            x.add_(1)
            return first, k(x)

        got, fused = run(between, x.clone())
        assert torch.equal(got[1], k(x + 1))
    assert fused.shared == 0


def set_smoothing(*layers):
    """Give layers equal smoothing vectors, each in its own memory."""
    for each in layers:
        each.packed_tensor("pre_quant_scale").copy_(torch.linspace(0.5, 1.5, 128))


def test_layers_of_a_block_with_equal_transforms_quantize_their_input_once(everywhere):
    model, given = nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block()])}), block_inputs()
    for block in model["blocks"]:
        set_smoothing(block.q, block.k)
    share_input_transforms(model)

    def call(x, *rest):
        for block in model["blocks"]:
            x = block(x, *rest)
        return x

    with torch.no_grad():
        want = call(*given)
        got, fused = run(call, *given)
    # up and down both have a vector of ones, but of different widths
    assert (fused.norms, fused.shared) == (4, 2)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3 * float(want.abs().max()))
    one = model["blocks"][0]
    again = copy.deepcopy(one)
    assert not again.k._first
    assert (
        pickle.loads(pickle.dumps(one.k))
        .packed_tensor("pre_quant_scale")
        .equal(one.k.packed_tensor("pre_quant_scale"))
    )

    torch._dynamo.reset()
    changed = {k: v.clone() for k, v in one.state_dict().items()}
    changed["k.pre_quant_scale"] *= -1  # changes the bits of bfloat16, so the vectors differ
    one.load_state_dict(changed)
    with torch.no_grad():
        want = call(*given)
        got, fused = run(call, *given)
    assert (fused.norms, fused.shared) == (5, 1)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3 * float(want.abs().max()))


def test_sharing_ends_when_tensors_change():
    q, k, v = (layer(128, 128) for _ in "qkv")
    model = nn.ModuleDict({"q": q, "k": k, "v": v})
    set_smoothing(q, k)
    share_input_transforms(model)
    assert (q._first, k._first, v._first) == ([], [q], [])
    set_smoothing(v)
    share_input_transforms(model)
    share_input_transforms(model)
    assert (k._first, v._first, q._followers) == ([q], [q], [k, v])
    k.fill(k.packed_tensors())
    assert (k._first, q._followers) == ([], [v])
    q.fill(q.packed_tensors())
    assert (v._first, q._followers) == ([], [])
    share_input_transforms(model)
    k.to("meta")  # offloaded: its own tensors are read
    x = torch.randn(2, 128)
    with torch.no_grad():
        run(lambda x: v(x), x)
    q.to("meta")
    with torch.no_grad():
        got, _ = run(lambda x: v(x), x)
        assert torch.equal(got, v(x))


def test_loaded_models_quantize_common_inputs_once(tmp_path, everywhere):
    model = tiny.dit()
    given = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([500, 500]),
        "class_labels": torch.tensor([1, 2]),
    }
    dtq.quantize(model, "w4a8", inputs=[given], progress=False, **QUICK)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for each in (model, loaded):
        torch._dynamo.reset()
        with torch.no_grad():
            want = each(**given)[0]
            got, fused = run(lambda each=each: each(**given)[0])
        assert fused.shared == 2 * len(each.transformer_blocks), fused
        assert (got - want).norm() < 1e-2 * want.norm()


def test_patterns_with_writes_in_between_are_not_fused(everywhere):
    q, norm = layer(128, 128), nn.LayerNorm(128, elementwise_affine=False)
    x, shift, scale, gate = block_inputs()

    def modulated(x):
        y = norm(x) * (1 + scale[:, None]) + shift[:, None]
        x.add_(1)
        return q(y)

    def gated(x):
        y, other = q(x), x.clone()
        other += y
        return other + gate[:, None] * q(x), other

    with torch.no_grad():
        for call in (modulated, gated):
            want = call(x.clone())
            got, _ = run(call, x.clone())
            torch.testing.assert_close(got, want, rtol=0, atol=0)
        assert run(modulated, x.clone())[1].norms == 0


def test_copies_that_are_written_to_are_not_merged():
    x = torch.randn(4, 6).T

    def by_method(one):
        one.view(6, 4).add_(1)

    def by_function(one):
        torch.add(one, 1, out=one)

    def by_operator(one):
        one %= 2

    def by_item(one):
        one[2:4] = 0

    def by_place(one):
        F.leaky_relu(one, 0.1, True)

    def by_list(one):
        torch._foreach_add_([one], 1.0)

    for write in (by_method, by_function, by_operator, by_item, by_place, by_list):

        def copies(x, write=write):
            one, two = x.reshape(-1) * 1, x.reshape(-1).clone()
            a, b = x.reshape(-1), x.reshape(-1)
            write(a)
            return one, two, a + 0, b + 0

        torch._dynamo.reset()
        want = copies(x.clone())
        got, _ = run(copies, x.clone())
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), write.__name__

    torch._dynamo.reset()
    a, b = run(lambda x: (x[0], x[0]), x)[0]
    a.add_(1)
    assert torch.equal(b, a) == torch.equal(*_twice(x))


def _twice(x):
    a, b = x[0], x[0]
    a.add_(1)
    return a, b


def test_views_with_and_without_gradients_are_not_merged(everywhere):
    w = torch.randn(4)

    def call(x):
        with torch.no_grad():
            most = x.reshape(-1, 4).abs().max()
        return (x.reshape(-1, 4) * w / most).sum()

    x = torch.randn(2, 8, requires_grad=True)
    (mine,) = torch.autograd.grad(run(call, x)[0], x)
    (want,) = torch.autograd.grad(call(x), x)
    torch.testing.assert_close(mine, want)


def test_broadcast_products_are_not_fused(everywhere):
    q, (x, _, _, gate) = layer(128, 128), block_inputs()
    one, whole = torch.randn(2, 1, 128), torch.randn(1, 9, 128)

    def by_token(x):
        return x + gate[:, None] * q(one)

    def by_image(x):
        return x + gate[:, None] * q(whole)

    def flat(x):
        return x[:1] + gate[:1, None] * q(x[0])

    def doubled(x):
        z = gate[:, None] * q(x)
        return z + z

    def unsqueezed(x):
        return F.gelu(q(x).unsqueeze(-1), approximate="tanh")

    with torch.no_grad():
        for call in (by_token, by_image, flat, doubled):
            got, fused = run(call, x)
            assert fused.gates == 0, call.__name__
            torch.testing.assert_close(got, call(x), rtol=0, atol=0)
        got, fused = run(unsqueezed, x)
        assert got.shape == (2, 9, 128, 1)
        torch.testing.assert_close(got, unsqueezed(x), rtol=1e-5, atol=1e-5)


def test_writes_before_the_norm_prevent_fusion(everywhere):
    q, norm = layer(128, 128), nn.LayerNorm(128, elementwise_affine=False)
    x, shift, scale, _ = block_inputs()

    def scale_written(x):
        s = scale[:, None].clone()
        up = 1 + s
        s.add_(1)
        return q(norm(x) * up + shift[:, None])

    def input_written(x):
        half = x.bfloat16()
        wide = half.float()
        half.add_(1)
        return q(norm(wide) * (1 + scale[:, None]) + shift[:, None])

    with torch.no_grad():
        for call in (scale_written, input_written):
            got, fused = run(call, x)
            assert fused.norms == 0, call.__name__
            torch.testing.assert_close(got, call(x), rtol=0, atol=0)


def test_casts_that_lose_values_are_not_ignored(everywhere):
    q, norm = layer(128, 128), nn.LayerNorm(128, elementwise_affine=False)
    x, shift, scale, _ = block_inputs()

    def modulated(x, to=torch.float32, by=torch.float32):
        return (norm(x) * (1 + scale[:, None].to(by)) + shift[:, None].to(by)).to(to)

    with torch.no_grad():
        for to in (torch.int8, torch.float8_e4m3fn):
            got, fused = run(lambda x, to=to: q(modulated(x, to).float()), x)
            assert fused.norms == 0
            torch.testing.assert_close(got, q(modulated(x, to).float()), rtol=0, atol=0)
        got, fused = run(lambda x: q(modulated(x, by=torch.float64)), x)
        assert fused.norms == 0
        assert run(lambda x: q(modulated(x, by=torch.bfloat16)), x)[1].norms == 1


def test_operands_may_be_keyword_arguments(everywhere):
    q, (x, *_) = layer(128, 128), block_inputs()
    rows = torch.randn(4, 128)
    with torch.no_grad():
        got, fused = run(lambda x: F.gelu(input=q(x), approximate="tanh"), x)
        assert fused.gelus == 1
        got, _ = run(lambda x: torch.ops.dtq.quantize_rows(x, None, 1, None), rows)
        assert torch.equal(got[0], torch.ops.dtq.quantize_rows(rows, None, 1, None)[0])
        run(lambda x: F.relu(input=x.reshape(-1), inplace=True), x.clone())


def test_results_with_other_users_are_not_fused(everywhere):
    q, norm = layer(128, 128), nn.LayerNorm(128, elementwise_affine=False)
    affine = nn.LayerNorm(128)
    x, shift, scale, gate = block_inputs()
    per_token = torch.randn(2, 9, 128)

    def read_elsewhere(x):
        y = norm(x) * (1 + scale[:, None]) + shift[:, None]
        z = q(y)
        return z + gate[:, None] * z, y

    def with_weights(x):
        return q(affine(x) * (1 + scale[:, None]) + shift[:, None])

    def modulated_by_token(x):
        return q(norm(x) * (1 + per_token) + shift[:, None]) * per_token + x

    def exact_gelu(x):
        return F.gelu(q(x))

    def transposed(x):
        return gate[:, None] * q(x).transpose(0, 1).reshape(2, 9, 128) + x

    with torch.no_grad():
        for call in (read_elsewhere, with_weights, modulated_by_token, exact_gelu, transposed):
            got, fused = run(call, x)
            assert (fused.norms, fused.gelus, fused.gates) == (0, 0, 0), call.__name__
            torch.testing.assert_close(got, call(x), rtol=0, atol=0)


def test_gradients_do_not_change(everywhere):
    q, (x, _, _, gate) = layer(128, 128), block_inputs()
    gate.requires_grad_()

    def call(x):
        return gate[:, None] * q(x) + x

    got, fused = run(call, x)
    assert fused.gates == 0
    (mine,) = torch.autograd.grad(got.sum(), gate)
    (want,) = torch.autograd.grad(call(x).sum(), gate)
    torch.testing.assert_close(mine, want)


@pytest.mark.slow
def test_the_backend_is_inductor_with_the_compiled_ops_of_the_device():
    block, given = Block(), block_inputs()
    with torch.no_grad():
        want = block(*given)
        for options in ({}, {"options": {"max_fusion_size": 8}}, {"mode": "reduce-overhead"}):
            torch._dynamo.reset()
            got = torch.compile(block, backend="dtq", fullgraph=True, **options)(*given)
            torch.testing.assert_close(got, want, rtol=0, atol=2e-3 * float(want.abs().max()))


def test_only_what_is_compiled_for_the_device_is_used():
    from dtq.kernels import CPU

    with torch.no_grad():
        _, fused = run(Block(), *block_inputs())
    there = CPU.load()
    assert (fused.norms, fused.gates, fused.gelus) == (3 * there, there, there)
