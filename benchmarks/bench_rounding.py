"""Which rounding loses less of a patch? A simulation over the ratio of what is added to the weights' steps.

For weights W ~ N(0, 0.02^2) and a patch D = B A of random factors, scaled to each relative size, both roundings of
W + D are held against the exact sum: the relative error of the output that D adds, ||E x|| / ||D x|| with
E = round(W + D) - (W + D), for inputs x in the space that A reads, and for inputs that point anywhere; and the share
of D that survives, <round(W + D) - W, D> / ||D||^2. ``portllm.rounding`` has the threshold that comes of it.

    python benchmarks/bench_rounding.py [--rank 16] [--rows 2048] [--columns 4096]
"""

from __future__ import annotations

import argparse

import torch

from portllm.noise import Mode, bits, rounded
from portllm.rounding import step

SIZES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3, 8e-3, 1e-2, 2e-2, 5e-2, 1e-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=4096)
    arguments = parser.parse_args()
    m, n, r = arguments.rows, arguments.columns, arguments.rank
    torch.manual_seed(0)
    lora_A, lora_B = torch.randn(r, n), torch.randn(m, r)
    direction = lora_B @ lora_A
    inside = torch.linalg.qr(lora_A.T)[0]  # [n, r]
    anywhere = torch.randn(n, 64)
    print("dtype     |D|/|W|   ratio  survives: nearest  stochastic  in A's space: nearest  stochastic  anywhere: ...")
    for dtype in (torch.bfloat16, torch.float16):
        weight = (torch.randn(m, n) * 0.02).to(dtype).float()
        for size in SIZES:
            delta = direction * (size * weight.norm() / direction.norm())
            total = weight + delta
            ratio = (delta.square().mean() / step(total, dtype).square().mean()).sqrt().item()
            found = {
                "nearest": total.to(dtype).float(),
                "stochastic": rounded(total, dtype, bits(Mode(1, 7), slice(0, m), n)).float(),
            }
            cells = [f"{str(dtype).removeprefix('torch.'):9} {size:8.3%} {ratio:7.3f}"]
            for name in found:
                kept = ((found[name] - weight) * delta).sum() / delta.square().sum()
                cells.append(f"{kept.item():10.3f}")
            for inputs in (inside, anywhere):
                for name in found:
                    error = ((found[name] - total) @ inputs).norm() / (delta @ inputs).norm()
                    cells.append(f"{error.item():10.3f}")
            print("  ".join(cells))


if __name__ == "__main__":
    main()
