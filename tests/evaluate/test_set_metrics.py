# SPDX-License-Identifier: Apache-2.0
"""Metrics of whole image sets in the gate: jackknife, features in a file, verdicts."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from dtq.errors import InputError
from dtq.evaluate import feature_file, run_file
from dtq.evaluate.feature_file import FeatureFile
from dtq.evaluate.gate import baseline_file, render, set_metrics
from dtq.evaluate.gate.decision import Outcome, decide
from dtq.evaluate.gate.metrics import METRICS
from dtq.evaluate.gate.policy import Limit, Policy
from dtq.evaluate.gate.set_metrics import SET_METRICS, blocks_of, pseudo_values
from dtq.evaluate.metrics.distributions import DISTRIBUTIONS
from dtq.evaluate.metrics.fid import FeatureMoments, frechet
from dtq.evaluate.metrics.precision_recall import inception_score, precision_recall
from dtq.evaluate.run_file import JOB, Run, Sample
from dtq.io.checksum import file_digest

D = 12
POLICY = Policy(primary=(Limit("error", 1.05), Limit("fid", 0.2), Limit("kid", 0.05)))


def features(n=256, shift=0.0, seed=0, noise=0.05):
    """Float and candidate features of pairs: the candidate has other noise and another mean."""
    g = torch.Generator().manual_seed(seed)
    floats = torch.randn(n, D, generator=g)
    return floats, floats + noise * torch.randn(n, D, generator=g) + shift


def run_of(shift=0.0, n=256, seed=0, kinds=("pool",), metrics=("fid", "kid")):
    ids = [f"{i:04d}" for i in range(32)]
    g = torch.Generator().manual_seed(1)
    errors = dict(zip(ids, (0.01 + 0.001 * torch.rand(32, 4, generator=g)).tolist(), strict=True))
    conditions = dict.fromkeys((*JOB, "hardware", "torch"), "x") | {"samples": 32}
    prompts = [f"p{i % 99}" for i in range(n)]
    run = Run("c", "r", conditions, {"reference": "r"}, [Sample(x, x, 0) for x in ids],
              {"error": errors}, {"error": errors},
              image_sets=FeatureFile(prompts, 1, {"emoji": "e"}, dict.fromkeys(metrics, "emoji")))  # fmt: skip
    floats, own = features(n, shift, seed)
    again = floats + 1e-5 * torch.randn(floats.shape, generator=g)
    run.features = {f"{side}.emoji.{kind}": t.clone() for kind in kinds
                    for side, t in (("float", floats), ("candidate", own), ("rerun", again))}  # fmt: skip
    return run


def saved(run, folder):
    folder.mkdir(exist_ok=True)
    run.image_sets = feature_file.write(run.features, folder, run.image_sets)
    (folder / "eval.json").write_text(run_file.text(run.to_json()))
    return run_file.read(folder)


def test_every_distribution_metric_is_a_metric_of_the_gate():
    of_sets = {name for name, metric in METRICS.items() if metric.of_sets}
    assert set(SET_METRICS) == set(DISTRIBUTIONS) == of_sets


def test_images_of_a_prompt_are_in_one_block():
    prompts = [f"p{i % 99}" for i in range(256)]
    blocks = blocks_of(prompts)
    assert len(blocks) == 64
    assert sorted(i for block in blocks.values() for i in block.tolist()) == list(range(256))
    held = [{prompts[i] for i in block.tolist()} for block in blocks.values()]
    assert all(not a & b for k, a in enumerate(held) for b in held[:k])
    assert list(blocks_of(["a", "b", "a"])) == ["a", "b"]


@pytest.mark.parametrize("name", sorted(set(SET_METRICS) - {"precision", "recall"}))
def test_leaving_a_block_out_is_the_metric_of_the_others(name):
    floats, own = features(64, 0.3)
    row, blocks = SET_METRICS[name], list(blocks_of([str(i) for i in range(64)], 7).values())
    for block, value in zip(blocks, row.without(own, floats, blocks), strict=True):
        kept = torch.ones(64, dtype=torch.bool)
        kept[block] = False
        assert float(value) == pytest.approx(row.value(own[kept], floats[kept]), rel=1e-9)


@pytest.mark.parametrize("name", ["precision", "recall"])
def test_precision_and_recall_are_means_over_images(name):
    floats, own = features(64, 1.0)
    blocks = list(blocks_of([f"p{i % 5}{'x' * (i > 40)}" for i in range(64)], 8).values())
    assert len({len(block) for block in blocks}) > 1
    values = pseudo_values(SET_METRICS[name], own, floats, blocks)
    assert float(values.mean()) == pytest.approx(SET_METRICS[name].value(own, floats))
    assert 0 < float(values.mean()) < 1


def test_few_images_for_many_features_are_refused():
    g = torch.Generator().manual_seed(0)
    run = run_of()
    run.features = {name: torch.randn(256, 200, generator=g) for name in run.features}
    reasons = set_metrics.flaws(run, Limit("fid", 0.2, num_images=256))
    assert reasons == ["fid: 256 images are too few for 200 features, whose bias a jackknife removes "
                       "from 400 images on; raise num_images, or take kid"]  # fmt: skip
    assert set_metrics.flaws(run, Limit("kid", 0.2, num_images=256)) == []


def test_kid_leaves_the_pairs_of_one_seed_out():
    floats, own = (t.double() for t in features(20, 0.3))
    k = lambda a, b: (a @ b / D + 1) ** 3  # noqa: E731
    pairs = [
        k(own[i], own[j]) + k(floats[i], floats[j]) - k(own[i], floats[j]) - k(own[j], floats[i])
        for i in range(20) for j in range(20) if i != j
    ]  # fmt: skip
    want = float(torch.stack(pairs).mean())
    assert SET_METRICS["kid"].value(own, floats) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("name", ["fid", "kid", "cmmd"])
def test_pseudo_values_have_no_bias(name):
    # equal distributions up to a tiny noise: the true value is nearly 0, the plain FID is not
    values, plain = [], []
    for seed in range(20):
        floats, own = features(256, 0.0, seed)
        blocks = list(blocks_of([str(i) for i in range(256)]).values())
        values.append(float(pseudo_values(SET_METRICS[name], own, floats, blocks).mean()))
        plain.append(SET_METRICS[name].value(own, floats))
    true = {"fid": D * ((1 + 0.05**2) ** 0.5 - 1) ** 2}.get(name, 0.0)
    spread = torch.tensor(values).std() / 20**0.5
    assert abs(sum(values) / 20 - true) < 4 * float(spread) + 1e-4
    if name == "fid":
        assert sum(plain) / 20 > 20 * true


def test_set_metrics_are_those_of_dtq_eval():
    floats, own = features(64, 0.3)
    assert SET_METRICS["fid"].value(own, floats) == pytest.approx(frechet(own, floats))
    assert SET_METRICS["precision"].value(own, floats) == precision_recall(own, floats)[0]
    assert SET_METRICS["recall"].value(own, floats) == precision_recall(own, floats)[1]
    change = inception_score(own) - inception_score(floats)
    assert SET_METRICS["is"].value(own, floats) == pytest.approx(change)


def test_frechet_of_few_samples_needs_no_large_matrix():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(20, 64, generator=g), torch.randn(30, 64, generator=g) * 1.3
    want = FeatureMoments.of(a).distance(FeatureMoments.of(b))
    assert frechet(a, b) == pytest.approx(want, rel=1e-7)  # eigenvalues of 0


@pytest.mark.parametrize(
    ("shift", "outcome"),
    [(0.0, Outcome.PASS), (0.5, Outcome.REGRESSION)],
)
def test_a_shift_of_the_set_is_a_regression(shift, outcome):
    verdict = decide(run_of(shift), run_of(), POLICY)
    assert verdict.outcome is outcome, verdict.sentence
    rows = {row.name: row for row in verdict.rows}
    assert rows["error"].outcome is Outcome.PASS
    assert rows["fid"].mean == pytest.approx(D * shift**2, abs=0.15)
    assert len(rows["fid"].differences) == 64
    assert rows["fid"].noise < 1e-3
    json.loads(run_file.text(verdict.to_json()))


def test_too_few_images_are_inconclusive():
    policy = replace(POLICY, primary=(Limit("error", 1.05), Limit("fid", 0.2, num_images=512)))
    verdict = decide(run_of(), run_of(), policy)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "--num-images 512" in verdict.sentence
    json.loads(run_file.text(verdict.to_json()))
    assert "| fid | yes | – | unbounded .. unbounded |" in render.markdown(verdict)
    # a regression of another metric is one all the same
    worse = run_of()
    worse.values = worse.rerun = {
        "error": {k: [2 * x for x in v] for k, v in worse.values["error"].items()}
    }
    assert decide(worse, run_of(), policy).outcome is Outcome.REGRESSION


def test_the_advice_for_image_sets_is_more_images():
    near = replace(POLICY, primary=(Limit("error", 1.05), Limit("fid", 2.65)))
    verdict = decide(run_of(0.47), run_of(), near)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "raise num_images of fid in the policy, and --num-images of dtq eval" in verdict.sentence


def test_a_run_with_more_images_is_compared_on_those_that_both_have():
    policy = replace(POLICY, primary=(Limit("fid", 0.2),))
    run, short = run_of(0.1), run_of()
    short.features = {name: t[:128] for name, t in short.features.items()}
    short.image_sets = replace(short.image_sets, prompts=short.image_sets.prompts[:128])
    cut = run_of(0.1)
    cut.features = {name: t[:128] for name, t in cut.features.items()}
    cut.image_sets = replace(cut.image_sets, prompts=cut.image_sets.prompts[:128])
    (row,), (want,) = (decide(each, short, policy).rows for each in (run, cut))
    assert row.differences == want.differences
    assert len(row.differences) == 64


def without(name):
    return lambda run: run.features.pop(name)


INVALID = {
    "no sets": (lambda run: setattr(run, "image_sets", None), "fid was not measured"),
    "metric": (lambda run: run.image_sets.extractor_of.pop("kid"), "kid was not measured"),
    "features": (without("candidate.emoji.pool"), "candidate.emoji.pool: not in the file"),
    "rerun": (without("rerun.emoji.pool"), "rerun.emoji.pool: not in the file"),
    "rows": (
        lambda run: run.features.update({"float.emoji.pool": torch.zeros(3, D)}),
        "3 images, the run has 256",
    ),
    "dtype": (
        lambda run: run.features.update({"float.emoji.pool": torch.zeros(256, D).half()}),
        "float.emoji.pool: not float32 of two axes",
    ),
    "same": (
        lambda run: run.features["candidate.emoji.pool"].fill_(0.0),
        "candidate.emoji.pool: the features of all images are the same",
    ),
    "widths": (
        lambda run: run.features.update({"float.emoji.pool": torch.randn(256, D + 1)}),
        "different numbers of features",
    ),
    "short rerun": (
        lambda run: run.features.update({"rerun.emoji.pool": torch.randn(3, D)}),
        "rerun.emoji.pool: 3 images",
    ),
    "few prompts": (
        lambda run: run.image_sets.prompts.__setitem__(slice(None), ["a", "b"] * 128),
        "fid: the images have 2 prompts, and an interval needs 8",
    ),
    "nan": (lambda run: run.features["candidate.emoji.pool"].fill_(float("nan")), "not finite"),
    "seed": (
        lambda run: setattr(run, "image_sets", replace(run.image_sets, seed=2)),
        "image sets: seed 2 in the run, 1 in the baseline",
    ),
    "extractor": (
        lambda run: setattr(run, "image_sets", replace(run.image_sets, extractors={"emoji": "f"})),
        "fid: features of emoji (f) in the run, emoji (e) in the baseline",
    ),
    "prompts": (
        lambda run: run.image_sets.prompts.__setitem__(3, "other"),
        "image sets: image 3: 'other' in the run, 'p3' in the baseline",
    ),
}


@pytest.mark.parametrize("kind", INVALID)
def test_runs_without_usable_features_are_invalid(kind):
    change, words = INVALID[kind]
    run = run_of()
    change(run)
    verdict = decide(run, run_of(), POLICY)
    assert verdict.outcome is Outcome.INVALID
    assert any(words in reason for reason in verdict.reasons), verdict.reasons
    plain = decide(run, run_of(), replace(POLICY, primary=(Limit("error", 1.05),)))
    assert plain.outcome is Outcome.PASS  # a policy without set metrics does not look at them


def test_the_policy_may_ask_for_an_extractor():
    policy = replace(POLICY, primary=(Limit("fid", 0.2, features="inception"),))
    (*_, reason) = decide(run_of(), run_of(), policy).reasons
    assert "the policy asks for features of inception, not emoji" in reason


def test_features_are_read_from_the_file_that_the_run_wrote(tmp_path):
    run = saved(run_of(0.5), tmp_path / "run")
    base = saved(run_of(), tmp_path / "base")
    assert decide(run, base, POLICY).outcome is Outcome.REGRESSION
    file = tmp_path / "run" / feature_file.FILE
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    damaged = decide(run_file.read(tmp_path / "run"), base, POLICY)
    assert damaged.outcome is Outcome.INVALID
    assert "SHA-256" in str(damaged.reasons)
    file.write_bytes(b"not safetensors")
    info = run_file.read(tmp_path / "run")
    info.image_sets = replace(info.image_sets, sha256=file_digest(file))
    assert "not safetensors" in str(decide(info, base, POLICY).reasons)
    file.unlink()
    assert "missing" in str(decide(run_file.read(tmp_path / "run"), base, POLICY).reasons)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", ".x.safetensors", "x"]
)
def test_the_file_of_features_has_a_plain_name(name, tmp_path):
    saved(run_of(), tmp_path)
    data = json.loads((tmp_path / "eval.json").read_text())
    data["image_sets"]["file"] = name
    (tmp_path / "eval.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="a plain name"):
        run_file.read(tmp_path)


def test_a_baseline_takes_the_features_that_its_policy_needs(tmp_path):
    run = saved(run_of(kinds=("pool", "spatial", "logits")), tmp_path / "run")
    policy = replace(POLICY, looks=(32,))
    (tmp_path / "my base.safetensors").write_bytes(b"weights of a model")
    baseline_file.accept(run, tmp_path / "my base.json", "first", policy)
    kept = run_file.read(tmp_path / "my base.json")
    assert sorted(kept.features) == [f"{s}.emoji.pool" for s in ("candidate", "float", "rerun")]
    assert decide(run, kept, policy).outcome is Outcome.PASS
    other = saved(run_of(seed=3), tmp_path / "other")
    baseline_file.accept(other, tmp_path / "my base.json", "again", policy)
    (file,) = tmp_path.glob("*.features.safetensors")
    assert file.name == run_file.read(tmp_path / "my base.json").image_sets.file
    assert (tmp_path / "my base.safetensors").read_bytes() == b"weights of a model"
    # the same features with other prompts: the same file
    other.image_sets = replace(other.image_sets, seed=other.image_sets.seed + 1)
    baseline_file.accept(other, tmp_path / "my base.json", "once more", policy)
    assert run_file.read(tmp_path / "my base.json").features
    # a copy of the baseline does not own the features; nor does one whose name starts alike
    for name in ("copy.json", "my.json"):
        shutil.copy(tmp_path / "my base.json", tmp_path / name)
        baseline_file.accept(run, tmp_path / name, "another", policy)
        assert run_file.read(tmp_path / "my base.json").features
    plain = replace(policy, primary=(Limit("error", 1.05),))
    baseline_file.accept(run, tmp_path / "plain.json", "first", plain)
    assert not list(tmp_path.glob("plain*.safetensors"))


BAD = {
    "parts": (Limit("fid", 1.0, parts=4), "fid has no value per step"),
    "margin": (Limit("fid", 0.0), "must be above 0"),
    "few": (Limit("fid", 1.0, num_images=8), "at least 64, is 8"),
    "other": (Limit("psnr", 1.0, num_images=128), "are keys of set metrics"),
}


@pytest.mark.parametrize("kind", BAD)
def test_mistakes_of_a_policy_are_found(kind):
    limit, words = BAD[kind]
    assert words in str(Policy(primary=(limit,)).problems())


def test_noise_is_measured_on_the_images_of_the_second_run():
    run = run_of()
    run.features["rerun.emoji.pool"] = run.features["rerun.emoji.pool"][:64] + 0.3
    assert set_metrics.noise_of(run, Limit("fid", 0.2)) == pytest.approx(D * 0.09, rel=0.2)
    noisy = decide(run, run_of(), POLICY)
    assert noisy.outcome is Outcome.INCONCLUSIVE
