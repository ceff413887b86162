"""Fine-tuning: what is trained of a model that has weights, and what is put beside them. Applied from outside to a
built model, by name pattern; blocks know nothing of it."""

from treadle.finetune.attach import attach, begin, settle
from treadle.finetune.config import FinetuneConfig
from treadle.finetune.merging import merge, unmerge, without_updates

__all__ = ["FinetuneConfig", "attach", "begin", "merge", "settle", "unmerge", "without_updates"]
