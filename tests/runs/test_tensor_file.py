"""Files of tensors: the bytes of the safetensors library, read only as they were hashed."""

import hashlib
import json

import pytest
import safetensors.torch
import torch

from lmtrain.errors import ArtefactError
from lmtrain.runs import tensor_file
from lmtrain.runs.tensor_file import TYPES, SavedFile, pieces_of, read_header, size_of

TENSORS = {
    "w": torch.randn(70, 30),
    "gap/한": torch.arange(5),
    "a": torch.ones(()),
    "none": torch.ones(0, 3),
    "turned": torch.randn(6, 7).t(),
    **{name: torch.tensor([[1, 0, 1]]).to(getattr(torch, dtype)) for name, (dtype, _) in TYPES.items()},
}


@pytest.fixture(params=[8, 1 << 20], ids=["small pieces", "large pieces"])
def saved(request, tmp_path, monkeypatch):
    """A file of tensors, and what is known of it once its header has been checked."""
    monkeypatch.setattr(tensor_file, "PIECE_BYTES", request.param)
    path = tmp_path / "t.safetensors"
    path.write_bytes(b"".join(pieces_of(TENSORS)))
    return known(path)


def known(path):
    data = path.read_bytes()
    with open(path, "rb") as handle:
        specs = read_header(path, handle, len(data))
    return SavedFile(path, len(data), hashlib.sha256(data).hexdigest(), specs)


def test_a_file_is_what_the_safetensors_library_writes(saved):
    contiguous = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    assert saved.path.read_bytes() == safetensors.torch.save(contiguous)
    assert saved.size == size_of(TENSORS)


def test_tensors_come_back(saved):
    places = {name: spec.empty() for name, spec in saved.specs.items()}
    saved.read_tensors(places)
    assert places.keys() == TENSORS.keys()
    assert all(places[name].equal(tensor) and places[name].dtype == tensor.dtype for name, tensor in TENSORS.items())


def test_tensors_that_have_changed_places_are_not_mistaken_for_each_other(tmp_path):
    path = tmp_path / "t.safetensors"
    path.write_bytes(b"".join(pieces_of({"a": torch.zeros(2), "b": torch.ones(2)})))
    before, data = known(path), path.read_bytes()
    path.write_bytes(data.replace(b'"b"', b'"c"').replace(b'"a"', b'"b"').replace(b'"c"', b'"a"'))
    after = known(path)
    with pytest.raises(ArtefactError, match="damaged"):
        after._replace(specs=before.specs).read_tensors({})


def test_what_is_read_is_what_was_hashed(saved):
    """Whatever becomes of the file once its header has been checked, its bytes are not taken."""
    good = saved.path.read_bytes()
    odd = bytearray(good)
    odd[-1] ^= 1
    other_names = good.replace(b'"w"', b'"v"')
    for bad in (odd, other_names, good[:-1], good + b"1", good[:9], b"", good[8:]):
        saved.path.write_bytes(bad)
        with pytest.raises(ArtefactError, match=r"t\.safetensors: (damaged|not a safetensors file)"):
            saved.read_tensors({})
    saved.path.write_bytes(good)
    saved.read_tensors({})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_found(tmp_path, value):
    path = tmp_path / "t.safetensors"
    path.write_bytes(b"".join(pieces_of({"weights/a": torch.tensor([1.0, value]), "b": torch.ones(2)})))
    with pytest.raises(ArtefactError, match="tensor 'weights/a' holds values that are not finite"):
        known(path).read_tensors({}, finite="weights/")
    known(path).read_tensors({}, finite="b")


@pytest.mark.parametrize(
    ("places", "shape"),
    [
        ([(0, 12), (8, 20)], [3]),  # two tensors in one place
        ([(0, 12), (16, 28)], [3]),  # a gap
        ([(0, 12), (12, 25)], [3]),  # more than its shape has
        ([(0, 12), (12, 24)], [-1, -3]),
        ([(0, 12), (12, 24)], [1] * 2 + [3] + [1] * 99),
        ([(0, 12), (12, 24)], "3"),
        ([(0, 12), (12, 24)], [3.0]),
    ],
)
def test_a_header_that_can_not_be_is_refused(tmp_path, places, shape):
    specs = [
        {"dtype": "F32", "shape": given, "data_offsets": place}
        for given, place in zip([[3], shape], places, strict=True)
    ]
    header = safetensors_header(dict(zip("ab", specs, strict=True)))
    path = tmp_path / "t.safetensors"
    path.write_bytes(header + bytes(28))
    with pytest.raises(ArtefactError, match="not a safetensors file"):
        known(path)


def safetensors_header(header):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text
