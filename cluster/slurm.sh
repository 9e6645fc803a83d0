#!/usr/bin/env bash
# A run on Slurm: a Ray cluster for as long as the job lasts, and `s4g train` on it. From the repository's root:
#
#   sbatch --nodes=4 cluster/slurm.sh configs/vigor_same.yaml run_dir=s3://BUCKET/runs/vigor train.num_workers=4
#
# After a time limit or a preemption, the same line continues from the newest checkpoint. Every node must be able to
# read the checkout and its .venv (`make lint` makes one; S4G_VENV names another).
#SBATCH --job-name=s4g-ray
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=1
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# SIGTERM to this script, two minutes before the end: it is passed on, and the run publishes a checkpoint
#SBATCH --signal=B:TERM@120
set -euo pipefail

if (($# == 0)); then
  echo "usage: sbatch cluster/slurm.sh CONFIG [key=value ...]" >&2
  exit 2
fi

PATH=${S4G_VENV:-$PWD/.venv}/bin:$PATH
# A token for this job alone; srun passes the environment to the nodes, where only this user can read it.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export PATH RAY_AUTH_TOKEN RAY_AUTH_MODE=token
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE} # since Slurm 22.05, srun reads it only from here

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes%%$'\n'*}
addresses=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address)
head_ip=''
for address in $addresses; do
  if [[ $address =~ ^[0-9.]+$ && $address != 127.* ]]; then
    head_ip=$address
    break
  fi
done
if [[ -z $head_ip ]]; then
  echo "$head calls itself $addresses, which other nodes cannot reach; give it its IPv4 address in its /etc/hosts" >&2
  exit 1
fi
port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs on the head's node seldom share it; see sbatch --exclusive
here=(--num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --block)

# --block: srun ends with Ray, and Slurm ends both with the job. No dashboard: the run is started right here.
srun --nodes=1 --ntasks=1 --nodelist="$head" ray start --head --node-ip-address="$head_ip" --port="$port" \
  --include-dashboard=false --temp-dir="/tmp/ray-$SLURM_JOB_ID" "${here[@]}" &
tries=0
until ray health-check --address "$head_ip:$port" >/dev/null 2>&1; do
  if ((++tries > 60)); then
    echo "Ray's head on $head ($head_ip:$port) does not answer; its output is above" >&2
    exit 1
  fi
  sleep 1
done
if ((SLURM_JOB_NUM_NODES > 1)); then
  srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \
    ray start --address="$head_ip:$port" "${here[@]}" &
fi

# the other nodes join meanwhile: the run starts when the nodes that it needs are there
s4g train "$1" ray.nodes_timeout_s=300 "${@:2}" "ray.address=$head_ip:$port" --resume &
run=$!
trap 'kill -TERM "$run"; signaled=yes' TERM
signaled=yes
while [[ $signaled ]]; do # a signal ends the wait, not the run
  signaled='' code=0
  wait "$run" || code=$?
done
exit "$code"
