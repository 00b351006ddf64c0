"""A plain PyTorch loop that gained data parallelism in the four lines marked with an arrow.

python examples/own_loop.py                              # one replica
torchrun --nproc-per-node 2 examples/own_loop.py         # two, the same result
"""

import torch
import torch.nn.functional as F

import unisono

torch.manual_seed(0)
world = unisono.join()  # <-
model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3))
sync = unisono.replicate(model)  # <-
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

data = torch.Generator().manual_seed(1)
for _ in range(100):
    x = torch.randn(32, 8, generator=data)
    y = x[:, :3].abs().argmax(1)
    x, y = world.share(x, y)  # <- this replica's rows of the global batch
    loss = F.cross_entropy(model(x), y, reduction="sum")
    loss.backward()
    sync.finish(len(y))  # <- gradients are now the mean over the global batch, on every replica
    optimizer.step()
    optimizer.zero_grad()

weights = torch.cat([p.detach().flatten() for p in model.parameters()])
if world.is_main:
    print(f"{world.size} replicas, weights sum to {weights.double().sum():.6f}")
