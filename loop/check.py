"""`python -m loop check`: the settings, the model's place and the data's, before the launch."""

from collections.abc import Sequence

from data.errors import UserError
from data.sources import files_of
from loop.base import find_base_model
from loop.config import Config
from loop.settings import read_config


def main(argv: Sequence[str]) -> None:
    """Answer a wrong flag or path in a second; launching the ranks alone takes many."""
    config = read_config(argv, Config, "Training flags. With none of them: the main job.")
    if config.model_name_or_path:
        find_base_model(config)
    for source in config.sources:
        for file in files_of(source, config.cache_dir):
            if not file.is_file():
                raise UserError(
                    f"--data_path {file}: no such file. Give JSON, JSONL, CSV or Parquet, or a "
                    "folder."
                )
