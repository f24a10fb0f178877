#!/bin/bash
# Tries the scripts of this folder on a Slurm of two CPU nodes on this machine, told to stop in each of Slurm's ways:
#   sudo bench/slurm/try-local.sh BIN      # BIN: the folder of torchrun, such as .venv/bin
# Needs root, unshare, iproute2, and Debian's slurm-wlm and munge. It lives in namespaces of its own: loopback is all
# the network it has, and all its processes end with it.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
bin=$(cd "${1:-$root/.venv/bin}" && pwd)
if [ -z "${INSIDE:-}" ]; then
    INSIDE=yes exec unshare --net --mount --pid --fork --kill-child --mount-proc "$0" "$bin"
fi
work=$(mktemp -d)
echo "(a requeued job starts again once its credentials have expired: here after 15 s, by default after 120)"
chmod 755 "$work"
trap 'rm -rf "$work"' EXIT
cd "$root"
export PATH="$bin:$PATH" SLURM_CONF="$work/slurm.conf" OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 PYTHONPATH="$root"
ip link set lo up
ip link add net0 type veth peer name net1 # goes nowhere, but with loopback alone no name is resolved
ip addr add 10.78.0.1/24 dev net0
ip link set net0 up
ip link set net1 up
mount -t tmpfs none /run
echo "127.0.0.1 localhost $(hostname) near far" >"$work/hosts"
mount --bind "$work/hosts" /etc/hosts
mkdir -p "$work"/{state,spool0,spool1}

dd if=/dev/urandom of="$work/key" bs=1 count=128 2>/dev/null
chmod 400 "$work/key"
munged --force --key-file="$work/key" --socket="$work/munge.socket" --pid-file="$work/munge.pid" \
    --log-file="$work/munge.log" --seed-file="$work/munge.seed"

cat >"$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge.socket,cred_expire=15
CredType=cred/munge
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool-%n
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd-%n.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
SchedulerParameters=batch_sched_delay=1,sched_interval=5
MinJobAge=3600
NodeName=near NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=17001 CPUs=2
NodeName=far NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=17002 CPUs=2
PartitionName=preemptible Nodes=near,far Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 State=UP
PartitionName=urgent Nodes=near,far PriorityTier=10 PreemptMode=OFF State=UP
CONF
slurmctld
for node in near far; do slurmd -N "$node"; done
until [ "$(sinfo -h -o %T | sort -u)" = idle ]; do sleep 0.2; done
sinfo

# A job of some 40 seconds, or of two minutes, in which the ranks mostly wait for the simulated network.
job=(model=tiny sampling.max_tokens=60 sampling.ignore_eos=true network.latency_ms=20
    pipeline.rounds=2 pipeline.micro_batch_size=8)
count=240
# What a CPU node has instead of the script's GPUs
cpu=(--gpus-per-node=0 --cpus-per-task=2)

answers() { cat "$work/$1/results.jsonl" 2>/dev/null | wc -l; }
state() { scontrol show job "$2" | grep -oE "(JobState|Restarts)=\S+" | tr '\n' ' '; echo "answers=$(answers "$1")"; }
until_answers() { until [ "$(answers "$1")" -ge "$2" ]; do sleep 0.2; done; }
until_shown() { # ID PATTERN
    until scontrol show job "$1" | grep -q "$2"; do
        ! scontrol show job "$1" | grep -qE "JobState=(FAILED|TIMEOUT|CANCELLED)" || { scontrol show job "$1"; exit 1; }
        sleep 0.2
    done
}
resumed() { # NAME ID: it waits for its turn, runs again and completes
    until_shown "$2" "Restarts=[1-9]"
    echo "$1 back in the queue: $(state "$1" "$2")"
    until_shown "$2" JobState=COMPLETED
    echo "$1 has ended:         $(state "$1" "$2")"
    grep -E "^deserve: (error|[0-9]+ requests)|requests \(|JOB .* (CANCELLED|DUE)" "$work/$1.out" | grep -v tok/s.now || true
    "$bin/python" - "$work/$1/results.jsonl" "$count" <<'PYTHON'
import json, sys
names = [json.loads(line)["custom_id"] for line in open(sys.argv[1])]
assert sorted(names) == sorted(f"fixed-{i}" for i in range(int(sys.argv[2]))), "missing or repeated"
print(f"{len(names)} results, each request once")
PYTHON
}
submit() { # NAME OPTIONS... : the job's id
    local name=$1
    shift
    sbatch --parsable --job-name="$name" --output="$work/$name.out" "${cpu[@]}" "$@" "${job[@]}" \
        workload.source="fixed$count:24:12" output.dir="$work/$name"
}

echo "--- told by a signal"
id=$(submit signal bench/slurm/one-node.sbatch)
until_answers signal 40
echo "signal is told:        $(state signal "$id")"
scancel --batch --signal=USR1 "$id"
resumed signal "$id"

echo "--- told by the time limit (of two minutes, a minute before)"
count=480
id=$(submit limit --time=2 --signal=B:USR1@60 bench/slurm/one-node.sbatch)
resumed limit "$id"

echo "--- told by preemption"
count=240
id=$(submit preempted bench/slurm/one-node.sbatch)
until_answers preempted 40
echo "preempted is told:     $(state preempted "$id")"
sbatch --parsable --partition=urgent --nodes=2 --exclusive --output=/dev/null --wrap="sleep 5" >/dev/null
resumed preempted "$id"

echo "--- two nodes, told by a signal"
id=$(submit nodes bench/slurm/several-nodes.sbatch)
until_answers nodes 40
echo "nodes is told:         $(state nodes "$id")"
scancel --batch --signal=USR1 "$id"
resumed nodes "$id"
