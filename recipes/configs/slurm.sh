#!/bin/bash
# A recipe on the nodes of a SLURM job: sbatch --nodes 2 recipes/configs/slurm.sh recipes/pretrain_gpt2.py --lp_size 8
# A rank that dies is started again from the last whole checkpoint, with --resume_from_checkpoint true among the options.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
set -euo pipefail
read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "${SLURM_GPUS_PER_NODE##*:}" --max_restarts 3 \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$first:29500" "$@"
