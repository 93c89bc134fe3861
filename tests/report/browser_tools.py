"""What the tests in a real browser share."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def opened(browser: Any, path: Path, fragment: str = "") -> Any:
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(path.as_uri() + fragment)
    return browser


def requests(browser: Any) -> list[str]:
    """Everything the page asked the network for, itself and its inline pictures aside."""
    urls = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            urls.append(message["params"]["request"]["url"])
    return [u for u in urls if not u.startswith(("data:", "file:///", "about:"))]


def complaints(browser: Any) -> list[str]:
    return [e["message"] for e in browser.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Return whether ``condition`` holds now or within ``seconds``: events come after the key."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def script(browser: Any, code: str, *arguments: object) -> Any:
    return browser.execute_script(code, *arguments)
