"""Ways to damage a file: blindly, and within its format, so that damage gets past checksums."""

from __future__ import annotations

import copy
import gzip
import io
import json
import pickle
import random
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from cmbench.files import SEAL, sealed

Random = random.Random
Files = dict[str, bytes]

#: Integers at the edges of what formats store.
EDGES = (0, 1, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
#: Values that readers of text do not expect.
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    10**30,
    -(10**400),
    1e308,
    -1e308,
    5e-324,
    float("nan"),
    float("inf"),
    "",
    "x" * 5000,
    "\x1b[2J\x07",
    "=1+1",
    "../../outside",
    "/etc/passwd",
    "\ud800",
    "\u202e",
    "\x00",
    [],
    {},
    [[]],
    ["a", 1, None],
    {"a": {"b": {}}},
)
TEXTS = (
    b"1e308",
    b"-1",
    b"9" * 5000,
    b"1e99999",
    b"nan",
    b"inf",
    b"[" * 3000,
    b"{a=" * 1500,
    b'"\\u0000"',
    b'"\x1b[31m"',
    b"=cmd()",
    b"../../outside",
    b"0x7fffffffffffffff",
    b"1979-05-27T07:32:00Z",
    b"''",
    b'"""',
    b"\xff\xfe",
)
#: Names of files in archives.
NAMES = ("../../out", "/abs/x.png", "a\x1b[2J.png", "x/" * 90, "", ".", "a\udcff.png")
#: Stands for a named pipe in the place of a file.
PIPE = b"a named pipe"
_ATOM = re.compile(rb"""-?\d[\w.+-]*|"[^"\n]*"|[A-Za-z_][\w-]*""")


def damage(files: Files, rng: Random) -> Files:
    """Return a copy of the files in which one is damaged, or a named pipe."""
    changed = dict(files)
    name = rng.choice(sorted(files))
    data = files[name]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        with suppress(Exception):  # a format that is damaged already: bytes are changed below
            data = within(data, rng) if rng.random() < 0.6 else blindly(data, rng)
    changed[name] = data if data != files[name] else blindly(data, rng)
    if rng.random() < 0.02:
        changed[name] = PIPE
    return changed


# ---- without knowing the format ----------------------------------------------------------------


def blindly(data: bytes, rng: Random) -> bytes:
    """Change, cut, repeat or insert bytes."""
    if not data:
        return rng.randbytes(9)
    place, length = rng.randrange(len(data)), rng.choice((1, 2, 4, 8, 64, 1000))
    rest = data[place + length :]
    edge = rng.choice(EDGES)
    width = rng.choice((1, 2, 4, 8))
    order: Any = rng.choice(("little", "big"))
    number = (edge % 256**width).to_bytes(width, order)
    return rng.choice(
        (
            lambda: data[:place],
            lambda: data[:place] + rest,
            lambda: data[:place] + rng.randbytes(length) + rest,
            lambda: data[:place] + number + data[place + width :],
            lambda: data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :],
            lambda: data[:place] + rng.randbytes(length) + data[place:],
            lambda: data[: place + length] + data[place:],
            lambda: data + data[:length],
            lambda: b"",
        )
    )()


# ---- within the format --------------------------------------------------------------------------


def within(data: bytes, rng: Random) -> bytes:
    """Damage the contents and keep checksums and lengths around them right."""
    for magic, change in CHANGES:
        if data.startswith(magic):
            return change(data, rng)
    if data[257:262] == b"ustar":
        return _tar(data, rng)
    if data[8:9] == b"{":
        return _safetensors(data, rng)
    with suppress(ValueError):
        data.decode()
        return _json(data, rng) if data[:1] in b"{[" else _text(data, rng)
    return blindly(data, rng)


def _zip(data: bytes, rng: Random) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as given, zipfile.ZipFile(out, "w") as made:
        infos = given.infolist()
        chosen = rng.randrange(len(infos))
        for i, info in enumerate(infos):
            name, inner = info.filename, given.read(info)
            if i == chosen:
                if rng.random() < 0.2:
                    name = rng.choice(
                        ("../out", "/abs", "a\x1b[2J.png", "x/" * 300, "", name + "/")
                    )
                else:
                    inner = within(inner, rng) if rng.random() < 0.7 else blindly(inner, rng)
            made.writestr(name, inner, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
            if rng.random() < 0.05:  # twice, or one whose directory lies
                made.filelist.append(copy.copy(made.filelist[-1]))
                made.filelist[-1].file_size = rng.choice(EDGES) % 2**32
    return out.getvalue()


def _gzip(data: bytes, rng: Random) -> bytes:
    inner = gzip.decompress(data)
    return gzip.compress(within(inner, rng) if rng.random() < 0.8 else blindly(inner, rng), 1)


def _tar(data: bytes, rng: Random) -> bytes:
    out = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(data)) as given,
        tarfile.open(fileobj=out, mode="w") as made,
    ):
        infos = given.getmembers()
        chosen = rng.choice(infos).name
        for info in infos:
            file = given.extractfile(info)
            inner = file.read() if file else b""
            if info.name == chosen:
                kind = rng.randrange(3)
                if kind == 0:
                    info.name = rng.choice(
                        ("../../out", "/abs/x.png", "a\x1b[2J.png", "x/" * 90, ".")
                    )
                elif kind == 1:
                    info.type = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE))
                    info.linkname = "/etc/passwd"
                else:
                    inner = within(inner, rng) if rng.random() < 0.7 else blindly(inner, rng)
            info.size = len(inner)
            made.addfile(info, io.BytesIO(inner))
    return out.getvalue()


def _png(data: bytes, rng: Random) -> bytes:
    """Damage a chunk, and set its checksum right again."""
    place, chunks = 8, []
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    chosen = rng.randrange(len(chunks))
    kind, body = chunks[chosen]
    if kind == b"IDAT" and rng.random() < 0.5:
        body = zlib.compress(blindly(zlib.decompress(body), rng))
    elif rng.random() < 0.3:
        kind = rng.choice((b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"iTXt", b"zTXt", b"iCCP", b"acTL"))
    else:
        body = blindly(body, rng)
    chunks[chosen] = (kind, body)
    if rng.random() < 0.2:
        chunks.insert(rng.randrange(len(chunks)), rng.choice(chunks))
    whole = (
        struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks
    )
    return data[:8] + b"".join(whole)


def _npy(data: bytes, rng: Random) -> bytes:
    """Write another header."""
    size = int.from_bytes(data[8:10], "little")
    header, body = data[10 : 10 + size], data[10 + size :]
    new = rng.choice(
        (
            lambda: _text(header, rng),
            lambda: header.replace(b"|u1", rng.choice((b"|O", b">f8", b"<f16", b"V0", b"M8[ns]"))),
            lambda: re.sub(rb"\([^)]*\)", b"(-1,)", header),
            lambda: re.sub(rb"\([^)]*\)", b"(%d, %d)" % (rng.choice(EDGES), 2**40), header),
            lambda: b"(" * rng.choice((10, 90, 3000)) + header,
            lambda: b"{'descr': [('a', 'O')], 'fortran_order': False, 'shape': (3,)}",
        )
    )()
    return data[:8] + (len(new) % 2**16).to_bytes(2, "little") + new[: 2**16 - 1] + body


def _safetensors(data: bytes, rng: Random) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header = _json(data[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def _text(data: bytes, rng: Random) -> bytes:
    """Replace a number, a word or a string."""
    atoms = list(_ATOM.finditer(data))
    if not atoms:
        return blindly(data, rng)
    found = rng.choice(atoms)
    new = rng.choice((*TEXTS, rng.choice(atoms)[0]))
    return data[: found.start()] + new + data[found.end() :]


def _json(data: bytes, rng: Random) -> bytes:
    """Replace, remove or add a value somewhere."""
    try:
        tree = json.loads(data)
    except ValueError:
        return _text(data, rng)
    places: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        inner = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in inner:
            places.append((node, key))
            if isinstance(value, (dict, list)):
                waiting.append(value)
    if not places:
        return _text(data, rng)
    node, key = rng.choice(places)
    kind = rng.randrange(5)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[rng.choice(("x", "\x1b[2J", "=a", "", "../x", key * 2))] = node.pop(key)
    elif kind == 2:
        other, place = rng.choice(places)
        with suppress(LookupError):
            node[key] = copy.deepcopy(other[place])
    else:
        node[key] = rng.choice(VALUES)
    if isinstance(tree, dict) and SEAL in tree:
        with suppress(TypeError, ValueError):  # the hash of what is in the file now
            tree = sealed({name: value for name, value in tree.items() if name != SEAL})
    if rng.random() < 0.03:
        deep = "[" * 400 + "]" * 400
        return json.dumps(tree).replace("null", deep, 1).encode("utf-8", "surrogatepass")
    return json.dumps(tree).encode()


#: Opcodes of pickles, and what hostile pickles are made of.
_OPCODES = [bytes([code]) for code in range(1, 151)]
_SNIPPETS = (
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"cbuiltins\ngetattr\n",
    b"cnumpy\nndarray\n",
    b"cnumpy\ndtype\n",
    b"ctorch\nSize\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch.storage\n_load_from_bytes\n",
    b"ccollections\nOrderedDict\n",
    b"cbuiltins\nset\n",
    b"X\x01\x00\x00\x00a",
    b"\x8a\x01\x05",
    b"\x8b\xff\xff\xff\x7f",
    b"\x8e\xff\xff\xff\xff\xff\xff\xff\x00",
    b"\x95\xff\xff\xff\xff\xff\xff\x00\x00",
    b"K\x05M\xff\xffJ\xff\xff\xff\x7f",
    b"h\x00h\x00\x86q\x000" * 30,
    b"(h\x00h\x00\x91q\x000" * 30,
    b"]" * 2000,
    b")" + b"\x85" * 2000,
    b"(" * 500,
    b"2" * 200,
)


def _pickle(data: bytes, rng: Random) -> bytes:
    """Insert opcodes, or leave some out."""
    start = rng.randrange(2, len(data))
    cut = data.rfind(rng.choice(_OPCODES), 0, start)
    place = max(cut, 2)
    new = rng.choice((*_SNIPPETS, *rng.choices(_OPCODES, k=len(_SNIPPETS))))
    if rng.random() < 0.2:
        return data[:place] + data[place + 1 :]
    return data[:place] + new + data[place:]


CHANGES: tuple[tuple[bytes, Callable[[bytes, Random], bytes]], ...] = (
    (b"PK", _zip),
    (b"\x1f\x8b", _gzip),
    (b"\x89PNG", _png),
    (b"\x93NUMPY", _npy),
    (pickle.PROTO, _pickle),
)
