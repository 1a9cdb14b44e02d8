#!/usr/bin/env bash
#SBATCH --job-name=robustscale
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-task=1
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=robustscale-%j.log
#
# A Ray cluster for one command, on the nodes of a Slurm job; from the root of the checkout:
#
#   sbatch cluster/slurm.sh python -m robustscale.pretrain cifar10 --run-name first --storage /shared/runs
#
# Three minutes before its time is over (USR1) the run is told to save and leave, and the job is put into the queue again:
# the same command goes on. When it is preempted or cancelled (TERM) the run saves and leaves, too; then Slurm decides.
# Without Slurm it does the same on this machine alone, for trying out, and ends with the command's own code.
# ROBUSTSCALE_PORTS: the first of three free ports on the first node.
set -euo pipefail
(($#)) || { echo "usage: [sbatch] cluster/slurm.sh COMMAND..., such as python -m robustscale.pretrain" >&2; exit 2; }

cd "${SLURM_SUBMIT_DIR:-"$(dirname "${BASH_SOURCE[0]}")/.."}" # Slurm runs a copy that lies elsewhere
export PATH="$PWD/.venv/bin:$PATH" PYTHONUNBUFFERED=1

id=${SLURM_JOB_ID:-$$}
cpus=${SLURM_CPUS_PER_TASK:-$(getconf _NPROCESSORS_ONLN)}
port=${ROBUSTSCALE_PORTS:-$((20000 + id % 4000 * 3))} # several jobs may share a node
temp=/tmp/robustscale-$id                           # short: sockets lie in there, whose paths may have 107 characters

if [[ -n ${SLURM_JOB_NODELIST:-} ]]; then
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
else
  nodes=(this-machine)
fi
on() { # on NODE: sets `there` to the words before a command that is to run on it
  there=()
  [[ -z ${SLURM_JOB_NODELIST:-} ]] || there=(srun --nodes=1 --ntasks=1 --nodelist="$1" --overlap --export=ALL)
}

# The first node's address as another sees it: its own /etc/hosts may call it 127.0.1.1.
on "${nodes[-1]}"
head=127.0.0.1
[[ -z ${SLURM_JOB_NODELIST:-} ]] || head=$("${there[@]}" getent ahostsv4 "${nodes[0]}" | awk 'NR == 1 {print $1}')

# Whoever has the token may run any code on the cluster: a file that nobody else may read, in a folder that all nodes see.
umask 077
private=$(mktemp -d "$HOME/.robustscale-XXXXXXXX")
python -c 'import secrets; print(secrets.token_hex(32))' >"$private/ray_token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$private/ray_token RAY_USAGE_STATS_ENABLED=0
export RAY_ADDRESS=$head:$port RAY_API_SERVER_ADDRESS=http://127.0.0.1:$((port + 1))

rays=() run='' told='' again=''
end() {
  trap - EXIT
  if [[ -n $run ]]; then kill -TERM "$run" 2>/dev/null && wait "$run" || true; fi
  # `ray start --block` ends what it started.
  if ((${#rays[@]})); then kill -TERM "${rays[@]}" 2>/dev/null && wait "${rays[@]}" || true; fi
  for node in "${nodes[@]}"; do
    on "$node"
    "${there[@]}" rm -rf "$temp" || true
  done
  rm -rf "$private"
}
trap end EXIT

start_ray() { # start_ray NODE OPTION...
  on "$1"
  # /tmp is everybody's: whoever made this folder before us would own Ray's sockets.
  "${there[@]}" sh -c 'mkdir -p "$1" && [ -O "$1" ] && [ ! -L "$1" ] && chmod 700 "$1"' sh "$temp" ||
    { echo "$1: cannot be reached, or $temp there is somebody else's; submit the job again" >&2; exit 1; }
  "${there[@]}" ray start --block --num-cpus "$cpus" --object-store-memory 2000000000 --disable-usage-stats \
    --dashboard-agent-listen-port 0 "${@:2}" >&2 &
  rays+=($!)
}

start_ray "${nodes[0]}" --head --node-ip-address "$head" --port "$port" --temp-dir "$temp" \
  --dashboard-host 127.0.0.1 --dashboard-port $((port + 1)) --ray-client-server-port $((port + 2))
# The first answers before there is a node to work on; the second would try for minutes where nothing answers.
until ray health-check && python -c 'import ray; ray.init()'; do
  kill -0 "${rays[0]}" || { echo "Ray's head did not start; its own message above says why" >&3; exit 1; }
  sleep 1
done 3>&2 >/dev/null 2>&1
for node in "${nodes[@]:1}"; do start_ray "$node" --address "$RAY_ADDRESS"; done

# In the background, and waited for: a signal interrupts `wait`, but not a command in the foreground.
"$@" &
run=$!
tell() {
  told=yes
  kill -TERM "$run" 2>/dev/null || true
}
trap 'again=yes; tell' USR1
trap tell TERM INT
code=0
wait "$run" || code=$?
while [[ -n $told ]]; do # that was the signal's; the run takes its time to save
  told=''
  wait "$run" && code=0 || code=$?
done

# 143: it left because it was told to, and its checkpoint is there.
if [[ -n $again && $code == 143 && -n ${SLURM_JOB_ID:-} ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
