"""What the doctor is asked: training's flags, and its own."""

import dataclasses
from dataclasses import dataclass

from loop.config.flags import Config
from loop.config.parser import flag


@dataclass(frozen=True)
class DoctorConfig(Config):
    """Training's settings, and what to examine."""

    estimate: bool = flag(
        False, "only memory by part and bytes sent, for one rank, of a config.json", "doctor"
    )
    trial: bool = flag(False, "run three steps of it, to tell time and memory", "doctor")
    accelerate_config: str | None = flag(
        None,
        "the launch's; none: launch.sh's zero2.yaml; --estimate: a row for each in "
        "accelerate_configs/",
        "doctor",
    )
    num_processes: int | None = flag(
        None, "ranks of the launch; none: as launch.sh counts; --estimate: 8", "doctor", at_least=1
    )
    supervised_share: float = flag(
        1.0,
        "--estimate: supervised tokens of all tokens in a micro-batch; a T5's: of its targets'",
        "doctor",
        above=0,
        at_most=1,
    )

    @property
    def training(self) -> Config:
        """Training's settings alone, as training would have them."""
        return Config(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Config)})
