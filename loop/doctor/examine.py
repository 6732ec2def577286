"""Examines launch, model and data, and prints the forecast of the run."""

from collections.abc import Sequence
from typing import Any

from data.errors import add_errors, collect_errors
from loop.config.flags import Config
from loop.config.load import read_config
from loop.distributed.accelerator import check_ranks, examine_launch
from loop.distributed.deepspeed_config import against_flags
from loop.distributed.layout import plan_layout
from loop.distributed.precision import slow_in_bf16, with_recorded_precision
from loop.doctor import forecast, model_and_data
from loop.doctor.flags import DoctorConfig
from loop.doctor.launch import Launch, find_launch, hardware_rows, launch_rows
from loop.doctor.trial import run_trial
from loop.monitor.formatting import Page


def examine(argv: Sequence[str], first: DoctorConfig, page: Page) -> list[str]:
    """Print the report section by section, and return the errors.

    The flags are read again in the launch's environment, since precision and ranks depend on it.
    """
    errors: list[str] = []
    launch = find_launch(first, errors)
    with launch.environment():
        config = with_recorded_precision(read_config(argv, DoctorConfig, "", errors).training)
        deepspeed, launch_errors = examine_launch(config)
        add_errors(launch_errors, errors)
        with collect_errors(errors):
            check_ranks()
        page.section("machine", hardware_rows(launch))
        page.section("launch", launch_rows(launch, deepspeed, config))
        notes = [note for note in [slow_in_bf16(config)] if note]
        _examine_run(config, launch, deepspeed, page, errors, notes, first.trial)
    if notes:
        page.section("notes", [("note", note) for note in notes])
    return errors


def _examine_run(
    config: Config,
    launch: Launch,
    deepspeed: dict[str, Any],
    page: Page,
    errors: list[str],
    notes: list[str],
    with_trial: bool,
) -> None:
    """Examine model and data, and forecast the run; deepspeed: DeepSpeed's JSON, or {}."""
    zero = deepspeed.get("zero_optimization", {})
    model = model_and_data.examine_model(config, zero, errors)
    page.section("model", model_and_data.model_rows(model, config, zero, notes))
    data = model_and_data.examine_data(model, config, errors)
    layout = token_forecast = None
    if data:
        page.section("data", model_and_data.data_rows(data, config, page.colour))
        with collect_errors(errors):
            layout = plan_layout(config, len(data.examples), launch, data.base.packed)
    if data and layout:
        add_errors(against_flags(deepspeed, config, layout), errors)
        token_forecast = forecast.forecast_tokens(data, layout, config)
        notes += forecast.batch_notes(layout, config)
        page.section(
            "steps", forecast.step_rows(layout, token_forecast, len(data.examples), config)
        )
        backend = launch.backend(deepspeed, config)
        ranks = layout.world_size
        run = forecast.largest_run(model, data, backend, ranks, token_forecast, config)
        rows, total, memory_errors = forecast.memory_rows(
            run, model.no_estimate, token_forecast, config
        )
        page.section("memory", rows)
        add_errors(memory_errors, errors)
        rows, disk_errors = forecast.disk_rows(model, data, layout, config)
        page.section("disk", rows)
        add_errors(disk_errors, errors)
    page.section("trackers", forecast.tracker_rows(config))
    if data and layout and token_forecast:
        trial = None
        if with_trial and not errors:
            with collect_errors(errors):
                model_and_data.check_weights(model)
                trial = run_trial(config, launch)
        page.section("time", forecast.time_rows(trial, layout, token_forecast, total))
