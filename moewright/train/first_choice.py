"""The layout of a run on several ranks whose run file names none: the planner's first choice."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from moewright.errors import ResourceError
from moewright.parallel.config import ParallelConfig
from moewright.parallel.offload import ranks_here
from moewright.parallel.ranks import Ranks, error_of
from moewright.train.config import RunConfig
from moewright.train.run_file import to_toml

LAUNCHER = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
"""What the names of a launcher's variables begin with: the planner is a process alone."""


def with_first_choice(config: RunConfig, *, ranks: Ranks, note: Callable[[str], None]) -> RunConfig:
    """`config` with the quickest layout that fits these ranks, by the planner's estimate; with a `[parallel]` table, or
    on one rank, as it is. All ranks call it. The first one plans, in a process of its own, which has simulated ranks.

    Raises ResourceError if the planner finds none that fits, and what it raises for settings that are no run.
    """
    if config.parallel is not None or ranks.size == 1:
        return config
    text = ""
    with ranks.agreeing():
        if ranks.is_first:
            note("no [parallel] table: looking for the quickest layout that fits")
            text = json.dumps(_plan(config, ranks))
    settings: dict[str, Any] = json.loads(ranks.text_from_first(text))
    note("chosen: " + ", ".join(f"parallel.{name} = {json.dumps(value)}" for name, value in settings.items()))
    return replace(config, parallel=ParallelConfig(**settings))


def _plan(config: RunConfig, ranks: Ranks) -> dict[str, Any]:
    """The settings of the first layout that fits."""
    here = ranks_here(ranks.size)
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    on_gpu = ranks.device.type == "cuda"
    device = torch.cuda.get_device_properties(ranks.device).total_memory if on_gpu else host // here
    options: dict[str, object] = {"--devices": ranks.size, "--devices-per-host": here, "--device-memory": f"{device}B"}
    if on_gpu:
        options["--host-memory"] = f"{host}B"
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run.toml"
        run.write_text(to_toml(config), encoding="utf-8")
        command = [sys.executable, "-m", "moewright", "plan", str(run), "--search", "--json"]
        command += ["--train.device", ranks.device.type, *(str(word) for pair in options.items() for word in pair)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, ResourceError.exit_code) or not done.stdout:
        reason = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise error_of(done.returncode, f"{reason[0].removeprefix('moewright: error: ')} (said by the planner)")
    plan = json.loads(done.stdout)
    if not plan["layouts"]:
        raise ResourceError(
            f"the planner finds no layout for {ranks.size} ranks with {device} bytes each: {plan['change']}; name a "
            "layout to try it all the same (parallel.layout)"
        )
    names = {field.name for field in fields(ParallelConfig)}
    return {name: value for name, value in plan["layouts"][0].items() if name in names}
