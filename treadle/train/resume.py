"""Going on with a run: its latest checkpoint, if model and data are the ones it was made with."""

import logging

from treadle.config import diff, to_dict
from treadle.data.loader import Loader
from treadle.errors import CheckpointError
from treadle.nn.transformer import TransformerConfig
from treadle.train.checkpoint import Checkpointer
from treadle.train.state import TrainState

logger = logging.getLogger(__name__)


def restore(state: TrainState, checkpointer: Checkpointer, loader: Loader, spec: TransformerConfig, end: int) -> None:
    """Load the latest checkpoint into the state, if there is one.

    spec: the model's config. end: the run's number of steps. Raises CheckpointError for another architecture, another
    batch size or a checkpoint beyond the end, DataError for other data.
    """
    steps = checkpointer.steps()
    if not steps:
        logger.warning("no complete checkpoint in %s: starting from step 0", checkpointer.folder)
        return
    facts = checkpointer.facts(steps[-1])
    if facts["model"] != to_dict(spec):
        changes = "; ".join(f"model.{key}: {old} -> {new}" for key, old, new in diff(facts["model"], to_dict(spec)))
        raise CheckpointError(
            f"{checkpointer.path(steps[-1])} holds another architecture ({changes}); restore the configuration of that "
            f"run, or start a new one"
        )
    if loader.resume(facts["data"]) != facts["step"]:
        raise CheckpointError(
            f"training.batch_size: {loader.batch_size}, but {checkpointer.path(steps[-1])} was made with batches of "
            f"{facts['data']['batch_size']}, and the step counts them; restore that, or start a new run"
        )
    if facts["step"] > end:
        raise CheckpointError(f"training.steps: {end}, but the run has a checkpoint of step {facts['step']}; raise it")
    checkpointer.load(state, steps[-1])
