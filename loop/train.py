"""Fine-tunes a LoRA adapter; this file is the first page, and reads in the order it runs.

accelerate launch --config_file accelerate_configs/zero2.yaml loop/train.py [--flag value ...]
"""

import sys
from pathlib import Path

# Run as a file, Python looks for imports in loop/; they are meant from the repository root.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from accelerate import PartialState

from loop.backend import (
    build_accelerator,
    check_agreement,
    check_launch,
    first_rank_says,
    join_ranks,
    resolve_precision,
    told_to_all,
)
from loop.clock import Clock
from loop.compat import notes
from loop.config import Config, shown
from loop.evaluation import Evaluator
from loop.fit import fitted
from loop.guard import skip_if_bad
from loop.leave import run_and_exit
from loop.metrics import work_of
from loop.model import load_model
from loop.objective import loss_scale, supervised_loss_sum
from loop.optim import accumulating, build_optimizer, clip_gradients, lr_at, set_learning_rate
from loop.output import claimed, is_finished, save_run, write_settings
from loop.prepare import prepare
from loop.quantize import describe_parameters
from loop.quiet import quiet, say
from loop.resume import find_start
from loop.saver import Saver
from loop.settings import read_config
from loop.tracking import Tracker
from loop.windows import plan_layout, prefetched, windows


def main() -> None:
    """Read the settings; a run that its output folder already holds is not trained again."""
    quiet()
    ranks = join_ranks()
    with told_to_all():
        config = read_config(sys.argv[1:], Config, __doc__ or "")
    config = resolve_precision(config)
    with told_to_all():
        check_launch(config)
        # The first rank alone writes, so what the other machines' disks hold does not count.
        finished = ranks.is_main_process and is_finished(config)
    for note in notes(sys.argv[1:]):
        say(note)
    if first_rank_says(finished):
        say(f"{config.output_dir} already holds this run, finished; nothing was changed.")
    else:
        with claimed(config):
            train(config, ranks)


def train(config: Config, ranks: PartialState) -> None:
    """Fine-tune the adapter that `config` describes and save it in its output folder."""
    # Each rank reads for itself, all at the same time: none waits for another one's work.
    with told_to_all():
        prepared = prepare(config)
        layout = plan_layout(config, len(prepared.examples), ranks, prepared.packed)
        start = find_start(config, prepared, layout, reads=ranks.is_main_process)
    check_agreement(config, prepared.facts)
    start.agree()

    accelerator = build_accelerator(config, layout)
    say(f"data: {prepared}\nplan: {layout}")
    model = load_model(prepared, config, accelerator)
    say(f"model: {shown(prepared.base)}: {describe_parameters(model)}")
    start.put_weights(accelerator, model)
    # No scheduler is prepared: accelerate would step it once per process.
    model, optimizer = accelerator.prepare(model, build_optimizer(model, config))
    start.put_optimizer(accelerator, model, optimizer)
    layout = fitted(layout, config, prepared, model, accelerator, start.progress)
    write_settings(accelerator, config)

    clock = Clock(accelerator.device)
    tracker = Tracker(config, layout, accelerator, start, clock, work_of(model, config))
    with tracker, Saver(config, layout, accelerator, start) as saver:
        evaluator = Evaluator(config, layout, accelerator, prepared, model, tracker, saver)
        evaluator.begin()
        dealt = windows(prepared.examples, layout, config.seed, prepared.collator, start.step)
        for window in clock.waits(evaluator.until_enough(prefetched(dealt)), "data"):
            # Before the backward pass: in its last one DeepSpeed makes the optimizer step.
            lr = set_learning_rate(optimizer, lr_at(window.step, layout.total_steps, config))
            scale = loss_scale(accelerator, window.supervised_tokens)
            loss_sum = torch.zeros((), device=accelerator.device)
            for batch, last in window.on(accelerator.device):
                with accumulating(accelerator, model, last):
                    with clock("forward"):
                        micro_loss_sum = supervised_loss_sum(model, batch, config.loss_chunk_tokens)
                    loss_sum += micro_loss_sum.detach()
                    with clock("backward"):
                        accelerator.backward(micro_loss_sum * scale)
                    with clock("step"):
                        grad_norm = clip_gradients(accelerator, optimizer, config.max_grad_norm)
                        bad = skip_if_bad(accelerator, optimizer, loss_sum, grad_norm)
                        optimizer.step()
                        optimizer.zero_grad()
            tracker.observe(window, loss_sum, lr, grad_norm, bad)
            evaluator.after(window)
            saver.after(window, model, optimizer, tracker)

    save_run(accelerator, model, prepared, evaluator.finish(), layout, config)
    tracker.end()


if __name__ == "__main__":
    run_and_exit(main)
