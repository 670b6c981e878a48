"""The models that benchmarks merge: real folders, equal each time, of full rank; and headers over holes."""

from __future__ import annotations

from pathlib import Path

import synthetic
import torch
from safetensors.torch import load_file

from isomerge.checkpoint import open_checkpoint


def test_a_set_is_a_base_and_experts_near_it(tmp_path: Path) -> None:
    llama = synthetic.SIZES["tiny"]
    for name in ("one", "two"):
        synthetic.write_set(tmp_path / name, llama, 2)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*") if path.is_file())
    assert len(files) == 3 * 3
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)
    base, *experts = (
        load_file(tmp_path / "one" / model / "model-00001-of-00001.safetensors")
        for model in ("base", "expert0", "expert1")
    )
    assert {name: tuple(weight.shape) for name, weight in base.items()} == llama.shapes()
    for name, weight in base.items():
        deltas = torch.stack([expert[name].float() - weight.float() for expert in experts])
        assert 0 < deltas[0].norm() < 0.2 * weight.float().norm()
        assert not torch.equal(deltas[0], deltas[1])
        if weight.dim() == 2:
            assert torch.linalg.matrix_rank(weight.double()) == min(weight.shape)


def test_a_sparse_set_can_be_planned_and_takes_no_room(tmp_path: Path) -> None:
    synthetic.write_set(tmp_path, synthetic.SIZES["70b"], 1, sparse=True)
    shards = sorted(tmp_path.glob("*/*.safetensors"))
    assert sum(shard.stat().st_size for shard in shards) > 2 * 141e9
    assert sum(512 * shard.stat().st_blocks for shard in shards) < 2e6
    base = open_checkpoint(tmp_path / "base")
    assert sum(info.numel for info in base.tensors.values()) == 70_553_706_496  # Llama-3.1-70B's own count
