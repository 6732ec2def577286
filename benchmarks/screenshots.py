"""Takes screenshots of a run's report and TensorBoard page in headless Chromium, for docs/.

python benchmarks/screenshots.py RUN [RUN ...] [--out docs]

The report shows all RUNs. TensorBoard shows the first RUN, if it has a TensorBoard log.
"""

import argparse
import base64
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from loop.monitor.history import read_runs
from loop.monitor.plots import page
from tests.support.browser import CHROMIUM, FLAGS

PAGE_TIMEOUT = 180  # seconds to load a page on a busy machine
TENSORBOARD = "/?darkMode=false&smoothing=0&tagFilter=loss%7Cnorm%7Cper_second%7Crate"
CARDS = "document.querySelectorAll('scalar-card line-chart canvas').length >= 4"
CLOSE = "document.querySelector('[aria-label=\"Close side pane\"]')?.click()"


class Page:
    """A page in Chromium, controlled with the DevTools protocol through a pipe."""

    def __init__(self, width: int, height: int) -> None:
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        commands, replies = os.pipe(), os.pipe()
        words = [str(CHROMIUM), *FLAGS, f"--user-data-dir={self.profile.name}"]
        words += ["--remote-debugging-pipe", "about:blank"]
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{commands[0]} 4>&{replies[1]}', "bash", *words],
            pass_fds=(commands[0], replies[1]),
            stderr=subprocess.DEVNULL,
        )
        os.close(commands[0])
        os.close(replies[1])
        self.commands: BinaryIO = os.fdopen(commands[1], "wb", buffering=0)
        self.replies: BinaryIO = os.fdopen(replies[0], "rb")
        self.number, self.session = 0, {}
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        found = self.do("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": found["sessionId"]}
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.do("Emulation.setDeviceMetricsOverride", **size)

    def do(self, method: str, **given: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self.number += 1
        call = {"id": self.number, "method": method, "params": given, **self.session}
        self.commands.write(json.dumps(call).encode() + b"\0")
        while True:
            answer = json.loads(self._message())
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])

    def _message(self) -> bytes:
        text = b""
        while not text.endswith(b"\0"):
            part = self.replies.read(1)
            if not part:
                raise RuntimeError(f"Chromium exited with {self.process.wait()}")
            text += part
        return text[:-1]

    def run(self, script: str) -> Any:
        """Evaluate a script in the page and return its value."""
        return self.do("Runtime.evaluate", expression=script)["result"].get("value")

    def open(self, address: str, ready: str) -> None:
        """Open an address and wait until the script `ready` evaluates to true."""
        self.do("Page.navigate", url=address)
        deadline = time.monotonic() + PAGE_TIMEOUT
        while not self.run(ready):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{address}: {ready} was not true in {PAGE_TIMEOUT} s")
            time.sleep(0.5)

    def photograph(self, file: Path) -> None:
        """Write a screenshot of at most 200 kB, because it is committed to the repository."""
        file.write_bytes(base64.b64decode(self.do("Page.captureScreenshot")["data"]))
        print(f"{file}: {file.stat().st_size / 1000:.0f} kB")
        if file.stat().st_size > 200_000:
            raise RuntimeError(f"{file}: expected at most 200 kB")

    def close(self) -> None:
        """Terminate this Chromium process."""
        self.process.terminate()
        self.process.wait()
        self.profile.cleanup()


def report(runs: list[str], out: Path) -> None:
    """Take screenshots of the report in light and dark, with the pointer over the loss."""
    with tempfile.TemporaryDirectory() as folder:
        html = Path(folder) / "report.html"
        html.write_text(page(read_runs(runs)), encoding="utf-8")
        with closing(Page(1120, 1060)) as shown:
            for name, theme in (("report.png", "light"), ("report_dark.png", "dark")):
                features = [{"name": "prefers-color-scheme", "value": theme}]
                shown.do("Emulation.setEmulatedMedia", features=features)
                shown.open(f"file://{html}", "document.querySelectorAll('.plot .curve').length > 3")
                shown.do("Input.dispatchMouseEvent", type="mouseMoved", x=680, y=200)
                time.sleep(1)
                shown.photograph(out / name)


def tensorboard(run: Path, file: Path) -> None:
    """Start TensorBoard on 127.0.0.1, take a screenshot of its page, and stop it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--logdir", str(run / "tensorboard"), "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", *words, "--load_fast", "false"],
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(port)
        name = quote(next((run / "tensorboard").iterdir()).name)
        address = f"http://127.0.0.1:{port}{TENSORBOARD}&runFilter=%5E{name}%24#timeseries"
        with closing(Page(1280, 1050)) as shown:
            shown.open(address, CARDS)
            shown.run(CLOSE)
            time.sleep(5)
            shown.photograph(file)
    finally:
        server.terminate()
        server.wait()


def wait_for(port: int) -> None:
    """Wait until a server listens on the port."""
    deadline = time.monotonic() + PAGE_TIMEOUT
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError("TensorBoard did not start")


def main() -> None:
    """Write report.png, report_dark.png and, if there is a log for it, tensorboard.png."""

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    flags = parser.parse_args()
    report(flags.runs, flags.out)
    first = Path(flags.runs[0])
    if (first / "tensorboard").is_dir():
        tensorboard(first, flags.out / "tensorboard.png")


if __name__ == "__main__":
    main()
