"""Files that PyTorch wrote (fixtures/make_torch_fixtures.py), and hostile ones."""

import functools
import json
import os
import pickle
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from models.checkpoints import torch_io
from models.checkpoints.memory_map import CheckpointError
from models.checkpoints.torch_io import load_torch

FIXTURES = Path(__file__).parents[2] / "fixtures"
EXPECTED = json.loads((FIXTURES / "torch_expected.json").read_text())


def fixture(name):
    return FIXTURES / f"torch_{name}.pth"


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_reads_what_pytorch_reads(name):
    reader = load_torch(fixture(name))
    expected = EXPECTED[name]
    tensors = {key: leaf for key, leaf in expected.items() if "dtype" in leaf}
    others = {key: leaf["other"] for key, leaf in expected.items() if "other" in leaf}
    assert reader.others == others
    assert list(reader) == list(tensors)
    assert len(reader) == len(tensors)
    for key, leaf in tensors.items():
        array = reader[key]
        assert array.dtype.name == leaf["dtype"], key
        assert list(array.shape) == leaf["shape"], key
        if array.size:
            strides = [stride // array.itemsize for stride in array.strides]
            assert strides == leaf["strides"], key
        numbers = np.asarray(leaf["numbers"])
        if array.dtype.kind == "c":
            numbers = numbers[0::2] + 1j * numbers[1::2]
        wide = array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
        np.testing.assert_array_equal(wide.ravel(), numbers, err_msg=key)


def test_tensors_are_views_of_the_file(tmp_path):
    file = tmp_path / "copy.pth"
    file.write_bytes(fixture("views").read_bytes())
    reader = load_torch(file)
    row = reader["row"]
    assert not row.flags.writeable
    assert row.tolist() == [12, 13, 14, 15, 16, 17]
    changed = file.read_bytes().replace(np.float32(13).tobytes(), b"\0" * 4)
    with file.open("r+b") as stream:
        stream.write(changed)
    assert row.tolist() == [12, 0, 14, 15, 16, 17]  # nothing had been copied


# Files that no PyTorch writes are put together here by hand.


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def write_pth(file, root, *, storages=None):
    """An archive like PyTorch's, of a pickle that may name any function."""
    data = root if isinstance(root, bytes) else pickle.dumps(root, protocol=2)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", data)
        archive.writestr("x/byteorder", "little")
        for record, content in (storages or {}).items():
            archive.writestr(f"x/data/{record}", content)
    return file


def tensor_pickle(
    *,
    storage="FloatStorage",
    record="0",
    size=4,
    offset=0,
    shape=(4,),
    strides=(1,),
    metadata=None,
    key="weight",
):
    """{key: tensor} in pickle's text-like opcodes, written out by hand."""

    def text(value):
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    def integer(value):
        return b"I%d\n" % value

    def integers(values):
        return b"(" + b"".join(integer(value) for value in values) + b"t"

    identifier = (
        b"("
        + text("storage")
        + b"ctorch\n%s\n" % storage.encode()
        + text(record)
        + text("cpu")
        + integer(size)
        + b"tQ"
    )
    arguments = (
        b"("
        + identifier
        + integer(offset)
        + integers(shape)
        + integers(strides)
        + b"I00\n"
        + b"N"
        + (b"" if metadata is None else b"}" + text(metadata) + b"I01\ns")
        + b"t"
    )
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"
    return b"\x80\x02}" + text(key) + tensor + b"s."


FOUR = np.arange(4, dtype=np.float32).tobytes()


def test_a_file_made_by_hand(tmp_path):
    """The well-formed base of the malformed files below."""
    file = write_pth(tmp_path / "a.pth", tensor_pickle(), storages={"0": FOUR})
    reader = load_torch(file)
    np.testing.assert_array_equal(reader["weight"], [0, 1, 2, 3])


@pytest.mark.parametrize(
    "make",
    [
        lambda mark: Call(os.system, f"touch {mark}"),
        lambda mark: Call(eval, f"open({str(mark)!r}, 'w')"),
        lambda mark: Call(getattr(Path, "touch"), mark),  # noqa: B009
        lambda mark: {"weight": [OrderedDict(a=Call(open, str(mark), "w"))]},
        lambda mark: Call(functools.partial, os.system, f"touch {mark}"),
    ],
    ids=["system", "eval", "method", "nested", "partial"],
)
def test_code_is_refused_and_not_run(tmp_path, make):
    mark = tmp_path / "mark"
    root = make(mark)
    file = write_pth(tmp_path / "evil.pth", root)
    with pytest.raises(CheckpointError, match=r"evil\.pth asks for .*, which is refu"):
        load_torch(file)
    assert not mark.exists()
    pickle.loads(pickle.dumps(root, protocol=2))  # it would have run


@pytest.mark.parametrize(
    "name",
    [
        "torch._utils\n_rebuild_sparse_tensor",
        "torch._utils\n_rebuild_tensor_v2.__globals__",
        "torch\nload",
        "torch.storage\n_load_from_bytes",
        "torch\nFloatStorage.__init__",
        "collections\ndefaultdict",
        "builtins\ngetattr",
        "models.checkpoints.torch_io\nPath",
    ],
)
def test_names_beside_the_known_ones_are_refused(tmp_path, name):
    data = b"\x80\x02c" + name.encode() + b"\n(tR."
    file = write_pth(tmp_path / "a.pth", data)
    dotted = name.replace("\n", ".")
    with pytest.raises(CheckpointError, match=rf"asks for {dotted}, which is refused"):
        load_torch(file)


@pytest.mark.parametrize(
    "name",
    [
        "torch._utils\n_rebuild_tensor_v2",
        "torch\nFloatStorage",
        "collections\nOrderedDict",
        "torch\nSize",
    ],
)
@pytest.mark.parametrize(
    "state", [b"}X\x01\x00\x00\x00xI1\ns", b"N}X\x01\x00\x00\x00x"]
)
def test_known_names_cannot_be_changed_by_a_file(tmp_path, name, state):
    """A pickle may set attributes of what it names; ours have none to set."""
    slots = state + (b"I1\ns\x86" if state.startswith(b"N") else b"")
    data = b"\x80\x02c" + name.encode() + b"\n" + slots + b"b."
    file = write_pth(tmp_path / "a.pth", data)
    with pytest.raises(CheckpointError, match=r"data\.pkl is damaged"):
        load_torch(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"record": "1"}, "lacks data/1, which holds weight"),
        ({"size": 5}, "data/0, which holds weight, has 16 bytes; expected 20"),
        ({"storage": "DoubleStorage"}, "holds weight, has 16 bytes; expected 32"),
        ({"shape": (5,)}, r"weight of shape \(5,\), .* does not fit in its storage"),
        ({"offset": 1}, "offset 1 does not fit in its storage of 4 elements"),
        ({"shape": (2, 2), "strides": (3, 1)}, r"strides \(3, 1\) and offset 0 does"),
        ({"offset": -1}, "data.pkl is damaged: .*not a plain tensor"),
        ({"strides": (-1,)}, "not a plain tensor"),
        ({"strides": (1, 1)}, "not a plain tensor"),
        ({"metadata": "neg"}, "not a plain tensor"),
        ({"storage": "QInt8Storage"}, "asks for torch.QInt8Storage, which is refused"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_tensors_that_do_not_fit_are_named(tmp_path, changes, message):
    data = tensor_pickle(**changes)
    file = write_pth(tmp_path / "wrong.pth", data, storages={"0": FOUR})
    with pytest.raises(CheckpointError, match=rf"wrong\.pth.*{message}"):
        load_torch(file)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("old", "format from before version 1.6"),
        ("script", "not one of torch.save"),
        ("whole_module", "asks for torch.nn.modules.linear.Linear, which is refused"),
    ],
)
def test_other_files_of_pytorch_are_told(name, message):
    with pytest.raises(CheckpointError, match=rf"torch_{name}\.pth .*{message}"):
        load_torch(fixture(name))


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ([1, 2], "holds a list; expected a dictionary"),
        (3, "holds a int; expected a dictionary"),
        ({"a": {"b": 1}, "a.b": 2}, r"holds the key a\.b twice"),
        (b"\x80\x02}\x94", "data.pkl is damaged"),
        (b"", "data.pkl is damaged"),
        (b"\x80\x02}X\x01\x00\x00\x00a(lb.", "data.pkl is damaged"),
        (b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", "contains itself"),
        (b"\x80\x02(I1\nI2\ntQ.", r"unknown storage: \(1, 2\)"),
    ],
    ids=["list", "number", "twice", "cut", "empty", "stack", "cycle", "storage"],
)
def test_wrong_contents_are_told(tmp_path, root, message):
    file = write_pth(tmp_path / "wrong.pth", root)
    with pytest.raises(CheckpointError, match=rf"wrong\.pth.*{message}"):
        load_torch(file)


@pytest.mark.nightly
def test_deep_nesting_is_told(tmp_path):
    depth = 100_000
    data = b"\x80\x02" + b"}X\x01\x00\x00\x00a" * depth + b"N" + b"s" * depth + b"."
    file = write_pth(tmp_path / "deep.pth", data)
    with pytest.raises(CheckpointError, match=r"deep\.pth is nested too deeply"):
        load_torch(file)


def doubled(times, first=b"(N", container=b"t", pair=b"\x86"):
    """Pickle of a container that holds twice what holds twice what ... `times` deep."""
    step = b"q\x00h\x00" + pair  # keep it under number 0, and pair it with itself
    return first + container + step * times


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value


TUPLE = b"(" + b"N" * 10**4 + b"t"  # a tuple of ten thousand values
COSTLY = {  # pickle after its first two bytes, message
    "lists": (b"}" + text(b"a") + doubled(200) + b"s.", "more than 1000000 values"),
    "keys": (
        b"}"
        + text(b"k" * 10**6)
        + b"}"
        + b"".join(text(b"%d" % i) + b"Ns" for i in range(1000))
        + b"s.",
        r"keys of more than \d+ characters",
    ),
    "key": (b"}" + doubled(200) + b"Ns.", "a key is a tuple; expected a text"),
    "keys of a set": (b"\x8f(" + doubled(200) + b"\x90.", "a key is a tuple"),
    "items": (
        b"ccollections\nOrderedDict\n((" + doubled(200) + b"N\x86ltR.",
        "a key is a tuple",
    ),
    "copies": (
        TUPLE + b"q\x01" + b"ctorch\nSize\nq\x02" + b"h\x02h\x01\x85R0" * 3000 + b"}.",
        "asks for more work than",
    ),
    "state": (
        b"ccollections\nOrderedDict\n)R}("
        + b"".join(text(b"%d" % i) + b"N" for i in range(10**4))
        + b"uq\x01"
        + b"bh\x01" * 3000
        + b"b.",
        "asks for more work than",
    ),
    "number": (
        b"}" + text(b"a") + b"\x8b\xa0\x86\x01\x00" + b"\x7f" * 100_000 + b"s.",
        "more than 128 bits",
    ),
    "storage": (doubled(200) + b"Q.", "unknown storage"),
}


@pytest.mark.nightly
@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", COSTLY)
def test_few_bytes_cannot_ask_for_work(tmp_path, case):
    """All of these took for ever, or gigabytes."""
    data, message = COSTLY[case]
    file = write_pth(tmp_path / "small.pth", b"\x80\x02" + data)
    with pytest.raises(CheckpointError, match=rf"small\.pth.*{message}"):
        load_torch(file)


def test_few_bytes_cannot_ask_for_memory(tmp_path):
    """The dictionary is kept under a number of half a billion, of which it is one."""
    file = write_pth(tmp_path / "small.pth", b"\x80\x02}r\xff\xff\xff\x1f.")
    tracemalloc.start()
    try:
        assert not load_torch(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("name", ["size", "offset", "shape", "strides"])
def test_sizes_past_64_bits_are_refused(tmp_path, name):
    value = 2**63 if name in ("size", "offset") else (2**63,)
    file = write_pth(tmp_path / "a.pth", tensor_pickle(**{name: value}))
    with pytest.raises(CheckpointError, match=r"not a plain tensor|unknown storage"):
        load_torch(file)


def test_a_description_larger_than_any_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_io, "MAX_PICKLE_BYTES", 50)
    file = write_pth(tmp_path / "a.pth", tensor_pickle(), storages={"0": FOUR})
    with pytest.raises(
        CheckpointError, match=r"data\.pkl has \d+ bytes, more than the"
    ):
        load_torch(file)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_named(tmp_path, share):
    whole = fixture("views").read_bytes()
    file = tmp_path / "cut.pth"
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"cut\.pth is missing, truncated or not"):
        load_torch(file)


def test_a_truncated_file_is_named_when_it_is_cut_later(tmp_path):
    file = write_pth(tmp_path / "cut.pth", tensor_pickle(), storages={"0": FOUR})
    reader = load_torch(file)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"cannot read weight from .*cut\.pth"):
        reader["weight"]


def test_missing_and_other_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.pth is missing"):
        load_torch(tmp_path / "absent.pth")
    page = tmp_path / "page.pth"
    page.write_text("<html>404</html>")
    with pytest.raises(CheckpointError, match=r"page\.pth is missing, truncated or no"):
        load_torch(page)
    other = write_pth(tmp_path / "other.pth", tensor_pickle(), storages={"0": FOUR})
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")
    with pytest.raises(CheckpointError, match=r"other\.pth is a zip archive, but not"):
        load_torch(other)


def test_compressed_archives_are_refused(tmp_path):
    file = tmp_path / "small.pth"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", tensor_pickle())
        archive.writestr("x/data/0", FOUR)
    with pytest.raises(CheckpointError, match="compressed or encrypted"):
        load_torch(file)


def test_big_endian_files_are_refused(tmp_path):
    file = tmp_path / "big.pth"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", tensor_pickle())
        archive.writestr("x/byteorder", "big")
        archive.writestr("x/data/0", FOUR)
    with pytest.raises(CheckpointError, match="byte order b'big'; expected b'little'"):
        load_torch(file)


def test_a_moved_record_is_named(tmp_path):
    """The table of contents points past the record's header."""
    file = write_pth(tmp_path / "moved.pth", tensor_pickle(), storages={"0": FOUR})
    data = file.read_bytes()
    position = data.rindex(b"x/data/0") - 4  # offset in the last directory entry
    old = int.from_bytes(data[position : position + 4], "little")
    moved = data[:position] + (old + 1).to_bytes(4, "little") + data[position + 4 :]
    file.write_bytes(moved)
    with pytest.raises(CheckpointError, match="x/data/0, which holds weight, is not"):
        load_torch(file)


def test_bfloat16_is_exact(tmp_path):
    values = np.asarray([1.0, -3.140625, 2.0**-20, 65536.0], ml_dtypes.bfloat16)
    data = tensor_pickle(storage="BFloat16Storage")
    file = write_pth(tmp_path / "a.pth", data, storages={"0": values.tobytes()})
    array = load_torch(file)["weight"]
    assert array.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(array, values)
