# SPDX-License-Identifier: Apache-2.0
"""Patches of other libraries: applied in every order of imports, and listed with what they need."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dtq import integrations

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent.parent

PATCHED = {
    "torch_ops.declare": (
        "import torch",
        "torch.ops.dtq.quantize_rows",
    ),
    "torch_compile.register": (
        "import torch",
        "torch.compile(torch.nn.Linear(2, 2), backend='dtq')",
    ),
    "diffusers.register": (
        "from diffusers import DiffusionPipeline",
        "from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING, "
        "AUTO_QUANTIZATION_CONFIG_MAPPING as CONFIGS\n"
        "assert AUTO_QUANTIZER_MAPPING['dtq'].__name__ == 'DTQQuantizer'\n"
        "assert CONFIGS['dtq'] is dtq.DTQConfig",
    ),
    "transformers.register": (
        "from transformers import BertModel",
        "import diffusers\n"
        "diffusers.PipelineQuantizationConfig(quant_backend='dtq', quant_kwargs={'recipe': 'w4a16'})",
    ),
    "model_config.drop_config_of_quantized": (
        "from diffusers import FluxTransformer2DModel",
        "assert FluxTransformer2DModel.from_config.__func__.dtq",
    ),
    "casts.register": (
        "from diffusers import ModelMixin",
        "assert ModelMixin.to.dtq and ModelMixin.half.dtq and ModelMixin.float.dtq",
    ),
    "casts.register_in_transformers": (
        "from transformers import PreTrainedModel",
        "assert all(getattr(PreTrainedModel, n).dtq for n in ('to', 'half', 'float'))",
    ),
    "float_weights.refuse_quantized_control_nets": (
        "from diffusers import FluxControlNetModel",
        "assert FluxControlNetModel.from_transformer.__func__.dtq",
    ),
    "float_weights.report_flux_shapes": (
        "import diffusers.loaders.lora_pipeline as lora",
        "assert lora._maybe_dequantize_weight_for_expanded_lora.dtq",
    ),
    "peft.register": (
        "import peft",
        "from peft.tuners.lora.model import LoraModel\nassert LoraModel._create_new_module.dtq",
    ),
}
"""Patch: an import that brings it, and code that shows that it is applied."""


def run(script: str, *arguments: str) -> str:
    """What a fresh interpreter prints."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{HERE}"}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_patch_is_applied_when_its_library_is_imported_after_dtq():
    """Each import brings its patch, torch not its slow compiler, and the last one ends the hook."""
    slow = (
        "import dtq, torch, sys\ntorch.ops.dtq.quantize_rows\nfrom dtq.kernels import CPU\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    checks = (f"{library}\n{check}" for library, check in PATCHED.values())
    end = (
        "import sys\nassert not dtq.integrations._hook.pending\n"
        "assert dtq.integrations._hook not in sys.meta_path"
    )
    run("\n".join([slow, *checks, end]))


def test_every_patch_is_applied_when_the_libraries_are_imported_before_dtq():
    libraries, checks = zip(*PATCHED.values(), strict=True)
    run("\n".join([*libraries, "import dtq", *checks]))


REGISTERED = """
from diffusers.quantizers import auto
assert auto.AUTO_QUANTIZER_MAPPING['dtq'].__name__ == 'DTQQuantizer'
"""
LOAD = """
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
assert sum(type(m).__name__ == 'QuantLinear' for m in pipe.transformer.modules()) == 14
"""
ORDERS = {
    # modules of dtq that import diffusers themselves, while the hook waits for it
    "dtq.nn.gelu": "import dtq.nn.gelu" + REGISTERED,
    "dtq.parallel": "import dtq.parallel" + REGISTERED,
    "dtq.checkpoint.config": "import dtq.checkpoint.config" + REGISTERED,
    "dtq.integrations.peft": "import dtq.integrations.peft" + REGISTERED,
    # a plain from_pretrained loads a dtq folder
    "dtq, diffusers": "import dtq; from diffusers import DiffusionPipeline" + LOAD,
    "diffusers, dtq": "from diffusers import DiffusionPipeline; import dtq" + LOAD,
    # without a library nothing is applied and nothing breaks
    "no peft": (
        "sys.modules['peft'] = None  # importing it fails from here on\n"
        "import dtq, diffusers\nfrom diffusers import FluxTransformer2DModel, FluxControlNetModel\n"
        "assert [p.module for p in dtq.integrations._hook.pending] == ['peft']\n"
        "import tiny; dtq.quantize(tiny.flux(), 'w4a16', progress=False)\n"
        "assert 'dtq.integrations.peft' not in sys.modules\n"
    ),
}


@pytest.fixture(scope="module")
def tracebacks(quantized_folder) -> dict[str, str]:
    """Each order in a process of its own, all forked after torch, whose import takes longest."""
    printed = run(
        "import gc, json, os, sys, traceback, torch, torch._dynamo\n"
        "assert 'diffusers' not in sys.modules and 'dtq' not in sys.modules\n"
        "gc.freeze()  # else the children look through all of it, and copy it\n"
        "for name, script in json.loads(sys.argv[2]).items():\n"
        "    read, write = os.pipe()\n"
        "    if not os.fork():\n"
        "        try:\n"
        "            exec(script)\n"
        "        except BaseException:\n"
        "            os.write(write, traceback.format_exc().encode())\n"
        "        os._exit(0)\n"
        "    os.close(write)\n"
        "    with open(read) as file:\n"
        "        print(json.dumps([name, file.read()]))\n"
        "    os.wait()",
        str(quantized_folder),
        json.dumps(ORDERS),
    )
    return dict(map(json.loads, printed.splitlines()))


@pytest.mark.parametrize("order", ORDERS)
def test_every_import_order_of_modules_ends_with_the_same_patches(order, tracebacks):
    assert tracebacks[order] == ""


def test_a_patch_that_fails_says_so_and_is_tried_again():
    run(
        "from dtq import integrations\n"
        "bad = integrations.Patch('colorsys', 'nothing.here', '', '')\n"
        "hook = integrations._ImportHook([bad])\n"
        "import sys; sys.meta_path.insert(0, hook)\n"
        "for _ in range(2):\n"
        "    try: import colorsys; raise SystemExit('no error')\n"
        "    except ModuleNotFoundError as error: assert 'nothing' in str(error)\n"
        "assert hook.pending == [bad]\n"
    )


def test_the_table_names_pinned_versions_and_tests_that_exist():
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    tests = "\n".join(path.read_text() for path in HERE.rglob("test_*.py"))
    for patch in integrations.PATCHES:
        library, version = patch.upstream.split()
        assert pinned[library] == version, patch
        assert re.search(rf"^def {patch.test}\(", tests, re.MULTILINE), patch
    assert {patch.function for patch in integrations.PATCHES} == set(PATCHED)
