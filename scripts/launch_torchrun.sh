#!/usr/bin/env bash
# Trains on several machines, or on one that restarts what fails: started on every machine with the same words.
# What it takes: scripts/launch_torchrun.sh --help. What to do when it does not work: docs/several_machines.md.
set -euo pipefail

usage() {
  cat <<'END'
Start it on every machine, in the same folder of a shared disk, with the same words:

    NNODES=2 HEAD=10.0.0.1 scripts/launch_torchrun.sh strategy=ddp trainer.devices=4 name=pets

The words are those of python -m src.train. name= has to be there: it is how the machines, and a run that is started
again, find the folder. trainer.devices is per machine. The rest is said before the command:

    NNODES    how many machines (default: trainer.num_nodes=, or 1)
    HEAD      address of one of them, where all meet; needed for more than one
    PORT      where they meet there (default: 29400; on one machine a free one)
    IFNAME    the network interface to talk through, such as eth0 (default: the libraries' choice)
    RESTARTS  how often the run goes on by itself from its last checkpoint after a failure (default: 3)

SIGTERM to this command saves the position and ends it. The same command again continues.
END
}

refuse() { # what was found, why, what to do
  printf 'ERROR   %s  (exit code 64)\nwhy     %s\nfix     %s\n' "$@" >&2
  exit 64
}

setting() { # what the command line says of a setting, or else the default
  local value=$2 word
  for word in "${words[@]}"; do
    if [[ $word == "$1="* ]]; then value=${word#*=}; fi
  done
  echo "$value"
}

if [[ $# -eq 0 || " $* " == *" --help "* || " $* " == *" -h "* ]]; then
  usage
  exit 0
fi

words=("$@")
name=$(setting name "")
devices=$(setting trainer.devices 1)
nodes=${NNODES:-$(setting trainer.num_nodes 1)}
again=$0$(printf ' %q' "$@")
if [[ -z $name ]]; then
  refuse "name= is missing" "the machines, and a run that is started again, find its folder by its name" \
    "$again name=first"
fi
if [[ ! $nodes =~ ^[1-9][0-9]*$ ]]; then
  refuse "NNODES=$nodes is not a number of machines" "as many agents wait for each other" "NNODES=2 $again"
fi
if [[ ! $devices =~ ^([1-9][0-9]*|auto)$ ]]; then
  refuse "trainer.devices=$devices is not a number" "a process is started for each of the first so many devices" \
    "CUDA_VISIBLE_DEVICES=0,2 $0 strategy=ddp trainer.devices=2 name=$name"
fi
if [[ $nodes -gt 1 && -z ${HEAD:-} ]]; then
  refuse "HEAD= is missing" "$nodes machines have to know where to meet: the address of one of them" \
    "NNODES=$nodes HEAD=$(hostname) $again"
fi
head=${HEAD:-localhost}
port=${PORT:-$((nodes > 1 ? 29400 : 0))}

# A mistyped word is answered here, once, and not by every process of every restart.
python -m src.train "${words[@]}" --cfg job >/dev/null

# This machine's address on the way to the head, and the head's: torchrun would go by host names, which in many an
# /etc/hosts stand for the loopback. Nothing is sent.
if ! addresses=$(python -c "
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
    way.connect((sys.argv[1], 1))
    print(way.getsockname()[0], way.getpeername()[0])" "$head" 2>/dev/null); then
  refuse "HEAD=$head cannot be reached from $(hostname)" "the name is not known here, or no interface leads there" \
    "ping $head"
fi
read -r address head_address <<<"$addresses"
is_head=false
if [[ $address == "$head_address" || $address == 127.* ]]; then
  is_head=true
  address=$head
fi

if [[ -n ${IFNAME:-} ]]; then
  export GLOO_SOCKET_IFNAME=$IFNAME NCCL_SOCKET_IFNAME=$IFNAME
fi
# After a restart the processes meet in a store of their own, not in the agents', where they would find the keys of the
# run before: pytorch issue 135712.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# How long a run that was told to end has to save its position, which may wait for the end of a validation.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}

# exec, so that a signal to this command is one to the agent.
exec python -m torch.distributed.run \
  --nnodes "$nodes" --nproc-per-node "${devices/auto/gpu}" --max-restarts "${RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-endpoint "$head:$port" --rdzv-id "$name" --rdzv-conf "is_host=$is_head" \
  --local-addr "$address" \
  -m src.train "${words[@]}" trainer.num_nodes="$nodes"
