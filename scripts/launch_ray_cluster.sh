#!/usr/bin/env bash
# Makes a Ray cluster of several machines for sweeps: by hand on each of them, or as a SLURM job that also runs a sweep.
# What it takes: scripts/launch_ray_cluster.sh --help. More: docs/sweeps.md. Edit these lines for your cluster:
#
#SBATCH --job-name=sweep
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1      # Ray, which shares out the cores and GPUs of its node
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=08:00:00
#SBATCH --no-kill                # a node that fails does not end the others: its trials go on there
#SBATCH --requeue                # a job that reached its time limit starts again, and the sweep goes on
#SBATCH --signal=B:TERM@120      # two minutes before: time enough for the trials to save their positions
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

usage() {
  cat <<'END'
By hand: start it on every machine, in the same folder of a shared disk. It stays until Ctrl-C or SIGTERM.

    HEAD=10.0.0.1 scripts/launch_ray_cluster.sh

Then, on one of the machines, in the same folder:

    python -m src.train -m hydra/sweeper=ray_tune hydra.sweeper.ray.init.address=auto experiment=tune_head name=heads

With SLURM: it makes the cluster, runs the sweep on it and ends it. The words are those of python -m src.train -m:

    sbatch scripts/launch_ray_cluster.sh experiment=tune_head name=heads
    sbatch --nodes=4 scripts/launch_ray_cluster.sh hydra/launcher=ray_tune optimizer.lr=1e-4,3e-4,1e-3

Without name= the sweep is called slurm-JOBID. The rest is said before the command:

    HEAD      address of one of the machines, where all meet; they may start in any order (SLURM: the first node)
    PORT      where they meet there (default: 6379; SLURM: another for every job)
    IFNAME    the network interface that a trial on several machines talks through, such as eth0
END
}

refuse() { # what was found, why, what to do
  printf 'ERROR   %s  (exit code 64)\nwhy     %s\nfix     %s\n' "$@" >&2
  exit 64
}

# Only who has the token in ~/.ray/auth_token may use the cluster. Without one it ran the code of whoever reaches it.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
patience=600 # seconds that machines wait for each other

# Nothing is sent. Prints this machine's address on the way to the head, and the head's.
addresses_towards() {
  python -c "
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
    way.connect((sys.argv[1], 1))
    print(way.getsockname()[0], way.getpeername()[0])" "$1" 2>/dev/null
}

head_answers() {
  (exec 3<>"/dev/tcp/$HEAD/$PORT") 2>/dev/null
}

join() { # becomes this machine's part of the cluster
  local address head_address cores meet
  PORT=${PORT:-6379}
  if ! read -r address head_address < <(addresses_towards "$HEAD"); then
    refuse "HEAD=$HEAD cannot be reached from $(hostname)" "the name is not known here, or no interface leads there" \
      "ping $HEAD"
  fi
  if [[ -n ${IFNAME:-} ]]; then
    export GLOO_SOCKET_IFNAME=$IFNAME NCCL_SOCKET_IFNAME=$IFNAME
  fi
  if [[ $address == "$head_address" || $address == 127.* ]]; then
    (umask 077; ray get-auth-token --generate >/dev/null) # makes one where the user has none, for nobody else to read
    meet=(--head --port="$PORT" --include-dashboard=false)
  else
    until head_answers; do
      if ((SECONDS > patience)); then
        refuse "no Ray cluster answers at $HEAD:$PORT" "it was not started there, or a firewall is in between" \
          "nc -vz $HEAD $PORT"
      fi
      sleep 1
    done
    meet=(--address="$HEAD:$PORT")
  fi
  if [[ $address != 127.* ]]; then # by which the others could not reach it
    meet+=(--node-ip-address="$address")
  fi
  cores=$(python -c 'from src.engine.runs.cores import cpu_cores; print(cpu_cores())') # Ray itself counts those of other jobs too
  # exec, so that a signal to this command is one to Ray, which ends all that it started.
  exec ray start "${meet[@]}" --num-cpus="$cores" --disable-usage-stats --block
}

all_are_there() {
  head_answers && python -c "
import ray, sys
ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR')
sys.exit(sum(node['Alive'] for node in ray.nodes()) < int(sys.argv[2]))" \
    "$HEAD:$PORT" "$SLURM_JOB_NUM_NODES" 2>/dev/null
}

sweep_in_slurm() { # in the batch script of a job, on its first node
  local plugin=sweeper name=slurm-$SLURM_JOB_ID word
  for word in "$@"; do
    case $word in
      name=*) name=${word#*=} ;;
      hydra/launcher=ray_tune) plugin=launcher ;;
    esac
  done
  if [[ ! " $* " =~ " hydra/"(sweeper|launcher)"=ray_tune "|" experiment=" ]]; then
    refuse "this is no sweep with Ray" "a Ray cluster is only for hydra/sweeper=ray_tune and hydra/launcher=ray_tune" \
      "sbatch $0 experiment=tune_head name=heads"
  fi
  read -r HEAD < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  PORT=${PORT:-$((20000 + SLURM_JOB_ID % 10000))} # another for every job, since jobs may share a node
  export HEAD PORT

  local told=false requeue=false sweep="" cluster code=0
  hand_on() {
    trap '' TERM
    told=true
    # Who cancels a job sends the same signal, and does not want it back; it is COMPLETING then.
    if [[ $(squeue --noheader --format=%T --job "$SLURM_JOB_ID") == RUNNING ]]; then requeue=true; fi
    if [[ -n $sweep ]]; then kill -TERM "$sweep"; fi
  }
  trap hand_on TERM

  # Not `ray symmetric-run`, which ends every Ray of the user on these nodes. srun does not take the number from sbatch.
  srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 \
    scripts/launch_ray_cluster.sh &
  cluster=$!
  until all_are_there || $told; do
    if ! kill -0 "$cluster" 2>/dev/null || ((SECONDS > patience)); then
      refuse "the $SLURM_JOB_NUM_NODES nodes did not make a Ray cluster" "what they said is above" "sinfo --nodes=$HEAD"
    fi
    sleep 1
  done
  if ! $told; then
    python -m src.train -m "$@" name="$name" "hydra.$plugin.ray.init.address=$HEAD:$PORT" &
    sweep=$!
    wait "$sweep" || code=$?
  fi
  if $told && [[ -n $sweep ]]; then # the signal ended that wait, not the sweep
    code=0
    wait "$sweep" || code=$?
  fi
  if $requeue && [[ -z $sweep || $code == 143 ]]; then # 143: the trials have saved their positions
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code" # with which SLURM ends the cluster
}

if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
  usage
elif [[ -n ${HEAD:-} && $# -gt 0 ]]; then
  refuse "$1 is not for the cluster" "it runs sweeps of any kind, which are started when it is there" \
    "HEAD=$HEAD $0, then on one machine: python -m src.train -m$(printf ' %q' "$@") hydra.sweeper.ray.init.address=auto"
elif [[ -n ${HEAD:-} ]]; then
  join
elif [[ -n ${SLURM_JOB_ID:-} ]]; then
  sweep_in_slurm "$@"
else
  refuse "HEAD= is missing" "the machines have to know where to meet: the address of one of them" \
    "HEAD=$(hostname) $0"
fi
