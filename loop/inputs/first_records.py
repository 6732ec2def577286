"""Checks the first records of the data without torch and transformers, whose imports take time."""

from itertools import islice

from data.dialogues.sharegpt import Tally, dialogues_of
from data.dialogues.sources import files_of
from data.files.read import placed_records
from loop.config.flags import Config

RECORDS = 20  # of each file
FILES = 8  # of each source


def check_first_records(config: Config) -> None:
    """Raise the UserError of a bad record at the beginning of the training data.

    Reading the data raises the same error, but only after the imports. Data sets of the hub are not
    checked, nor is any data with --on_bad_record skip.
    """
    if config.on_bad_record == "skip":
        return
    for source in config.sources:
        files = [] if source.is_on_hub else files_of(source, encoding=config.encoding)
        for file in files[:FILES]:
            placed = islice(placed_records(file), RECORDS)
            # Whether empty answers are valid depends on the model.
            for _ in dialogues_of(placed, Tally(), empty_answers=True, how=config.reading):
                pass
