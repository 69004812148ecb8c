#!/usr/bin/env python3
"""Runs the gpu_layer bench beside its peers, shape by shape, and prints the ratios.

usage: gpu_layer.py BENCH PEERS [REPEATS [SHAPES]]

BENCH is the program that `cargo bench -p burn-fsep-benches --features libtorch,cuda,vulkan,fusion,autotune --bench gpu_layer
--no-run` builds, or with fewer of the backends; PEERS a script that prints one line of JSON a peer for the same options (--tokens,
--hidden, --ffn, --experts, --topk). BENCH runs on each backend it has, also the layer of Burn's own operations on Burn's own
backends, in f16 where a backend has no bf16. All take turns on the same GPU; of REPEATS (2 by default) the better time of each
counts. SHAPES are numbers of the shapes, from 0, with commas.
"""

import json
import os
import subprocess
import sys

SHAPES = [  # tokens, hidden, ffn, experts, topk
    (16384, 4096, 14336, 8, 2),
    (8192, 4096, 7168, 16, 4),
    (8192, 2048, 1408, 64, 6),
    (16384, 2048, 1024, 64, 8),
    (2048, 1024, 4096, 8, 2),
]

OURS = "burn-fsep on "
# Backend and whether the layer is Burn's own operations.
PROGRAMS = [("libtorch", False), ("cuda", False), ("cuda", True), ("vulkan", False), ("vulkan", True)]
# A product is measured in all ways that there are when its shape is first met.
LIMIT = 240


def lines(command, env=None):
    try:
        result = subprocess.run(command, env={**os.environ, **(env or {})}, stdout=subprocess.PIPE, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        print(f"  took more than {LIMIT} s: {' '.join(command[-6:])}", flush=True)
        return []
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def run(bench, options, env=None):
    """Lines of all programs, of those that this build and this GPU have."""
    found = []
    for backend, plain in PROGRAMS:
        command = [bench, *options, "--backend", backend] + (["--plain"] if plain else [])
        found += lines(command, env) or (lines([*command, "--dtype", "f16"], env) if backend == "vulkan" else [])
    return found


def main():
    if len(sys.argv) not in (3, 4, 5):
        sys.exit(__doc__)
    bench, peers = sys.argv[1:3]
    repeats = int(sys.argv[3]) if len(sys.argv) > 3 else 2
    shapes = [SHAPES[int(i)] for i in sys.argv[4].split(",")] if len(sys.argv) > 4 else SHAPES
    for shape in shapes:
        names = ("tokens", "hidden", "ffn", "experts", "topk")
        options = [word for name, size in zip(names, shape) for word in (f"--{name}", str(size))]
        best = {}
        for _ in range(repeats):
            for line in lines([sys.executable, peers, *options]) + run(bench, options):
                if "ms" not in line:
                    print(line, flush=True)
                elif line["peer"] not in best or line["ms"] < best[line["peer"]]["ms"]:
                    best[line["peer"]] = line
        for line in run(bench, [*options, "--memory"], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}):
            best.get(line["peer"], {}).update(peak_gib=line["peak_gib"])
        print("T={} D={} F={} E={} K={}".format(*shape), flush=True)
        ours = best.get(OURS + "libtorch")
        for name, line in best.items():
            speed = f"{line['ms'] / ours['ms']:.3f}x" if ours and name not in ("gemm", OURS + "libtorch") else ""
            print(f"  {name:22}{line['ms']:9.3f} ms {line['tflops']:8.1f} TFLOP/s {line.get('peak_gib', 0):7.2f} GiB  {speed}", flush=True)
    print("\nlast column: how much faster burn-fsep on LibTorch is; gemm is one 8192^3 product, experts leaves router and permutation out")


if __name__ == "__main__":
    main()
