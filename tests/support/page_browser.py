"""A run page in headless Chromium, as Debian packages it: what it shows, complains of and asks the network for."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "needs a browser: apt-get install chromium chromium-driver" if not (CHROMIUM and DRIVER) else ""


class Browser:
    """One headless Chromium; a context manager."""

    def __init__(self) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        assert CHROMIUM is not None, MISSING
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
            options.add_argument(f"--{argument}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options, Service(DRIVER))

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.driver.quit()

    def open(self, file: Path, width: int = 1280, scheme: str = "light", height: int = 900) -> None:
        """Opens a page in a window of this size, light or dark."""
        self.driver.get("about:blank")
        self.messages()
        self.driver.get_log("performance")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        self.driver.get(file.resolve().as_uri())

    def run(self, script: str, *arguments: object) -> Any:
        """Runs the body of a function in the page and returns its result."""
        return self.driver.execute_script(script, *arguments)

    def messages(self) -> list[str]:
        """Returns what the console has got since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Returns the addresses that were asked for since the page was opened, but for data in the page itself."""
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        sent = (event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent")
        return [address for address in sent if not address.startswith("data:")]

    def picture(self, top: int = 0, height: int | None = None) -> bytes:
        """Returns the page from `top` on as a PNG, all of it by default."""
        width, whole = self.run("return [innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": top, "width": width, "height": min(height or whole, whole - top), "scale": 1}
        options = {"captureBeyondViewport": True, "clip": clip}
        return base64.b64decode(self.driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"])
