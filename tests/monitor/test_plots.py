"""Plots show the logged values, and a failing plot never fails a run."""

import ast
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.errors import Stopped, UserError
from loop.checkpoint import storage
from loop.monitor import logger, plots
from loop.monitor.history import read_runs
from loop.monitor.plots import draw, draw_at_end, page, running_mean
from tests.support.browser import needs_chromium, opened
from tests.support.helpers import ROOT, command, log_of

Train = Callable[..., Path]
Entries = list[dict[str, Any]]


def entries(steps: range, **more: float) -> Entries:
    """Return log entries of these steps."""
    return [
        {
            "step": step,
            "loss": 3 - step / 20,
            "learning_rate": 1e-4 * step,
            "grad_norm": 1.5,
            "tokens_per_second": 900.0 + step,
            "supervised_tokens_per_second": 300.0,
            "supervised_tokens": 100 * step,
            "seconds": 7.0 * step,
            **more,
        }
        for step in steps
    ]


def write(folder: Path, log: Entries | str, settings: str = "") -> Path:
    """Write a run's folder with its log, and with its settings if given."""
    folder.mkdir(parents=True)
    text = log if isinstance(log, str) else "".join(json.dumps(entry) + "\n" for entry in log)
    (folder / "metrics.jsonl").write_text(text)
    if settings:
        (folder / "training_config.yaml").write_text(settings)
    return folder


def titles(figure: Any) -> list[str]:
    return [axes.get_title(loc="left").partition("  ")[0] for axes in figure.axes]


def test_a_finished_run_leaves_a_plot_of_the_logged_values(train: Train) -> None:
    folder = train("run", "--logging_steps", "1")
    assert (folder / "training_curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    figure = draw(read_runs([str(folder)]))
    assert titles(figure) == ["Loss", "Learning rate", "Gradient norm", "Speed", "Peak memory"]
    history = log_of(folder)
    keys = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gib")
    for axes, key in zip(figure.axes, keys, strict=True):
        line = axes.lines[0]
        assert [*line.get_xdata()] == [entry["step"] for entry in history] == [1, 2, 3, 4]
        assert [*line.get_ydata()] == [entry[key] for entry in history]


def test_a_stopped_run_is_drawn_after_its_checkpoint_is_valid(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(folder: Path) -> None:
        assert storage.verify(folder / "checkpoint-1").step == 1
        draw_at_end(folder)

    monkeypatch.setattr(logger, "draw_at_end", drawn)
    with pytest.raises(Stopped):
        train("run", "--max_minutes", "1e-6")
    assert (tmp_path / "run/training_curves.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_a_failing_plot_does_not_change_how_a_stopped_run_ends(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run/training_curves.png").mkdir(parents=True)
    with pytest.raises(Stopped):
        train("run", "--max_minutes", "1e-6")
    assert "note: training_curves.png was not drawn: " in capsys.readouterr().out


def test_a_failing_plot_does_not_fail_a_finished_run(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run/training_curves.png").mkdir(parents=True)
    folder = train("run")
    assert json.loads((folder / "trainer_state.json").read_text())["finished"]
    assert "note: training_curves.png was not drawn: " in capsys.readouterr().out


def test_matplotlib_is_imported_only_when_something_is_drawn() -> None:
    tree = ast.parse((ROOT / "loop/monitor/plots.py").read_text())
    at_once = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert "matplotlib" in (ROOT / "loop/monitor/plots.py").read_text()
    assert not [node for node in at_once if "matplotlib" in ast.unparse(node)]


def test_null_values_are_left_out_and_several_runs_share_a_panel(tmp_path: Path) -> None:
    one = entries(range(1, 9), peak_memory_gib=11.5)
    one.insert(4, {"step": 4, "eval_loss": 2.9})
    first = write(tmp_path / "one", one)
    second = write(tmp_path / "two", [{"step": 2, "loss": 2.5}, {"step": 5, "loss": None}])
    figure = draw(read_runs([str(first), str(second)]))
    assert titles(figure)[-1] == "Peak memory"
    curves = [[*map(float, line.get_ydata())] for line in figure.axes[0].lines]
    assert [3 - step / 20 for step in range(1, 9)] in curves
    assert [2.9] in curves
    assert [2.5] in curves
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]


def test_a_resumed_run_is_drawn_as_one(tmp_path: Path) -> None:
    marked = entries(range(1, 7))
    marked[3]["resumed_from"] = 3
    # The resume has not removed the log's entries after the checkpoint.
    uncut = [*entries(range(1, 6)), *entries(range(4, 7), grad_norm=2.5)]
    for name, log, norm in (("marked", marked, 1.5), ("uncut", uncut, 2.5)):
        (run,) = read_runs([str(write(tmp_path / name, log))])
        assert [x for x, _ in run.points("loss")] == [1, 2, 3, 4, 5, 6]
        assert run.points("grad_norm")[3:] == [(4, norm), (5, norm), (6, norm)]
        assert run.resumed == [3]
        marks = [line for line in draw([run]).axes[0].lines if [*line.get_xdata()] == [3, 3]]
        assert len(marks) == 1


def test_another_trainers_log_is_drawn_and_a_truncated_last_line_is_ignored(
    tmp_path: Path,
) -> None:
    (tmp_path / "theirs").mkdir()
    state = {"log_history": [{"step": 5, "loss": 2.0, "epoch": 1}, {"step": 5, "eval_loss": 2.1}]}
    (tmp_path / "theirs/trainer_state.json").write_text(json.dumps(state))
    (theirs,) = read_runs([str(tmp_path / "theirs")])
    assert (theirs.points("loss"), theirs.points("eval_loss")) == ([(5, 2.0)], [(5, 2.1)])
    cut = "".join(json.dumps(entry) + "\n" for entry in entries(range(1, 4)))[:-20]
    (run,) = read_runs([str(write(tmp_path / "cut", cut))])
    assert [x for x, _ in run.points("loss")] == [1, 2]


def test_the_running_mean_keeps_a_straight_line_and_removes_noise() -> None:
    straight = [2.0 - 0.01 * step for step in range(90)]
    assert running_mean(straight) == pytest.approx(straight)
    noisy = [value + (-1) ** step for step, value in enumerate(straight)]
    middle = slice(3, -3)
    assert running_mean(noisy)[middle] == pytest.approx(straight[middle], abs=1 / 7 + 1e-9)


BAD = {
    "no such folder": None,
    "line 2 is not valid JSON": '{"step": 1, "loss": 2}\n{"st\n{"step": 3, "loss": 2}\n',
    "line 1: found no step": '{"loss": 2}\n',
    "line 1: loss: found '2'; expected a number": '{"step": 1, "loss": "2"}\n',
    "found no metrics yet": "",
}


@pytest.mark.parametrize("message", BAD)
def test_a_log_that_cannot_be_drawn_is_an_error(message: str, tmp_path: Path) -> None:
    log = BAD[message]
    folder = tmp_path / "run"
    if log is not None:
        write(folder, log)
    with pytest.raises(UserError, match=re.escape(message)):
        plots.main([str(folder)])
    assert not [*tmp_path.rglob("training_curves*")]
    draw_at_end(folder)  # raises nothing


def test_wrong_folders_and_flags_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(write(tmp_path / "run", entries(range(1, 3))))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "state").mkdir()
    (tmp_path / "state/trainer_state.json").write_text("[]")
    wrong = {
        (): "found no run",
        (run, run): "the same run twice",
        tuple(f"{tmp_path}/{n}" for n in range(9)): "found 9 runs; expected at most 8",
        (str(tmp_path / "empty"),): "found neither metrics.jsonl nor trainer_state.json",
        (str(tmp_path / "file"),): "found a file; expected the folder of a run",
        (str(tmp_path / "state"),): "found no log_history",
        (run, "--out", str(tmp_path / "file/x")): "cannot be written",
        (run, "--outt", "x"): "Did you mean --out?",
    }
    for words, message in wrong.items():
        with pytest.raises(UserError, match=re.escape(message)):
            plots.main(words)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plots.main([run])


def test_the_command_prints_the_files_that_it_writes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, entries(range(1, 5)))
    alone = command("python", "-m", "loop", "plot", tmp_path / "one")
    assert alone.stdout.split() == [
        str(tmp_path / f"one/training_curves.{kind}") for kind in ("png", "html")
    ]
    out = tmp_path / "new/both"
    both = command(
        "python", "-m", "loop", "plot", tmp_path / "one", tmp_path / "two", "--out", out
    )  # fmt: skip
    assert both.returncode == 0, both.stderr
    assert "one, two" in out.with_suffix(".html").read_text()
    assert out.with_suffix(".png").stat().st_size > 10_000
    missing = command("python", "-m", "loop", "plot", tmp_path / "three")
    assert missing.returncode == 2
    assert missing.stderr == (
        f"error: {tmp_path}/three: no such folder. Give the --output_dir of a run.\n"
    )


HOVER = """<script>
const plot = document.querySelector(".plot"), box = plot.getBoundingClientRect();
plot.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2,
  clientY: box.top + 50}));
</script>"""


@needs_chromium
def test_the_page_draws_every_run_in_a_browser_and_shows_values_under_the_pointer(
    tmp_path: Path,
) -> None:
    named = tmp_path / "<!--<script>"  # a valid folder name
    log = entries(range(1, 10), peak_memory_gib=2.25)
    log[4]["resumed_from"] = 4
    log.append({"step": 9, "eval_loss": 2.625})
    write(named, log, "lora_r: 8\nseed: 1\n")
    other = write(tmp_path / "other", entries(range(1, 10), loss=1.5), "lora_r: 64\nseed: 1\n")
    file = tmp_path / "page.html"
    file.write_text(page(read_runs([str(named), str(other)])) + HOVER)
    dom = opened(f"file://{file}").dom
    curves = re.findall(r'data-run="([^"]*)" data-key="(\w+)" d="(M[\d. ML-]+)"', dom)
    keys = ["loss", "learning_rate", "grad_norm", "tokens_per_second"]
    keys += ["supervised_tokens_per_second"]
    found = {(run, key): path for run, key, path in curves}
    assert {key for run, key in found if run == "other"} == {*keys}
    ours = {key: path for (run, key), path in found.items() if run != "other"}
    assert {*ours} == {*keys, "eval_loss", "peak_memory_gib"}
    assert ours["loss"].count("L") == 8
    assert dom.count('class="resume"') == 5, "one a panel"
    (tip,) = re.findall(r'<div class="tip"[^>]*display: block[^>]*>(.*?)</div><svg', dom)
    assert "step 5" in tip
    assert re.findall(r"<td>([\d.]+)</td>", tip) == ["2.75", "1.5", "2.625"]
    changed = dom.partition("Settings that differ</h2>")[2].partition("</section>")[0]
    assert re.findall(r"<t[hd]>(\w*)</t[hd]>", changed)[-3:] == ["lora_r", "8", "64"]


@needs_chromium
def test_the_page_makes_no_network_request(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    html = page(read_runs([str(write(tmp_path / "run", entries(range(1, 10))))]))
    file.write_text(html)
    assert opened(f"file://{file}").requests == []
    # The page's policy blocks such a request. Without the policy, the log has the request.
    image = '<img src="http://outside.invalid/pixel.png">'
    file.write_text(html.replace("<main", f"{image}<main"))
    assert opened(f"file://{file}").requests == []
    file.write_text(html.replace("Content-Security-Policy", "x").replace("<main", f"{image}<main"))
    assert opened(f"file://{file}").requests == ["http://outside.invalid/pixel.png"]


@needs_chromium
def test_the_page_follows_the_systems_colour_scheme(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(page(read_runs([str(write(tmp_path / "run", entries(range(1, 10))))])))
    strokes = {
        theme: re.findall(r'stroke="(#\w+)"', opened(f"file://{file}", *words).dom)
        for theme, words in {
            "light": (),
            "dark": ("--blink-settings=preferredColorScheme=0",),
        }.items()
    }
    assert {*strokes["light"]} == {"#2a78d6"}
    assert {*strokes["dark"]} == {"#3987e5"}
