"""Opens pages in a headless Chromium that can reach only this machine."""

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
    """An opened page: its DOM after its script has run, and the URLs that it requested."""

    dom: str
    requests: list[str]


def chromium(*words: str, seconds: float = HANG) -> str:
    """Run Chromium with a temporary profile and return its standard output."""
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
    """Open a page. Chromium's own requests have no origin and are left out."""
    with tempfile.TemporaryDirectory(prefix="chromium-log-") as folder:
        log = Path(folder) / "net.json"
        dom = chromium(f"--log-net-log={log}", *words, "--dump-dom", address)
        events = json.loads(log.read_text())["events"]
    requests = [event["params"] for event in events if "initiator" in event.get("params", {})]
    return Opened(dom, [one["url"] for one in requests if one["initiator"] != "not an origin"])
