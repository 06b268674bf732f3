"""A made-up checkpoint, like one that a trainer leaves: for the demo."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Final

from ckptd.core.safetensors_header import TensorOutline, build_header, byte_length

_BLOCK_BYTES: Final = 4 * 1024 * 1024
_HIDDEN: Final = 768
_VOCABULARY: Final = 16_000


def make_sample(directory: Path, *, layers: int = 6) -> int:
    """Writes a small language model's checkpoint to `directory`; returns its size in bytes.

    Two safetensors files with random weights and their index, an optimizer state, a random
    generator's state, a tokenizer and the json files around them: about 150 MB at 6 layers.
    """
    directory.mkdir(parents=True)
    embedding = [("model.embed_tokens.weight", (_VOCABULARY, _HIDDEN))]
    middle = layers // 2
    files = {
        "model-00001-of-00002.safetensors": [*embedding, *_layers(range(middle))],
        "model-00002-of-00002.safetensors": [*_layers(range(middle, layers))],
    }
    weight_map: dict[str, str] = {}
    for name, tensors in files.items():
        outlines = [
            TensorOutline(tensor, "BF16", shape, byte_length("BF16", shape))
            for tensor, shape in tensors
        ]
        with open(directory / name, "wb") as file:
            file.write(build_header(outlines, {"format": "pt"}))
            _write_random(file, sum(outline.length for outline in outlines))
        weight_map |= {outline.name: name for outline in outlines}
    with open(directory / "optimizer.pt", "wb") as file:
        _write_random(file, 48_000_000)
    with open(directory / "rng_state.pth", "wb") as file:
        _write_random(file, 14_244)
    (directory / "tokenizer").mkdir()
    documents = {
        "model.safetensors.index.json": {"metadata": {}, "weight_map": weight_map},
        "config.json": {"hidden_size": _HIDDEN, "num_hidden_layers": layers},
        "trainer_state.json": {"global_step": 1000, "log_history": [{"loss": 2.71, "step": 1000}]},
        "scheduler.json": {"last_epoch": 1000, "base_lrs": [0.0003]},
        "tokenizer/vocab.json": {f"token{number}": number for number in range(2000)},
    }
    for name, content in documents.items():
        (directory / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _layers(numbers: Iterable[int]) -> list[tuple[str, tuple[int, ...]]]:
    tensors: list[tuple[str, tuple[int, ...]]] = []
    for number in numbers:
        prefix = f"model.layers.{number}"
        tensors += [
            (f"{prefix}.self_attn.{part}_proj.weight", (_HIDDEN, _HIDDEN)) for part in "qkvo"
        ]
        tensors.append((f"{prefix}.mlp.up_proj.weight", (4 * _HIDDEN, _HIDDEN)))
        tensors.append((f"{prefix}.mlp.down_proj.weight", (_HIDDEN, 4 * _HIDDEN)))
        tensors.append((f"{prefix}.input_layernorm.weight", (_HIDDEN,)))
    return tensors


def _write_random(file: BinaryIO, size: int) -> None:
    while size:
        block = os.urandom(min(size, _BLOCK_BYTES))
        file.write(block)
        size -= len(block)
