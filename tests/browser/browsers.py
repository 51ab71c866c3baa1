"""A browser from the system's packages, without a window and without a network."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

_IN_SIGHT = (
    "[...document.querySelectorAll('.plot')].filter("
    "p => p.getBoundingClientRect().bottom > 0 && p.getBoundingClientRect().top < innerHeight)"
)
NAMES = ("chromium", "chromium-browser", "google-chrome")


class Browser:
    """A page that is looked at, and what it asked of the world."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(
        self, path: Path, *, width: int = 1400, height: int = 1000, dark: bool = False
    ) -> None:
        """Show a file as a screen of that size does, and wait for its curves."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.driver.get(path.absolute().as_uri())
        self.until("document.documentElement.dataset.ready === 'true'")

    def run(self, script: str, *arguments: object) -> Any:
        """What a script gives that ends with ``return``."""
        return self.driver.execute_script(script, *arguments)

    def until(self, condition: str) -> None:
        """Wait until an expression is true."""
        WebDriverWait(self.driver, 30, poll_frequency=0.05).until(
            lambda _: self.run(f"return Boolean({condition})")
        )

    def shoot(self, path: Path, selector: str | None = None) -> None:
        """Write what is seen, or one element, as a PNG file."""
        # Charts that came into sight are drawn one by one.
        self.until("document.querySelector('.plot .trace')")
        self.until(f"{_IN_SIGHT}.every(p => p.querySelector('.trace'))")
        if selector is None:
            self.driver.save_screenshot(str(path))
        else:
            self.driver.find_element("css selector", selector).screenshot(str(path))

    def complaints(self) -> list[str]:
        """Errors and warnings of the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses that were asked for since the last call."""
        events = [
            json.loads(one["message"])["message"] for one in self.driver.get_log("performance")
        ]
        return [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The browser, until the block ends."""
    binary = next(filter(None, map(shutil.which, NAMES)), None)
    driver = shutil.which("chromedriver")
    assert binary, f"none of {', '.join(NAMES)} is installed; `nox -s browser` installs one"
    assert driver, "chromedriver is not installed; `nox -s browser` installs it"
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    # Without a sandbox: the tests may run as root. Without shared memory: a container has little.
    for switch in (
        "headless=new",
        "no-sandbox",
        "disable-dev-shm-usage",
        "disable-gpu",
        "hide-scrollbars",
    ):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield Browser(made)
    finally:
        made.quit()
