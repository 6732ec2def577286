"""The flags of `python -m loop doctor`: those of training and its own."""

import dataclasses
from dataclasses import dataclass

from loop.config.flags import Config
from loop.config.parser import flag


@dataclass(frozen=True)
class DoctorConfig(Config):
    """The settings of training and of the doctor."""

    estimate: bool = flag(
        False,
        "print only one rank's memory by part and the bytes that it sends, from config.json",
        "doctor",
    )
    trial: bool = flag(False, "run three steps to measure time and memory", "doctor")
    accelerate_config: str | None = flag(
        None,
        "accelerate config of the launch; none: zero2.yaml, as in launch.sh; with --estimate: "
        "all of accelerate_configs/",
        "doctor",
    )
    num_processes: int | None = flag(
        None,
        "number of ranks; none: counted as in launch.sh; with --estimate: 8",
        "doctor",
        at_least=1,
    )
    supervised_share: float = flag(
        1.0,
        "for --estimate: supervised share of a micro-batch's tokens; T5: of its target tokens",
        "doctor",
        above=0,
        at_most=1,
    )

    @property
    def training(self) -> Config:
        """The settings of training only."""
        return Config(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Config)})
