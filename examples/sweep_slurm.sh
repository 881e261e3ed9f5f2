#!/bin/bash
# A sweep on several machines: SLURM gives the machines, Ray puts one worker on each GPU.
#
#     sbatch examples/sweep_slurm.sh trace --model /models/llava-1.5-7b-hf \
#         --data /data/vqa-constraints --images /data/pictures --windows 1,3,5,6 --out /results/llava
#
# The folders must be on a disk that all machines see. When the time is up before the sweep is
# complete, or a machine fails, submit the same line again: it goes on where it was stopped.
#
#SBATCH --job-name=mmlens-sweep
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --output=mmlens-sweep-%j.txt

set -euo pipefail

port=$((20000 + SLURM_JOB_ID % 20000))
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')

# Only who knows the job's secret may give its cluster work (Ray 2.52 and later).
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c "import secrets; print(secrets.token_hex(32))")
export RAY_AUTH_TOKEN

# `ray start --block` ends with the job; its machines' CPUs and GPUs are those of the allocation.
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
    ray start --head --node-ip-address="$address" --port="$port" \
    --num-cpus="$SLURM_CPUS_PER_TASK" --block &
sleep 15  # the others cannot join before
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) \
        --exclude="$head" --overlap \
        ray start --address="$address:$port" --num-cpus="$SLURM_CPUS_PER_TASK" --block &
fi

# There is one worker per GPU that has joined by now, so wait for all machines.
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap python -c "
import ray, time
ray.init(address='$address:$port')
while sum(node['Alive'] for node in ray.nodes()) < $SLURM_JOB_NUM_NODES:
    time.sleep(1)
"
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
    mmlens sweep "$@" --ray "$address:$port"
