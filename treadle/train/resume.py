"""Going on with a run: its latest checkpoint, if model and data are the ones it was made with."""

from typing import Any

from treadle.config import diff, resolve, to_dict
from treadle.data.batches import Batches
from treadle.errors import CheckpointError
from treadle.nn.transformer import TransformerConfig
from treadle.train.checkpoint import Checkpointer


def check_resume(checkpointer: Checkpointer, batches: Batches, spec: TransformerConfig, end: int) -> int | None:
    """The step to go on from; None when there is no complete checkpoint. Changes nothing.

    spec: the model's config. end: the run's number of steps. Raises CheckpointError for another architecture, another
    batch size or a checkpoint beyond the end, DataError for other data.
    """
    steps = checkpointer.steps()
    if not steps:
        return None
    step, facts = steps[-1], checkpointer.facts(steps[-1])
    changes = diff(_architecture(resolve(TransformerConfig, facts["model"])), _architecture(spec))
    if changes:
        shown = "; ".join(f"model.{key}: {old} -> {new}" for key, old, new in changes)
        raise CheckpointError(
            f"{checkpointer.path(step)} holds another architecture ({shown}); restore the configuration of that run, "
            f"or start a new one"
        )
    if batches.resume(facts["data"]) != step:
        raise CheckpointError(
            f"training.batch_size: {batches.batch_size}, but {checkpointer.path(step)} was made with batches of "
            f"{facts['data']['batch_size']}, and the step counts them; restore that, or start a new run"
        )
    if step > end:
        raise CheckpointError(f"training.steps: {end}, but the run has a checkpoint of step {step}; raise it")
    return step


def _architecture(spec: TransformerConfig) -> dict[str, Any]:
    """What the weights depend on: not how they started, nor the weight of multi-token prediction, which DeepSeek-V3
    lowers on the way. Keys that came later have their defaults in old checkpoints.
    """
    plain = {key: value for key, value in to_dict(spec).items() if key != "init"}
    if spec.multi_token is not None:
        plain["multi_token"] = {key: value for key, value in plain["multi_token"].items() if key != "weight"}
    return plain
