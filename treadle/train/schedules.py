"""Learning-rate schedules: a factor on the peak rate, as a pure function of the step."""

import math
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from treadle.config import Kind


class ScheduleConfig(Kind):
    """Base: linear warm-up from 1/warmup, then `after`. `final` is the factor just after the last step."""

    warmup: NonNegativeInt = Field(0, description="steps of linear warm-up")

    def factor(self, step: int, steps: int) -> float:
        """The factor at a step (0 is the first) of a run of `steps`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return self.after(step - self.warmup, max(1, steps - self.warmup))

    def after(self, step: int, steps: int) -> float:
        """The factor `step` steps after warm-up, of `steps` that follow warm-up."""
        raise TypeError(f"{type(self).__name__} does not define after")


class ConstantConfig(ScheduleConfig):
    """The peak rate throughout."""

    kind: Literal["constant"] = "constant"

    def after(self, step: int, steps: int) -> float:
        return 1.0


class LinearConfig(ScheduleConfig):
    """A straight line down to `final`."""

    kind: Literal["linear"] = "linear"
    final: NonNegativeFloat = Field(0.0, description="factor at the end")

    def after(self, step: int, steps: int) -> float:
        return 1 - (1 - self.final) * min(1.0, step / steps)


class CosineConfig(ScheduleConfig):
    """Half a cosine down to `final` (Loshchilov and Hutter 2016, arXiv:1608.03983)."""

    kind: Literal["cosine"] = "cosine"
    final: NonNegativeFloat = Field(0.1, description="factor at the end")

    def after(self, step: int, steps: int) -> float:
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


class WSDConfig(ScheduleConfig):
    """Warm-up, stable, decay: the last `decay` of the run goes down to `final` (MiniCPM, arXiv:2404.06395)."""

    kind: Literal["wsd"] = "wsd"
    decay: PositiveFloat = Field(0.2, le=1, description="share of the run that decays")
    final: NonNegativeFloat = Field(0.0, description="factor at the end")
    shape: Literal["linear", "sqrt"] = Field("linear", description="sqrt: 1 - sqrt(progress) (arXiv:2405.18392)")

    def after(self, step: int, steps: int) -> float:
        length = min(steps, self.decay * (self.warmup + steps))
        progress = min(1.0, max(0.0, 1 - (steps - step) / length))
        if self.shape == "sqrt":
            progress = math.sqrt(progress)
        return 1 - (1 - self.final) * progress


class InverseSqrtConfig(ScheduleConfig):
    """Falls with the square root of the step after `timescale` steps (Vaswani et al. 2017, arXiv:1706.03762)."""

    kind: Literal["inverse_sqrt"] = "inverse_sqrt"
    timescale: PositiveFloat = Field(1000.0, description="steps until the rate starts to fall noticeably")

    def after(self, step: int, steps: int) -> float:
        return math.sqrt(self.timescale / (self.timescale + step))
