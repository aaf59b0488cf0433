# SPDX-License-Identifier: Apache-2.0
"""Several processes compute what one computes, with tokens or with weights split among them."""

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
from dtq.nn.slice import ROW, Slice, slice_specs
from dtq.parallel import shard, tp_plan
from dtq.pipelines.loading import LoadedModel
from dtq.plan.layers import LayerSpec
from dtq.recipe import Recipe

CUTS = [(64, 32), (64, 1), (33, 17), (7, 3), (2, 1)]
INTEGER = ("w8a8", "w4a8-two-level")  # kernels whose products are exact, whatever the batch


def filled(spec: LayerSpec, n: int = 48, k: int = 128) -> QuantLinear:
    """A layer with random packed tensors."""
    g = torch.Generator().manual_seed(0)
    fmt, w = FORMATS[spec.weight_format], torch.randn(n, k, generator=g) * 0.05
    layer = QuantLinear(k, n, True, spec)
    tensors = fmt.pack(w, fmt.compute_qparams(w))
    for name, tensor_spec in layer.tensor_specs().items():
        if name == "pre_quant_perm":
            tensors[name] = torch.randperm(k, generator=g).int().reshape(1, -1)
        elif name == "input_scale":
            tensors[name] = torch.full(tensor_spec.shape, 0.02)
        elif name not in tensors:
            values = torch.rand(tensor_spec.shape, generator=g) + 0.5
            tensors[name] = values.to(tensor_spec.dtype)
    layer.fill(tensors)
    nn.init.normal_(layer.bias)
    return layer.requires_grad_(False)


def tokens(m: int, k: int = 128) -> torch.Tensor:
    g = torch.Generator().manual_seed(m)
    return torch.randn(m, k, generator=g) * torch.rand(m, 1, generator=g) * 10


# context parallelism: tokens are split


@pytest.mark.parametrize("name", ACTIVATION_FORMATS)
@pytest.mark.parametrize("cut", CUTS)
def test_a_token_is_quantized_independently_of_the_others(name, cut):
    ops, activations = torch.ops.dtq, ACTIVATION_FORMATS[name]
    scale, perm = torch.rand(128).bfloat16(), torch.randperm(128).int()
    static = torch.tensor([0.02]) if activations.static else None

    def quantized(x):
        if activations.integer:
            return ops.quantize_rows(x, scale, 32, static, activations.qmax)
        transform = scale, perm, 32, 2
        if activations.bits == 16:
            return (ops.transform_rows(x, *transform),)
        return (ops.round_rows(x, *transform, name, torch.float32),)

    x = tokens(cut[0])
    for whole, *halves in zip(
        quantized(x), quantized(x[: cut[1]]), quantized(x[cut[1] :]), strict=True
    ):
        assert torch.equal(torch.cat(halves), whole)


def layers_of(recipe: str) -> set[tuple[LayerSpec, int]]:
    """The specs that a recipe has for layers, and their widths."""
    result = set()
    for model in (tiny.dit(), tiny.flux()):
        plan = planned(LoadedModel("tiny", None, "transformer", model), Recipe.load(recipe)).plan
        result |= {(layer.spec, layer.shape[1]) for layer in plan.quantized()}
    return result


@pytest.mark.parametrize("recipe", yaml_names("recipes"))
def test_tokens_can_be_split_in_every_recipe(recipe):
    for spec, columns in layers_of(recipe):
        layer = filled(spec, k=columns)
        for m, cut in CUTS:
            x = tokens(m, columns)
            whole = layer(x)
            halves = torch.cat([layer(x[:cut]), layer(x[cut:])])
            if layer.kernel.name in INTEGER and not spec.rank:
                assert torch.equal(halves, whole)
            else:  # the summation order of a float product depends on the number of rows
                assert (halves - whole).norm() < 1e-6 * whole.norm()


# tensor parallelism: weights are split


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of two processes."""
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
def test_two_processes_compute_what_one_computes(results, name, kind):
    for rank in range(2):
        want, got, slices = results[rank][name, kind]
        assert slices >= 6
        if kind in ranks.EXACT:
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        else:
            assert error(got, want) < 1e-5
    assert all(
        torch.equal(a, b)
        for a, b in zip(results[0][name, kind][1], results[1][name, kind][1], strict=True)
    )


def test_slices_follow_the_step_policy(results):
    want, got, _ = results[0]["dit", "policy"]
    assert torch.equal(got[0], want[0])  # native
    assert error(got[1:], want[1:]) < 1e-5  # a16: float products


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_slices_are_read_from_the_file(results, name):
    whole = sum(p.nbytes for p in ranks.quantized(name, "w4a8").parameters())
    for rank in range(2):
        want, got, held = results[rank][name, "loaded"]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert held < whole


def small(**more) -> nn.Module:
    """A tiny PixArt, its attention 4 heads of 32 channels."""
    settings = {**ranks.KINDS["w8a8"], **more}
    return dtq.quantize(tiny.pixart(), "rtn-w4a8", progress=False, **settings)


def test_the_plan_has_the_rule_and_the_largest_number_of_processes():
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
    assert "split together" in single["single_transformer_blocks.0.attn.to_q"].why


@pytest.mark.parametrize(
    ("more", "world", "why"),
    [
        ({}, 3, "4 heads do not split into 3"),
        ({}, 4, "rotation block of 64 channels does not fit into a slice of 32"),
        ({"weights": "int4-g64", "transform": "none"}, 4, "needs input features divisible by 64"),
        (
            {"activations": "int4-g64", "transform": "none"},
            4,
            "needs input features divisible by 64",
        ),
        ({"exclude": ["attn.k"]}, 2, "to_k is not quantized"),
    ],
)
def test_the_plan_has_the_reason_for_replication(more, world, why):
    cut = tp_plan(small(**more), world)["transformer_blocks.0.attn1.to_out.0"]
    assert cut.rule == "replicate"
    assert why in cut.why
    assert cut.max_tp < world or "exclude" in more


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (LayerSpec("int8-row", "int8-row", permutation=True), "are permuted"),
        (LayerSpec("int8-row", "int8-row", 32, num_rotations=2), "second rotation"),
        (LayerSpec("trit-row", "int8-row"), "trit-row: weight does not split"),
    ],
)
def test_layers_that_mix_all_channels_have_no_row_rule(spec, why):
    with pytest.raises(InputError, match=why):
        slice_specs(filled(spec), ROW, 2)


@pytest.mark.parametrize("weights", FORMATS)
def test_column_slices_make_the_whole(weights):
    k = max(128, FORMATS[weights].group or 0)
    layer = filled(
        LayerSpec(weights, "int8-row", 64, True, rank=4), n=64 if "vq" in weights else 48, k=k
    )
    x = tokens(5, k)
    outputs = []
    for rank in range(2):
        piece = Slice(layer, "column", rank, 2, None)
        piece.fill(
            {name: piece.take(name, tensor) for name, tensor in layer.packed_tensors().items()}
        )
        piece.bias = nn.Parameter(piece.take("bias", layer.bias), requires_grad=False)
        outputs.append(piece(x))
    torch.testing.assert_close(torch.cat(outputs, -1), layer(x), rtol=1e-5, atol=1e-4)


def test_both_halves_of_a_gated_feed_forward_are_split():
    layer = filled(LayerSpec("int8-row", "int8-row"), n=64)
    piece = Slice(layer, "column", 1, 2, None, sections=2)
    rows = [*range(16, 32), *range(48, 64)]
    assert torch.equal(piece.take("weight", layer.packed_tensor("weight")), layer.weight[rows])
    assert torch.equal(piece.take("bias", layer.bias), layer.bias[rows])


def test_sharding_is_refused_with_a_reason():
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
