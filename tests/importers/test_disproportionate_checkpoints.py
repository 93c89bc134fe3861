"""Files that would take far more memory than their size, and files whose parts are of odd types."""

from __future__ import annotations

import copy
import io
import json
import pickle
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_builders import GOLDEN, Persistent, write_edm, write_pickle
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cmbench.data.pickles import RestrictedUnpickler, as_array, load_plain_pickle, unshell
from cmbench.errors import UserError
from cmbench.importers.inert import load_network_pickle, plain_facts
from cmbench.importers.read import read_checkpoint
from cmbench.importers.torch_file import load_tensors
from cmbench.metrics.reference_import import import_reference


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return load_file(GOLDEN / "edm-ddpmpp-uncond.weights.safetensors")


def refuse(path: Path, message: str, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_checkpoint(path, **options)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def peak_of(call: Any) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _typed(tensor: Tensor) -> torch.storage.TypedStorage:
    return torch.storage.TypedStorage(
        wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True
    )


# ---- memory ------------------------------------------------------------------------------------


def test_a_large_memo_index_takes_no_memory() -> None:
    # None, put at index 2**24 - 1: pickle's own machine in C makes room for all below it.
    data = b"\x80\x04Nr\xff\xff\xff\x00."
    assert peak_of(lambda: load_plain_pickle(data, "file")) < 2**20


def test_a_bytearray_that_is_not_there_takes_no_memory() -> None:
    data = b"\x80\x05\x96" + (2**27).to_bytes(8, "little") + b"x."

    def load() -> None:
        with pytest.raises(UserError, match="truncated or corrupt"):
            load_plain_pickle(data, "file")

    assert peak_of(load) < 2**20


@pytest.mark.parametrize("name", [b"builtins\nset", b"builtins\nfrozenset"])
@pytest.mark.parametrize("opcode", [b"R", b"\x81"])
def test_copies_of_a_container_are_counted(name: bytes, opcode: bytes) -> None:
    # A list of 100,000 numbers, and 2000 sets made of it, five bytes each.
    numbers = b"".join(b"J" + i.to_bytes(4, "little") for i in range(100_000))
    data = (
        b"\x80\x02]("
        + numbers
        + b"eq\x00c"
        + name
        + b"\nq\x01("
        + 2000 * (b"h\x01h\x00\x85" + opcode)
        + b"l."
    )

    # A set is made by a call; the other opcode wants a class, which no stand-in for a set is.
    message = r"refused: .*6 times its own size in memory" if opcode == b"R" else "corrupt pickle"

    def load() -> None:
        with pytest.raises(UserError, match=message):
            load_plain_pickle(data, "file")

    assert peak_of(load) < 100 * len(data)


def test_one_storage_under_many_names(tmp_path: Path) -> None:
    storage = torch.zeros(2**16).untyped_storage()

    class Shared:
        def __reduce__(self) -> Any:
            typed = torch.storage.TypedStorage(
                wrap_storage=storage, dtype=torch.float32, _internal=True
            )
            return (torch._utils._rebuild_tensor_v2, (typed, 0, (2**16,), (1,), False, {}))

    first = Shared().__reduce__()[1]

    class Again:
        def __reduce__(self) -> Any:
            return (torch._utils._rebuild_tensor_v2, first)

    path = write_pickle(tmp_path / "bad.pkl", {"ema": [Again() for _ in range(40)]})
    assert path.stat().st_size < 2**19
    refuse(path, "refused: .*more than 6 times its own size in memory")


def test_a_zip_that_unpacks_to_far_more(tmp_path: Path) -> None:
    torch.save({"input_blocks.0.0.weight": torch.zeros(2**20)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as given,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for info in given.infolist():
            packed.writestr(info.filename, given.read(info))
    assert torch.load(tmp_path / "b.pt", weights_only=True), "torch itself would unpack it"
    refuse(
        tmp_path / "b.pt", r"truncated or corrupt pickle \(ValueError: 'a/data.pkl' is not stored"
    )


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_storage_that_unpacks_to_far_more(tmp_path: Path) -> None:
    """The zip that torch would unpack lies within the pickle here."""
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save(_typed(torch.zeros(2**20)), plain)
    with (
        zipfile.ZipFile(plain) as given,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for info in given.infolist():
            target.writestr(info.filename, given.read(info))

    class Hidden:
        def __reduce__(self) -> Any:
            return (torch.storage._load_from_bytes, (packed.getvalue(),))

    packed.seek(0)
    assert torch.load(packed, weights_only=True).nbytes() == 2**22, "torch would unpack it"
    path = write_pickle(tmp_path / "bad.pkl", {"ema": Hidden()})
    refuse(path, "refused: the pickle asks for a storage in a zip; ")


@pytest.mark.parametrize(
    "state",
    [
        (_typed(torch.zeros(4)), 0, (2**20,), (1,)),  # a longer storage: of memory as it was found
        (_typed(torch.zeros(4)), 0, (2**40,), (0,)),  # one number seen many times
        (False, None, {}),
        (torch.zeros(2), None, {}, False, None),
    ],
)
def test_a_tensor_that_is_laid_anew(tmp_path: Path, state: Any) -> None:
    class Changed:
        def __reduce__(self) -> Any:
            arguments = (_typed(torch.zeros(4)), 0, (4,), (1,), False, {})
            return (torch._utils._rebuild_tensor_v2, arguments, state)

    path = write_pickle(tmp_path / "bad.pkl", {"ema": Changed()})
    refuse(path, "refused: the pickle asks for a change of a tensor; ")


def test_many_views_of_one_storage_in_a_pt(tmp_path: Path) -> None:
    base = torch.zeros(2**20, dtype=torch.float16)
    weights = load_file(GOLDEN / "openai-adm-cond.weights.safetensors")
    views = {f"more.{i}": base[:] for i in range(8)}
    torch.save({n: w.half() for n, w in weights.items()} | views, tmp_path / "a.pt")
    refuse(
        tmp_path / "a.pt",
        r"holds tensors of [\d,]+ bytes in a file of [\d,]+; allowed: up to",
        resolution=16,
        channels_per_head=16,
    )


def test_an_honest_network_is_well_within_the_bounds(
    tmp_path: Path, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_edm(tmp_path / "a.pkl", weights)
    monkeypatch.setattr(RestrictedUnpickler, "SHARE", 4)
    assert read_checkpoint(path).architecture == "ddpmpp"
    assert load_network_pickle(write_pickle(tmp_path / "big.pkl", {"x": torch.zeros(2**21)}))[
        "x"
    ].shape == (2**21,)


# ---- billions of laughs ------------------------------------------------------------------------


def laughs(depth: int = 60) -> Any:
    inner: Any = {"x": 1}
    for _ in range(depth):
        inner = {"a": inner, "b": [inner, (inner, inner)]}
    return inner


def test_shared_containers_are_walked_once() -> None:
    read = load_plain_pickle(pickle.dumps(laughs()), "file")
    assert read["a"] is read["b"][0]
    assert len(json.dumps(plain_facts(laughs(4)))) < 100_000


def test_a_container_within_itself() -> None:
    loop: list[Any] = [np.arange(3), {}]
    loop.append(loop)
    read = load_plain_pickle(pickle.dumps(loop), "file")
    assert read[2] is read
    assert np.array_equal(read[0], np.arange(3))
    assert unshell(loop)[2] is not loop


@pytest.mark.parametrize(
    ("before", "make"),
    [
        (b"", b"h%ch%c\x86"),  # a pair of the last one
        (b"ctorch\nSize\nq\xfe0", b"h\xfe(h%ch%cl\x85R"),  # by the name that stands for tuple
    ],
)
def test_tuples_that_take_forever_to_hash(tmp_path: Path, before: bytes, make: bytes) -> None:
    # Each tuple goes into the memo and off the stack; the last becomes the key of a dict.
    pairs = b"".join(make % (i, i) + b"q%c0" % (i + 1) for i in range(60))
    path = tmp_path / "bad.pkl"
    path.write_bytes(b"\x80\x04}" + before + b")q\x000" + pairs + b"h%cK\x01s." % 60)
    refuse(path, "refused: the pickle asks for keys nested without end; ")


def test_tuples_deeper_than_the_stack() -> None:
    data = b"\x80\x04})" + b"\x85" * 1_000_000 + b"K\x01s."
    with pytest.raises(UserError, match=r"refused: .*keys nested without end"):
        load_plain_pickle(data, "file")


def in_every_kind_of_key(key: bytes) -> dict[str, bytes]:
    """Return pickles that hash what ``key`` pushes, by each opcode and call that hashes."""
    end = {
        "SETITEM": b"}%bK\x01s.",
        "SETITEMS": b"}(%bK\x01u.",
        "DICT": b"(%bK\x01d.",
        "ADDITEMS": b"\x8f(%b\x90.",
        "FROZENSET": b"(%b\x91.",
        "frozenset": b"cbuiltins\nfrozenset\n](%be\x85R.",
        "set": b"cbuiltins\nset\n](%be\x85R.",
        "OrderedDict": b"ccollections\nOrderedDict\n](](%bK\x01ee\x85R.",
    }
    return {name: b"\x80\x04" + form.replace(b"%b", key) for name, form in end.items()}


def towers(form: bytes) -> bytes:
    """Return opcodes that push 60 containers, each of the two before it (``%c`` their places)."""
    start = b"K\x00q\x000K\x01q\x010"
    return start + b"".join(form % (i, i + 1) + b"q%c0" % (i + 2) for i in range(60)) + b"h%c" % 61


@pytest.mark.parametrize("form", [b"h%ch%c\x86", b"(h%ch%c\x91"])
@pytest.mark.parametrize("kind", in_every_kind_of_key(b""))
def test_towers_of_keys(tmp_path: Path, form: bytes, kind: str) -> None:
    """Hashing the last takes 2**40 steps, or many a frozenset's: not one is taken."""
    wrapped = in_every_kind_of_key(towers(form))[kind]
    message = "refused: .*keys nested without end"
    with pytest.raises(UserError, match=message):
        load_plain_pickle(wrapped, "file")
    (tmp_path / "a.pkl").write_bytes(wrapped)
    refuse(tmp_path / "a.pkl", message)
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", wrapped)
    refuse(tmp_path / "a.pt", message)
    with pytest.raises(UserError, match=message):
        import_reference(tmp_path / "a.pt")
    with pytest.raises(UserError, match=message):
        import_reference(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (b"cnumpy\ndtype\n", b"\x85R.", r"numpy.dtype\(a tuple\)"),
        (b"", b"Q.", "a persistent object of a tuple"),
        (b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n}(\x8c\x05state}"
         b"\x8c\x0aclass_name", b"u\x85R.", "holds no network 'ema'"),
    ],
)  # fmt: skip
def test_towers_are_not_printed_either(
    tmp_path: Path, before: bytes, after: bytes, message: str
) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(b"\x80\x04" + before + towers(b"h%ch%c\x86") + after)
    refuse(path, message)


def test_lists_that_would_become_arrays_of_any_size(tmp_path: Path) -> None:
    tower: list[Any] = [1.0, 1.0]
    for _ in range(60):
        tower = [tower, tower]
    path = tmp_path / "edm2.pkl"
    path.write_bytes(pickle.dumps({"fid": {"mu": tower, "sigma": tower}}))
    with pytest.raises(UserError, match="mu is a list; allowed: an array"):
        import_reference(path)
    with pytest.raises(ValueError, match="labels is a list, not an array or a list of numbers"):
        as_array(tower, "labels")
    assert as_array([1, 2], "labels").tolist() == [1, 2]


def test_many_steps_and_much_time(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"\x80\x04" + 3000 * b"N0" + b"N."
    assert load_plain_pickle(data, "file") is None
    monkeypatch.setattr(RestrictedUnpickler, "MOST_SECONDS", 0.0)
    with pytest.raises(UserError, match=r"refused: .*more than 0 s of processor time"):
        load_plain_pickle(data, "file")
    monkeypatch.setattr(RestrictedUnpickler, "MOST_OPCODES", 1000)
    with pytest.raises(UserError, match=r"refused: .*more than 1,000 steps"):
        load_plain_pickle(data, "file")


def test_a_huge_integer() -> None:
    data = b"\x80\x04\x8b" + (10**6).to_bytes(4, "little") + b"\x01" * 10**6 + b"."
    with pytest.raises(UserError, match="an integer of 1000000 bytes"):
        load_plain_pickle(data, "file")


def test_sizes_that_are_tensors(tmp_path: Path) -> None:
    """Arithmetic of uint8 tensors wraps around: 200 * 200 elements look like 64."""

    class Strange:
        def __reduce__(self) -> Any:
            side = torch.tensor(200, dtype=torch.uint8)
            return (
                torch._utils._rebuild_tensor_v2,
                (_typed(torch.zeros(4)), 0, (side, side), (torch.tensor(0), torch.tensor(0)),
                 False, {}),
            )  # fmt: skip

    path = write_pickle(tmp_path / "bad.pkl", {"ema": Strange()})
    refuse(path, "a tensor of an impossible size, stride or offset")


def test_a_second_archive_in_the_file_is_not_read(tmp_path: Path) -> None:
    """One parser decides what is read: a bomb that only another reader finds stays packed."""
    torch.save({"fc.weight": torch.arange(4.0)}, tmp_path / "inner.pt")
    torch.save({"fc.weight": torch.zeros(2**20)}, tmp_path / "outer.pt")
    data = (tmp_path / "outer.pt").read_bytes() + (tmp_path / "inner.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(data)
    assert torch.equal(load_tensors(tmp_path / "a.pt")["fc.weight"], torch.arange(4.0))


def test_members_that_share_bytes(tmp_path: Path) -> None:
    """Many storages of a zip may claim the same bytes of it."""
    tensors = {str(i): torch.full((2**14,), float(i)) for i in range(8)}
    torch.save(tensors, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        pickled = archive.read("a/data.pkl")
        storage = archive.read("a/data/0")
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        archive.writestr("b/data.pkl", pickled)
        archive.writestr("b/data/0", storage)
        for i in range(1, 8):
            archive.filelist.append(copy.copy(archive.getinfo("b/data/0")))
            archive.filelist[-1].filename = f"b/data/{i}"
    refuse(tmp_path / "b.pt", "truncated or corrupt pickle")


def test_many_small_tuples_are_no_offence() -> None:
    data = {"shapes": tuple((i, (i, i)) for i in range(20_000)), (1, (2, 3)): 4}
    assert load_plain_pickle(pickle.dumps(data), "file") == data


def modules(children: Any, **more: Any) -> dict[str, Any]:
    return {"_parameters": {}, "_buffers": {}, "_modules": children, **more}


def container(children: Any) -> nn.ModuleDict:
    made = nn.ModuleDict()
    made.__dict__["_modules"] = children
    return made


def test_modules_without_end(tmp_path: Path) -> None:
    shared = container({})
    for _ in range(30):
        shared = container({"a": shared, "b": shared})
    path = write_pickle(
        tmp_path / "wide.pkl", {"ema": Persistent("EDMPrecond", modules({"x": shared}))}
    )
    refuse(path, "modules are nested without end")
    loop = container({})
    loop.__dict__["_modules"] = {"self": loop}
    path = write_pickle(
        tmp_path / "deep.pkl", {"ema": Persistent("EDMPrecond", modules({"x": loop}))}
    )
    refuse(path, "modules are nested without end")


# ---- odd types ---------------------------------------------------------------------------------


def test_objects_made_without_a_state(tmp_path: Path) -> None:
    path = tmp_path / "bare.pkl"
    path.write_bytes(b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81.")
    refuse(path, "holds no network 'ema'")


@pytest.mark.parametrize(
    "change",
    [
        {"_modules": [1]},
        {"_parameters": {}, "_buffers": [1]},
        {"_modules": {1: 2}, "_buffers": 3},
        {"_non_persistent_buffers_set": 7},
    ],
)
def test_parts_of_odd_types(tmp_path: Path, change: dict[str, Any]) -> None:
    state = modules({}) | change
    path = write_pickle(tmp_path / "a.pkl", {"ema": Persistent("EDMPrecond", state)})
    refuse(path, r"a module's _(modules|buffers) is a|unknown network")


@pytest.mark.parametrize(
    "tensors",
    [
        {"model.enc.foo": torch.zeros(1)},
        {
            "model.enc.8x8_conv.weight": torch.zeros(3),
            "model.enc.8x8_aux_norm.weight": torch.zeros(1),
        },
        {"unet.enc.foo": torch.zeros(1)},
        {"unet.enc.8x8_conv.weight": torch.zeros(3), "unet.emb_fourier.freqs": torch.zeros(())},
        {"input_blocks.0.0.weight": torch.zeros(3)},
        {
            "input_blocks.0.0.weight": torch.zeros(0, 3, 3, 3),
            "time_embed.0.weight": torch.zeros(4, 0),
            "input_blocks.1.0.out_layers.3.weight": torch.zeros(4, 1),
            "out.2.weight": torch.zeros(3),
            "input_blocks.1.0.emb_layers.1.weight": torch.zeros(4),
            "output_blocks.0.0.x": torch.ones(1),
        },
    ],
)
def test_shapes_that_make_no_network(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    refuse(tmp_path / "a.safetensors", r"shapes make no network|is missing", resolution=8)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sample_size", [16, 8]),
        ("sample_size", "x"),
        ("sample_size", 0),
        ("layers_per_block", "x"),
        ("attention_head_dim", [8]),
        ("attention_head_dim", -1),
        ("down_block_types", 3),
        ("up_block_types", [["x"]]),
        ("block_out_channels", None),
        ("block_out_channels", [32]),
        ("block_out_channels", [32, 0]),
        ("block_out_channels", [0, 32]),
        ("block_out_channels", ["x", 32]),
        ("time_embedding_dim", "x"),
        ("out_channels", "x"),
        ("_class_name", 3),
    ],
)
def test_diffusers_configs_of_odd_types(tmp_path: Path, key: str, value: object) -> None:
    refuse(diffusers(tmp_path, {key: value}), rf"{key} (= |has )")


def test_a_diffusers_size_as_an_equal_pair(tmp_path: Path) -> None:
    side = json.loads((GOLDEN / "diffusers-adm-cond.config.json").read_text())["sample_size"]
    found = read_checkpoint(diffusers(tmp_path, {"sample_size": [side, side]}))
    assert found.data_shape[1:] == (side, side)


def diffusers(folder: Path, change: dict[str, Any]) -> Path:
    config = json.loads((GOLDEN / "diffusers-adm-cond.config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    weights = load_file(GOLDEN / "diffusers-adm-cond.model.safetensors")
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder


def test_whatever_else_goes_wrong_is_one_line(
    tmp_path: Path, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def surprise(*_: object) -> None:
        raise ZeroDivisionError("of a kind\nthat nobody foresaw")

    monkeypatch.setattr("cmbench.importers.read.to_ours", surprise)
    path = write_edm(tmp_path / "a.pkl", weights)
    refuse(path, r"makes no sense \(ZeroDivisionError: of a kind that nobody foresaw\)")


# ---- shapes and dtypes of the weights ----------------------------------------------------------


@pytest.mark.parametrize("turn", ["transposed", "flat", "split"])
def test_as_many_numbers_in_another_shape(
    tmp_path: Path, weights: dict[str, Tensor], turn: str
) -> None:
    name = next(
        n
        for n, w in weights.items()
        if w.ndim == 4 and w.shape[0] != w.shape[1] and w.shape[-1] == 3 and "block" in n
    )
    right = weights[name]
    wrong = {
        "transposed": right.transpose(0, 1),
        "flat": right.flatten(1),
        "split": right.reshape(right.shape[0], 3, -1, 3),
    }[turn].contiguous()
    path = write_edm(tmp_path / "a.pkl", weights | {name: wrong})
    shape = str(tuple(right.shape)).replace("(", r"\(").replace(")", r"\)")
    refuse(path, rf"{name} has shape .*; allowed: {shape}")


def test_integer_weights(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    name = "model.dec.16x16_aux_conv.weight"
    save_file(weights | {name: weights[name].to(torch.int8)}, tmp_path / "a.safetensors")
    refuse(tmp_path / "a.safetensors", rf"{name} is of int8; allowed: float32")
