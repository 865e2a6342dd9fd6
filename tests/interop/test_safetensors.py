import json
import os
import struct
import weakref

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors.torch import load_file, save_file

from lljax.errors import ModelError
from lljax.interop import safetensors as ours

F32 = np.dtype(np.float32)


def entry(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def raw(folder, header, data=b"", length=None):
    """A model.safetensors of exactly these bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", len(text) if length is None else length) + text + data
    )
    return folder


def read_all(folder):
    opened = ours.Folder(folder)
    return {name: opened.read(name) for name in opened.names()}


def save(path, **arrays):
    ours.write(path, ours.layout(arrays.items()), lambda name: arrays[name])


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.float8_e4m3fn,
        torch.int64,
        torch.int8,
        torch.uint8,
        torch.bool,
    ],
)
def test_files_of_torch_are_read_bitwise_in_every_type(tmp_path, dtype):
    torch.manual_seed(0)
    tensor = (torch.randn(5, 3) * 3).to(dtype)
    save_file({"x": tensor, "empty": torch.zeros(0, 4)}, tmp_path / "model.safetensors")
    arrays = read_all(tmp_path)
    assert arrays["empty"].shape == (0, 4)
    assert arrays["x"].tobytes() == tensor.view(torch.uint8).numpy().tobytes()
    if dtype == torch.bfloat16:
        assert arrays["x"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    "arrange",
    [np.asfortranarray, lambda x: x[::2, ::-1], lambda x: x.T, lambda x: x[1:, 1:]],
    ids=["column major", "strided and reversed", "transposed", "a window"],
)
def test_arrays_in_any_memory_order_are_written_right(tmp_path, arrange):
    array = arrange(np.arange(30, dtype=np.float32).reshape(5, 6))
    save(tmp_path / "x.safetensors", x=array)
    np.testing.assert_array_equal(
        safetensors.numpy.load_file(tmp_path / "x.safetensors")["x"], array
    )
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_shards_hold_at_most_their_size_and_torch_reads_them_back(tmp_path):
    arrays = {
        f"t{i}": np.full((10, 10), i, np.float32).astype(ml_dtypes.bfloat16) for i in range(7)
    }
    ours.write_sharded(
        tmp_path, ours.layout(arrays.items()), lambda name: arrays[name], max_shard_bytes=450
    )
    index = json.loads((tmp_path / ours.INDEX).read_text())
    assert len(set(index["weight_map"].values())) == 4  # two tensors of 200 bytes each
    assert index["metadata"]["total_size"] == 1400
    for name, array in arrays.items():
        assert float(load_file(tmp_path / index["weight_map"][name])[name][0, 0]) == array[0, 0]
        np.testing.assert_array_equal(read_all(tmp_path)[name], array)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_single_shard_needs_no_index_and_a_tensor_may_exceed_the_limit(tmp_path):
    ours.write_sharded(
        tmp_path, {"x": (F32, (100,))}, lambda name: np.ones(100, np.float32), max_shard_bytes=10
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors"]


def test_a_writer_holds_the_tensor_at_hand_and_no_more_than_the_one_before(tmp_path):
    given = []

    def read(name):
        assert sum(reference() is not None for reference in given) <= 1
        array = np.ones(1000, np.float32)
        given.append(weakref.ref(array))
        return array

    ours.write_sharded(
        tmp_path, {f"t{i}": (F32, (1000,)) for i in range(6)}, read, max_shard_bytes=9000
    )
    assert len(given) == 6


def test_a_failed_write_leaves_no_file_of_that_name(tmp_path):
    def read(name):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        ours.write(tmp_path / "x.safetensors", {"x": (F32, (3,))}, read)
    assert not (tmp_path / "x.safetensors").exists()


def test_what_the_disk_changed_is_noticed(tmp_path, monkeypatch):
    real = os.fsync

    def flip(descriptor):
        real(descriptor)
        with open(tmp_path / "x.safetensors.tmp", "r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x55")

    monkeypatch.setattr(os, "fsync", flip)
    with pytest.raises(ModelError, match="'x' read back differs"):
        save(tmp_path / "x.safetensors", x=np.ones(3, np.float32))
    assert not (tmp_path / "x.safetensors").exists()


DAMAGED = {
    "a header longer than the file": ({}, b"", 1 << 60),
    "a header longer than is allowed": ({}, b"", (100 << 20) + 1),
    "no header": (b"", b"", 0),
    "not JSON": (b"{", b"", None),
    "JSON in UTF-32": ("{}".encode("utf-32-le"), b"", None),
    "a list": (b"[]", b"", None),
    "JSON nested without end": (b"[" * 200_000 + b"]" * 200_000, b"", None),
    "overlapping tensors": ({"a": entry([2], [0, 8]), "b": entry([2], [4, 12])}, b"0" * 12, None),
    "data cut short": ({"a": entry([2], [0, 8])}, b"0" * 4, None),
    "an unknown type": ({"a": entry([2], [0, 8], "X9")}, b"0" * 8, None),
    "a type that is a list": ({"a": entry([2], [0, 8], ["F32"])}, b"0" * 8, None),
    "another size than its shape": ({"a": entry([3], [0, 8])}, b"0" * 8, None),
    "a negative shape": ({"a": entry([-2], [0, 8])}, b"0" * 8, None),
    "offsets in reverse": ({"a": entry([2], [8, 0])}, b"0" * 8, None),
    "a shape that overflows": ({"a": entry([1 << 61, 8], [0, 0])}, b"", None),
    "an empty shape that overflows": ({"a": entry([0, 1 << 61], [0, 0])}, b"", None),
    "more dimensions than numpy has": ({"a": entry([1] * 100, [0, 4])}, b"0" * 4, None),
    "a shape of booleans": ({"a": entry([True, 2], [0, 8])}, b"0" * 8, None),
    "a shape of fractions": ({"a": entry([2.0], [0, 8])}, b"0" * 8, None),
    "an entry that is a list": ({"a": [1, 2]}, b"", None),
    "one name twice": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b"0" * 8,
        None,
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_or_hostile_file_is_one_line(tmp_path, damage):
    header, data, length = DAMAGED[damage]
    with pytest.raises(ModelError) as error:
        read_all(raw(tmp_path, header, data, length))
    assert "model.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_every_cut_of_a_file_is_refused(tmp_path):
    save(tmp_path / "whole", x=np.arange(6, dtype=np.float32), y=np.ones((2, 2), np.float32))
    whole = (tmp_path / "whole").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(ModelError):
            read_all(tmp_path)


def test_an_empty_tensor_that_shares_its_start_is_no_overlap(tmp_path):
    arrays = read_all(raw(tmp_path, {"a": entry([2], [0, 8]), "z": entry([0], [0, 0])}, b"0" * 8))
    assert arrays["z"].shape == (0,)


# ---------------------------------------------------------------- the index of shards
@pytest.fixture
def sharded(tmp_path):
    """make(weight_map) -> a folder with shards one (a = 1), two (a = 9, b = 9), beside a file
    outside it (a = 7).
    """
    folder = tmp_path / "model"
    folder.mkdir()
    save(folder / "one.safetensors", a=np.ones(2, np.float32))
    save(folder / "two.safetensors", a=np.full(2, 9, np.float32), b=np.full(2, 9, np.float32))
    save(tmp_path / "outside.safetensors", a=np.full(2, 7, np.float32))
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "folder.safetensors").mkdir()

    def make(weight_map):
        (folder / ours.INDEX).write_text(json.dumps({"weight_map": weight_map}))
        return folder

    return make


@pytest.mark.parametrize(
    "file",
    [
        "../outside.safetensors",
        "model/../../outside.safetensors",
        "ABSOLUTE",
        "missing.safetensors",
        "folder.safetensors",
        "pipe.safetensors",
        "a\0.safetensors",
        "weights.bin",
        "",
        "..",
        "a" * 300 + ".safetensors",
        None,
        3,
    ],
    ids=lambda file: repr(file)[:30],
)
def test_the_index_names_plain_files_of_its_folder(sharded, tmp_path, file):
    file = str(tmp_path / "outside.safetensors") if file == "ABSOLUTE" else file
    with pytest.raises(ModelError, match=ours.INDEX):
        read_all(sharded({"a": file}))


@pytest.mark.parametrize(
    "target", ["/dev/zero", "pipe.safetensors", "folder.safetensors", "link.safetensors", "nowhere"]
)
def test_a_link_leads_to_a_regular_file_or_is_refused(sharded, tmp_path, target):
    """A hub's cache links out of the folder, to a file."""
    folder = sharded({"a": "link.safetensors"})
    (folder / "link.safetensors").symlink_to(target)
    with pytest.raises(ModelError, match=ours.INDEX):
        read_all(folder)
    (folder / "link.safetensors").unlink()
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    assert read_all(folder)["a"][0] == 7


@pytest.mark.parametrize(
    "content",
    [b"[]", b"{}", b"\xff", b'{"weight_map": [1]}', b"[" * 200_000],
    ids=["a list", "no map", "not UTF-8", "a map that is a list", "nested without end"],
)
def test_an_index_that_is_none_is_one_line(sharded, content):
    folder = sharded({})
    (folder / ours.INDEX).write_bytes(content)
    with pytest.raises(ModelError, match=ours.INDEX):
        ours.Folder(folder)


def test_a_tensor_that_the_index_promises_and_its_file_lacks_is_named(sharded):
    with pytest.raises(ModelError, match=r"one\.safetensors: tensor 'b' is missing"):
        ours.Folder(sharded({"a": "one.safetensors", "b": "one.safetensors"}))


def test_a_tensor_in_two_files_is_read_from_the_one_that_the_index_names(sharded):
    assert read_all(sharded({"a": "one.safetensors", "b": "two.safetensors"}))["a"][0] == 1


def test_pickles_are_named_and_never_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ModelError, match="pytorch_model.bin is a pickle"):
        ours.Folder(tmp_path)
