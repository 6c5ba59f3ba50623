"""Chromium without a screen, for tests and pictures: a page at a width, light or dark, and what it requests."""

import base64
import json
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRAMS = ("chromium", "chromedriver")
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",  # which root cannot have
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",  # or it looks for updates
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)
HEIGHT = 900  # of the window, in CSS pixels


def missing() -> str | None:
    """Why there can be no browser here; None if there can."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return (
        f"no {' and no '.join(absent)} on the PATH (Debian: apt-get install chromium chromium-driver)"
        if absent
        else None
    )


class Browser:
    """One Chromium, for many pages one after the other; close it, or use it as a context."""

    def __init__(self) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which(PROGRAMS[0]))
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        for argument in (*ARGUMENTS, f"--user-data-dir={self._profile.name}"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.ChromeService(executable_path=str(shutil.which(PROGRAMS[1])))
        self._driver = webdriver.Chrome(options=options, service=service)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._driver.quit()
        self._profile.cleanup()

    def open(self, page: Path | str, width: int = 1280, dark: bool = False, height: int = HEIGHT) -> None:
        """Load a file or an address in a window of `width` CSS pixels; the page before is dropped."""
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._command("Emulation.setEmulatedMedia", features=[scheme])
        self._driver.get("about:blank")
        self._driver.get_log("browser")
        self._driver.get_log("performance")
        self._driver.get(page.absolute().as_uri() if isinstance(page, Path) else page)

    def resize(self, width: int, height: int = HEIGHT) -> None:
        self._command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self._driver.execute_script(f"return ({script})")

    def press(self, key: str) -> None:
        """Press a key, named as in `selenium.webdriver.Keys` (TAB, ENTER, ARROW_RIGHT), where the focus is."""
        from selenium.webdriver import ActionChains, Keys

        ActionChains(self._driver).send_keys(getattr(Keys, key)).perform()

    def errors(self) -> list[str]:
        """The console's warnings and errors."""
        return [
            entry["message"] for entry in self._driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
        ]

    def requests(self) -> list[str]:
        """The addresses that were requested, the page itself first; what a page carries itself is none."""
        events = [json.loads(entry["message"])["message"] for entry in self._driver.get_log("performance")]
        requests = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        addresses = [str(each["request"]["url"]) for each in requests]
        return [address for address in addresses if not address.startswith("data:")]

    def screenshot(self, target: Path, whole: bool = True) -> None:
        """Save a PNG of the whole page, or of what the window shows."""
        options: dict[str, Any] = {"captureBeyondViewport": whole}
        if whole:
            size = self._command("Page.getLayoutMetrics")["cssContentSize"]
            options["clip"] = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        target.write_bytes(base64.b64decode(self._command("Page.captureScreenshot", **options)["data"]))

    def _command(self, name: str, **options: Any) -> Any:
        return self._driver.execute_cdp_cmd(name, options)
