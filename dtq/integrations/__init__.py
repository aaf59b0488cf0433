# SPDX-License-Identifier: Apache-2.0
"""Everything that dtq changes in other libraries: one table of patches, and when they are applied.

``import dtq`` imports none of these libraries. A patch is applied at once if its module is imported
already, else by an import hook.
"""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple


class Patch(NamedTuple):
    """A change in another library.

    Attributes:
        module: the patch is applied after this module has been imported.
        function: of a module of this folder; applies the patch.
        upstream: library and version that the patch is tested with.
        test: name of a test that fails when the library changes what the patch relies on.
    """

    module: str
    function: str
    upstream: str
    test: str

    def apply(self) -> None:
        """Import the function and call it."""
        home, _, name = self.function.rpartition(".")
        getattr(importlib.import_module(f"{__name__}.{home}"), name)()


# fmt: off
PATCHES = (
    Patch("torch", "torch_ops.declare", "torch 2.13.0",
          "test_a_patch_is_applied_when_its_library_is_imported_after_dtq"),
    # an import of torch does not bring this one, which takes longer
    Patch("torch._dynamo.backends.registry", "torch_compile.register", "torch 2.13.0",
          "test_the_backend_is_inductor_with_the_compiled_ops_of_the_device"),
    Patch("diffusers.quantizers.auto", "diffusers.register", "diffusers 0.42.1",
          "test_every_way_to_load"),
    Patch("transformers.quantizers.auto", "transformers.register", "transformers 5.23.0",
          "test_a_text_encoder_round_trip"),
    Patch("diffusers.models.modeling_utils", "model_config.drop_config_of_quantized",
          "diffusers 0.42.1", "test_a_model_made_of_the_config_of_a_quantized_one_is_float"),
    Patch("diffusers.models.modeling_utils", "casts.register", "diffusers 0.42.1",
          "test_casts_apply_to_what_is_not_quantized"),
    Patch("transformers.modeling_utils", "casts.register_in_transformers", "transformers 5.23.0",
          "test_a_text_encoder_can_be_cast"),
    Patch("diffusers.models.controlnets", "float_weights.refuse_quantized_control_nets",
          "diffusers 0.42.1", "test_control_nets_are_not_made_of_codes"),
    Patch("diffusers.loaders.lora_pipeline", "float_weights.report_flux_shapes", "diffusers 0.42.1",
          "test_control_adapters_widen_kept_layers_only"),
    Patch("peft", "peft.register", "peft 0.21.2",
          "test_adapters_that_need_the_float_weight_are_refused"),
)
# fmt: on

quantize_while_loading: Callable[..., Any] | None = None
"""Called by the quantizers of diffusers and transformers with model and config. It is set from
outside because it runs every stage, and the stages import this package."""


def install(while_loading: Callable[..., Any]) -> None:
    """Apply every patch whose module is imported, and the others once theirs is.

    Args:
        while_loading: the value of :data:`quantize_while_loading`.
    """
    global quantize_while_loading
    quantize_while_loading = while_loading
    if _hook.pending and _hook not in sys.meta_path:
        sys.meta_path.insert(0, _hook)
    _hook.apply()


class _ImportHook(MetaPathFinder):
    """Applies patches when the outermost import of a patched library, or of dtq, ends.

    Patches import from both, and modules that are still being imported lack names.
    """

    def __init__(self, patches: Sequence[Patch]) -> None:
        self.pending = list(patches)
        self._packages = {"dtq", *(patch.module.partition(".")[0] for patch in patches)}
        self._lock = threading.Lock()
        self._thread = threading.local()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, with a loader that tells when it has finished."""
        if name.partition(".")[0] not in self._packages or getattr(self._thread, "finding", False):
            return None
        self._thread.finding = True  # another hook may ask every finder too
        try:
            others = [finder for finder in sys.meta_path if finder is not self]
            specs = (finder.find_spec(name, path, target) for finder in others)
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            self._thread.finding = False
        loader: Any = spec and spec.loader
        # built-in modules have a class as their loader; it is not theirs alone
        if loader is not None and not isinstance(loader, type):
            loader.exec_module = functools.partial(self._execute, loader.exec_module)
        return spec

    def _execute(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        depth = getattr(self._thread, "depth", 0)
        self._thread.depth = depth + 1
        try:
            execute(module)
        finally:
            self._thread.depth = depth
        if depth == 0:
            self.apply()

    def apply(self) -> None:
        """Apply the patches whose module is imported; leave when none is left."""
        while (patch := self._take()) is not None:
            try:
                patch.apply()
            except BaseException:
                self.pending.append(patch)
                raise
        if not self.pending and self in sys.meta_path:
            sys.meta_path.remove(self)

    def _take(self) -> Patch | None:
        with self._lock:
            ready = (p for p in self.pending if sys.modules.get(p.module) is not None)
            if (patch := next(ready, None)) is not None:
                self.pending.remove(patch)
            return patch


_hook = _ImportHook(PATCHES)
