# SPDX-License-Identifier: Apache-2.0
"""Second moments of gradients: of the Jacobian, of every model, and of samples apart."""

from __future__ import annotations

import math

import pytest
import text_encoders as texts
import tiny
import torch
import zoo
from builders import collected
from torch import nn

import dtq
from dtq.calibrate import gradients
from dtq.calibrate.gradients import ModelCall, OutputGradients, OutputPart, is_part, output_parts
from dtq.errors import InputError
from dtq.pipelines.loading import LoadedModel
from dtq.pipelines.tracing import dummy_inputs
from dtq.recipe import Recipe

# their attention has no gradient on a CPU
FLEX_ATTENTION = ("AnyFlowFARTransformer3DModel", "Kandinsky6SRTransformer3DModel")


class Squashed(nn.Module):
    """Two linears; the second moment of the Jacobian of the first is known."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def moments(model, x, draws, parts):
    """Second moment of each part, of ``draws`` projections."""
    totals = {part.name: 0.0 for part in parts}

    def observe(part, rows):
        totals[part.name] = totals[part.name] + rows.T @ rows / (draws * len(rows))

    collector = OutputGradients(model, parts, text=False)
    for seed in range(draws):
        call = ModelCall((x,), {}, model(x).detach(), len(x), len(x), None)
        collector.collect(call, seed, observe)
    return totals


def test_the_mean_is_the_second_moment_of_the_jacobian():
    model, x = Squashed(), torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    (part,) = output_parts("first", 5)
    got = moments(model, x, 4000, [part])[part.name]
    want = torch.zeros(5, 5)
    for row in x:
        hidden = model.first(row)
        jacobian = model.second.weight * (1 - torch.tanh(hidden).square())  # (4, 5)
        size = model(row).square().mean()  # outputs count relative to their size
        want += (jacobian.T @ jacobian / size).detach() / len(x)
    torch.testing.assert_close(got, want, rtol=0.08, atol=0.08 * float(want.diagonal().mean()))


def test_wide_outputs_are_observed_in_interleaved_parts(monkeypatch):
    monkeypatch.setattr(gradients, "WIDEST", 2)
    model, x = Squashed(), torch.randn(3, 6)
    parts = output_parts("first", 5)
    assert [part.columns for part in parts] == [2, 2, 1]
    assert all(is_part(part.name) for part in parts)
    assert not is_part("transformer_blocks.0.ff.net.0.proj")
    split = moments(model, x, 5, parts)
    whole = moments(model, x, 5, [OutputPart("first", 5, 0, 1)])["first:0"]
    for part in parts:
        torch.testing.assert_close(split[part.name], whole[part.index :: 3, part.index :: 3])


def test_the_model_is_left_as_it_was():
    model = tiny.dit()
    model.transformer_blocks[0].requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    recipe = Recipe.load("w4a8", solver="yaqa")
    inputs = [dummy_inputs(model, 4, 500.0, 0)]
    collected(LoadedModel("dit", None, "transformer", model), recipe, recipe.needs(), inputs=inputs)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def rows_of_parts(model, inputs):
    recipe = Recipe.load("w4a8", solver="yaqa")
    loaded = LoadedModel(type(model).__name__, None, "transformer", model)
    stats = collected(loaded, recipe, recipe.needs(), inputs=inputs).inputs
    parts = {name: x for name, x in stats.items() if is_part(name)}
    assert all(x.hessian.hessian().isfinite().all() for x in parts.values())
    return {name: int(x.hessian.count) for name, x in parts.items()}


@pytest.mark.parametrize("name", zoo.names())
def test_every_model_has_gradients(name, caplog):
    model = zoo.model(name)
    counts = rows_of_parts(model, [zoo.inputs(name)])
    if name in FLEX_ATTENTION:
        assert f"no gradients of {name}, solver yaqa becomes gptq" in caplog.text
        assert not any(counts.values())
    else:
        # the outputs of a text branch in the last block, and of idle experts, reach nothing
        assert sum(map(bool, counts.values())) > 0.6 * len(counts)


@pytest.mark.parametrize("name", ["BertModel", "CLIPTextModel", "T5EncoderModel", "Qwen3Model"])
def test_text_encoders_have_gradients_of_their_tokens(name):
    counts = rows_of_parts(texts.model(name), [texts.inputs(name)])
    assert all(counts.values())


@pytest.mark.parametrize("name", ["dit", "flux", "sd3", "wan", "pixart"])
def test_a_few_samples_have_the_gradients_that_they_have_in_their_batch(name, monkeypatch):
    model = getattr(tiny, name)()
    call = dummy_inputs(model, 6, 500.0, 0)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    layer = next(name for name in linears if ".attn" in name)

    def run(part_rows, rows_wanted):
        monkeypatch.setattr(gradients, "PART_ROWS", part_rows)
        monkeypatch.setattr(gradients, "ROWS", rows_wanted)
        batches = []
        module = model.get_submodule(layer)
        hook = module.register_forward_hook(lambda m, a, o: batches.append(a[0].numel()))
        collector = OutputGradients(model, output_parts(layer, module.out_features), text=False)
        with torch.no_grad():
            output = model(**call)
        whole = batches.pop()
        rows = whole // module.in_features
        collector.collect(ModelCall((), call, output, 6, rows, None), 4, lambda *_: None)
        hook.remove()
        return [b / whole for b in batches]

    model.eval()
    assert run(1, 10**9) == pytest.approx([1 / 6] * 6)
    assert run(1, 1) == pytest.approx([1 / 6])
    assert run(10**9, 1) == [1.0]


def test_gradients_that_overflow_are_left_out():
    model, x, rows = Squashed(), torch.randn(3, 6), []
    collector = OutputGradients(model, output_parts("first", 5), text=False)
    model.second.register_forward_pre_hook(
        lambda m, a: (a[0] * torch.tensor([[1.0], [torch.inf], [1.0]]).clamp(max=3e38) * 1e10,)
    )
    collector.collect(ModelCall((x,), {}, x, 3, 3, None), 0, lambda part, g: rows.append(g))
    assert all(g.isfinite().all() for g in rows)


def test_statistics_without_gradients_are_refused():
    model, inputs = tiny.dit(), [dummy_inputs(tiny.dit(), 4, 500.0, 0)]
    loaded, plain = LoadedModel("dit", None, "transformer", model), Recipe.load("w4a8")
    statistics = collected(loaded, plain, plain.needs(), inputs=inputs)
    with pytest.raises(InputError, match="the statistics lack gradients"):
        dtq.quantize(model, "w4a8", solver="yaqa", statistics=statistics, progress=False)


def test_samples_that_change_apart_run_with_their_batch(caplog):
    class Mixed(Squashed):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    model, x = Mixed(), torch.randn(4, 3, 6)
    sizes = []
    model.first.register_forward_hook(lambda m, a, o: sizes.append(len(a[0])))
    rows = []
    collector = OutputGradients(model, output_parts("first", 5), text=False)
    call = ModelCall((x,), {}, model(x).detach(), 4, 10**6, None)
    with caplog.at_level("INFO", "dtq"):
        collector.collect(call, 0, lambda part, g: rows.append(len(g)))
        collector.collect(call, 1, lambda part, g: rows.append(len(g)))
    assert sizes == [4, 1, 4, 4]  # the pipeline's call, one sample, and then whole batches
    assert rows == [12, 12]
    assert caplog.text.count("Mixed runs whole batches") == 1


def test_padding_does_not_count():
    model, x = Squashed(), torch.randn(2, 3, 6)
    kept = torch.tensor([True, True, False, True, False, False])
    collector, rows = OutputGradients(model, output_parts("first", 5), text=True), []
    call = ModelCall((x,), {}, model(x).detach(), 2, 6, kept)
    collector.collect(call, 0, lambda part, g: rows.append(g))
    assert len(rows) == gradients.TEXT_PROJECTIONS
    for gradient in rows:
        assert torch.equal(gradient.any(1), kept)
    assert call.rows_of(torch.tensor([0])) == 2
    assert math.isclose(call.rows_of(torch.tensor([0, 1])), 3)
