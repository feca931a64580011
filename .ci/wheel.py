"""Prunes a model by the wheel alone: no extra installed, nothing of the repository near."""

from __future__ import annotations

import sys
from importlib.metadata import files
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

import torch_adapmtl
from torch_adapmtl import apply_adapmtl, load_sparse, save_sparse

for extra in ("timm", "torchvision", "sklearn", "matplotlib", "torchmetrics", "lightning"):
    assert find_spec(extra) is None, f"{extra} is installed: this is not the wheel alone"
assert "site-packages" in str(Path(torch_adapmtl.__file__)), torch_adapmtl.__file__

packed = [path for path in files("torch-adapmtl") or () if path.suffix == ".py"]
foreign = [str(path) for path in packed if path.parts[0] != "torch_adapmtl"]
assert packed, "the wheel holds no module"
assert not foreign, foreign
for path in packed:
    text = path.read_text(encoding="utf-8")
    found = [word for word in ("docs/", "examples/", "tests/", ".jsonl") if word in text]
    assert not found, f"{path} names paths of the repository: {found}"


class Net(nn.Module):
    """A shared layer and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 4), nn.Linear(32, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the outputs of both heads."""
        h = self.body(x).relu()
        return {"a": self.a(h), "b": self.b(h)}


torch.manual_seed(0)
model, x = Net(), torch.randn(16, 8)
pruner = apply_adapmtl(model, target_sparsity=0.9, total_steps=20, example_inputs=x)
optimizer = torch.optim.SGD(pruner.param_groups(lr=0.1))
for _ in range(20):
    pruner.loss({task: (out - 1).square().mean() for task, out in model(x).items()}).backward()
    optimizer.step()
    optimizer.zero_grad()
    pruner.step()
model = pruner.finalize()
weights = [layer.weight for layer in (model.body, model.a, model.b)]
zeros = sum(int((weight == 0).sum()) for weight in weights)
assert zeros == round(0.9 * sum(weight.numel() for weight in weights)), zeros
assert not any("adapmtl" in key for key in model.state_dict())
file = save_sparse(model, "model.safetensors")
loaded = load_sparse("model.safetensors", Net())
assert all(torch.equal(x, model.state_dict()[name]) for name, x in loaded.state_dict().items())
print(f"the wheel alone: {len(packed)} modules, Python {sys.version.split()[0]}, {zeros} zeros")
