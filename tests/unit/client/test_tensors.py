"""Arrays of the bytes of tensors, bit by bit, for every framework that is installed here."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import struct
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import safetensors.numpy

from ckptd.client.tensors import maker
from ckptd.core.safetensors_header import DTYPE_BITS
from ckptd.core.tensor_index import TensorRecord
from ckptd.errors import Refused, UsageError

BYTES = {dtype: bits // 8 for dtype, bits in DTYPE_BITS.items() if not bits % 8}
NOT_OF_MLX = {"F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
READ_BY_SAFETENSORS_NUMPY = sorted(BYTES.keys() - {"BF16", *NOT_OF_MLX})  # version 0.8
OPTIONAL = [name for name in ("torch", "mlx") if importlib.util.find_spec(name)]
TYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
SHAPES = [(2, 3), (), (0, 4), (5,)]


def _record(dtype: str, shape: tuple[int, ...]) -> tuple[TensorRecord, bytes]:
    count = 1
    for length in shape:
        count *= length
    content = os.urandom(count * BYTES[dtype])
    if dtype == "BOOL":
        content = bytes(byte & 1 for byte in content)
    return TensorRecord("t", "model.safetensors", dtype, shape, 0, len(content)), content


def _bits(framework: str, array: Any) -> bytes:
    """What lies in memory, whatever the type."""
    if framework == "numpy":
        return bytes(array.tobytes())
    if framework == "torch":
        import torch

        return bytes(array.reshape(-1).view(torch.uint8).numpy()) if array.numel() else b""
    import mlx.core

    return bytes(numpy.array(array.reshape(-1).view(mlx.core.uint8))) if array.size else b""


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("framework", ["numpy", *OPTIONAL])
def test_an_array_is_the_bits_of_the_tensor(
    framework: str, dtype: str, shape: tuple[int, ...]
) -> None:
    record, content = _record(dtype, shape)
    make = maker(framework)
    if framework == "mlx" and dtype in NOT_OF_MLX:
        with pytest.raises(Refused, match=f"no type for tensor 't', which is {dtype}"):
            make(record, bytearray(content))
        return
    array = make(record, bytearray(content))
    assert tuple(array.shape) == shape
    assert _bits(framework, array) == content
    assert str(array.dtype).rpartition(".")[2] == TYPES[dtype]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", READ_BY_SAFETENSORS_NUMPY)
def test_it_is_what_the_safetensors_library_makes_of_it(dtype: str, shape: tuple[int, ...]) -> None:
    record, content = _record(dtype, shape)
    entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [0, len(content)]}
    header = json.dumps({"t": entry}).encode()
    expected = safetensors.numpy.load(struct.pack("<Q", len(header)) + header + content)["t"]
    array = maker("numpy")(record, bytearray(content))
    assert array.dtype == expected.dtype
    assert array.shape == expected.shape
    assert array.tobytes() == expected.tobytes()


@pytest.mark.parametrize("framework", ["numpy", *OPTIONAL])
def test_types_below_a_byte_are_refused_by_name(framework: str) -> None:
    record = TensorRecord("t", "model.safetensors", "F4", (2,), 0, 1)
    with pytest.raises(Refused, match="no type for tensor 't', which is F4"):
        maker(framework)(record, bytearray(1))


@pytest.mark.parametrize("framework", ["numpy", *{"mlx"}.intersection(OPTIONAL)])
def test_a_shape_that_no_array_can_have_is_refused_by_name(framework: str) -> None:
    record = TensorRecord("t", "model.safetensors", "F32", (2**62, 0), 0, 0)
    with pytest.raises(Refused, match="tensor 't' of shape"):
        maker(framework)(record, bytearray())


def test_an_array_may_be_written_to() -> None:
    record, content = _record("F32", (5,))
    array = maker("numpy")(record, bytearray(content))
    array[:] = 1
    assert array.sum() == 5


def test_an_unknown_framework_and_a_missing_one_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UsageError, match="numpy, torch, mlx, not 'jax'"):
        maker("jax")

    def none_is_there(name: str) -> SimpleNamespace:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", none_is_there)
    for framework, extra in (("numpy", "client"), ("torch", "torch"), ("mlx", "mlx")):
        with pytest.raises(Refused) as refused:
            maker(framework)
        assert refused.value.next == f"pip install 'ckptd[{extra}]'"
