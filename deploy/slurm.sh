#!/bin/sh
# Trains on 4 machines of 8 GPUs, a process per GPU: sbatch deploy/slurm.sh COCO RUN
# Both folders must be on a disk that every machine sees. Submitted again, it goes on from the newest checkpoint, if there is one.
#SBATCH --job-name=querydet
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -eu
data=${1:?usage: sbatch deploy/slurm.sh COCO RUN}
run=${2:?usage: sbatch deploy/slurm.sh COCO RUN}
exec srun querydet train coco_querydet_r50 --run "$run" --data.root "$data" --hosts.auto --resume
