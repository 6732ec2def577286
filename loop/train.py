"""Fine-tunes a LoRA adapter. Start reading here: the file reads in the order it runs.

accelerate launch --config_file accelerate_configs/zero2.yaml loop/train.py [--flag value ...]
"""

import sys
from pathlib import Path

# When a script runs, Python searches its folder for imports. Search the repository root instead.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

# Block bitsandbytes: peft 0.21 imports it if it is installed (helpers.py). The import takes seconds
# and can fail (wrong GPU driver). --q_lora unblocks it (model/quantization.py).
sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]

import torch
from accelerate import PartialState

from loop.checkpoint.resume import find_resume_point
from loop.checkpoint.run_folder import is_finished, locked_output_dir, save_run, write_settings
from loop.checkpoint.saver import Saver
from loop.checkpoint.storage import newest_checkpoint
from loop.config.flags import Config, display_path
from loop.config.load import ignored_flag_notes, read_config
from loop.distributed.accelerator import (
    broadcast_flag,
    build_accelerator,
    check_agreement,
    check_launch,
    init_process_group_once,
    raise_on_all_ranks,
)
from loop.distributed.layout import plan_layout
from loop.distributed.precision import resolve_precision
from loop.distributed.rank_zero import print_rank0, quiet
from loop.distributed.signals import run_and_exit
from loop.inputs.training_data import read_training_data
from loop.inputs.windows import prefetched, windows
from loop.model.load import load_model
from loop.model.quantization import describe_parameters
from loop.monitor.logger import Tracker
from loop.monitor.loss_guard import skip_if_bad
from loop.monitor.metrics import Clock, work_of
from loop.training.auto_micro_batch import fit_micro_batch
from loop.training.evaluation import Evaluator
from loop.training.loss import loss_scale, supervised_loss_sum
from loop.training.model_check import check_model
from loop.training.optim import (
    accumulating,
    build_optimizer,
    clip_gradients,
    lr_at,
    set_learning_rate,
)


def main() -> None:
    """Read the settings and train, unless the output folder holds this run, already finished."""
    quiet()
    ranks = init_process_group_once()
    with raise_on_all_ranks():
        config = read_config(sys.argv[1:], Config, __doc__ or "")
    config = resolve_precision(config)
    with raise_on_all_ranks():
        check_launch(config)
        # Only rank 0 writes to the output folder. Other machines need not have it.
        finished = ranks.is_main_process and is_finished(config)
    for note in ignored_flag_notes(sys.argv[1:]):
        print_rank0(note)
    if broadcast_flag(finished):
        print_rank0(f"{config.output_dir}: this run is already finished; nothing was changed.")
    else:
        with locked_output_dir(config):
            train(config, ranks)


def train(config: Config, ranks: PartialState) -> None:
    """Fine-tune an adapter with these settings and save it in the output folder."""
    with raise_on_all_ranks():
        data = read_training_data(config)
        layout = plan_layout(config, len(data.examples), ranks, data.base.packed)
        start = find_resume_point(config, data, layout, reads=ranks.is_main_process)
    check_agreement(config, data.facts)
    start.agree()

    accelerator = build_accelerator(config, layout)
    print_rank0(f"data: {data}\nplan: {layout}")
    model = load_model(data.base, config, accelerator)
    print_rank0(f"model: {display_path(data.base.name)}: {describe_parameters(model)}")
    start.put_weights(accelerator, model)
    # No scheduler is prepared: accelerate would step it once per process.
    model, optimizer = accelerator.prepare(model, build_optimizer(model, config))
    start.put_optimizer(accelerator, model, optimizer)
    data, layout = check_model(data, layout, config, model, accelerator)
    layout = fit_micro_batch(layout, config, data, model, accelerator, start.progress)
    write_settings(accelerator, config)

    clock = Clock(accelerator.device)
    tracker = Tracker(config, layout, accelerator, start.prior, clock, work_of(model, config))
    with tracker, Saver(config, layout, accelerator, start) as saver:
        evaluator = Evaluator(config, layout, accelerator, data, model, tracker, saver)
        evaluator.begin()
        remaining = windows(data.examples, layout, config.seed, data.collator, start.step)
        for window in clock.timed_iter(evaluator.until_early_stop(prefetched(remaining)), "data"):
            # Set before the backward passes: DeepSpeed steps the optimizer in the last one.
            lr = set_learning_rate(optimizer, lr_at(window.step, layout.total_steps, config))
            scale = loss_scale(accelerator, window.supervised_tokens)
            loss_sum = torch.zeros((), device=accelerator.device)
            for batch, last in window.micro_batches_on(accelerator.device):
                with accumulating(accelerator, model, last):
                    with clock("forward"):
                        micro_loss_sum = supervised_loss_sum(model, batch, layout.chunk_tokens)
                    loss_sum += micro_loss_sum.detach()
                    with clock("backward"):
                        accelerator.backward(micro_loss_sum * scale)
                    with clock("step"):
                        grad_norm = clip_gradients(accelerator, optimizer, config.max_grad_norm)
                        bad = skip_if_bad(accelerator, optimizer, loss_sum, grad_norm)
                        optimizer.step()
                        optimizer.zero_grad()
            tracker.observe(window, loss_sum, lr, grad_norm, bad)
            evaluator.maybe_evaluate(window)
            saver.maybe_save(window, model, optimizer, tracker)

    save_run(accelerator, model, data, evaluator.finish(), layout, config)
    tracker.end(newest_checkpoint(Path(config.output_dir)))


if __name__ == "__main__":
    run_and_exit(main)
