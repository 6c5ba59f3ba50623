"""A cluster of two machines on this one: a machine is lost while two workers train, and the curve is that of no loss.

python tools/rehearse_cluster.py [KEY=VALUE ...]

Two Ray nodes (`ray.cluster_utils.Cluster`, a raylet each) with room for one worker, a head without room for any. The
smoke experiment's first training is run on them twice through the platform's own command, sharded over both workers
(`parallel=fsdp`). In the second run one node is killed after the first checkpoint, raylet and worker, and
another comes. Status 0 if both runs end with the same losses at the same steps. About two minutes on two quiet cores.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT_TOKENS, TOKENS = 8_192, 65_536
WORDS = (
    "experiment=smoke",
    "cluster=ray",
    "cluster.workers=2",
    "cluster.cpus_per_worker=1",
    "cluster.gpus_per_worker=0",
    "cluster.parallel=fsdp",
    f"cluster.checkpoint_every_tokens={CHECKPOINT_TOKENS}",
    f"stages.prepare.total_tokens={TOKENS}",
    "stages.prepare.schedule.warmup_tokens=8192",
    "tracking.enabled=false",
    *(f"stages.{name}=null" for name in ("scale_up", "dense", "scale_out", "moe", "control", "evaluate", "export")),
    "report.chain=[prepare]",
    "report.control=null",
)


def start(address: str, root: Path, words: list[str]) -> "subprocess.Popen[bytes]":
    """The platform's command, on the cluster."""
    command = [sys.executable, str(ROOT / "workflows" / "efficientscale.py"), *WORDS, *words]
    return subprocess.Popen([*command, f"cluster.address={address}", f"paths.root={root}"])


def curve(root: Path) -> list[tuple[int, float]]:
    """The loss at each step of the training, of its finished output."""
    (path,) = (root / "stages").glob("prepare-*/metrics.jsonl")
    points: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    return [(point["step"], point["train/loss"]) for point in points if "train/loss" in point]


def wait_for_checkpoint(root: Path, process: "subprocess.Popen[bytes]") -> None:
    while not any((root / "stages").glob("prepare-*.partial/checkpoints/*")):
        if process.poll() is not None:
            raise SystemExit("the run ended before there was a checkpoint")
        time.sleep(0.1)


def main() -> None:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        with tempfile.TemporaryDirectory() as name:
            undisturbed, disturbed = Path(name, "undisturbed"), Path(name, "disturbed")
            if start(cluster.address, undisturbed, sys.argv[1:]).wait():
                raise SystemExit("the undisturbed run failed")
            process = start(cluster.address, disturbed, sys.argv[1:])
            wait_for_checkpoint(disturbed, process)
            # As a machine that is switched off: no process of the node says good-bye.
            cluster.remove_node(nodes[1], allow_graceful=False)
            print("a node was killed; another one comes", flush=True)
            cluster.add_node(num_cpus=1)
            if process.wait():
                raise SystemExit("the run whose node was killed failed")
            before, after = curve(undisturbed), curve(disturbed)
    finally:
        cluster.shutdown()
    same = before == after and len(before) > 1
    print(f"{len(before)} losses, {before[0][1]:.4f} -> {before[-1][1]:.4f}; with a node lost {after[-1][1]:.4f}")
    print("the same curve" if same else "NOT the same curve")
    sys.exit(not same)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
