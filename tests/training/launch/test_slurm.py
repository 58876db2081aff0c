"""The Slurm scripts of docs/scale.md, with an `srun` that starts two tasks on this machine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import ROOT, write_yaml
from tests.training.forked import free_port
from tests.training.launch.processes import assert_no_process_names

SRUN = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 "$@" &
    tasks="$tasks $!"
done
code=0
for task in $tasks; do wait "$task" || code=$?; done
exit $code
"""


def scripts() -> list[str]:
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    return [block for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if "#SBATCH" in block]


@pytest.mark.distributed
@pytest.mark.parametrize("number", [0, 1])
def test_the_scripts_of_the_docs_train_on_two_tasks(exact: dict[str, Any], tmp_path: Path, number: int) -> None:
    config = str(write_yaml(tmp_path / "run.yaml", exact))
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {
        "srun": SRUN,
        "scontrol": '#!/bin/sh\n[ "$*" = "show hostnames node-[1-2]" ] && printf "localhost\\nelsewhere\\n"\n',
        "moe": f'#!/bin/sh\nexec {sys.executable} -m training.cli "$@"\n',
    }.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    script = scripts()[number]
    sizes = {"29400": str(free_port()), "--nodes 2:4": "--nodes 2", "--ranks 8": "--ranks 1"}
    if number == 1:
        sizes = {"29500": str(free_port()), "exec python": f"exec {sys.executable}"}
    for word, other in (sizes | {"configs/large-64e.yaml": config, "runs/large": exact["run_dir"]}).items():
        assert script.count(word) == 1, word
        script = script.replace(word, other)
    process = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "SLURM_JOB_NODELIST": "node-[1-2]",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert json.loads((Path(exact["run_dir"]) / "summary.json").read_text())["world_size"] == 2
    assert_no_process_names(config)


def test_there_are_two_scripts() -> None:
    assert len(scripts()) == 2
