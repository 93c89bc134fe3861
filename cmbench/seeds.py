"""Named seeds: every random draw comes from a seed derived from names.

``derive_seed(7, "noise", 12)`` is the seed of image 12's noise in evaluation 7, whatever the
batch size, the number of processes or the order in which images are made.
"""

from __future__ import annotations

import hashlib
from operator import index

#: Sampling seeds from here on are never a record's: noise levels are tuned on them.
HELD_OUT_FROM = 1_000_000


def derive_seed(*names: int | str) -> int:
    """Return a 63-bit seed that depends on the names and their order only.

    Names are length-prefixed before hashing (SHA-256), so ``("ab", "c")`` and ``("a", "bc")``
    differ, and integers differ from their decimal strings. Whatever is an integer (numpy's too)
    counts as its value.

    Raises:
        TypeError: a name is neither a string nor an integer.
    """
    digest = hashlib.sha256()
    for name in names:
        kind, plain = ("str", name) if isinstance(name, str) else ("int", int(index(name)))
        data = f"{kind}:{plain}".encode()
        digest.update(len(data).to_bytes(4, "big") + data)
    return int.from_bytes(digest.digest()[:8], "big") >> 1
