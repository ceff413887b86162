"""Context parallelism: each row is cut over ranks, which read the same rows and take their own tokens of them.

Nothing of the model changes. What a token needs of other ranks' tokens, it gets through the context that the model is
called with: attention (`treadle.attention.context_parallel`), scalings of rotary embeddings that depend on a document's
length, and multi-token prediction. Mixers that work in another way are refused (`MixerConfig.in_parts`).
"""

from dataclasses import replace

import torch

from treadle.attention.parts import Parts
from treadle.data.packing import Batch
from treadle.kernels.linear_cross_entropy import IGNORED
from treadle.parallel.mesh import Mesh


def parts_of(mesh: Mesh) -> Parts | None:
    """How rows are cut over this mesh; None where they are not."""
    if mesh.context is None:
        return None
    layout, group = mesh.layout, mesh.context.get_group()
    return Parts(layout.context_method, layout.context_order, group.group_name, group.rank(), layout.context)


def own_part(batch: Batch, mesh: Mesh, device: torch.device | str) -> Batch:
    """This rank's tokens of each row, on the device. Targets and what attention may see are those of the whole rows.

    Raises ConfigError for rows that cannot be cut equally.
    """
    parts = parts_of(mesh)
    if parts is None:
        return batch.to(device, non_blocking=True)
    valid = own_targets(batch, mesh)  # before it moves: the device is not waited for
    batch = batch.to(device, non_blocking=True)
    return replace(
        batch,
        tokens_BS=parts.cut(batch.tokens_BS),
        targets_BS=parts.cut(batch.targets_BS),
        context=batch.context.cut(parts),
        valid_tokens=valid,
    )


def own_targets(batch: Batch, mesh: Mesh) -> int:
    """How many of them are to be predicted; counted where the batch is."""
    parts = parts_of(mesh)
    return batch.valid_tokens if parts is None else int((parts.cut(batch.targets_BS) != IGNORED).sum())
