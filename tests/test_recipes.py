"""The recipes and examples: what can be run without a cluster."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moewright.train.metrics import read_json_lines
from moewright.train.run_file import to_toml
from tests.imports import ROOT
from tests.runs import make_run

RECIPES = ROOT / "recipes"


def environment(**values: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | values


@pytest.mark.slow
def test_two_machines_lose_a_rank_and_finish(tmp_path: Path) -> None:
    run = tmp_path / "run.toml"
    run.write_text(to_toml(make_run(tmp_path, steps=60, checkpoint_every=5)))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = environment(
        NODES="2", HEAD="localhost", RANKS="1", PORT=port
    )  # with the recipe's three restarts: agents may miss each other once
    command = [str(RECIPES / "torchrun.sh"), str(run)]
    machines = [subprocess.Popen(command, env=env) for _ in range(2)]
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "run" / "checkpoints").glob("step-*[0-9]/COMMITTED.json")):
            assert time.monotonic() < deadline
            assert [machine.poll() for machine in machines] == [None, None]
            time.sleep(0.05)
        rank = subprocess.run(["pgrep", "-P", str(machines[0].pid)], capture_output=True, text=True, check=True).stdout
        os.kill(int(rank.split()[0]), signal.SIGKILL)
        assert [machine.wait(120) for machine in machines] == [0, 0]
    finally:
        for machine in machines:
            machine.terminate()
            machine.wait()
    steps = [line["step"] for line in read_json_lines(tmp_path / "run" / "metrics.jsonl")]
    assert steps == list(range(1, 61))


@pytest.mark.parametrize(("ending", "code", "requeued"), [("saves", 0, True), ("fails", 1, False), ("ends", 0, False)])
def test_slurm_requeues_a_job_that_has_made_progress(tmp_path: Path, ending: str, code: int, requeued: bool) -> None:
    """With stand-ins for `srun`, which runs the launcher, and `scontrol`, which is asked for hosts and to requeue."""
    out, tools = tmp_path / "out", tmp_path / "bin"
    tools.mkdir()
    old = out / "checkpoints" / "step-00000005"
    if ending == "fails":  # there are states, and no newer one
        old.mkdir(parents=True)
        (old / "COMMITTED.json").touch()
    state = out / "checkpoints" / "step-00000010"
    done = {"saves": f"mkdir -p {state}; touch {state}/COMMITTED.json; exit 1", "fails": "exit 1", "ends": "exit 0"}
    scripts = {
        "srun": f'echo "$@" > {tmp_path}/srun\n{done[ending]}',
        "scontrol": f'[ "$1" = show ] && echo "first\nsecond" || echo "$@" > {tmp_path}/scontrol',
    }
    for name, script in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_ON_NODE": "8"}
    env = environment(**job)
    env["PATH"] = f"{tools}{os.pathsep}{env['PATH']}"
    command = ["bash", str(RECIPES / "slurm.sbatch"), "run.toml", str(out), "--train.steps", "7"]
    assert subprocess.run(command, env=env, capture_output=True).returncode == code
    started = (tmp_path / "srun").read_text().split()
    assert started[-7:] == ["moewright", "train", "run.toml", "--out", str(out), "--train.steps", "7"]
    for option, value in (("--nnodes", "2"), ("--nproc-per-node", "8"), ("--rdzv-endpoint", "first:20012")):
        assert started[started.index(option) + 1] == value
    assert (tmp_path / "scontrol").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol").read_text().split() == ["requeue", "12"]


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch"])
def test_scripts_say_what_they_lack(script: str) -> None:
    env = {key: value for key, value in environment().items() if key not in ("NODES", "HEAD")}
    result = subprocess.run(["bash", str(RECIPES / script)], env=env, capture_output=True, text=True)
    assert result.returncode == 1
    assert (
        "which all can reach" in result.stderr or "machines take part" in result.stderr or "RUN.toml" in result.stderr
    )


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch"])
def test_scripts_are_clean(script: str) -> None:
    subprocess.run(["shellcheck", str(RECIPES / script)], check=True)


def test_the_loop_of_ones_own_is_that_of_one_process_on_several() -> None:
    script, env = str(ROOT / "examples" / "own_loop.py"), environment()
    alone = [sys.executable, script, "--steps", "10"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", script]
    others = ([*torchrun, "--layout", layout, "--steps", "10"] for layout in ("E+Z", "E+D+M"))
    printed = [
        subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
        for command in (alone, *others)
    ]
    assert printed[0].startswith("step 10  loss 2.5941")
    assert printed[0] == printed[1] == printed[2]
