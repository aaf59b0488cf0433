# SPDX-License-Identifier: Apache-2.0
"""int8 attention: the reference against float64, the kernels against the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attention import Recorder, random_qkv, relative_error

from dtq.kernels import ops_attention
from dtq.pipelines.loading import load_transformers
from dtq.pipelines.recording import sample_calls
from dtq.pipelines.settings import SamplingSettings

compiled = torch.ops.dtq.int8_attention
reference = ops_attention.int8_attention

# (batch, heads, queries, keys, channels): whole and broken tiles of keys, blocks of queries, vectors
# of channels; self and cross attention
SIZES = [
    (2, 3, 64, 64, 64),
    (1, 2, 256, 256, 72),
    (1, 2, 33, 130, 128),
    (2, 1, 17, 5, 32),
    (1, 3, 300, 77, 40),
    (3, 2, 1, 65, 80),
    (1, 1, 5, 1, 96),
    (1, 1, 50, 200, 37),
]


def exact(q, k, v, mask=None, scale=None):
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    doubles = (x.double() for x in (q, k, v))
    return F.scaled_dot_product_attention(*doubles, attn_mask=mask, scale=scale, enable_gqa=True)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_reference_is_close_to_float_attention(size):
    scale = size[-1] ** -0.5
    for outliers in (False, True):
        qkv = random_qkv(*size, outliers=outliers)
        error = relative_error(reference(*qkv, None, scale), exact(*qkv))
        assert error < 3e-4, (outliers, error)
        # 8 bits are not more exact than this: the bound is one of int8, not of float
        assert size[-2] == 1 or error > 1e-7


def test_smoothing_is_what_makes_outliers_harmless():
    q, k, v = random_qkv(1, 4, 256, 256, 72, outliers=True)
    want, scale = exact(q, k, v), 72**-0.5
    smoothed = relative_error(reference(q, k, v, None, scale), want)
    codes = [ops_attention.codes(x, x.abs().amax(-1, keepdim=True)) for x in (q, k, v)]
    rounded = [c * s for c, s in codes]
    assert relative_error(F.scaled_dot_product_attention(*rounded), want) > 10 * smoothed


@pytest.mark.parametrize("name", ["demo", "demo-video"])
def test_the_error_on_the_bundled_models_is_small(name):
    (loaded,) = load_transformers(name)
    settings = SamplingSettings(samples=1, batch_size=1, steps=3)
    with Recorder() as recorder, torch.no_grad():
        sample_calls(loaded, settings, 1)
    assert recorder.calls
    for q, k, v, mask in recorder.calls:
        scale = q.shape[-1] ** -0.5
        error = relative_error(reference(q, k, v, mask, scale), exact(q, k, v, mask))
        assert error < 3e-4, (list(q.shape), list(k.shape), error)


MASKS = {
    "boolean": lambda b, h, n, m: torch.arange(b * h * n * m).reshape(b, h, n, m) % 3 > 0,
    "padding": lambda b, h, n, m: (torch.arange(m) < m - m // 4).expand(b, 1, 1, m),
    "causal": lambda b, h, n, m: torch.ones(n, m, dtype=torch.bool).tril(),
    "additive": lambda b, h, n, m: torch.arange(n * m).reshape(1, 1, n, m) % 7 - 3.0,
    "infinite": lambda b, h, n, m: torch.where(torch.arange(m) % 5 > 0, 0.0, -torch.inf).expand(
        1, m
    ),
    "finfo.min": lambda b, h, n, m: torch.where(
        torch.arange(m) % 5 > 0, 0.0, torch.finfo(torch.float32).min
    ).expand(1, m),
    "bfloat16": lambda b, h, n, m: (torch.arange(m) % 4 * -0.5).bfloat16().expand(b, 1, 1, m),
    "per query": lambda b, h, n, m: torch.linspace(-2, 2, n).reshape(1, 1, n, 1),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_masks_mean_what_they_mean_in_torch(mask):
    for size in ((2, 3, 40, 70, 40), (1, 2, 33, 129, 64)):
        q, k, v = random_qkv(*size)
        bias = mask(*size[:4])
        got = reference(q, k, v, bias, size[-1] ** -0.5)
        assert relative_error(got, exact(q, k, v, bias)) < 3e-4


def test_a_query_without_keys_gets_zeros_and_one_with_low_keys_their_mean():
    q, k, v = random_qkv(1, 2, 9, 70, 32)
    mask = torch.ones(9, 70, dtype=torch.bool)
    mask[4] = False
    out = reference(q, k, v, mask, 0.2)
    assert not out[:, :, 4].any()
    assert torch.equal(out[:, :, :4], reference(q, k, v, None, 0.2)[:, :, :4])
    low = torch.zeros(9, 70)
    low[4] = torch.finfo(torch.float32).min
    out = reference(q, k, v, low, 0.2)
    torch.testing.assert_close(out[:, :, 4], v.mean(2), atol=3e-3, rtol=0)


def test_a_constant_channel_and_a_row_of_zeros_are_exact():
    q, k, v = random_qkv(1, 1, 20, 80, 32)
    v[..., 7], v[..., 9] = 3.5, 0.0
    k[:, :, 11] = k.mean(2)  # zero after smoothing
    q[:, :, 2] = 0
    out = reference(q, k, v, None, 0.2)
    torch.testing.assert_close(out[..., 7], torch.full_like(out[..., 7], 3.5), rtol=1e-6, atol=0)
    assert not out[..., 9].any()
    torch.testing.assert_close(out[:, :, 2], v.mean(2), atol=3e-3, rtol=0)


def test_values_that_are_not_finite_are_not_hidden():
    for index in range(3):
        for bad in (torch.nan, torch.inf):
            qkv = random_qkv(1, 2, 20, 80, 32)
            qkv[index][0, 1, 3, 4] = bad
            got, want = reference(*qkv, None, 0.2), exact(*qkv, scale=0.2)
            assert got.isnan().any()
            assert not (want.isnan() & ~got.isnan()).any()
            assert got[0, 0].isfinite().all()  # the other head


def test_neighbouring_query_heads_share_keys():
    q, k, v = random_qkv(2, 6, 20, 80, 32)
    k, v = k[:, ::3], v[:, ::3]
    got = reference(q, k, v, None, 0.2)
    assert relative_error(got, exact(q, k, v, scale=0.2)) < 3e-4


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 4), (2, 3, 4), (2, 3, 4)), "are (batch, heads, tokens, channels)"),
        (((1, 2, 4, 8), (1, 2, 4, 9), (1, 2, 4, 9)), "do not fit"),
        (((1, 3, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)), "do not fit"),
        (((1, 2, 4, 8), (1, 2, 0, 8), (1, 2, 0, 8)), "do not fit"),
        (((1, 2, 4, 300), (1, 2, 4, 300), (1, 2, 4, 300)), "at most 256"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, message):
    with pytest.raises(ValueError, match="int8_attention") as error:
        reference(*map(torch.zeros, shapes), None, 1.0)
    assert message in str(error.value)
    with pytest.raises(ValueError, match="mask"):
        reference(*random_qkv(1, 2, 4, 8, 16), torch.zeros(1, 2, 4, 7), 1.0)


# ---------------------------------------------------------------------------------- compiled


def same(got, want):
    assert got.dtype == want.dtype
    assert got.stride() == want.stride()
    assert torch.equal(got, want) or (
        torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(), want.nan_to_num())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_path_gives_the_bits_of_the_reference(isa, dtype):
    for size in SIZES:
        for outliers in (False, True):
            qkv = [x.to(dtype) for x in random_qkv(*size, outliers=outliers)]
            scale = size[-1] ** -0.5
            same(compiled(*qkv, None, scale), reference(*qkv, None, scale))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_every_path_gives_the_bits_of_the_reference_with_masks(isa, mask):
    for size in ((2, 3, 40, 70, 40), (1, 2, 33, 129, 64)):
        qkv, bias = random_qkv(*size), mask(*size[:4])
        same(compiled(*qkv, bias, 0.2), reference(*qkv, bias, 0.2))


def test_every_path_has_the_bits_of_the_reference_at_the_edges(isa):
    q, k, v = random_qkv(2, 6, 40, 80, 48)
    same(
        compiled(q, k[:, ::3], v[:, ::3], None, 0.2), reference(q, k[:, ::3], v[:, ::3], None, 0.2)
    )
    same(compiled(q, k, v[..., :20], None, 0.2), reference(q, k, v[..., :20], None, 0.2))
    same(compiled(q.double(), k, v, None, 0.2), reference(q.double(), k, v, None, 0.2))
    mask = torch.ones(40, 80, dtype=torch.bool)
    mask[4] = False
    mask[5, 10:] = False
    same(compiled(q, k, v, mask, 0.2), reference(q, k, v, mask, 0.2))
    large = (q * 3e3, k * 3e3, v * 1e30)
    same(compiled(*large, None, 1.0), reference(*large, None, 1.0))
    zeros = (q * 0, k * 0, v * 0)
    same(compiled(*zeros, None, 1.0), reference(*zeros, None, 1.0))
    for index in range(3):
        for bad in (torch.nan, torch.inf, -torch.inf):
            broken = [x.clone() for x in (q, k, v)]
            broken[index][0, 1, 3, 4] = bad
            same(compiled(*broken, None, 0.2), reference(*broken, None, 0.2))


def test_any_layout_in_memory_gives_the_same(isa):
    q, k, v = random_qkv(2, 4, 40, 80, 48)
    want = compiled(q, k, v, None, 0.2)
    copies = [x.contiguous() for x in (q, k, v)]
    same(compiled(*copies, None, 0.2), want)
    by_channel = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    same(compiled(*by_channel, None, 0.2), want)
    joint = torch.cat([x[:, :, :40].transpose(1, 2) for x in (q, k, v)], -1)  # one linear
    parts = [x.transpose(1, 2) for x in joint.chunk(3, -1)]
    same(compiled(*parts, None, 0.2), compiled(q, k[:, :, :40], v[:, :, :40], None, 0.2))


def test_the_result_depends_neither_on_threads_nor_on_the_batch(library):
    q, k, v = random_qkv(3, 5, 100, 150, 72)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = compiled(q, k, v, None, 0.1)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(compiled(q, k, v, None, 0.1), want)
    finally:
        torch.set_num_threads(before)
    for b in range(3):
        one = compiled(q[b : b + 1], k[b : b + 1], v[b : b + 1], None, 0.1)
        assert torch.equal(one, want[b : b + 1])


def test_the_op_has_a_schema_and_a_fake_and_no_input_is_refused_less(library):
    q, k, v = random_qkv(1, 2, 20, 30, 16)
    torch.library.opcheck(torch.ops.dtq.int8_attention.default, (q, k, v, None, 0.25))
    torch.library.opcheck(torch.ops.dtq.int8_attention.default, (q, k, v, torch.zeros(20, 30), 0.2))
    with pytest.raises(RuntimeError, match="do not fit"):
        compiled(q, k[..., :8], v, None, 0.25)
    with pytest.raises(RuntimeError, match="at most 256"):
        compiled(*(torch.zeros(1, 1, 2, 300) for _ in range(3)), None, 0.25)
    with pytest.raises(RuntimeError, match="mask"):
        compiled(q, k, v, torch.zeros(1, 2, 20, 29), 0.25)
    assert compiled(q[:, :, :0], k, v, None, 0.25).shape == (1, 2, 0, 16)
