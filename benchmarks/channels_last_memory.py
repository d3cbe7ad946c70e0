"""Which convolutions corrupt memory when they are trained on a CPU: random shapes, each in a process of its own.

LD_PRELOAD=libc_malloc_debug.so.0 MALLOC_CHECK_=3 python benchmarks/channels_last_memory.py

Linux with glibc, whose malloc then looks at the bytes around every block. Why the engine keeps some students from
channels last: pcdistill.engine.placement.make_placement.
"""

import argparse
import os
import random
from collections import Counter

import torch
from _bench import machine, table

LAYOUTS = {"channels last": torch.channels_last, "plain": torch.contiguous_format}


def train(shape: tuple[int, ...], layout: torch.memory_format, bfloat16: bool) -> None:
    n, channels, out, height, width, kernel, stride = shape
    conv = torch.nn.Conv2d(channels, out, kernel, stride=stride, padding=kernel // 2).to(memory_format=layout)
    for _ in range(10):
        x = torch.randn(n, channels, height, width).contiguous(memory_format=layout).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            y = conv(x)
        y.sum().backward()


def dies(*arguments: object) -> bool:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        train(*arguments)
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if os.environ.get("MALLOC_CHECK_") != "3" or "malloc_debug" not in os.environ.get("LD_PRELOAD", ""):
        parser.error("start it as the docstring says, or nothing is found")
    torch.set_num_threads(1)
    draw = random.Random(args.seed)
    tried: Counter[tuple[str, str]] = Counter()
    died: Counter[tuple[str, str]] = Counter()
    for _ in range(args.shapes):
        kernel, stride = draw.choice((1, 3)), draw.choice((1, 2, 3))
        channels = draw.randint(1, 15) if draw.random() < 0.5 else draw.randint(16, 64)
        out, side = draw.randint(1, 64), [draw.randint(3, 100) for _ in range(2)]
        shape = (draw.choice((1, 4, 16)), channels, out, *side, kernel, stride)
        kind = "strided 1x1, fewer than 16 channels" if kernel == 1 < stride and channels < 16 else "any other"
        for name, layout in LAYOUTS.items():
            tried[kind, name] += 1
            died[kind, name] += dies(shape, layout, draw.random() < 0.5)
    info = machine("cpu") | {"instructions": torch.backends.cpu.get_cpu_capability()}
    print(", ".join(f"{key} {value}" for key, value in info.items()))
    print(table([{"convolution": k, "layout": f, "shapes": tried[k, f], "crashed": died[k, f]} for k, f in tried]))


if __name__ == "__main__":
    main()
