#!/usr/bin/env python3
"""Says what the GPU did in the timed steps of gpu_step, by kind of kernel.

usage: kernel_times.py KERNEL_TIMES GPU_STEP_OUTPUT

KERNEL_TIMES is what kernel_times.c wrote while gpu_step ran, GPU_STEP_OUTPUT what gpu_step printed. Kernels that overlap
count once; where the GPU waits, the kernel that it waited for and the one before are named. The last line is the share of
the steps in which neither matrix products nor attention ran.
"""

import json
import re
import sys

KINDS = [
    ("attention", r"flash|fmha|attention|softmax_warp|cudnn6fusion"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|grouped|splitK|cublas"),
    ("NCCL", r"nccl"),
    ("copies", r"^mem(cpy|set)"),
]


OURS = r"^(swiglu|swiglu_backward|combine|combine_backward|sum_replicas|adamw\w*)$"


def kind_of(name):
    if re.match(OURS, name):
        return f"fused, of burn-fsep: {name}"
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other: " + name[:70])


def covered(spans):
    """Length of the union of spans."""
    total, reached = 0, 0
    for start, end in sorted(spans):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


def idle_times(spans):
    """Sum and number of the times in which nothing ran, by the names of the kernels before and after."""
    gaps = {}
    reached, before = None, ""
    for start, end, name in sorted(spans):
        if reached is not None and start > reached:
            total, count = gaps.get((before, name), (0, 0))
            gaps[before, name] = (total + start - reached, count + 1)
        if reached is None or end > reached:
            reached, before = end, name
    return gaps


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    run = next(json.loads(line) for line in open(sys.argv[2]) if line.startswith('{"began"') or '"step_ms"' in line)
    began, ended, steps = run["began"] * 1e9, run["ended"] * 1e9, run["steps"]
    spans, named = {}, []
    for line in open(sys.argv[1]):
        start, end, _stream, name = line.rstrip("\n").split(" ", 3)
        if began <= int(start) and int(end) <= ended:
            spans.setdefault(kind_of(name), []).append((int(start), int(end)))
            named.append((int(start), int(end), name))
    wall = ended - began
    for kind, of_kind in sorted(spans.items(), key=lambda item: -covered(item[1])):
        print(f"{covered(of_kind) / 1e6 / steps:9.3f} ms a step {len(of_kind) / steps:8.1f} launches  {kind}")
    busy = covered([span for of_kind in spans.values() for span in of_kind])
    wanted = covered(spans.get("attention", []) + spans.get("matrix products", []))
    nccl = spans.get("NCCL", [])
    if nccl:
        others = [span for kind, of_kind in spans.items() if kind != "NCCL" for span in of_kind]
        hidden = covered(nccl) + covered(others) - busy
        print(f"NCCL behind other kernels: {100 * hidden / covered(nccl):.1f} %")
    for (before, after), (total, count) in sorted(idle_times(named).items(), key=lambda item: -item[1][0])[:12]:
        print(f"{total / 1e6 / steps:9.3f} ms a step {count / steps:8.1f} waits     idle: {before[:40]} -> {after[:40]}")
    print(f"{wall / 1e6 / steps:9.3f} ms a step in all, GPU idle {100 * (1 - busy / wall):.1f} %")
    print(f"outside matrix products and attention: {100 * (1 - wanted / wall):.1f} % of the step")


if __name__ == "__main__":
    main()
