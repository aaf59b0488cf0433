# SPDX-License-Identifier: Apache-2.0
"""Cases that break kernels, as checks of ``tests/gpu.py``: no tokens, streams, graphs, devices."""

from __future__ import annotations

from typing import Any
from unittest import mock

import agreement
import torch
import torch.nn.functional as F
from gpu_run import Check, Session, Skipped, need
from torch import nn

from dtq.bench.layers import quantized
from dtq.formats import FORMATS
from dtq.formats.activations import ACTIVATION_FORMATS
from dtq.kernels import LinearProblem, gpu_dispatch, pick

dtq = torch.ops.dtq
reference = torch.ops.dtq_reference


def _operands(s: Session, m: int, n: int, k: int) -> tuple[Any, ...]:
    codes, weight = agreement.int8(m, k, seed=1), agreement.int8(n, k, seed=2)
    rows, columns = agreement.normal(m).abs(), agreement.normal(n, 1).abs()
    return tuple(t.to(s.device) for t in (codes, rows, weight, columns))


def no_tokens(s: Session) -> None:
    """No tokens: an empty output, no launch."""
    codes, rows, weight, columns = _operands(s, 0, 64, 128)
    assert dtq.w8a8_linear(codes, rows, weight, columns, None, torch.bfloat16).shape == (0, 64)
    assert dtq.quantize_rows(codes.bfloat16(), None, 64, None)[0].shape == (0, 128)


def many_tokens(s: Session) -> None:
    """80 000 tokens and 28 672 outputs: more than 2^31 elements, and than 65 535 tiles."""
    m, n, k = s.size(80_000, 300), s.size(28_672, 64), s.size(1152, 128)
    codes, rows, weight, columns = _operands(s, m, n, k)
    y = dtq.w8a8_linear(codes, rows, weight, columns, None, torch.bfloat16)
    for part in (slice(0, 3), slice(m // 2, m // 2 + 3), slice(m - 3, m)):
        want = reference.w8a8_linear(
            codes[part].cpu(), rows[part].cpu(), weight.cpu(), columns.cpu(), None, y.dtype
        )
        assert torch.equal(y[part].cpu(), want), part


def long_rows(s: Session) -> None:
    """Rows of 18 432 channels: longer than the registers of a block."""
    x = agreement.normal(s.size(64, 3), 18_432).bfloat16()
    agreement.agree(
        dtq.quantize_rows, reference.quantize_rows, (x, None, 64, None, 127), s.device, "K 18432"
    )


def every_stream(s: Session) -> None:
    """Launches go to the current stream."""
    s.need_gpu()
    codes, rows, weight, columns = _operands(s, 512, 512, 512)
    want = dtq.w8a8_linear(codes, rows, weight, columns, None, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        slow = torch.randn(4096, 4096, device=s.device)
        for _ in range(20):
            slow = slow @ slow / 4096
        late = codes.clone()  # behind the slow work: another stream would read it too early
        got = dtq.w8a8_linear(late, rows, weight, columns, None, torch.bfloat16)
    stream.synchronize()
    assert torch.equal(got, want)


def captured(s: Session) -> None:
    """A captured graph replays with new inputs."""
    s.need_gpu()
    problem = LinearProblem(FORMATS["int4-2l-g64"], ACTIVATION_FORMATS["int8-row"], 64)
    w = agreement.normal(3072, 1024)
    packed = problem.weight_format.pack(w, problem.weight_format.compute_qparams(w))
    parts = {n: t.to(s.device) for n, t in packed.items()}
    x = agreement.normal(1024, 1024).bfloat16().to(s.device)
    kernel = pick(problem)
    kernel.call(problem, x, parts, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernel.call(problem, x, parts, None)
    fresh = agreement.normal(1024, 1024, seed=9).bfloat16().to(s.device)
    x.copy_(fresh)
    graph.replay()
    assert torch.equal(y, kernel.call(problem, fresh, parts, None))


def no_waiting(s: Session) -> None:
    """No op waits for the GPU."""
    s.need_gpu()
    codes, rows, weight, columns = _operands(s, 256, 256, 256)
    x = agreement.normal(256, 256).bfloat16().to(s.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        dtq.quantize_rows(x, None, 64, None)
        dtq.w8a8_linear(codes, rows, weight, columns, None, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def the_same_twice(s: Session) -> None:
    """The same bits in every run, also where K is split."""
    for m in (1, 16, 300):
        given = _operands(s, m, 256, s.size(12_288, 256))
        first = dtq.w8a8_linear(*given, None, torch.float32)
        for _ in range(5):
            assert torch.equal(dtq.w8a8_linear(*given, None, torch.float32), first), m


def a_token_alone(s: Session) -> None:
    """A token's output does not depend on its batch."""
    codes, rows, weight, columns = _operands(s, 300, 256, 1152)
    whole = dtq.w8a8_linear(codes, rows, weight, columns, None, torch.bfloat16)
    for i in (0, 150, 299):
        one = dtq.w8a8_linear(
            codes[i : i + 1], rows[i : i + 1], weight, columns, None, torch.bfloat16
        )
        assert torch.equal(one[0], whole[i]), i


def ends_of_the_range(s: Session) -> None:
    """Infinite and NaN scales, overflow of float16: as torch rounds."""
    codes, _, weight, columns = _operands(s, 3, 16, 64)
    for unit in (1e-12, 1e-4, 1e30, torch.inf, torch.nan):
        rows = torch.full((3,), unit, device=s.device)
        for dtype in agreement.DTYPES:
            got = dtq.w8a8_linear(codes, rows, weight, columns, None, dtype).cpu()
            want = reference.w8a8_linear(
                *(t.cpu() for t in (codes, rows, weight, columns)), None, dtype
            )
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def the_wrong_device(s: Session) -> None:
    """Operands of two devices are an error, not a crash."""
    s.need_gpu()
    codes, rows, weight, columns = _operands(s, 3, 16, 64)
    try:
        dtq.w8a8_linear(codes, rows.cpu(), weight, columns, None, torch.bfloat16)
    except RuntimeError as error:
        outcome = str(error)
    else:
        outcome = "accepted"
    assert "row_scale is not on the device" in outcome, outcome


def every_gpu(s: Session) -> None:
    """The second GPU is used when the operands are there."""
    if not s.cuda or torch.cuda.device_count() < 2:
        raise Skipped("fewer than two GPUs")
    given = [t.to("cuda:1") for t in _operands(s, 33, 64, 128)]
    got = dtq.w8a8_linear(*given, None, torch.bfloat16)
    assert torch.equal(
        got.cpu(), reference.w8a8_linear(*(t.cpu() for t in given), None, torch.bfloat16)
    )


def compiled(s: Session) -> None:
    """A compiled layer gives the bits of the eager one."""
    if s.small:
        raise Skipped("needs a GPU: inductor compiles for it")
    layer = quantized(nn.Linear(1152, 1152).to(s.device), "int4-2l-g64")
    x = agreement.normal(2048, 1152).bfloat16().to(s.device)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))


def fused(s: Session) -> str:
    """A compiled DiT is fused, and stays near the eager one."""
    need("diffusers")
    if s.small:
        raise Skipped("needs a GPU: inductor compiles for it")
    from dtq.bench import cases
    from dtq.integrations import torch_compile

    model, given, _ = cases.dit(s.device, quick=True)
    made, found = cases.quantized_model(model, "w4a8", cases.calibration_calls(given)), []

    def backend(module: Any, inputs: Any) -> Any:
        found.append(torch_compile.fuse(module))
        return torch_compile.backend(module, inputs)  # nothing is left to fuse

    with torch.no_grad():
        want = made(**given)[0].float()
        got = torch.compile(made, backend=backend)(**given)[0].float()
    assert sum(f.norms for f in found), found
    assert sum(f.gates for f in found), found
    error = float((got - want).norm() / want.norm())
    assert error < 0.05, error
    return f"{found[0]}, {error:.4f} from eager"


def all_formats(s: Session) -> None:
    """Every format, weight-only and with int8 activations, is near the float product.

    The product is so small that int8 activations are multiplied in float on most GPUs. So int8
    runs once more where it is taken at every size.
    """
    for fmt in FORMATS.values():
        w, x = agreement.normal(128, 256) * 0.1, agreement.normal(40, 256).bfloat16()
        parts = fmt.pack(w, fmt.compute_qparams(w))
        there = {n: t.to(s.device) for n, t in parts.items()}
        for activations, only in (("none", False), ("int8-row", False), ("int8-row", True)):
            problem = LinearProblem(fmt, ACTIVATION_FORMATS[activations])
            with mock.patch.object(gpu_dispatch, "INT8_ONLY", only):
                got = pick(problem).call(problem, x.to(s.device), there, None).float().cpu()
            want = F.linear(x.float(), fmt.unpack(parts))
            # bfloat16 outputs, and 7-bit codes: far below the error of a wrong layout
            assert (got - want).norm() <= 0.02 * want.norm(), f"{fmt.name} {activations} {only}"


ROBUST = (
    no_tokens, many_tokens, long_rows, every_stream, captured, no_waiting, the_same_twice,
    a_token_alone, ends_of_the_range, the_wrong_device, every_gpu, all_formats, compiled, fused,
)  # fmt: skip


def checks() -> list[Check]:
    """A check for each function above; the first line of its docstring is the name."""
    names = [(f.__doc__ or "").strip().splitlines()[0].rstrip(".") for f in ROBUST]
    return [Check("robustness", name, f, 120) for name, f in zip(names, ROBUST, strict=True)]
