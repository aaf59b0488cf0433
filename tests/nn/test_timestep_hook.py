# SPDX-License-Identifier: Apache-2.0
"""The step clock follows the noise of the tokens that are denoised, sample by sample."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import zoo
from conftest import hasty
from torch.utils._python_dispatch import TorchDispatchMode

import dtq
from dtq.errors import InputError
from dtq.formats import FORMATS
from dtq.models.timestep import sample_timesteps
from dtq.nn.linear import QuantLinear
from dtq.nn.slice import COLUMN, ROW, Slice
from dtq.nn.step_clock import StepClock
from dtq.nn.timestep_hook import install_clock, remove_clock
from dtq.plan.layers import LayerSpec
from dtq.plan.step_policy import StepPolicy

EDGES = (250.0, 500.0, 750.0)


@pytest.mark.parametrize(
    ("timestep", "want"),
    [
        (torch.tensor(7), [7]),
        (torch.tensor([7.0]), [7]),
        (torch.tensor([7, 3]), [7, 3]),
        (torch.tensor([[0.0, 0.0, 9.0], [4.0, 0.0, 0.0]]), [9, 4]),
        (torch.tensor([0.0, 8.0, 0.0]).reshape(1, 1, 3, 1, 1), [8]),
    ],
)
def test_a_sample_has_the_timestep_of_its_noisiest_tokens(timestep, want):
    assert sample_timesteps(timestep).tolist() == want


def batch_of(name: str, size: int) -> dict:
    """Arguments of one forward with the same sample ``size`` times, each with noise of its own."""
    call = zoo.inputs(name)
    was = call["hidden_states"].shape[0]

    def resized(value):
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == was:
            return value[:1].expand(size, *value.shape[1:]).clone()
        return value

    call = {key: value if key.endswith("_ids") else resized(value) for key, value in call.items()}
    g = torch.Generator().manual_seed(0)
    call["hidden_states"] = torch.randn(call["hidden_states"].shape, generator=g)
    return call


def one(call: dict, i: int) -> dict:
    size = len(call["hidden_states"])
    return {
        k: v[i : i + 1] if isinstance(v, torch.Tensor) and v.ndim and len(v) == size and not k.endswith("_ids") else v
        for k, v in call.items()
    }  # fmt: skip


@pytest.mark.parametrize("name", zoo.FIVE)
@pytest.mark.parametrize("kind", ["policy", "scales"])
def test_samples_of_different_timesteps_run_as_they_do_alone(name, kind):
    model, call = zoo.model(name), batch_of(name, 3)
    top = 1.0 if name.startswith("Flux") else 1000.0
    acts = "int8-static-timestep" if kind == "scales" else "int8-row"
    calls = [call | {"timestep": torch.full((3,), top * t).long() if "DiT" in name or "PixArt" in name
                     else torch.full((3,), top * t)} for t in (0.9, 0.6, 0.4, 0.1)]  # fmt: skip
    options = {"calibration": {"num_timestep_bins": 4}, "activations": acts}
    dtq.quantize(model, hasty("w8a8", **options), inputs=calls, progress=False)
    if kind == "policy":
        edges = tuple(top * e / 1000 for e in EDGES[1:2])
        install_clock(model, (), StepPolicy(edges, ("a4", "a16")))
    mixed = call | {
        "timestep": torch.tensor([0.9 * top, 0.1 * top, 0.6 * top]).to(calls[0]["timestep"])
    }
    with torch.no_grad():
        together = model(**mixed, return_dict=False)[0]
        alone = [model(**one(mixed, i), return_dict=False)[0] for i in range(3)]
        again = model(**mixed, return_dict=False)[0]
    # a float layer may round differently in a batch, and an input then to its neighbor
    same = float((together - torch.cat(alone)).norm() / together.norm())
    assert same < 1e-4
    assert torch.equal(together, again)
    like = mixed | {"timestep": mixed["timestep"][:1].expand(3)}
    with torch.no_grad():
        other = model(**like, return_dict=False)[0][1]
    assert float((other - together[1]).norm() / together[1].norm()) > 3 * same


def test_a_clean_first_frame_changes_neither_policy_nor_search():
    name = "WanTransformer3DModel"
    model, call = zoo.model(name), zoo.inputs(name)
    latents = call["hidden_states"]
    patch = model.config.patch_size
    tokens = [n // p for n, p in zip(latents.shape[2:], patch, strict=True)]

    def at(t: float) -> dict:
        per_token = torch.full((len(latents), tokens[0], tokens[1] * tokens[2]), t)
        per_token[:, 0] = 0
        return call | {"timestep": per_token.flatten(1)}

    dtq.quantize(
        model, hasty("w8a8", step_policy={"precisions": ["native", "a16"], "num_bins": 4}),
        inputs=[at(t) for t in (900.0, 600.0, 400.0, 100.0)], progress=False,
    )  # fmt: skip
    policy = model.hf_quantizer.report.step_policy
    assert policy["num_inference_steps"] == 4
    install_clock(model, (), StepPolicy((500.0,), ("a4", "a16")))
    with torch.no_grad():
        noisy = model(**at(950.0), return_dict=False)[0]
        install_clock(model, (), StepPolicy((), ("a16",)))
        assert torch.equal(noisy, model(**at(950.0), return_dict=False)[0])


def a_layer() -> QuantLinear:
    """A layer with one activation scale for each of four timestep bins."""
    w = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    fmt, spec = FORMATS["int8-row"], LayerSpec("int8-row", "int8-static-timestep")
    layer = QuantLinear(64, 48, False, spec, bins=4)
    scales = {"input_scale": torch.tensor([[0.01, 0.02, 0.04, 0.08]])}
    layer.fill(fmt.pack(w, fmt.compute_qparams(w)) | scales)
    return layer


def sliced(layer: QuantLinear, rule: str) -> Slice:
    """All of a layer as the slice of the only process of a group."""
    part = Slice(layer, rule, 0, 1, None)
    part.fill({n: part.take(n, t) for n, t in layer.packed_tensors().items()})
    part._all_reduce = lambda tensor, op: tensor
    return part


@pytest.mark.parametrize("rule", ["", COLUMN, ROW])
def test_a_layer_and_its_slices_split_the_samples(rule):
    layer, clock = a_layer(), StepClock(EDGES)
    layer.set_clock(clock, "a.layer")
    part = sliced(layer, rule) if rule else layer
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))
    times = torch.tensor([900.0, 100.0, 600.0])
    alone = []
    for i in range(3):
        clock.set(times[i : i + 1])
        alone.append(layer(x[i : i + 1]))
    clock.set(times)
    for shaped in (x, x.flatten(0, 1).unflatten(0, (15, 1)), x.unflatten(1, (5, 1))):
        assert torch.equal(part(shaped).flatten(), torch.cat(alone).flatten())
    assert clock.bin.item() == 3
    # 15 tokens without the axis of the samples may be in any order
    for flat in (x.flatten(0, 1), x.reshape(1, 15, 64)):
        with pytest.raises(InputError, match=r"a\.layer has an input of shape .*15.* 3 samples"):
            part(flat)


def test_experts_refuse_samples_of_different_timesteps():
    name = "HiDreamImageTransformer2DModel"
    model, call = zoo.model(name), batch_of(name, 2)
    dtq.quantize(model, hasty("w8a8"), inputs=[call], progress=False)
    install_clock(model, (), StepPolicy((500.0,), ("a4", "a16")))
    mixed = torch.tensor([900, 100]).to(call["timesteps"])
    with pytest.raises(InputError, match=r"experts\.\d+\.w\d has an input of shape"):
        model(**call | {"timesteps": mixed})
    clock = model._dtq_clock
    assert clock.samples is None
    with torch.no_grad():
        model(**call)
    # as many tokens as samples are no samples, unlike the rows that modulation reads
    clock.set(mixed)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    expert = next(m for n, m in layers.items() if n.endswith("experts.0.w1"))
    modulation = next(m for n, m in layers.items() if "adaLN" in n)
    with pytest.raises(InputError, match=r"experts\.0\.w1 has an input of shape \[2, "):
        expert(torch.randn(2, expert.in_features))
    assert modulation(torch.randn(2, modulation.in_features)).isfinite().all()


def test_samples_are_forgotten_after_a_call():
    model, call = zoo.model("DiTTransformer2DModel"), batch_of("DiTTransformer2DModel", 2)
    clock, seen = install_clock(model, EDGES), []
    model.transformer_blocks[0].register_forward_hook(lambda *_: seen.append(clock.samples))
    mixed = call | {"timestep": torch.tensor([900, 100])}
    model(**mixed)
    assert seen[0][0].tolist() == [3, 0]
    assert clock.samples is None
    with pytest.raises(TypeError):
        model(**mixed, unknown=1)
    assert clock.samples is None
    remove_clock(model)
    assert not any(
        hooks for name, hooks in vars(model).items() if name.startswith("_forward") and hooks
    )


def test_the_timestep_is_required_as_a_tensor():
    model, call = zoo.model("DiTTransformer2DModel"), batch_of("DiTTransformer2DModel", 2)
    install_clock(model, EDGES)
    with pytest.raises(InputError, match="need the timestep as a tensor"):
        model(**call | {"timestep": 900})


class Ops(TorchDispatchMode):
    """Counts the ops that run, by name."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count[op.overloadpacket.__name__] += 1
        return op(*args, **(kwargs or {}))


def test_only_different_timesteps_are_compared_and_each_is_looked_up_once():
    layer, clock = a_layer(), StepClock(EDGES)
    layer.set_clock(clock)
    for timestep in (torch.tensor(600.0).expand(3), torch.tensor([600.0]), torch.tensor(600.0)):
        with Ops() as ops:
            clock.set(timestep)
        assert not ops.count["_local_scalar_dense"]  # waits for a GPU
    with Ops() as ops:
        clock.set(torch.tensor([900.0, 100.0, 600.0]))
        for _ in range(3):
            layer(torch.randn(3, 5, 64))
    assert ops.count["bucketize"] == ops.count["_local_scalar_dense"] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_clock_is_set_while_a_graph_is_captured():
    clock = StepClock(EDGES).cuda()
    timestep = torch.tensor([600.0, 600.0], device="cuda")
    clock.set(timestep)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        clock.set(timestep)
    timestep.fill_(100.0)
    graph.replay()
    assert clock.bin.tolist() == [0]


def test_a_compiled_graph_refuses_samples_of_different_timesteps():
    clock = StepClock(EDGES)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def bins(timestep):
        clock.set(timestep)
        return clock.bin + 0

    assert bins(torch.tensor([600.0, 600.0])).tolist() == [2]
    with pytest.raises(RuntimeError, match="samples of one timestep"):
        bins(torch.tensor([600.0, 100.0]))


def test_an_exported_graph_refuses_samples_of_different_timesteps():
    name = "FluxTransformer2DModel"
    model, call = zoo.model(name), batch_of(name, 2)
    dtq.quantize(model, hasty("w8a8"), inputs=[call], progress=False)
    install_clock(model, (), StepPolicy((0.5,), ("a4", "a16")))
    with torch.no_grad():
        program = torch.export.export(model, (), call).module()
        program(**call)
        with pytest.raises(RuntimeError, match="samples of one timestep"):
            program(**call | {"timestep": torch.tensor([0.9, 0.1])})


def test_compiled_blocks_take_samples_of_different_timesteps():
    model, call = zoo.model("FluxTransformer2DModel"), batch_of("FluxTransformer2DModel", 2)
    dtq.quantize(model, hasty("w8a8"), inputs=[call], progress=False)
    install_clock(model, (), StepPolicy((0.5,), ("a4", "a16")))
    torch._dynamo.reset()
    outputs = []
    for compiled in (False, True):
        if compiled:
            model.compile_repeated_blocks(fullgraph=True, backend="eager")
        with torch.no_grad():
            for times in ([0.9, 0.1], [0.9, 0.9]):
                outputs.append(model(**call | {"timestep": torch.tensor(times)})[0])
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])
