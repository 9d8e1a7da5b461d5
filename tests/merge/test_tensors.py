"""The streamed safetensors file against the format's own library."""

from __future__ import annotations

import hashlib
import io

import pytest
import torch
from safetensors.torch import load, save

from atoll.merge.tensors import DTYPES, WEIGHTS_NAME, Layout, Weights, write

STATE = {
    **{f"t.{name.lower()}": torch.arange(6).reshape(2, 3).to(d) for name, d in DTYPES.items()},
    "b": torch.ones(3),
    "a": torch.ones(()),
    "none": torch.zeros(0, 4, dtype=torch.bfloat16),
    'ü " \n': torch.ones(1, dtype=torch.float16),
}


def layouts() -> dict[str, Layout]:
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {key: Layout(names[value.dtype], tuple(value.shape)) for key, value in STATE.items()}


def pieces(name: str):
    yield from STATE[name].reshape(-1).split(2)


def test_bytes_are_those_of_the_library():
    expected = save(STATE, {"format": "pt"})
    file = io.BytesIO()
    digest = write(layouts(), pieces, file=file)
    assert file.getvalue() == expected
    assert digest == hashlib.sha256(expected).hexdigest()
    assert write(layouts(), pieces) == digest
    turned = dict(reversed(layouts().items()))
    assert write(turned, pieces) == digest
    assert load(file.getvalue()).keys() == STATE.keys()


@pytest.mark.parametrize("first", [0, 1, 5])
def test_pieces_are_read_where_they_lie(tmp_path, first):
    (tmp_path / WEIGHTS_NAME).write_bytes(save(STATE))
    with Weights(tmp_path) as weights:
        assert weights.layout == layouts()
        for name, value in STATE.items():
            count = max(value.numel() - first, 0)
            got = weights.read(name, min(first, value.numel()), count)
            assert got.dtype == value.dtype
            assert got.tolist() == value.reshape(-1)[first:].tolist()
