# SPDX-License-Identifier: Apache-2.0
"""``REFINE``: train what is continuous in a quantized model, block by block, against the float one.

Blocks are visited in the order in which they run. A block reads what the quantized model, refined
so far, gives it, and is to return what the float model returns there on its own trajectory: it
learns to undo the error of the blocks before it. Calls are teacher-forced, as in VQ4DiT
(2408.17131, sec. 3.3). A held-out share of the calls judges: new parts stay only where they bring
the block nearer to the float one, so no block gets worse on its own objective.
"""

from collections.abc import Callable

from dtq.finetune.methods import blocks, vq4dit
from dtq.finetune.report import BlockReport, FinetuneReport

FINETUNE: dict[str, Callable[..., FinetuneReport]] = {"blocks": blocks, "vq4dit": vq4dit}

__all__ = ["FINETUNE", "BlockReport", "FinetuneReport"]
