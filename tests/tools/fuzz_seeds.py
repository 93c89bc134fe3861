"""Sound files of every kind that cmbench reads, and the command that reads each."""

from __future__ import annotations

import io
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

TESTS = Path(__file__).parents[1]
for folder in ("data", "importers", "report"):
    sys.path.append(str(TESTS / folder))

from checkpoint_builders import write_edm  # noqa: E402
from dataset_builders import cifar_archive, edm_zip, image_tar, pictures  # noqa: E402
from record_factory import record, sweep  # noqa: E402

from cmbench.cli.main import main  # noqa: E402

GOLDEN = TESTS / "golden" / "networks"
JAX = TESTS / "importers" / "golden" / "jax-ncsnpp.checkpoint"


class Seed(NamedTuple):
    """Files that a reader accepts, and the arguments of cmbench that read them.

    In the arguments ``{in}`` is the folder that the files are in, and ``{out}`` an empty one.
    """

    name: str
    files: dict[str, bytes]
    arguments: tuple[str, ...]


def seeds(work: Path) -> list[Seed]:
    """Return all seeds; ``work`` is an empty folder to make them in."""
    makers: tuple[Callable[[Path], Iterator[Seed]], ...] = (
        _checkpoints,
        _references,
        _samples,
        _pictures,
        _sources,
        _records,
        _tables,
        _prepared,
    )
    return [seed for maker in makers for seed in maker(work)]


def _saved(write: Callable[[Any], object]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def _run(*arguments: str) -> None:
    try:
        main(arguments)
    except SystemExit as stopped:
        if stopped.code:
            raise AssertionError(f"{arguments} exits {stopped.code}") from None


# ---- checkpoints and statistics -----------------------------------------------------------------


def _checkpoints(work: Path) -> Iterator[Seed]:
    read = ("import", "--to", "x", "-w", "{out}")
    small = load_file(GOLDEN / "edm-ddpmpp-uncond.weights.safetensors")
    for protocol in (2, 4):
        edm = write_edm(work / "a.pkl", small, protocol=protocol).read_bytes()
        yield Seed(f"edm-pickle-{protocol}", {"a.pkl": edm}, (*read, "{in}/a.pkl"))
    edm2 = load_file(GOLDEN / "edm2-uncond.weights.safetensors")
    data = write_edm(work / "a.pkl", edm2, "Precond").read_bytes()
    yield Seed("edm2-pickle", {"a.pkl": data}, (*read, "{in}/a.pkl"))
    adm = {
        n: w.half() for n, w in load_file(GOLDEN / "openai-adm-cond.weights.safetensors").items()
    }
    options = ("--resolution", "16", "--channels-per-head", "16")
    for zipped in (True, False):
        data = _saved(lambda f, z=zipped: torch.save(adm, f, _use_new_zipfile_serialization=z))
        name = "openai-pt" if zipped else "openai-pt-legacy"
        yield Seed(name, {"a.pt": data}, (*read, *options, "{in}/a.pt"))
    tiny = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2, dtype=torch.bfloat16)}
    for zipped in (True, False):  # small, so that damage hits the structure
        data = _saved(lambda f, z=zipped: torch.save(tiny, f, _use_new_zipfile_serialization=z))
        yield Seed(f"tiny-pt-{zipped}", {"a.pt": data}, (*read, "{in}/a.pt"))
    few = write_edm(work / "a.pkl", dict(list(small.items())[:3])).read_bytes()
    yield Seed("tiny-pickle", {"a.pkl": few}, (*read, "{in}/a.pkl"))
    data = (GOLDEN / "edm-ddpmpp-cond.weights.safetensors").read_bytes()
    yield Seed("safetensors", {"a.safetensors": data}, (*read, "{in}/a.safetensors"))
    yield Seed("flax", {"checkpoint_1": JAX.read_bytes()}, (*read, "{in}/checkpoint_1"))
    model = {
        "config.json": (GOLDEN / "diffusers-adm-cond.config.json").read_bytes(),
        "diffusion_pytorch_model.safetensors": (
            GOLDEN / "diffusers-adm-cond.model.safetensors"
        ).read_bytes(),
    }
    yield Seed("diffusers-folder", model, (*read, "{in}"))


def _references(work: Path) -> Iterator[Seed]:
    read = ("refs", "import", "-w", "{out}", "--name", "x", "--no-images")
    mu, sigma = np.arange(4.0), np.eye(4)
    both = {"mu": mu, "sigma": sigma}
    openai = {**both, "mu_s": mu, "sigma_s": sigma, "arr_0": np.zeros((2, 4, 4, 3), np.uint8)}
    for name, arrays in (("edm", both), ("openai", openai), ("kid", {"feats": sigma})):
        for kind, save in (("plain", np.savez), ("packed", np.savez_compressed)):
            data = _saved(lambda f, s=save, a=arrays: s(f, **a))
            yield Seed(f"statistics-{name}-{kind}", {"a.npz": data}, (*read, "{in}/a.npz"))
    edm2 = pickle.dumps({"fid": both, "fd_dinov2": both})
    yield Seed("statistics-edm2", {"a.pkl": edm2}, (*read, "{in}/a.pkl"))
    fidelity = {name: torch.from_numpy(a) for name, a in both.items()}
    data = _saved(lambda f: torch.save(fidelity, f))
    yield Seed("statistics-torch-fidelity", {"a.pt": data}, (*read, "{in}/a.pt"))
    wide = {"mu": np.zeros(2048, "f4"), "sigma": np.eye(2048, dtype="f4")}
    np.savez_compressed(work / "own.npz", **wide)  # as wide as the extractor's features
    data = (work / "own.npz").read_bytes()
    yield Seed("statistics-wide", {"a.npz": data}, (*read, "{in}/a.npz"))
    own = work / "statistics"
    _run("refs", "import", str(work / "own.npz"), "-w", str(own), "--no-images")
    (saved,) = own.rglob("*.safetensors")
    name = saved.name
    yield Seed("statistics-own", {name: saved.read_bytes()}, (*read, f"{{in}}/{name}"))
    data = _saved(lambda f: torch.save(both, f))
    yield Seed("statistics-numpy-pt", {"a.pt": data}, (*read, "{in}/a.pt"))


# ---- samples and datasets ------------------------------------------------------------------------


def _samples(work: Path) -> Iterator[Seed]:
    read = ("eval", "-q", "-d", "digits", "--metrics", "fd-digits", "--limit", "12", "--no-record")
    grey = np.random.default_rng(0).integers(0, 255, (16, 8, 8, 1), dtype=np.uint8)
    labels = np.arange(16) % 10
    for name, save in (("plain", np.savez), ("packed", np.savez_compressed)):
        data = _saved(lambda f, s=save: s(f, arr_0=grey, arr_1=labels))
        yield Seed(f"samples-npz-{name}", {"a.npz": data}, (*read, "{in}/a.npz"))
    yield Seed("samples-npy", {"a.npy": _saved(lambda f: np.save(f, grey))}, (*read, "{in}/a.npy"))
    pngs = {
        f"{i}.png": _saved(lambda f, g=image: Image.fromarray(g[..., 0]).save(f, "png"))
        for i, image in enumerate(grey[:12])
    }
    yield Seed("samples-folder", pngs, (*read, "{in}"))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in pngs.items():
            archive.writestr(name, data)
    yield Seed("samples-zip", {"a.zip": buffer.getvalue()}, (*read, "{in}/a.zip"))


def _pictures(work: Path) -> Iterator[Seed]:
    """One picture of each format and mode, in a folder that is prepared."""
    colour = pictures(1, 8)[0]
    image, noisy = Image.fromarray(colour), Image.fromarray(pictures(1, 24)[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: tuple[tuple[str, str, Any, dict[str, Any]], ...] = (
        ("png", "png", image, {}),
        ("palette", "png", image.convert("P"), {"transparency": 0}),
        ("alpha", "png", image.convert("RGBA"), {"exif": exif}),
        ("jpg", "jpeg", noisy, {"exif": exif}),
        ("progressive", "jpeg", noisy, {"progressive": True}),
        ("cmyk", "jpeg", noisy.convert("CMYK"), {}),
        ("tif", "tiff", image, {}),
        ("lzw", "tiff", image, {"compression": "tiff_lzw"}),
        ("deflate", "tiff", image, {"compression": "tiff_adobe_deflate"}),
        ("gif", "gif", image, {}),
        ("webp", "webp", noisy, {}),
        ("lossless", "webp", image, {"lossless": True}),
        ("bmp", "bmp", image, {}),
    )
    other = _saved(lambda f: image.save(f, "png"))
    suffixes = {"jpeg": "jpg", "tiff": "tif"}
    read = ("prepare", "folder:{in}", "--name", "mine", "--data-dir", "{out}", "--workers", "1")
    for name, kind, picture, options in kinds:
        data = _saved(lambda f, p=picture, k=kind, o=options: p.save(f, k, **o))
        files = {f"a.{suffixes.get(kind, kind)}": data, "b.png": other}
        more = ("--transform", "edm-crop", "--resolution", "8")
        yield Seed(f"picture-{name}", files, (*read, *more))


def _sources(work: Path) -> Iterator[Seed]:
    read = ("prepare", "--data-dir", "{out}", "--subset", "--workers", "1")
    images = pictures(10, 32)
    path = cifar_archive(work / "cifar-10-python.tar.gz", images, [i % 10 for i in range(10)])
    name = path.name
    yield Seed(
        "cifar-archive", {name: path.read_bytes()}, (*read, "cifar10", "--source", f"{{in}}/{name}")
    )
    rows = images.transpose(0, 3, 1, 2).reshape(10, -1)
    batches = {
        f"data_batch_{i + 1}": pickle.dumps(
            {b"data": rows[2 * i : 2 * i + 2], b"labels": [1, 2]}, protocol=2
        )
        for i in range(5)
    }
    yield Seed("cifar-folder", batches, (*read, "cifar10", "--source", "{in}"))
    large = np.random.default_rng(0).integers(0, 255, (2, 3 * 64 * 64), dtype=np.uint8)
    batch = {"data": large, "labels": np.array([1, 2])}
    npz = {"train_data_batch_1.npz": _saved(lambda f: np.savez(f, **batch))}
    yield Seed("imagenet-npz", npz, (*read, "imagenet64-small", "--source", "{in}"))
    pickled = {"train_data_batch_1": pickle.dumps({"data": large, "labels": [1, 2]})}
    yield Seed("imagenet-pickle", pickled, (*read, "imagenet64-small", "--source", "{in}"))
    own = (*read, "--name", "mine")
    for kind, method in (("stored", zipfile.ZIP_STORED), ("deflated", zipfile.ZIP_DEFLATED)):
        path = edm_zip(work / "a.zip", pictures(4), [0, 1, 0, 1], compression=method)
        yield Seed(f"edm-zip-{kind}", {"a.zip": path.read_bytes()}, (*own, "zip:{in}/a.zip"))
    for mode in ("w", "w:gz", "w:xz"):
        path = image_tar(work / "a.tar", pictures(4, 64), mode=mode)
        files = {"a.tar": path.read_bytes()}
        yield Seed(f"tar-{mode}", files, (*read, "lsun-bedroom256", "--source", "{in}/a.tar"))
    with np.errstate(all="ignore"):
        yield from _database(work, read)


def _database(work: Path, read: tuple[str, ...]) -> Iterator[Seed]:
    try:
        import lmdb
    except ImportError:
        return
    folder = work / "lmdb"
    with (
        lmdb.open(str(folder), map_size=1 << 20) as environment,
        environment.begin(write=True) as transaction,
    ):
        for i, image in enumerate(pictures(5, 64)):
            data = _saved(lambda f, p=image: Image.fromarray(p).save(f, "webp"))
            transaction.put(f"{i:040d}".encode(), data)
    files = {"data.mdb": (folder / "data.mdb").read_bytes()}
    yield Seed("lmdb", files, (*read, "lsun-bedroom256", "--source", "{in}"))


# ---- records, tables, manifests ------------------------------------------------------------------


def _records(work: Path) -> Iterator[Seed]:
    one = record().to_json().encode()
    many = {f"records/digits/{r.cell}.json": r.to_json().encode() for r in sweep(seeds=2)}
    yield Seed("record-show", {"a.json": one}, ("show", "{in}/a.json"))
    yield Seed("record-verify", {"a.json": one}, ("verify", "--no-resample", "{in}/a.json"))
    yield Seed("records-report", many, ("report", "-w", "{in}", "--out", "{out}/pages"))
    yield Seed("records-export", many, ("export", "csv", "-w", "{in}"))
    yield Seed("records-compare", many, ("compare", "alpha", "beta", "-d", "digits", "-w", "{in}"))
    yield Seed("records-merge", many, ("merge", "{in}", "-w", "{out}"))
    yield Seed("records-status", many, ("status", "-w", "{in}"))
    source = work / "submitted"
    for name, data in many.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    files = sorted(str(p) for p in source.rglob("*.json"))[:3]
    _run("submit", *files, "--out", str(work / "s.zip"), "-w", str(source))
    packed = {"s.zip": (work / "s.zip").read_bytes()}
    yield Seed("submission", packed, ("verify", "--no-resample", "{in}/s.zip"))


RECIPE = b"""[base]
batch_size = 128
[digits.mine]
extends = "demo"
duration_kimg = 2.5
network = { name = "unet-tiny", channels = 16 }
ema = [{ halflife_kimg = 1.0, rampup_ratio = 0.1 }]
optimizer = { lr = 0.001, warmup_kimg = 1.0, decay = "cosine" }
mid_sigmas = [0.8]
[digits.demo]
duration_kimg = 1
"""


def _tables(work: Path) -> Iterator[Seed]:
    run = ("run", "-q", "-m", "ect", "-d", "digits", "-w", "{out}", "--nfe", "1,2", "--dry-run")
    yield Seed("recipe", {"a.toml": RECIPE}, (*run, "--recipe", "{in}/a.toml:mine"))
    boards = TESTS.parent / "leaderboards" / "imagenet512"
    board = {f"imagenet512/{n}": (boards / n).read_bytes() for n in ("board.toml", "published.csv")}
    yield Seed("board", board, ("leaderboard", "validate", "{in}"))
    yield Seed("board-render", board, ("leaderboard", "render", "{in}", "--out", "{out}/pages"))


def _prepared(work: Path) -> Iterator[Seed]:
    folder = work / "pictures"
    folder.mkdir()
    for i, image in enumerate(pictures(3)):
        Image.fromarray(image).save(folder / f"{i}.png")
    data = work / "data"
    _run("prepare", f"folder:{folder}", "--name", "mine", "--data-dir", str(data))
    files = {str(p.relative_to(data)): p.read_bytes() for p in data.rglob("*") if p.is_file()}
    check = ("prepare", "mine", "--verify", "--data-dir", "{in}")
    yield Seed("prepared-verify", files, check)
    yield Seed("prepared-list", files, ("prepare", "--data-dir", "{in}"))
    spaces = work / "workspace"
    small = load_file(GOLDEN / "edm-ddpmpp-uncond.weights.safetensors")
    checkpoint = write_edm(work / "a.pkl", small, "ECMPrecond")
    _run("import", str(checkpoint), "--to", "x", "-w", str(spaces))
    files = {str(p.relative_to(spaces)): p.read_bytes() for p in spaces.rglob("*") if p.is_file()}
    yield from _runs(work)
    use = ("run", "-q", "--checkpoint", "import:x", "-d", "cifar10", "-m", "cd", "--dry-run")
    yield Seed("imported-model", files, (*use, "-w", "{in}"))


def _runs(work: Path) -> Iterator[Seed]:
    """A finished run of a toy dataset."""
    spaces = work / "runs"
    made = ("run", "-q", "-m", "ct", "-d", "gmm", "-r", "smoke", "--nfe", "1", "--samples", "64")
    _run(*made, "-w", str(spaces))
    files = {
        str(path.relative_to(spaces)): path.read_bytes()
        for path in spaces.rglob("*")
        if path.suffix in (".json", ".jsonl") and "reports" not in path.parts
    }
    yield Seed("run-status", files, ("status", "-w", "{in}"))
    yield Seed("run-planned", files, (*made, "--dry-run", "-w", "{in}"))
    (cell,) = (name for name in files if name.startswith("records/"))
    check = ("verify", "--no-resample", f"{{in}}/{cell}", "-w", "{in}")
    yield Seed("run-verified", files, check)
