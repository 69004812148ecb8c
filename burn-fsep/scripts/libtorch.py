#!/usr/bin/env python3
"""Sets LibTorch up for burn-fsep's feature `libtorch`, from PyTorch's wheels on PyPI.

usage: libtorch.py [--cuda] FOLDER

Writes FOLDER/lib and FOLDER/include, and FOLDER/env, which a shell reads before it builds or runs:

    python3 burn-fsep/scripts/libtorch.py target/libtorch
    . target/libtorch/env
    cargo test --workspace --features burn-fsep-tests/libtorch

Without --cuda it keeps what the CPU needs (about 0.6 GB; the wheel is a download of 0.5 GB). With --cuda it also installs
the CUDA libraries that PyTorch needs (3 GB more); the machine has to bring the driver. Needs Python 3.10 or later with
pip, and a C++ compiler for the build. A folder that is complete already is left as it is.
"""

import argparse
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile

# burn-tch 0.22 is written for LibTorch 2.9 and runs with 2.11, which is built for the CUDA 13 of today's drivers.
TORCH = "torch==2.11.0"
# libtorch_cpu.so of a CUDA build loads these two, also where there is no GPU.
CPU_NEEDS = ["nvidia-cuda-runtime==13.0.96", "nvidia-cuda-cupti==13.0.85"]
CUDA_ONLY = ("libtorch_cuda", "libc10_cuda", "libtorch_nvshmem", "libcaffe2_nvrtc")
PYTHON_ONLY = ("libtorch_python", "libshm")

ENV = """\
export LIBTORCH="{folder}"
# 2.11 where torch-sys expects 2.9: see burn-fsep/scripts/libtorch.py
export LIBTORCH_BYPASS_VERSION_CHECK=1
export LD_LIBRARY_PATH="{folder}/lib${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"
"""


def download(folder, requirements, with_needs):
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--only-binary=:all:", "--dest", str(folder)]
    if not with_needs:
        command.append("--no-deps")
    if subprocess.run(command + requirements).returncode != 0:
        sys.exit(f"error: pip could not download {' '.join(requirements)}: is PyPI reachable, is there room on the disk?")


def unpack(wheel, folder, cuda):
    """Takes headers and shared libraries out of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            path = pathlib.PurePosixPath(entry.filename)
            if path.parts[:2] == ("torch", "include") and not entry.is_dir():
                target = folder.joinpath(*path.parts[1:])
            elif ".so" in path.name and "lib" in path.parts:
                is_left_out = path.name.startswith(PYTHON_ONLY) or (not cuda and path.name.startswith(CUDA_ONLY))
                if is_left_out:
                    continue
                target = folder / "lib" / path.name
            else:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, open(target, "wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--cuda", action="store_true", help="with CUDA")
    args = parser.parse_args()
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        sys.exit("error: there are LibTorch wheels of this layout for Linux on x86_64 and aarch64 only")
    folder = args.folder.resolve()
    complete = folder / ("complete-cuda" if args.cuda else "complete-cpu")
    if complete.exists() and complete.read_text() == TORCH:
        print(f"{folder} is complete: . {folder}/env")
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as wheels:
        if args.cuda:
            download(wheels, [TORCH], with_needs=True)
        else:
            download(wheels, [TORCH] + CPU_NEEDS, with_needs=False)
        for wheel in sorted(pathlib.Path(wheels).glob("*.whl")):
            unpack(wheel, folder, args.cuda)
    if args.cuda and not (folder / "lib" / "libnccl.so").exists():
        # The name under which cudarc looks for it.
        (folder / "lib" / "libnccl.so").symlink_to("libnccl.so.2")
    (folder / "env").write_text(ENV.format(folder=folder))
    complete.write_text(TORCH)
    print(f"LibTorch is in {folder}: . {os.path.relpath(folder)}/env")


if __name__ == "__main__":
    main()
