#!/usr/bin/env bash
# One job of a PPO run, or any other command:  docker run ... nemo_eppo actor|critic|reward key=value ...
#
# NPROC_PER_NODE  ranks, "gpu" for one per GPU (default)
# RUN_DIRECTORY   where the job writes (/runs/actor, /runs/critic, /runs/reward)
# PORT            of a server (critic 5555, reward 5556)
# NEMO_EPPO_CERTIFICATES folder of the run's certificates: a server that has them listens beyond this container
# NEMO_EPPO_STATE what health.py has to know (/tmp/nemo_eppo)
# More arguments for torchrun, for several nodes: TORCHRUN_ARGUMENTS="--nnodes 2 --node_rank 0 --rdzv_endpoint host:29500"
set -euo pipefail
job=${1:-bash}
servers=${SERVERS:-/opt/servers}
state=${NEMO_EPPO_STATE:-/tmp/nemo_eppo}
run=${RUN_DIRECTORY:-/runs/$job}

case $job in
actor)
    python=${PYTHON:-python} script=train_gpt_ppo_actor.py settings=()
    ;;
critic | reward)
    python=$servers/bin/python
    if [[ $job == critic ]]; then
        script=serve_ppo_critic.py port=${PORT:-5555}
    else
        script=serve_reward_model.py port=${PORT:-5556}
    fi
    settings=("server.port=$port" "server.ready_file=$state/ready.json")
    if [[ ${NEMO_EPPO_CERTIFICATES:-} ]]; then
        settings+=(server.host=0.0.0.0 "server.certificates=$NEMO_EPPO_CERTIFICATES")
    fi
    ;;
*)
    exec "$@"
    ;;
esac
shift

cd "$(dirname "${BASH_SOURCE[0]}")/../examples/nlp/gpt"
for argument in "$@"; do
    if [[ $argument == -h || $argument == --help || $argument == -c || $argument == --cfg ]]; then
        exec "$python" "$script" "exp_manager.explicit_log_dir=$run" "${settings[@]}" "$@"
    fi
done
mkdir -p "$state"
rm -f "$state/ready.json"
printf '{"job": "%s", "pid": %d, "run": "%s"}\n' "$job" $$ "$run" >"$state/job.json"
launcher=nemo_eppo.entry.torchrun  # it listens inside this container only
if [[ ${TORCHRUN_ARGUMENTS:-} ]]; then
    launcher=torch.distributed.run
fi
# exec: the job keeps this process's number, and Docker's signals reach it
# shellcheck disable=SC2086
exec "$python" -m "$launcher" --nproc_per_node "${NPROC_PER_NODE:-gpu}" ${TORCHRUN_ARGUMENTS:-} \
    "$script" "exp_manager.explicit_log_dir=$run" "${settings[@]}" "$@"
