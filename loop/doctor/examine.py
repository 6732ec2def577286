"""The doctor's examination of launch, model, data and all that follows from them, in that order."""

from collections.abc import Sequence
from typing import Any

from data.errors import noted, tell
from loop import findings, machine, outlook
from loop.backend import check_ranks, examine_launch, slow_in_bf16
from loop.config import Config
from loop.doctor_flags import DoctorConfig
from loop.launches import Launch, find_launch
from loop.sections import Page
from loop.settings import read_config
from loop.trial import run_trial
from loop.windows import plan_layout
from loop.zero import against_flags


def examine(argv: Sequence[str], first: DoctorConfig, page: Page) -> list[str]:
    """Print what is found, section by section, and return what is wrong.

    The flags are read again in the launch's environment, which decides what they mean.
    """
    mistakes: list[str] = []
    launch = find_launch(first, mistakes)
    with launch.environment():
        config = read_config(argv, DoctorConfig, "", mistakes).training
        asked, found = examine_launch(config)
        tell(found, mistakes)
        with noted(mistakes):
            check_ranks()
        page.section("machine", machine.hardware_rows(launch))
        page.section("launch", machine.launch_rows(launch, asked, config))
        notes = [note for note in [slow_in_bf16(config)] if note]
        _examine_run(config, launch, asked, page, mistakes, notes, first.trial)
    if notes:
        page.section("notes", [("note", note) for note in notes])
    return mistakes


def _examine_run(
    config: Config,
    launch: Launch,
    asked: dict[str, Any],
    page: Page,
    mistakes: list[str],
    notes: list[str],
    tries: bool,
) -> None:
    """Look at model and data, and reckon what training on them takes."""
    zero = asked.get("zero_optimization", {})
    model = findings.examine_model(config, zero, mistakes)
    page.section("model", findings.model_rows(model, config, zero, notes))
    prepared = findings.examine_data(model, config, mistakes)
    layout = ahead = None
    if prepared:
        page.section("data", findings.data_rows(prepared, config, page.colour))
        with noted(mistakes):
            layout = plan_layout(config, len(prepared.examples), launch, prepared.packed)
    if prepared and layout:
        tell(against_flags(asked, config, layout), mistakes)
        ahead = outlook.outlook_of(prepared, layout, config)
        notes += outlook.batch_notes(layout, config)
        page.section("steps", outlook.step_rows(layout, ahead, len(prepared.examples), config))
        backend = launch.backend(asked, config)
        ranks = layout.world_size
        run = outlook.largest_run(model, prepared, backend, ranks, ahead, config)
        rows, total, found = outlook.memory_rows(run, model.unlike, ahead, config)
        page.section("memory", rows)
        tell(found, mistakes)
        rows, found = outlook.disk_rows(model, prepared, layout, config)
        page.section("disk", rows)
        tell(found, mistakes)
    page.section("trackers", outlook.tracker_rows(config))
    if prepared and layout and ahead:
        trial = None
        if tries and not mistakes:
            with noted(mistakes):
                findings.check_weights(model)
                trial = run_trial(config, launch)
        page.section("time", outlook.time_rows(trial, layout, ahead, total))
