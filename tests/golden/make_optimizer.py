"""Writes tests/golden/optimizer/*.npz, a few steps of torch's AdamW and SGD. Run by hand where torch is installed.

    python tests/golden/make_optimizer.py

Megatron trains with Apex's FusedAdam, whose AdamW is torch's: p -= lr * (m_hat / (sqrt(v_hat) + eps) + wd * p). Two
parameter groups, as Megatron makes them: `kernel` with weight decay, `bias` without. The learning rate and the weight
decay change with every step. Arrays: kernel_0, bias_0 the start; grad_kernel, grad_bias [steps, ...]; lr, wd [steps];
kernel, bias [steps, ...] the values after each step. Last made with torch 2.13 on a CPU.
"""

# SPDX-License-Identifier: Apache-2.0
import pathlib
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

STEPS = 6
FOLDER = pathlib.Path(__file__).parent / "optimizer"


def record(name: str, make) -> None:
    generator = torch.Generator().manual_seed(7)
    shapes = {"kernel": (4, 5), "bias": (5,)}
    start = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    scale = 10.0 ** torch.linspace(-4, 1, STEPS)  # small gradients first: eps must matter
    grads = {
        key: torch.randn((STEPS, *shape), generator=generator) * scale.reshape(-1, *(1 for _ in shape))
        for key, shape in shapes.items()
    }
    params = {key: torch.nn.Parameter(value.clone()) for key, value in start.items()}
    optimizer = make([{"params": [params["kernel"]]}, {"params": [params["bias"]]}])
    lr = np.linspace(0.02, 0.005, STEPS)
    wd = np.linspace(0.1, 0.3, STEPS)
    trace = {key: [] for key in shapes}
    for step in range(STEPS):
        for key, param in params.items():
            param.grad = grads[key][step].clone()
        for group, decays in zip(optimizer.param_groups, (True, False), strict=True):
            group["lr"] = float(lr[step])
            group["weight_decay"] = float(wd[step]) if decays else 0.0
        optimizer.step()
        for key, param in params.items():
            trace[key].append(param.detach().numpy().copy())
    arrays: dict[str, Any] = {"lr": lr, "wd": wd}
    arrays |= {f"{key}_0": value.numpy() for key, value in start.items()}
    arrays |= {f"grad_{key}": value.numpy() for key, value in grads.items()}
    arrays |= {key: np.stack(values) for key, values in trace.items()}
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / f"{name}.npz", **arrays)


if __name__ == "__main__":
    record("adam", lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6, foreach=False))
    record("sgd", lambda groups: torch.optim.SGD(groups, momentum=0.9, foreach=False))
