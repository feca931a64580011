"""Prune a model on several GPUs, or in several processes on a CPU.

torchrun --standalone --nproc_per_node=2 examples/several_gpus.py
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from torch_adapmtl import apply_adapmtl, save_sparse, sparsity


class TwoTasks(nn.Module):
    """Three classes and a number from a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Linear(16, 256), nn.ReLU()),
            *(nn.Linear(256, 64), nn.ReLU()),
        )
        self.kind, self.size = nn.Linear(64, 3), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Outputs by task, (N, 3) and (N, 1), of vectors (N, 16)."""
        h = self.encoder(x)
        return {"kind": self.kind(h), "size": self.size(h)}


def examples(count: int) -> TensorDataset:
    """Vectors, which of their first three numbers is largest, and norms."""
    x = torch.randn(count, 16, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x[:, :3].argmax(1), x.norm(dim=1, keepdim=True))


def main() -> None:
    """Train in one of the processes that `torchrun` has started."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    epochs = 2 if parser.parse_args().quick else 20
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it by torchrun, as its first lines show")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")

    data = examples(4096)
    sampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=64, sampler=sampler)

    torch.manual_seed(0)  # the same weights in every process
    model = TwoTasks().to(device)
    pruner = apply_adapmtl(  # before DistributedDataParallel
        model,
        target_sparsity=0.9,
        total_steps=epochs * len(loader),
        example_inputs=torch.zeros(2, 16, device=device),
    )
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(pruner.param_groups(lr=3e-3))
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            x, kind, size = (part.to(device) for part in batch)
            out = parallel(x)
            losses = {
                "kind": F.cross_entropy(out["kind"], kind),
                "size": F.mse_loss(out["size"], size),
            }
            pruner.loss(losses).backward()
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()  # every process, every step

    plain = pruner.finalize()
    if dist.get_rank() == 0:
        count = dist.get_world_size()
        print(f"{count} processes, {sparsity(plain):.2%} zeros")
        print(save_sparse(plain, "model.safetensors"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
