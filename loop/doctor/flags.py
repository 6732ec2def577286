"""Flags of `python -m loop doctor`: training's, and its own."""

import dataclasses
from dataclasses import dataclass

from loop.config.flags import Config
from loop.config.parser import flag


@dataclass(frozen=True)
class DoctorConfig(Config):
    """Training's settings, and the doctor's."""

    estimate: bool = flag(
        False, "print only a rank's memory by part and bytes sent, from config.json", "doctor"
    )
    trial: bool = flag(False, "run three steps to measure time and memory", "doctor")
    accelerate_config: str | None = flag(
        None,
        "accelerate config of the launch; none: zero2.yaml, as launch.sh; with --estimate: all of "
        "accelerate_configs/",
        "doctor",
    )
    num_processes: int | None = flag(
        None, "ranks; none: counted as launch.sh does; with --estimate: 8", "doctor", at_least=1
    )
    supervised_share: float = flag(
        1.0,
        "for --estimate: share of a micro-batch's tokens that is supervised; T5: of its targets",
        "doctor",
        above=0,
        at_most=1,
    )

    @property
    def training(self) -> Config:
        """Training's settings alone."""
        return Config(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Config)})
