# Sourced by eval.sh and sft.sh: reads where this node stands in the job, from NNODES, NODE_RANK, MASTER_ADDR and
# MASTER_PORT, else from SLURM's variables, else for a single node. $root must be set to the project's root.
#
# Sets $python, $nnodes, $node_rank, $master_addr and $master_port. Exits with status 2 on an invalid value.

require_number() { # NAME VALUE MIN MAX
  if ! [[ $2 =~ ^[0-9]{1,6}$ ]] || ((10#$2 < $3 || 10#$2 > $4)); then
    echo "error: $1=$2: give a whole number from $3 to $4" >&2
    exit 2
  fi
}

answer_of() { # COMMAND ...: what it answers. Libraries may print to stdout, which goes to stderr here
  QWENVL_ANSWER=3 "$@" 3>&1 >&2
}

require_srun() { # a command that srun did not start runs on one node, and would wait for the others
  if [ -z "${NNODES:-}" ] && ((10#$nnodes > ${SLURM_STEP_NUM_NODES:-1})); then
    echo "error: this job has $nnodes nodes, and the command runs on one of them: put srun before it, or set NNODES=1" >&2
    exit 2
  fi
}

free_port() { # a port of this node that no other run uses
  "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

python=python
[ -x "$root/.venv/bin/python" ] && python="$root/.venv/bin/python"

if [ "${SLURM_LOCALID:-0}" -gt 0 ]; then
  echo "error: srun started several tasks on this node: give it --ntasks-per-node=1" >&2
  exit 2
fi

nnodes=${NNODES:-${SLURM_NNODES:-1}}
require_number NNODES "$nnodes" 1 65536
node_rank=${NODE_RANK:-${SLURM_NODEID:-0}}
require_number NODE_RANK "$node_rank" 0 $((10#$nnodes - 1))
master_port=${MASTER_PORT:-$((29500 + ${SLURM_JOB_ID:-0} % 1000))} # the same on all nodes of a job
require_number MASTER_PORT "$master_port" 1 65535

master_addr=${MASTER_ADDR:-127.0.0.1}
nodes=${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:-}} # srun may use some of the nodes of a job
if [ -z "${MASTER_ADDR:-}" ] && ((10#$nnodes > 1)) && [ -n "$nodes" ]; then
  if hosts=$(scontrol show hostnames "$nodes" 2>/dev/null); then
    master_addr=${hosts%%$'\n'*}
  else # scontrol is missing in most containers: node[03-05,7] starts with node03
    master_addr=$(sed -E 's/^([^[,]*)(\[([0-9]+)[^]]*\])?.*/\1\3/' <<<"$nodes")
  fi
fi

# PyTorch logs every connection that closes when its process ends; the programs report what matters in one line.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
