"""Tensors of a checkpoint straight into memory, without a file in between.

Each tensor gets a buffer of its own, which the shards are written into and which the array then
stands on; only mlx copies it, one tensor at a time. Frameworks are imported only when they are
asked for.
"""

from __future__ import annotations

import importlib
import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from types import ModuleType
from typing import Any, Final, TypeAlias

from ckptd.client.choose_version import choose_in_cluster
from ckptd.client.cluster import Cluster
from ckptd.client.progress import Progress
from ckptd.client.pull import Pull
from ckptd.client.range_writer import PlainRange
from ckptd.client.restore import in_thread
from ckptd.client.restore_plan import file_parts, wanted_shards
from ckptd.client.shard_sources import NodeSources
from ckptd.client.tensor_plan import read_tensor_index
from ckptd.core.layout import byte_ranges
from ckptd.core.tensor_index import TensorRecord
from ckptd.core.tensor_selection import Segment, choose_tensors
from ckptd.errors import Refused, UsageError

MakeArray: TypeAlias = Callable[[TensorRecord, bytearray], Any]

_NUMPY: Final = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}
_ML_DTYPES: Final = {
    "BF16": "bfloat16",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
_TORCH: Final = {**_NUMPY, **_ML_DTYPES}  # torch has all of them, under the same names
_AS_A_FILE: Final = "ckptd restore NAME --tensor GLOB --to FILE.safetensors"
_MLX: Final = {**_NUMPY, "BOOL": "bool_"}


async def load_tensors(
    cluster: Cluster,
    selector: str,
    globs: Sequence[str] = ("*",),
    *,
    framework: str = "numpy",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The tensors whose names match any of `globs`, of all safetensors files of a version.

    `selector` as for `restore`. `framework`: "numpy", "torch" or "mlx"; the arrays lie in memory
    of their own, and may be written to. bfloat16 and 8-bit floats need `ml_dtypes` with numpy.
    Only the shards that hold the tensors are read, and every byte is verified.

    Raises UsageError for an unknown framework, Refused when it is not installed or has no type for
    a tensor, NotFound with the nearest names when a glob matches nothing, NoGoodCopy,
    NotEnoughNodes.
    """
    make = maker(framework)
    shown = progress or Progress()
    cluster.require_nodes()
    chosen = await choose_in_cluster(cluster, selector, shown)
    sources = NodeSources(cluster)

    def work(stop: threading.Event) -> dict[str, Any]:
        pull = Pull(sources, progress=shown, stop=stop)
        records = choose_tensors(read_tensor_index(pull, chosen.manifest), globs)
        outputs = TensorBuffers([record.end - record.begin for record in records])
        segments = [
            Segment(record.file, record.begin, record.end - record.begin, start)
            for record, start in zip(records, outputs.starts, strict=True)
            if record.end > record.begin
        ]
        shards = wanted_shards(chosen.manifest, byte_ranges(file_parts(chosen.manifest), segments))
        shown.total(sum(shard.size for shard in shards))
        pull.run(shards, outputs)
        sources.flush()
        outputs.buffers.reverse()  # each is let go as soon as its array is made
        return {record.name: make(record, outputs.buffers.pop()) for record in records}

    return await in_thread(work)


class TensorBuffers:
    """One buffer for each of `sizes`, which together are one output: number 0.

    `starts[i]` is where buffer i begins in it.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.buffers = [bytearray(size) for size in sizes]
        self.starts = list(accumulate(sizes, initial=0))[: len(sizes)]

    def range_writer(self, output: int, offset: int, length: int) -> PlainRange:
        """As in Outputs of `pull_threads`."""
        return PlainRange(self, output, offset)

    def write(self, output: int, view: memoryview, offset: int) -> None:
        """Copies `view` to `offset` of the one output."""
        index = bisect_right(self.starts, offset) - 1
        while view:
            buffer = self.buffers[index]
            begin = offset - self.starts[index]
            count = min(len(view), len(buffer) - begin)
            # Through a view: assigning bytes to a slice could change the buffer's size.
            memoryview(buffer)[begin : begin + count] = view[:count]
            view = view[count:]
            offset += count
            index += 1


def _made(make: MakeArray, record: TensorRecord, buffer: bytearray) -> Any:
    try:
        return make(record, buffer)
    except (ValueError, OverflowError) as error:  # a shape that it cannot have, such as (2^62, 0)
        raise Refused(
            f"tensor {record.name!r} of shape {record.shape} cannot be an array here: {error}",
            next=_AS_A_FILE,
        ) from error


def maker(framework: str) -> MakeArray:
    """What makes arrays of `framework` out of the bytes of tensors: it stands on the buffer that it
    is given, or copies it bit by bit. Raises UsageError for an unknown framework, Refused when it
    is not installed; what it returns, when it has no type or no shape for a tensor."""
    makers: Mapping[str, Callable[[], MakeArray]] = {
        "numpy": _numpy_maker,
        "torch": _torch_maker,
        "mlx": _mlx_maker,
    }
    if framework not in makers:
        raise UsageError(f"framework is one of {', '.join(makers)}, not {framework!r}")
    return partial(_made, makers[framework]())


def _numpy_maker() -> MakeArray:
    numpy = _imported("numpy", "client")

    def make(record: TensorRecord, buffer: bytearray) -> Any:
        if record.dtype in _NUMPY:
            dtype = numpy.dtype(_NUMPY[record.dtype])
        else:
            name = _type_name(record, _ML_DTYPES, "numpy")
            dtype = numpy.dtype(getattr(_imported("ml_dtypes", "client"), name))
        return numpy.ndarray(record.shape, dtype, buffer if buffer else None)

    return make


def _torch_maker() -> MakeArray:
    torch = _imported("torch", "torch")

    def make(record: TensorRecord, buffer: bytearray) -> Any:
        dtype = getattr(torch, _type_name(record, _TORCH, "torch"), None)
        if dtype is None:
            raise _no_type(record, "this torch")
        if not buffer:
            return torch.empty(record.shape, dtype=dtype)
        return torch.frombuffer(buffer, dtype=dtype).reshape(record.shape)

    return make


def _mlx_maker() -> MakeArray:
    mlx = _imported("mlx.core", "mlx")
    numpy = _imported("numpy", "client")

    def make(record: TensorRecord, buffer: bytearray) -> Any:
        def as_numpy(name: str) -> Any:
            return numpy.ndarray(record.shape, numpy.dtype(name), buffer if buffer else None)

        if record.dtype == "BF16":  # it takes numpy's types alone: the bits, seen as its own
            return mlx.array(as_numpy("uint16")).view(mlx.bfloat16)
        dtype = getattr(mlx, _type_name(record, _MLX, "mlx"), None)
        if dtype is None:
            raise _no_type(record, "this mlx")
        # Without the type it would make float32 of float64.
        return mlx.array(as_numpy(_NUMPY[record.dtype]), dtype=dtype)

    return make


def _type_name(record: TensorRecord, names: Mapping[str, str], framework: str) -> str:
    name = names.get(record.dtype)
    if name is None:
        raise _no_type(record, framework)
    return name


def _no_type(record: TensorRecord, framework: str) -> Refused:
    return Refused(
        f"{framework} has no type for tensor {record.name!r}, which is {record.dtype}",
        next=_AS_A_FILE,
    )


def _imported(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Refused(
            f"{module} is needed for this and is not installed",
            next=f"pip install 'ckptd[{extra}]'",
        ) from error
