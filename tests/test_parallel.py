# SPDX-License-Identifier: Apache-2.0
"""Several processes say what one says, tokens split among them or weights."""

from __future__ import annotations

import copy

import pytest
import ranks
import tiny
import torch
from builders import planned
from torch import nn

import dtq
from dtq.errors import InputError
from dtq.formats import FORMATS
from dtq.formats.activations import ACTIVATION_FORMATS
from dtq.io.package_data import yaml_names
from dtq.nn import QuantLinear
from dtq.parallel import ROW, Slice, shard, sliced, tp_plan
from dtq.pipelines.loading import LoadedModel
from dtq.plan.layers import LayerSpec
from dtq.recipe import Recipe

CUTS = [(64, 32), (64, 1), (33, 17), (7, 3), (2, 1)]
INTEGER = ("w8a8", "w4a8-two-level")  # kernels whose products are exact, whatever the batch


def filled(runtime: LayerSpec, n: int = 48, k: int = 128) -> QuantLinear:
    """A layer with random parts."""
    g = torch.Generator().manual_seed(0)
    fmt, w = FORMATS[runtime.weight_format], torch.randn(n, k, generator=g) * 0.05
    layer = QuantLinear(k, n, True, runtime)
    parts = fmt.pack(w, fmt.compute_qparams(w))
    for name, spec in layer.tensor_specs().items():
        if name == "pre_quant_perm":
            parts[name] = torch.randperm(k, generator=g).int().reshape(1, -1)
        elif name == "input_scale":
            parts[name] = torch.full(spec.shape, 0.02)
        elif name not in parts:
            parts[name] = (torch.rand(spec.shape, generator=g) + 0.5).to(spec.dtype)
    layer.fill(parts)
    nn.init.normal_(layer.bias)
    return layer.requires_grad_(False)


def tokens(m: int, k: int = 128) -> torch.Tensor:
    g = torch.Generator().manual_seed(m)
    return torch.randn(m, k, generator=g) * torch.rand(m, 1, generator=g) * 10


# context parallelism: tokens are split


@pytest.mark.parametrize("acts", ACTIVATION_FORMATS)
@pytest.mark.parametrize("cut", CUTS)
def test_a_token_is_quantized_without_looking_at_others(acts, cut):
    ops, format_ = torch.ops.dtq, ACTIVATION_FORMATS[acts]
    scale, order = torch.rand(128).bfloat16(), torch.randperm(128).int()
    static = torch.tensor([0.02]) if format_.static else None

    def changed(x):
        if format_.integer:
            return ops.quantize_rows(x, scale, 32, static, format_.qmax)
        change = scale, order, 32, 2
        if format_.bits == 16:
            return (ops.transform_rows(x, *change),)
        return (ops.round_rows(x, *change, acts, torch.float32),)

    x = tokens(cut[0])
    for whole, *halves in zip(changed(x), changed(x[: cut[1]]), changed(x[cut[1] :]), strict=True):
        assert torch.equal(torch.cat(halves), whole)


def layers_of(recipe: str) -> set[tuple[LayerSpec, int]]:
    """What a recipe asks of layers, and their widths."""
    found = set()
    for model in (tiny.dit(), tiny.flux()):
        plan = planned(LoadedModel("tiny", None, "transformer", model), Recipe.load(recipe)).plan
        found |= {(layer.spec, layer.shape[1]) for layer in plan.quantized()}
    return found


@pytest.mark.parametrize("recipe", yaml_names("recipes"))
def test_tokens_can_be_split_in_every_recipe(recipe):
    for runtime, columns in layers_of(recipe):
        layer = filled(runtime, k=columns)
        for m, cut in CUTS:
            x = tokens(m, columns)
            whole = layer(x)
            halves = torch.cat([layer(x[:cut]), layer(x[cut:])])
            if layer.kernel.name in INTEGER and not runtime.rank:
                assert torch.equal(halves, whole)
            else:  # a float product adds in an order that depends on how many rows there are
                assert (halves - whole).norm() < 1e-6 * whole.norm()


# tensor parallelism: weights are split


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What two processes said."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("dit", "flux"):
        ranks.quantized(name, "w4a8").save_pretrained(folder / name)
    torch.multiprocessing.set_forkserver_preload(["dtq.api", "dtq.parallel"])  # imported once
    torch.multiprocessing.start_processes(
        ranks.every_case, (2, folder), nprocs=2, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def error(got, want) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("name", "kind"), ranks.CASES)
def test_two_processes_say_what_one_says(said, name, kind):
    for rank in range(2):
        want, got, slices = said[rank][name, kind]
        assert slices >= 6
        if kind in ranks.EXACT:
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        else:
            assert error(got, want) < 1e-5
    assert all(
        torch.equal(a, b)
        for a, b in zip(said[0][name, kind][1], said[1][name, kind][1], strict=True)
    )


def test_the_step_policy_is_obeyed_in_slices(said):
    want, got, _ = said[0]["dit", "policy"]
    assert torch.equal(got[0], want[0])  # native
    assert error(got[1:], want[1:]) < 1e-5  # a16: float products


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_slices_are_read_from_the_file(said, name):
    whole = sum(p.nbytes for p in ranks.quantized(name, "w4a8").parameters())
    for rank in range(2):
        want, got, held = said[rank][name, "loaded"]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert held < whole


def small(**more) -> nn.Module:
    """A tiny PixArt, its attention 4 heads of 32 channels."""
    settings = {**ranks.KINDS["w8a8"], **more}
    return dtq.quantize(tiny.pixart(), "rtn-w4a8", progress=False, **settings)


def test_the_plan_says_what_is_cut_and_how_far():
    plan = tp_plan(small(), 2)
    block = "transformer_blocks.0."
    assert plan[f"{block}attn1.to_q"].rule == "column"
    assert plan[f"{block}attn2.to_out.0"].rule == "row"
    assert plan[f"{block}ff.net.0.proj"].rule == "column"
    assert plan[f"{block}ff.net.2"].rule == "row"
    assert plan[f"{block}attn1.to_q"].max_tp == 2  # blocks of 64 in 128 channels
    assert plan[f"{block}ff.net.2"].max_tp == 8  # and in 512
    single = tp_plan(copy.deepcopy(ranks.quantized("flux", "w8a8")), 2)
    assert single["single_transformer_blocks.0.proj_out"].rule == "replicate"
    assert "cut together" in single["single_transformer_blocks.0.attn.to_q"].why


@pytest.mark.parametrize(
    ("more", "world", "why"),
    [
        ({}, 3, "4 heads do not split into 3"),
        ({}, 4, "rotation block of 64 channels would cross the cut at 32"),
        ({"weights": "int4-g64", "transform": "none"}, 4, "needs input features divisible by 64"),
        (
            {"activations": "int4-g64", "transform": "none"},
            4,
            "needs input features divisible by 64",
        ),
        ({"exclude": ["attn.k"]}, 2, "to_k is not quantized"),
    ],
)
def test_what_cannot_be_cut_says_why(more, world, why):
    cut = tp_plan(small(**more), world)["transformer_blocks.0.attn1.to_out.0"]
    assert cut.rule == "replicate"
    assert why in cut.why
    assert cut.max_tp < world or "keep" in more


@pytest.mark.parametrize(
    ("runtime", "why"),
    [
        (LayerSpec("int8-row", "int8-row", permutation=True), "change places"),
        (LayerSpec("int8-row", "int8-row", 32, num_rotations=2), "second rotation"),
        (LayerSpec("trit-row", "int8-row"), "trit-row: weight does not split"),
    ],
)
def test_layers_that_mix_all_channels_have_no_row_rule(runtime, why):
    with pytest.raises(InputError, match=why):
        sliced(filled(runtime), ROW, 2)


@pytest.mark.parametrize("weights", FORMATS)
def test_column_slices_make_the_whole(weights):
    layer = filled(
        LayerSpec(weights, "int8-row", 64, True, rank=4), n=64 if "vq" in weights else 48
    )
    x = tokens(5)
    outputs = []
    for rank in range(2):
        piece = Slice(layer, "column", rank, 2, None)
        piece.fill({name: piece.take(name, part) for name, part in layer.packed_tensors().items()})
        piece.bias = nn.Parameter(piece.take("bias", layer.bias), requires_grad=False)
        outputs.append(piece(x))
    torch.testing.assert_close(torch.cat(outputs, -1), layer(x), rtol=1e-5, atol=1e-4)


def test_gated_feed_forwards_are_cut_in_both_halves():
    layer = filled(LayerSpec("int8-row", "int8-row"), n=64)
    piece = Slice(layer, "column", 1, 2, None, sections=2)
    rows = [*range(16, 32), *range(48, 64)]
    assert torch.equal(piece.take("weight", layer.packed_tensor("weight")), layer.weight[rows])
    assert torch.equal(piece.take("bias", layer.bias), layer.bias[rows])


def test_sharding_is_refused_with_a_reason(tmp_path):
    with pytest.raises(InputError, match=r"dtq\.quantize it first"):
        shard(tiny.pixart(), 0, 2)
    with pytest.raises(InputError, match="init_process_group"):
        shard(small(), 0, 2)
    with pytest.raises(InputError, match=r"rank must be one of 0\.\.1"):
        shard(small(), 2, 2)
    with pytest.raises(InputError, match=r"(?s)Use at most 8, or.*4 heads do not split into 3"):
        shard(small(), 0, 3)
    with pytest.raises(InputError, match="at least 1"):
        tp_plan(small(), 0)
    hooked = small()
    hooked.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(InputError, match="shard before"):
        shard(hooked, 0, 2)


def test_what_a_sharded_model_cannot_do(tmp_path):
    meet = f"file://{tmp_path / 'meet'}"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=0, world_size=1)
    try:
        with pytest.raises(InputError, match="process 0 of 1 in the group, not 0 of 2"):
            shard(small(), 0, 2)
        model = shard(small(), 0, 1)
        with pytest.raises(InputError, match="save it before"):
            model.save_pretrained(tmp_path / "m")
    finally:
        torch.distributed.destroy_process_group()
    layer = filled(LayerSpec("int8-row", "int8-row"))
    piece = Slice(layer, "column", 0, 2, None)
    with pytest.raises(InputError, match="for inference"):
        piece(tokens(2).requires_grad_())
