"""What the tests in a real browser share."""

from __future__ import annotations

import json
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


def script(browser: Any, code: str, *arguments: object) -> Any:
    return browser.execute_script(code, *arguments)
