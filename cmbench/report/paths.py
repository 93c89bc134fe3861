"""Pages are published: they show no absolute path of the machine that measured or rendered them."""

from __future__ import annotations

import re
from typing import Any

_NAME = r"[^\s/\\'\"<>|:*?;,()\[\]{}]"
#: In quotes a path may hold anything; elsewhere it ends at a space or punctuation. A path begins
#: after a space, ``=`` or a bracket, never inside a word or a URL.
_QUOTED = re.compile(
    r"(?P<q>['\"`])(?:file://)?(?:/|~[^/'\"`\n]*/|[A-Za-z]:[\\/]|\\\\)[^'\"`\n]*[\\/]"
    r"(?P<name>[^'\"`\\/\n]*)(?P=q)"
)
_PLAIN = re.compile(
    rf"(?<![\w:/.…~\\-])(?:file://)?(?:/(?:{_NAME}+/)+|~{_NAME}*/(?:{_NAME}+/)*"
    rf"|[A-Za-z]:[\\/](?:{_NAME}+[\\/])*|\\\\(?:{_NAME}+\\)+)(?P<name>{_NAME}*)"
)


def without_paths(text: str) -> str:
    """Return ``text`` with absolute paths cut to their last part: ``…/result.json``.

    URLs and relative paths stay. What stands in quotes may hold spaces.
    """
    if "/" not in text and "\\" not in text:  # nearly every string of a record
        return text
    text = _QUOTED.sub(lambda m: f"{m['q']}…/{m['name']}{m['q']}", text)
    return _PLAIN.sub(lambda m: f"…/{m['name']}", text)


def clean(value: Any) -> Any:
    """Return a JSON value with :func:`without_paths` applied to every string in it."""
    if isinstance(value, str):
        return without_paths(value)
    if isinstance(value, list):
        return [clean(item) for item in value]
    if isinstance(value, dict):
        return {without_paths(str(key)): clean(item) for key, item in value.items()}
    return value
