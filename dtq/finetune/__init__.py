# SPDX-License-Identifier: Apache-2.0
"""Fine-tune the continuous parameters of a quantized model, block by block.

Blocks are visited in the order in which they run. A block reads what the quantized model, with the
blocks before it already fine-tuned, gives it, and its target is what the float model returns there
on its own trajectory: it learns to undo the error of the blocks before it. Calls are teacher-
forced, as in VQ4DiT (2408.17131, sec. 3.3). Some calls are held out: a block keeps its trained
parameters only if they lower its error on those, so no block gets worse on its own objective.
"""

from collections.abc import Callable

from dtq.finetune.methods import blocks, vq4dit
from dtq.finetune.report import FinetuneReport

FINETUNE: dict[str, Callable[..., FinetuneReport]] = {"blocks": blocks, "vq4dit": vq4dit}
"""Methods by the name that a recipe gives them."""
