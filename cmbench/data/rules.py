"""What ``cmbench prepare`` knows of each built-in dataset: where to get it, how to cut it.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """How a dataset is prepared.

    ``transform`` cuts images of a *folder, tar or LMDB* of originals; a zip or batch file is taken
    to be cut already and must have the exact resolution. ``count`` is the number of training
    images, ``kinds`` the sources that make sense, ``stored`` shape and type where what is stored is
    not the image, ``hint`` what to give as ``--source``. ``upright`` applies EXIF orientations; the
    preparations that the papers used ignored them.
    """

    hint: str
    transform: str = "none"
    count: int | None = None
    kinds: tuple[str, ...] = ("folder", "zip", "tar")
    lossless: bool = False
    upright: bool = True
    stored: tuple[tuple[int, int, int], str] | None = None


_ILSVRC = "the ILSVRC 2012 folder Data/CLS-LOC/train (https://image-net.org)"
_ILSVRC_COUNT = 1_281_167

RULES: dict[str, Rule] = {
    "cifar10": Rule(
        "cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html, "
        "EDM's cifar10-32x32.zip, or a folder of lossless images",
        count=50_000,
        kinds=("cifar-python", "zip", "folder", "tar"),
        lossless=True,
    ),
    "cifar10-jpeg": Rule("the archive or folder train/<class>/<n>.jpg", count=50_000),
    "imagenet64": Rule(
        f"{_ILSVRC}, or EDM2's img64.zip (center-crop-dhariwal)",
        transform="dhariwal-crop",
        upright=False,
        count=_ILSVRC_COUNT,
    ),
    "imagenet64-adm": Rule(_ILSVRC, transform="adm-crop", upright=False, count=_ILSVRC_COUNT),
    "imagenet64-edm": Rule(
        f"{_ILSVRC}, or EDM's imagenet-64x64.zip (center-crop)",
        transform="edm-crop",
        upright=False,
        count=_ILSVRC_COUNT,
    ),
    "imagenet64-small": Rule(
        "the folder of train_data_batch_1 … 10, .npz or pickle (https://image-net.org)",
        count=_ILSVRC_COUNT,
        kinds=("imagenet-batches",),
    ),
    "lsun-bedroom256": Rule(
        "bedroom_train_lmdb (https://www.yf.io/p/lsun) or a folder of its images",
        transform="lsun-crop",
        upright=False,
        count=3_033_042,
        kinds=("lmdb", "folder", "zip", "tar"),
    ),
    "lsun-cat256": Rule(
        "the cat LMDB (https://www.yf.io/p/lsun) or a folder of its images",
        transform="lsun-crop",
        upright=False,
        count=1_657_266,
        kinds=("lmdb", "folder", "zip", "tar"),
    ),
    "imagenet512": Rule(
        "EDM2's img512-sd.zip of latents (its dataset_tool.py, `encode`)",
        count=_ILSVRC_COUNT,
        kinds=("zip", "folder"),
        stored=((8, 64, 64), "float32"),
    ),
}

#: For ``folder:PATH`` and ``zip:PATH``.
CUSTOM_RULE = Rule("the images", kinds=("folder", "zip", "tar", "lmdb"))
