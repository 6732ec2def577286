"""Opens pages in a headless Chromium that reaches nothing but this machine."""

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.helpers import HANG

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs a browser: apt-get install chromium"
)


@dataclass(frozen=True)
class Opened:
    """What became of a page: its elements once its script has run, and what it asked for."""

    dom: str
    requests: list[str]


def chromium(*words: str, seconds: float = HANG) -> str:
    """Run it with a profile of its own and return what it printed."""
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        done = subprocess.run(
            [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *words],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


def opened(address: str, *words: str) -> Opened:
    """Open a page; of its requests those that Chromium makes for itself have no origin."""
    with tempfile.TemporaryDirectory(prefix="chromium-log-") as folder:
        log = Path(folder) / "net.json"
        dom = chromium(f"--log-net-log={log}", *words, "--dump-dom", address)
        events = json.loads(log.read_text())["events"]
    asked = [event["params"] for event in events if "initiator" in event.get("params", {})]
    return Opened(dom, [one["url"] for one in asked if one["initiator"] != "not an origin"])
