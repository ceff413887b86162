"""From a configuration to a plan, in closed form: nothing is allocated, and no GPU is needed."""

from typing import Any, Protocol

from treadle.config import Config
from treadle.errors import ConfigError
from treadle.memory.analytic import Setting
from treadle.memory.anatomy import anatomy
from treadle.memory.devices import Device, find_device
from treadle.memory.plan import GIB, Plan
from treadle.memory.roofline import step_time, training_flops
from treadle.nn.transformer import TransformerConfig
from treadle.parallel.config import ParallelConfig, check_layout
from treadle.train.config import TrainingConfig
from treadle.train.optimizers import AdamWConfig, OptimizerConfig


class Planned(Config):
    """What of a recipe is planned; for a model that has no recipe yet."""

    imports: tuple[str, ...] = ()
    model: TransformerConfig
    training: TrainingConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = AdamWConfig()


class Recipe(Protocol):
    """Any recipe's configuration will do."""

    @property
    def model(self) -> TransformerConfig: ...
    @property
    def training(self) -> TrainingConfig: ...
    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...


def predict(config: Recipe, world: int, device: Device | str) -> Plan:
    """What a run of a recipe takes on `world` devices. Raises ConfigError for a layout that cannot be, saying why, and
    for a device that is not known.
    """
    return plan_of(setting_of(config, world, device))


def setting_of(config: Recipe, world: int, device: Device | str) -> Setting:
    """The setting of a recipe, checked as `treadle train` would."""
    setting = open_setting(config, world, device)
    check(setting)
    return setting


def open_setting(config: Recipe, world: int, device: Device | str) -> Setting:
    """The same where the layout is still to be found."""
    model, training = config.model, config.training
    if model.vocab_size is None:
        raise ConfigError("model.vocab_size: not set, and the tokenizer's size is not known here; override it")
    found = find_device(device) if isinstance(device, str) else device
    known = anatomy(model, training.sequence_length)
    return Setting(model, training, config.parallel, config.optimizer, world, found, known)


def check(setting: Any) -> None:
    """Raises ConfigError where model and batch cannot be cut like this."""
    training = setting.training
    check_layout(
        *(setting.parallel, setting.world, setting.model, training.batch_size, training.sequence_length),
        rows=training.rows,
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
