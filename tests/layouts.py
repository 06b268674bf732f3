"""Checkpoints as trainers write them: which files, with valid content, in which order.

Each layout is a list of writes below a watched root. `incomplete_until` tells, for a checkpoint
whose incompleteness can be seen at every point in between, after which write it is complete; of the
others only the time of quiet tells.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """`writes`: path and bytes, in the order of the trainer. `checkpoints`: by path of what is to
    be stored, the paths in it that belong to it, relative to it. `step`: by checkpoint."""

    writes: list[tuple[str, bytes]]
    checkpoints: dict[str, set[str]]
    incomplete_until: dict[str, str] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)

    def write(self, root: Path, count: int | None = None) -> None:
        """Writes the first `count` files (None: all) below `root`."""
        for path, content in self.writes[:count]:
            write(root, path, content)

    def contents(self) -> dict[str, bytes]:
        """What is there at the end."""
        return dict(self.writes)


def write(root: Path, path: str, content: bytes) -> None:
    """Writes one file and the directories above it."""
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(content)


# -- files


def safetensors(
    size: int = 4000, seed: int = 0, metadata: Mapping[str, str] | None = None
) -> bytes:
    """A valid file with one tensor of `size` bytes."""
    header: dict[str, object] = {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    if metadata:
        header["__metadata__"] = dict(metadata)
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + random.Random(seed).randbytes(size)


def archive(size: int = 3000, seed: int = 0) -> bytes:
    """What torch.save writes: an uncompressed zip of a pickle and its storages."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as zipped:
        for name, content in (
            ("archive/data.pkl", b"\x80\x02}q\x00."),
            ("archive/data/0", random.Random(seed).randbytes(size)),
            ("archive/version", b"3\n"),
        ):
            zipped.writestr(zipfile.ZipInfo(name), content)  # without the time of day
    return buffer.getvalue()


def gguf(elements: int = 64, *, alignment: int = 32, version: int = 3) -> bytes:
    """A GGUF file with a vocabulary and two tensors, F32 and Q4_0."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    vocabulary = [f"token-{number}" for number in range(10)]
    values = [
        text("general.alignment") + struct.pack("<II", 4, alignment),
        text("general.name") + struct.pack("<I", 8) + text("tiny"),
        text("some.flag") + struct.pack("<IB", 7, 1),
        text("tokens") + struct.pack("<IIQ", 9, 8, 10) + b"".join(map(text, vocabulary)),
        text("scores") + struct.pack("<IIQ", 9, 6, 3) + struct.pack("<3f", 0, 1, 2),
    ]
    first = elements * 4
    begins = -(-first // alignment) * alignment
    tensors = [
        text("a") + struct.pack("<IQIQ", 1, elements, 0, 0),
        text("b") + struct.pack("<IQQIQ", 2, 32, 2, 2, begins),
    ]
    raw = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(values))
    raw += b"".join(values) + b"".join(tensors)
    return raw + bytes(-len(raw) % alignment) + b"\1" * (begins + 2 * 18)


def trainer_state(step: int, *, loss: float = 0.5, best: float | None = None) -> bytes:
    """As the Hugging Face Trainer writes it, NaN included."""
    history = [
        {"epoch": 0.5, "grad_norm": 1.5, "learning_rate": 1e-4, "loss": 2.0, "step": step // 2},
        {"epoch": 0.5, "eval_loss": 0.9, "step": step // 2},
        {"epoch": 1.0, "grad_norm": 1.25, "learning_rate": 5e-5, "loss": loss, "step": step},
        {"epoch": 1.0, "eval_loss": 0.4, "eval_accuracy": 0.75, "step": step},
    ]
    state = {"best_metric": best, "global_step": step, "epoch": 1.0, "log_history": history}
    return json.dumps(state, indent=2).encode() + b"\n"


def weight_index(names: list[str]) -> bytes:
    """The index of a sharded model."""
    weight_map = {f"layer.{number}.weight": name for number, name in enumerate(names)}
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()


def dcp_metadata(names: list[str]) -> bytes:
    """The pickle of torch.distributed.checkpoint, as far as names are concerned."""
    texts = b"".join(b"\x8c" + bytes([len(name)]) + name.encode() for name in names)
    return b"\x80\x05\x95\0\0\0\0\0\0\0\0" + texts + b"."


# -- layouts


def hugging_face_trainer() -> Layout:
    """checkpoint-N with optimizer and state, then the final model beside them."""
    writes = []
    for step in (50, 100):
        below = f"run/checkpoint-{step}"
        writes += [
            (f"{below}/config.json", b"{}"),
            (f"{below}/model.safetensors", safetensors(seed=step)),
            (f"{below}/optimizer.pt", archive(seed=step)),
            (f"{below}/scheduler.pt", archive(100)),
            (f"{below}/rng_state.pth", archive(100)),
            (f"{below}/trainer_state.json", trainer_state(step)),
            (f"{below}/training_args.bin", archive(100)),
        ]
    writes += [
        ("run/config.json", b"{}"),
        ("run/model.safetensors", safetensors(seed=101)),
        ("run/tokenizer/tokenizer.json", b"{}"),
        ("run/training_args.bin", archive(100)),
    ]
    files = {"config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
             "trainer_state.json", "training_args.bin"}  # fmt: skip
    final = {"config.json", "model.safetensors", "tokenizer", "tokenizer/tokenizer.json",
             "training_args.bin"}  # fmt: skip
    return Layout(
        writes,
        {"run": final, "run/checkpoint-50": files, "run/checkpoint-100": files},
        steps={"run/checkpoint-50": 50, "run/checkpoint-100": 100},
    )


def _sharded(order: Callable[[str, list[str]], list[str]]) -> Layout:
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    index = "model.safetensors.index.json"
    contents = {name: safetensors(seed=number) for number, name in enumerate(names)}
    contents[index] = weight_index(names)
    ordered = order(index, names)
    return Layout(
        [(f"big/step_7/{name}", contents[name]) for name in ordered],
        {"big/step_7": set(ordered)},
        incomplete_until={"big/step_7": f"big/step_7/{ordered[-1]}"},
        steps={"big/step_7": 7},
    )


def sharded_index_last() -> Layout:
    """As transformers writes it."""
    return _sharded(lambda index, names: [*names, index])


def sharded_index_first() -> Layout:
    """As a copy may arrive."""
    return _sharded(lambda index, names: [index, *names])


def deepspeed() -> Layout:
    """The Trainer with DeepSpeed: ranks in a directory that is named as a step, too."""
    below = "ds/checkpoint-20"
    inner = f"{below}/global_step20"
    names = [f"{inner}/mp_rank_00_model_states.pt"] + [
        f"{inner}/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)
    ]
    writes = [(f"{below}/model.safetensors", safetensors())]
    writes += [(name, archive(seed=number)) for number, name in enumerate(names)]
    writes += [
        (f"{below}/latest", b"global_step20"),
        (f"{below}/zero_to_fp32.py", b"print()\n"),
        (f"{below}/trainer_state.json", trainer_state(20)),
    ]
    members = {path.removeprefix(f"{below}/") for path, _ in writes} | {"global_step20"}
    return Layout(writes, {below: members}, steps={below: 20})


def deepspeed_alone() -> Layout:
    """global_stepN directly in the run, beside a file that names the newest."""
    writes = [
        ("ds/global_step20/mp_rank_00_model_states.pt", archive()),
        ("ds/latest", b"global_step20"),
    ]
    below = "ds/global_step20"
    return Layout(writes, {below: {"mp_rank_00_model_states.pt"}}, steps={below: 20})


def fsdp() -> Layout:
    """The Trainer with sharded FSDP state: distributed checkpoints inside."""
    below = "fsdp/checkpoint-10"
    writes = []
    for part in ("optimizer_0", "pytorch_model_fsdp_0"):
        names = ["__0_0.distcp", "__1_0.distcp"]
        writes += [(f"{below}/{part}/{name}", archive(seed=3)) for name in names]
        writes.append((f"{below}/{part}/.metadata", dcp_metadata(names)))
    writes.append((f"{below}/trainer_state.json", trainer_state(10)))
    members = {path.removeprefix(f"{below}/") for path, _ in writes}
    members |= {"optimizer_0", "pytorch_model_fsdp_0"}
    return Layout(writes, {below: members}, steps={below: 10})


def distributed_checkpoint() -> Layout:
    """torch.distributed.checkpoint in a directory of any name: `.metadata` comes last."""
    names = ["__0_0.distcp", "__1_0.distcp"]
    writes = [(f"dcp/now/{name}", archive(seed=4)) for name in names]
    writes.append(("dcp/now/.metadata", dcp_metadata(names)))
    return Layout(writes, {"dcp/now": {*names, ".metadata"}})


def sentence_transformers() -> Layout:
    """Modules in directories, some with weights of their own."""
    writes = [
        ("st/1_Pooling/config.json", b"{}"),
        ("st/2_Dense/model.safetensors", safetensors(seed=2)),
        ("st/2_Dense/config.json", b"{}"),
        ("st/config.json", b"{}"),
        ("st/model.safetensors", safetensors(seed=1)),
        ("st/modules.json", b"[]"),
    ]
    members = {path.removeprefix("st/") for path, _ in writes} | {"1_Pooling", "2_Dense"}
    return Layout(writes, {"st": members})


def diffusers() -> Layout:
    """A pipeline: model_index.json above directories of models."""
    writes = [
        ("pipe/model_index.json", b"{}"),
        ("pipe/scheduler/scheduler_config.json", b"{}"),
        ("pipe/unet/config.json", b"{}"),
        ("pipe/unet/diffusion_pytorch_model.safetensors", safetensors()),
        ("pipe/vae/diffusion_pytorch_model.safetensors", safetensors(seed=9)),
    ]
    members = {path.removeprefix("pipe/") for path, _ in writes} | {"scheduler", "unet", "vae"}
    return Layout(writes, {"pipe": members})


def lightning() -> Layout:
    """Checkpoint files side by side, the newest also as last.ckpt."""
    below = "logs/version_0/checkpoints"
    writes = [
        ("logs/version_0/hparams.yaml", b"{}\n"),
        (f"{below}/epoch=0-step=10.ckpt", archive(seed=10)),
        (f"{below}/epoch=1-step=20.ckpt", archive(seed=20)),
        (f"{below}/last.ckpt", archive(seed=20)),
    ]
    members = {"epoch=0-step=10.ckpt", "epoch=1-step=20.ckpt", "last.ckpt"}
    return Layout(writes, {below: members})


def mlx_adapters() -> Layout:
    """Adapters of several steps in one directory, the newest also without a number."""
    writes = [
        ("adapters/adapter_config.json", b"{}"),
        ("adapters/0000100_adapters.safetensors", safetensors(seed=1)),
        ("adapters/adapters.safetensors", safetensors(seed=1)),
    ]
    return Layout(writes, {"adapters": {path.removeprefix("adapters/") for path, _ in writes}})


def single_files() -> Layout:
    """Checkpoints that are one file, directly in the root."""
    writes = [
        ("final.safetensors", safetensors(metadata={"step": "12", "loss": "0.25"})),
        ("model-q4.gguf", gguf()),
        ("step_30.pt", archive()),
        ("notes.txt", b"none"),
    ]
    names = {"final.safetensors", "model-q4.gguf", "step_30.pt"}
    return Layout(
        writes,
        {name: {name} for name in names},
        incomplete_until={name: name for name in names},
        steps={"final.safetensors": 12, "step_30.pt": 30},
    )


def latest(version: int = 0) -> Layout:
    """One directory that is overwritten again and again."""
    writes = [
        ("run/latest/model.safetensors", safetensors(seed=version)),
        ("run/latest/state.pt", archive(seed=version)),
    ]
    return Layout(writes, {"run/latest": {"model.safetensors", "state.pt"}})


LAYOUTS: dict[str, Callable[[], Layout]] = {
    layout.__name__: layout
    for layout in (
        hugging_face_trainer, sharded_index_last, sharded_index_first, deepspeed, deepspeed_alone,
        fsdp, distributed_checkpoint, sentence_transformers, diffusers, lightning, mlx_adapters,
        single_files, latest,
    )
}  # fmt: skip
