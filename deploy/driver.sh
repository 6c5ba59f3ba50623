#!/bin/sh
# One run on the cluster at CLUSTER_ADDRESS: joins it as a node without processors, so that Ray's own driver protocol is
# spoken and no proxy is needed, and runs the workflow with the words of this command line.
set -eu
# A raylet on a busy machine may find that its helpers did not start in the seconds that it gives them.
tries=0
until ray start --address="$CLUSTER_ADDRESS" --num-cpus=0 --num-gpus=0 --disable-usage-stats --metrics-export-port=8080 \
    --dashboard-agent-listen-port=52365 --dashboard-agent-grpc-port=52366 --runtime-env-agent-port=52367 >/tmp/join.log 2>&1
do
    tries=$((tries + 1))
    if [ "$tries" = 5 ]; then
        tail -n 3 /tmp/join.log >&2
        echo "error: no node could be started at $CLUSTER_ADDRESS in $tries attempts" >&2
        exit 1
    fi
    sleep 2
done
exec python /app/workflows/efficientscale.py cluster=compose paths.root=/runs tracking.uri="$TRACKING_URI" "$@"
