"""Six AdamW steps of PyTorch with clipping, decay on one of two tensors, and a changing learning rate.

Writes optim.safetensors: p0, q0, then for each step g (of p), h (of q), and p, q after it.
"""

import pathlib

import torch
from safetensors.torch import save_file

torch.manual_seed(0)
p = torch.nn.Parameter(torch.randn(3, 1, 1, 5))
q = torch.nn.Parameter(torch.randn(1, 1, 1, 4))
tensors = {"p0": p.detach().clone(), "q0": q.detach().clone()}
optimizer = torch.optim.AdamW(
    [{"params": [p], "weight_decay": 0.05}, {"params": [q], "weight_decay": 0.0}],
    betas=(0.9, 0.99),
    eps=1e-8,
)
for step in range(1, 7):
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * step
    # Norms on both sides of the limit.
    p.grad = torch.randn_like(p) * (0.05 if step % 2 else 2.0)
    q.grad = torch.randn_like(q) * 0.1
    tensors[f"g{step}"], tensors[f"h{step}"] = p.grad.clone(), q.grad.clone()
    torch.nn.utils.clip_grad_norm_([p, q], 1.0)
    optimizer.step()
    tensors[f"p{step}"], tensors[f"q{step}"] = p.detach().clone(), q.detach().clone()
save_file(tensors, pathlib.Path(__file__).with_name("optim.safetensors"))
