# SPDX-License-Identifier: Apache-2.0
"""Prompt sets: shipped, local in every format, and what is refused."""

from __future__ import annotations

import hashlib
import json
import re

import pytest
import tiny

from dtq.errors import InputError
from dtq.io.package_data import folder
from dtq.pipelines import prompts


class Prompted:
    def __call__(self, prompt=None, num_inference_steps=50):
        """A pipeline that takes prompts."""


def test_shipped_sets_have_what_their_names_say():
    assert (
        len(prompts.load("prompts-64", Prompted(), 64).entries)
        == len(set(prompts.load("prompts-64", Prompted(), 64).entries))
        == 64
    )
    assert len(set(prompts.load("imagenet-64", tiny.pipeline(), 64).entries)) == 64


def test_the_readme_has_the_hash_of_every_set():
    text = (folder("calibration") / "README.md").read_text()
    for path in folder("calibration").glob("*.txt"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert re.search(rf"{path.name}.*{digest}", text), f"{path.name}: {digest}"


def test_auto_is_data_free_for_labels_and_the_prompts_otherwise():
    labels = prompts.load("auto", tiny.pipeline(), 10)
    assert labels.argument == "class_labels"
    assert labels.entries == (0, 100, 200, 300, 400, 500, 600, 700, 800, 900)
    assert prompts.load("auto", Prompted(), 3).argument == "prompt"


@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl", ".csv", ".parquet"])
def test_local_files(suffix, tmp_path):
    lines = ["a red house", "two birds, one stone"]
    file = tmp_path / f"mine{suffix}"
    if suffix == ".txt":
        file.write_text("# a comment\n" + "\n".join(lines) + "\n\n")
    elif suffix == ".parquet":
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_dict({"prompt": lines}).to_parquet(str(file))
    elif suffix == ".csv":
        file.write_text("id,caption\n" + "\n".join(f'{i},"{p}"' for i, p in enumerate(lines)))
    elif suffix == ".jsonl":
        file.write_text("\n".join(json.dumps({"text": p}) for p in lines))
    else:
        file.write_text(json.dumps([{"prompt": p} for p in lines]))
    assert prompts.load(str(file), Prompted(), 3).entries == (lines[0], lines[1], lines[0])


def test_refusals(tmp_path):
    with pytest.raises(InputError, match="did you mean prompts-64"):
        prompts.load("prompts-65", Prompted(), 1)
    with pytest.raises(InputError, match="no such file"):
        prompts.load(str(tmp_path / "x.txt"), Prompted(), 1)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match="empty"):
        prompts.load(str(tmp_path / "empty.txt"), Prompted(), 1)
    (tmp_path / "bad.txt").write_text("cat\n")
    with pytest.raises(InputError, match="not a label"):
        prompts.load(str(tmp_path / "bad.txt"), tiny.pipeline(), 1)
    (tmp_path / "big.txt").write_text("1000\n")
    with pytest.raises(InputError, match="not in"):
        prompts.load(str(tmp_path / "big.txt"), tiny.pipeline(), 1)
    with pytest.raises(InputError, match="cannot call it"):
        prompts.load("auto", object(), 1)


def test_a_label_that_is_nearly_right_is_told_the_right_one():
    pipe = tiny.pipeline()
    pipe.labels = {"cat-face": 0, "face-smiling": 1, "face-sleepy": 2}
    assert prompts.given(["face-smiling", "2"], pipe).entries == (1, 2)
    with pytest.raises(InputError, match="did you mean face-smiling"):
        prompts.given(["face-smilng"], pipe)
    with pytest.raises(InputError, match=r"'zzz' is not a label of this model$"):
        prompts.given(["zzz"], pipe)
