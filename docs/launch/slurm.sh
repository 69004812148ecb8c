#!/bin/bash
# moe-lm on 2 nodes with 8 GPUs each, a rank for each GPU: `sbatch docs/launch/slurm.sh` from the repository's folder, which all
# nodes share. Options of moe-lm can follow: `sbatch docs/launch/slurm.sh --steps 20000`. Submitted again, it goes on from its
# newest checkpoint.
#SBATCH --job-name=moe-lm
#SBATCH --nodes=2
#SBATCH --ntasks=16
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
# Two minutes before its time is over the ranks are told, and save a checkpoint.
#SBATCH --signal=TERM@120
# After the loss of a node Slurm starts it again.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

# Where rank 0 listens. The name has to mean the same address on all nodes: not 127.0.1.1 on the first.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
# One secret for the job. Ranks get it through srun, from the environment.
BURN_FSEP_TOKEN=$(openssl rand -hex 32)
export MASTER_ADDR MASTER_PORT BURN_FSEP_TOKEN

# Made by burn-fsep/scripts/libtorch.py --cuda; it also leads to NCCL.
. "${LIBTORCH_ENV:-target/libtorch/env}"

# Tasks see all GPUs of their node (no --gpus-per-task) and take the one of their SLURM_LOCALID.
srun --kill-on-bad-exit=1 "${MOE_LM:-target/release/moe-lm}" \
    --comm nccl --backend libtorch --device cuda --mixed-precision --ranks-per-node 8 \
    --timeout 300 --rendezvous-timeout 300 \
    --batch 64 --out "out/$SLURM_JOB_NAME" --checkpoint-every 500 --resume auto "$@"
