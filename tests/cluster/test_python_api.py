"""The Python interface against real daemons, with asyncio and without."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy
import pytest
from safetensors.numpy import save_file
from tests.cluster.kill_fixtures import BreakableCluster

import ckptd
from ckptd.client.tree_compare import differences
from ckptd.errors import NotFound, UsageError


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, dict[str, numpy.ndarray]]:
    random = numpy.random.default_rng(1)
    tensors = {
        "layers.0.weight": random.standard_normal((300, 200)).astype(numpy.float32),
        "layers.1.weight": random.standard_normal((300, 200)).astype(ml_dtypes.bfloat16),
        "head.bias": random.integers(0, 100, (7,)),
    }
    directory = tmp_path / "step-7"
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    return directory, tensors


def test_without_asyncio(
    cluster: BreakableCluster,
    new_name: Callable[[], str],
    model: tuple[Path, dict[str, numpy.ndarray]],
    tmp_path: Path,
) -> None:
    directory, tensors = model
    client = ckptd.SyncClient(cluster.config)
    name = new_name()
    stored = client.store(directory, name)
    assert (stored.state, stored.copies) == ("protected", 2)

    restored = client.restore(name, tmp_path / "back")
    assert restored.verified
    assert differences(directory, tmp_path / "back") == []

    assert [row.version for row in client.ls(name.rpartition("/")[0])] == [stored.version]
    assert client.verify([name]).ok

    loaded = client.load_tensors(name, ["layers.*"])
    assert sorted(loaded) == ["layers.0.weight", "layers.1.weight"]
    for tensor, array in loaded.items():
        assert array.dtype == tensors[tensor].dtype
        assert array.tobytes() == tensors[tensor].tobytes()


def test_with_asyncio(
    cluster: BreakableCluster,
    new_name: Callable[[], str],
    model: tuple[Path, dict[str, numpy.ndarray]],
) -> None:
    directory, tensors = model
    name = new_name()

    async def work() -> dict[str, numpy.ndarray]:
        async with ckptd.Client(cluster.config) as client:
            await client.store(directory, name)
            with pytest.raises(NotFound):
                await client.restore("no/such")
            return await client.load_tensors(name, ["head.bias"])

    assert asyncio.run(work())["head.bias"].tolist() == tensors["head.bias"].tolist()


def test_a_client_outside_its_context_says_how_to_use_it(cluster: BreakableCluster) -> None:
    with pytest.raises(UsageError, match="async with"):
        asyncio.run(ckptd.Client(cluster.config).ls())


def test_importing_the_package_imports_no_client() -> None:
    code = "import sys, ckptd, ckptd.node.daemon; sys.exit('numpy' in sys.modules or "
    code += "any(name.startswith('ckptd.client') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
