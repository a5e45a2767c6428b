"""A real headless Chromium, driven over WebDriver with the standard library alone."""

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip


def missing() -> str | None:
    """Why there is no browser to test with, or None."""
    if not any(map(shutil.which, BROWSERS)):
        return f"none of {', '.join(BROWSERS)} is installed"
    return None if shutil.which("chromedriver") else "chromedriver is not installed"


class Browser:
    """One session; ``with Browser(folder) as browser``."""

    def __init__(self, profile: Path, *, dark: bool = False) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.driver = subprocess.Popen(
            ["chromedriver", f"--port={self.port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        binary = next(filter(None, map(shutil.which, BROWSERS)))
        flags = [*FLAGS, f"--user-data-dir={profile}"]
        if dark:
            flags.append("--blink-settings=preferredColorScheme=0")
        wanted = {"goog:chromeOptions": {"binary": binary, "args": flags}, "goog:loggingPrefs": {"browser": "ALL"}}
        for _ in range(100):
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                self._call("GET", "/status")
                break
            time.sleep(0.1)
        answer = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.session = f"/session/{answer['sessionId']}"

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(Exception):
            self._call("DELETE", self.session)
        self.driver.terminate()
        self.driver.wait(20)

    def open(self, path: Path, width: int = 1100, height: int = 1000) -> None:
        """Open a file in a page of the given size in CSS pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", metrics)
        self.post("/url", {"url": path.resolve().as_uri()})

    def devtools(self, command: str, values: dict) -> dict:
        return self.post("/goog/cdp/execute", {"cmd": command, "params": values})

    def run(self, script: str):
        """The value of a script that returns one."""
        return self.post("/execute/sync", {"script": script, "args": []})

    def hover(self, x: float, y: float) -> None:
        self.devtools("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        shot = self.devtools("Page.captureScreenshot", {"captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(shot["data"]))

    def complaints(self) -> list[str]:
        """What the page's console said, errors of scripts and refusals of the policy among it."""
        return [entry["message"] for entry in self.post("/se/log", {"type": "browser"})]

    def post(self, path: str, values: dict):
        return self._call("POST", self.session + path, values)

    def _call(self, method: str, path: str, values: dict | None = None):
        body = None if values is None else json.dumps(values).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise RuntimeError(error.read().decode()) from error
