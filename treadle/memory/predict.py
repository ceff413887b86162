"""From a configuration to a plan, in closed form: nothing is allocated, and no GPU is needed."""

from typing import Any, Protocol

from treadle.errors import ConfigError
from treadle.memory.analytic import Setting
from treadle.memory.devices import Device, find_device
from treadle.memory.plan import GIB, Plan
from treadle.memory.roofline import step_time, training_flops
from treadle.nn.transformer import TransformerConfig
from treadle.parallel.config import ParallelConfig, check_layout
from treadle.train.config import TrainingConfig
from treadle.train.optimizers import OptimizerConfig


class Trained(Protocol):
    """What of a recipe is planned."""

    @property
    def model(self) -> TransformerConfig: ...
    @property
    def training(self) -> TrainingConfig: ...
    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...


def predict(config: Trained, world: int, device: Device | str) -> Plan:
    """What a run of a recipe takes on `world` devices. Raises ConfigError for a layout that cannot be, saying why."""
    return plan_of(setting_of(config, world, device))


def setting_of(config: Trained, world: int, device: Device | str) -> Setting:
    """The setting of a recipe, checked as `treadle train` would."""
    model, training = config.model, config.training
    if model.vocab_size is None:
        raise ConfigError("model.vocab_size: not set, and the tokenizer's size is not known here; override it")
    layout_of(config, world)
    found = find_device(device) if isinstance(device, str) else device
    return Setting(model, training, config.parallel, config.optimizer, world, found)


def layout_of(config: Any, world: int) -> None:
    training = config.training
    check_layout(
        config.parallel, world, config.model, training.batch_size, training.sequence_length, rows=training.rows
    )


def plan_of(setting: Setting) -> Plan:
    """The plan of a setting that is known to be possible."""
    time = step_time(setting)
    tokens = setting.training.batch_size * setting.training.sequence_length
    peak = setting.device.peak_tflops * 1e12 * setting.world
    return Plan(
        footprints=tuple(rank.footprint() for rank in setting.ranks),
        time=time,
        memory=setting.device.memory_gib * GIB,
        tokens=tokens,
        mfu=training_flops(setting) * tokens / time.total / peak,
    )
