# SPDX-License-Identifier: Apache-2.0
"""A sampling run of the float pipeline that can be repeated without its denoisers.

Each call of a denoiser is answered with the recorded output, so that the latents stay those of the
float run. What changes is what reaches the denoisers by other ways: the embeddings of the prompts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from dtq.pipelines import prompts
from dtq.pipelines.loading import LoadedModel
from dtq.pipelines.recorded_calls import RecordedCall, copy_to_cpu
from dtq.pipelines.recording import watch_calls
from dtq.pipelines.sampling import run_pipeline
from dtq.pipelines.settings import SamplingSettings


@dataclass(frozen=True)
class RecordedSampling:
    """One sampling run of a pipeline.

    Attributes:
        loaded: a denoiser, and the pipeline that was run.
        requests: what was generated.
        settings: how.
        calls: of every denoiser of the pipeline, in order.
        answers: what each call returned, on the CPU.
    """

    loaded: LoadedModel
    requests: prompts.Requests
    settings: SamplingSettings
    calls: list[RecordedCall]
    answers: list[Any]

    @classmethod
    def record(
        cls, loaded: LoadedModel, settings: SamplingSettings, samples: int
    ) -> RecordedSampling:
        """Run the pipeline of a model once.

        Args:
            loaded: with a pipeline.
            settings: of the calibration.
            samples: images that are generated together, at most one calibration batch.
        """
        number = min(samples, settings.batch_size)
        once = replace(settings, samples=number, batch_size=number)
        return cls.of(loaded, prompts.load(once.prompts, loaded.pipeline, number), once)

    @classmethod
    @torch.no_grad()
    def of(
        cls, loaded: LoadedModel, requests: prompts.Requests, settings: SamplingSettings
    ) -> RecordedSampling:
        """Run the pipeline of a model over requests, batch by batch.

        Args:
            loaded: with a pipeline.
            requests: what to generate.
            settings: how.
        """
        made = cls(loaded, requests, settings, [], [])

        def note(module: nn.Module, args: Any, output: Any) -> None:
            made.answers.append(copy_to_cpu(output))

        with ExitStack() as hooks:
            for model in loaded.models().values():
                hooks.enter_context(model.register_forward_hook(note))
            watch_calls(loaded.models(), made._run, made.calls.append)
        return made

    def again(self) -> list[RecordedCall]:
        """The calls of the denoisers with the text encoders as they are now; none is computed.

        Their outputs are the recorded ones.
        """
        calls: list[RecordedCall] = []
        with self.answered():
            watch_calls(self.loaded.models(), self._run, calls.append)
        return calls

    @contextmanager
    def answered(self) -> Iterator[None]:
        """Inside, one sampling run gets the recorded outputs from the denoisers."""
        left = iter(self.answers)

        def patched(model: nn.Module) -> Any:
            @functools.wraps(model.forward)
            def forward(*args: Any, **kwargs: Any) -> Any:
                return send_to_device(next(left), next(model.parameters()).device)

            return forward

        models = self.loaded.models().values()
        before = [(vars(model), vars(model).get("forward")) for model in models]
        try:
            for model in models:
                model.forward = patched(model)
            yield
        finally:
            for attributes, forward in before:  # hooks of accelerate are such an attribute
                if forward is None:
                    del attributes["forward"]
                else:
                    attributes["forward"] = forward

    def _run(self) -> Iterable[object]:
        yield from run_pipeline(self.loaded.pipeline, self.requests, self.settings, "latent")
