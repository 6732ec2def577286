"""`python -m loop check`: checks settings, packages, model path and data paths before a launch."""

from collections.abc import Sequence

from data.dialogues.sources import files_of, parse_source
from data.errors import UserError
from loop.config.flags import Config
from loop.config.load import read_config
from loop.config.preflight import CORE, conflicts, problems, together
from loop.inputs.first_records import check_first_records
from loop.model.base import find_base_model


def main(argv: Sequence[str]) -> None:
    """Report a wrong flag, path or first record within a second, before the ranks start."""
    config = read_config(argv, Config, "The flags of training; without flags: the main job.")
    errors = [*conflicts(CORE), *problems(config)]
    if errors:
        raise UserError(together(errors))
    if config.model_name_or_path:
        find_base_model(config)
    named = [("--data_path", source) for source in config.sources]
    named += [("--eval_data_path", parse_source(word)) for word in config.eval_data_path or ()]
    for flag, source in named:
        for file in files_of(source, config.cache_dir):
            if not file.is_file():
                raise UserError(
                    f"{flag} {file}: no such file. Give JSON, JSONL, CSV or Parquet, or a folder."
                )
    check_first_records(config)
