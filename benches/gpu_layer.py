#!/usr/bin/env python3
"""Runs the gpu_layer bench beside its peers, shape by shape, and prints the ratios.

usage: gpu_layer.py BENCH PEERS [REPEATS]

BENCH is the program that `cargo bench -p burn-fsep-benches --features libtorch --bench gpu_layer --no-run` builds, PEERS a
script that prints one line of JSON a peer for the same options (--tokens, --hidden, --ffn, --experts, --topk). The two
take turns on the same GPU; of REPEATS (2 by default) the better time of each counts.
"""

import json
import os
import subprocess
import sys

SHAPES = [  # tokens, hidden, ffn, experts, topk
    (16384, 4096, 14336, 8, 2),
    (8192, 4096, 7168, 16, 4),
    (8192, 2048, 1408, 64, 6),
    (2048, 1024, 4096, 8, 2),
]


def lines(command, env=None):
    result = subprocess.run(command, env={**os.environ, **(env or {})}, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def main():
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    bench, peers = sys.argv[1:3]
    repeats = int(sys.argv[3]) if len(sys.argv) == 4 else 2
    for shape in SHAPES:
        names = ("tokens", "hidden", "ffn", "experts", "topk")
        options = [word for name, size in zip(names, shape) for word in (f"--{name}", str(size))]
        best = {}
        for _ in range(repeats):
            for line in lines([sys.executable, peers, *options]) + lines([bench, *options]):
                if "ms" not in line:
                    print(line, flush=True)
                elif line["peer"] not in best or line["ms"] < best[line["peer"]]["ms"]:
                    best[line["peer"]] = line
        for line in lines([bench, *options, "--memory"], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}):
            best.get(line["peer"], {}).update(peak_gib=line["peak_gib"])
        print("T={} D={} F={} E={} K={}".format(*shape), flush=True)
        ours = best.get("burn-fsep")
        for name, line in best.items():
            speed = f"{line['ms'] / ours['ms']:.3f}x" if ours and name not in ("gemm", "burn-fsep") else ""
            print(f"  {name:14}{line['ms']:9.3f} ms {line['tflops']:8.1f} TFLOP/s {line.get('peak_gib', 0):7.2f} GiB  {speed}", flush=True)
    print("\nlast column: how much faster burn-fsep is; gemm is one 8192^3 product, experts leaves router and permutation out")


if __name__ == "__main__":
    main()
