"""A signal is never lost: raised where Python swallows it, it ends every program all the same."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from aquilamoe.checkpoint.state_dict import save_model
from aquilamoe.data.tokens import TokenCounts, TokensRecord, write_record
from aquilamoe.model.transformer import Decoder
from aquilamoe.process import interruption
from aquilamoe.training import example
from aquilamoe.training.loop import train
from token_files import write_token_file

pytestmark = pytest.mark.process

REPOSITORY = Path(__file__).parents[2]
TWO_METHODS = (
    "ablation.exclude=[{method:random},{method:lemon},{method:aki_pro},{method:hypercloning},{depth:interpolate}]"
)
LATER = ("scale_up", "dense", "scale_out", "moe", "control", "evaluate", "export")
SWALLOWED = """
import gc, os, signal, sys, weakref
from aquilamoe.process import interruption

class Mortal:
    pass

class Sender:
    def __del__(self):
        os.kill(os.getpid(), NUMBER)

def destructor():
    Sender()

def weak_reference():
    mortal = Mortal()
    kept.append(weakref.ref(mortal, lambda _: os.kill(os.getpid(), NUMBER)))

def collector():
    cycle = [Sender()]
    cycle.append(cycle)
    del cycle
    gc.collect()

kept, NUMBER = [], int(sys.argv[2])
interruption.handle()
try:
    vars()[sys.argv[1]]()
    print("swallowed", flush=True)
    while True:
        signal.pause()
except KeyboardInterrupt:
    sys.exit(interruption.end())
"""

# Python imports this when it starts: the process sends itself a signal, once, in a destructor in its main thread, where
# it is about to open a certain file.
SENDER = """
import os, re, sys, threading

pattern, number = re.compile(os.environ["SENDER_PATH"]), int(os.environ["SENDER_SIGNAL"])

class Sender:
    def __del__(self):
        os.kill(os.getpid(), number)

def watch(event, arguments):
    global pattern
    if event == "open" and threading.current_thread() is threading.main_thread() and pattern:
        if pattern.search(str(arguments[0])):
            pattern = None
            Sender()
            print("swallowed", flush=True)

sys.addaudithook(watch)
"""

Sent = Callable[[str, int], dict[str, str]]


@pytest.mark.parametrize("where", ["destructor", "weak_reference", "collector"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_python_swallows_comes_again(where: str, number: signal.Signals) -> None:
    words = [sys.executable, "-c", SWALLOWED, where, str(int(number))]
    completed = subprocess.run(words, capture_output=True, text=True)
    assert (completed.returncode, completed.stdout, completed.stderr) == (128 + number, "swallowed\n", "")


def test_a_signal_that_the_caller_ignores_stays_ignored() -> None:
    """As `nohup`, and a shell that starts something in the background, want it."""
    code = "from aquilamoe.process import interruption as i; import os, signal; i.handle(); os.kill(os.getpid(), 1)"
    words = ["nohup", sys.executable, "-c", f"{code}; print('alive')"]
    completed = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (completed.returncode, completed.stdout) == (0, "alive\n")


def test_after_the_last_word_another_signal_ends_the_process_at_once() -> None:
    code = "from aquilamoe.process import interruption as i; import os; i.handle(); i.end(); os.kill(os.getpid(), 15)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 128 + signal.SIGTERM


def test_a_loop_ends_at_its_next_step_if_a_library_has_caught_the_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {split: TokenCounts(1000, 10, 1000) for split in ("train", "validation")}
    for split in counts:
        numbers = np.arange(1000, dtype=np.int64) % (example.VOCABULARY - 1)
        write_token_file(tmp_path / f"{split}-en", example.VOCABULARY, np.array_split(numbers, 10))
    write_record(tmp_path, TokensRecord(example.VOCABULARY, example.VOCABULARY - 1, {"en": counts}))
    job = example.job(tmp_path, tmp_path / "out")
    monkeypatch.setattr(interruption, "_received", [signal.SIGTERM])
    with pytest.raises(KeyboardInterrupt):
        train(job)
    assert not (tmp_path / "out" / "model").exists()


@pytest.fixture
def sent(tmp_path_factory: pytest.TempPathFactory) -> Sent:
    """Environment in which a process sends itself a signal when it opens a path that matches."""
    folder = tmp_path_factory.mktemp("sender")
    (folder / "sitecustomize.py").write_text(SENDER)
    python_path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return lambda path, number: {
        "PYTHONPATH": python_path,
        "SENDER_PATH": path,
        "SENDER_SIGNAL": str(int(number)),
    }


def program(name: str, words: list[str], folder: Path, changes: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run `python workflows/NAME.py` in a folder."""
    script = str(REPOSITORY / "workflows" / f"{name}.py")
    environment = os.environ | changes
    return subprocess.run([sys.executable, script, *words], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("cluster", ["local_process", "local"])
def test_a_pipeline_ends_by_a_swallowed_signal_and_resumes(
    cluster: str, tiny: list[str], tmp_path: Path, sent: Sent
) -> None:
    words = [word for word in tiny if not word.startswith(("cluster=", *(f"stages.{stage}." for stage in LATER)))]
    words += [f"stages.{stage}=null" for stage in LATER]
    words += [f"cluster={cluster}", "report={chain: [], control: null}", "tracking.enabled=false"]
    completed = program("efficientscale", words, tmp_path, sent(r"attempts/\.?prepare-", signal.SIGTERM))
    assert completed.returncode == 128 + signal.SIGTERM
    assert completed.stderr == "\ninterrupted; the same command continues where this stopped\n"
    assert "swallowed" in completed.stdout and "interrupted" in completed.stdout
    assert not list((tmp_path / "runs" / "stages").glob("prepare-*[!l]"))


def test_a_growth_ends_by_a_swallowed_signal(tmp_path: Path, sent: Sent) -> None:
    model = Decoder(example.model())
    model.initialize(0)
    save_model(model, tmp_path / "source", dtype=torch.float32)
    words = ["source=source", "target=target", "upcycling=copy", "model.num_experts=4"]
    words += ["model.num_experts_per_tok=2", "certificate.enabled=false"]
    completed = program("grow", words, tmp_path, sent(r"target\.partial/config\.json", signal.SIGINT))
    assert completed.returncode == 128 + signal.SIGINT
    assert "swallowed" in completed.stdout
    assert completed.stderr.startswith("\ninterrupted; ") and completed.stderr.count("\n") == 2
    assert not (tmp_path / "target").exists()


def test_an_ablation_ends_by_a_swallowed_signal(tiny: list[str], tmp_path: Path, sent: Sent) -> None:
    of_later = ("stages.moe", "stages.control", "stages.scale_out", "stages.ev")
    words = ["+ablation=scale_up", TWO_METHODS, "tracking.enabled=false"]
    words += [word for word in tiny if not word.startswith(of_later)]
    completed = program("ablations", words, tmp_path, sent(r"prepare-\w+\.partial/metrics.jsonl", signal.SIGTERM))
    assert completed.returncode == 128 + signal.SIGTERM
    assert completed.stderr == "\ninterrupted; the same command continues where this stopped\n"
    assert not list((tmp_path / "runs" / "stages").glob("prepare-*[!l]"))
