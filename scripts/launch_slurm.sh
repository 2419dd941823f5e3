#!/usr/bin/env bash
# Trains on the machines of a SLURM job, as often requeued as it takes: docs/several_machines.md. From the checkout:
#
#     sbatch scripts/launch_slurm.sh strategy=ddp data=image_folder data.root=/shared/photos name=pets
#     sbatch --nodes=4 --time=24:00:00 scripts/launch_slurm.sh strategy=ddp
#
# The words are those of python -m src.train. Without name= the run is called slurm-JOBID; without trainer.devices= it
# takes the GPUs that a node was given. Edit these lines for your cluster:
#
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1      # launch_torchrun.sh, which starts a process for every GPU
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=08:00:00
#SBATCH --requeue                # a job that reached its time limit starts again, and the run continues
#SBATCH --signal=B:TERM@120      # two minutes before: time enough for a validation and a checkpoint
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

name=slurm-$SLURM_JOB_ID
runs_dir=runs
for word in "$@"; do
  case $word in
    name=*) name=${word#*=} ;;
    runs_dir=*) runs_dir=${word#*=} ;;
  esac
done

read -r HEAD < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export HEAD NNODES=$SLURM_JOB_NUM_NODES
export PORT=${PORT:-$((20000 + SLURM_JOB_ID % 10000))} # another for every job, since jobs may share a node

told=false requeue=false
hand_on() {
  trap '' TERM USR1
  told=true
  # Who cancels a job sends the same signal, and does not want it back; it is COMPLETING then.
  if [[ $(squeue --noheader --format=%T --job "$SLURM_JOB_ID") == RUNNING ]]; then requeue=true; fi
  scancel --signal=TERM "$SLURM_JOB_ID" # to the step; srun itself would turn a SIGTERM into a SIGKILL
}
trap hand_on TERM USR1 # some sites announce the end with --signal=B:USR1@120

# A machine may end a moment before the others, which still save.
srun --ntasks-per-node=1 --kill-on-bad-exit=0 \
  scripts/launch_torchrun.sh trainer.devices="${SLURM_GPUS_ON_NODE:-1}" "$@" name="$name" &
step=$!
code=0
wait "$step" || code=$?
if $told; then # the signal ended that wait, not the training
  code=0
  wait "$step" || code=$?
fi

if $requeue && ! grep -qsE '"state": "(finished|failed)"' "$runs_dir/$name/result.json"; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
