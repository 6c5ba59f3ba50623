"""What exporting a training's metrics to Ray costs: microseconds a step, and milliseconds per export.

python benchmarks/gauges.py [--steps N]

A Ray session starts, and one of its workers exports metrics of a Mixture of Experts with 8 layers of 8 experts, as the
training loop would, by the CPU's clock; nothing is trained.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, cast

HERE = Path(__file__).resolve().parent
LAYERS, EXPERTS = 8, 8


def measure(values: dict[str, Any], steps: int) -> dict[str, float]:
    """Runs in a worker. Seconds of the CPU: of a step without an export, of one with an export, of a log point."""
    import torch

    from aquilamoe.config import graph
    from aquilamoe.config.schema import PretrainStage
    from aquilamoe.training.job import Job, Rank
    from aquilamoe.training.ray import metrics_exporter

    experiment = graph.parse(values)
    node = graph.build(experiment)["moe"]
    meter = metrics_exporter.meter("benchmark")
    assert isinstance(meter, metrics_exporter.RayMetricsExporter) and node.model is not None
    model = node.model.model_copy(update={"num_hidden_layers": LAYERS, "num_experts": EXPERTS})
    out = Path("moe-0123abcd.partial")
    job = Job(
        name="moe",
        stage=cast(PretrainStage, node.stage),
        model=model,
        tokens=out,
        source=None,
        out=out,
        ancestor_tokens=0,
        ancestor_flops=0,
        cluster=experiment.cluster,
    )
    meter.begins(job, Rank(), torch.device("cpu"), 0)
    point = {"train/loss": 5.0, "train/balance_loss": 1.0, "train/grad_norm": 1.0, "train/learning_rate": 1e-3}
    table = {"load": [[1 / EXPERTS] * EXPERTS] * LAYERS, "entropy": [2.0] * LAYERS, "dropped": [0] * LAYERS}

    def step(number: int) -> None:
        meter.spent("wait", 1e-6)
        meter.spent("step", 1e-3)
        meter.stepped(number, point)

    def seconds(act: Any, times: int) -> float:
        started = time.process_time()
        for number in range(times):
            act(number)
        return (time.process_time() - started) / times

    def exporting(number: int) -> None:
        meter.exported_at = 0.0
        step(number)

    def log_point(number: int) -> None:
        meter.measured(number, point, table)

    rounds: list[tuple[Any, int]] = [(step, steps), (exporting, steps // 100), (log_point, steps // 100)]
    found = [[seconds(act, times) for act, times in rounds] for _ in range(5)]
    return dict(zip(("step", "exporting", "point"), map(statistics.median, zip(*found, strict=True)), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    steps = parser.parse_args().steps

    import hydra
    import ray
    from omegaconf import OmegaConf

    from aquilamoe.config import graph
    from aquilamoe.training.ray.metrics_exporter import EVERY_S
    from aquilamoe.training.ray.session import start_session

    with hydra.initialize_config_dir(str(HERE.parent / "conf"), version_base="1.3"):
        values: Any = OmegaConf.to_container(hydra.compose("config"), resolve=True)
    start_session(graph.parse(values).cluster)
    found = ray.get(ray.remote(num_cpus=1)(measure).remote(values, steps))
    ray.shutdown()
    print(f"a step                      {found['step'] * 1e6:8.2f} us")
    share = found["exporting"] / EVERY_S
    print(f"exporting, every {EVERY_S:.0f} s        {found['exporting'] * 1e3:8.3f} ms, {share:.3%}")
    print(f"a log point, {LAYERS * EXPERTS} experts    {found['point'] * 1e3:8.3f} ms")


if __name__ == "__main__":
    main()
