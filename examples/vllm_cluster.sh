#!/usr/bin/env bash
# Two vLLM servers that share KV through a node, behind one gateway on http://127.0.0.1:8000/v1. Ctrl-C ends all.
#
# usage: vllm_cluster.sh MODEL [further arguments of vLLM's server]
#   VLLM_PYTHON  python of the environment with vLLM and kvpool (default: python)
#   PORT         of the gateway; the others take the ports that follow (default: 8000)
set -euo pipefail
model=${1:?usage: vllm_cluster.sh MODEL [further arguments of vLLM\'s server]}
shift
python=${VLLM_PYTHON:-python}
kvpool="$python -m kvpool.cli.main"
port=${PORT:-8000}
scheduler=127.0.0.1:$((port + 1)) node=127.0.0.1:$((port + 2))
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT

$kvpool scheduler --listen "$scheduler" &
$kvpool node --scheduler "$scheduler" --listen "$node" --memory 1GiB &
servers=()
for i in 0 1; do
  http=$((port + 10 + i)) events=$((port + 20 + 2 * i)) replay=$((port + 21 + 2 * i))
  $python -m vllm.entrypoints.openai.api_server --model "$model" --served-model-name my-model --host 127.0.0.1 \
    --port "$http" --kv-transfer-config "{\"kv_connector\": \"KVPoolConnector\",
      \"kv_connector_module_path\": \"engines.vllm.connector\", \"kv_role\": \"kv_both\",
      \"kv_load_failure_policy\": \"recompute\", \"kv_connector_extra_config\": {\"node\": \"$node\"}}" \
    --kv-events-config "{\"enable_kv_cache_events\": true, \"publisher\": \"zmq\",
      \"endpoint\": \"tcp://*:$events\", \"replay_endpoint\": \"tcp://*:$replay\"}" "$@" &
  address=http://127.0.0.1:$http
  servers+=(--server "$address,id=vllm-$i,node=$node,events=tcp://127.0.0.1:$events,replay=tcp://127.0.0.1:$replay")
done
$kvpool engine-agent --scheduler "$scheduler" "${servers[@]}" &
$kvpool gateway --scheduler "$scheduler" --listen "127.0.0.1:$port"
