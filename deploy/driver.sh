#!/bin/sh
# One run on the cluster at CLUSTER_ADDRESS: joins it as a node without processors, so that Ray's own driver protocol is
# spoken and no proxy is needed, and runs the workflow with the words of this command line.
set -eu
ray start --address="$CLUSTER_ADDRESS" --num-cpus=0 --num-gpus=0 --disable-usage-stats --metrics-export-port=8080 \
    --dashboard-agent-listen-port=52365 --dashboard-agent-grpc-port=52366 --runtime-env-agent-port=52367 >/dev/null
exec python /app/workflows/efficientscale.py cluster=compose paths.root=/runs tracking.uri="$TRACKING_URI" "$@"
