"""The recipes of deploy/: what they start is a command of this package, with flags that it has."""

import subprocess
from pathlib import Path

import pytest
import yaml

from querydet_jax.cli.arguments import parse
from querydet_jax.cli.train import TrainArguments

DEPLOY = Path(__file__).parents[2] / "deploy"


def started(folder, program, *command):
    """Run a script with a stand-in for ``program``; return the arguments of `querydet train` in it, as parsed."""
    stand_in = folder / program
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "JOB_COMPLETION_INDEX": "1"}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    words = told.stdout.splitlines()
    at = words.index("train")
    assert words[:at] == ([] if program == "querydet" else ["querydet"])
    return parse(TrainArguments, "", words[at + 1 :], "querydet train")[0]


@pytest.mark.parametrize(("name", "run"), [("jobset-tpu.yaml", "pod"), ("jobset-gpu.yaml", "gpus")])
def test_a_jobset_starts_or_resumes_a_training(tmp_path, name, run):
    jobset = yaml.safe_load((DEPLOY / name).read_text())
    assert jobset["kind"] == "JobSet"
    (job,) = jobset["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]
    assert pods["parallelism"] == pods["completions"]
    (container,) = pods["template"]["spec"]["containers"]
    (script,) = container["args"]
    command = [*container["command"], script.replace("/data", str(tmp_path / "data"))]
    found = started(tmp_path, "querydet", *command)
    assert found.resume and found.run == f"{tmp_path}/data/runs/{run}"
    assert found.hosts.auto or (found.hosts.count, found.hosts.index) == (pods["completions"], 1)
    if found.hosts.coordinator:
        assert found.hosts.coordinator.startswith(f"{jobset['metadata']['name']}-{job['name']}-0-0.")
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pods["template"]["spec"]["volumes"]}


def test_the_slurm_script_starts_or_resumes_a_training(tmp_path):
    command = "sh", str(DEPLOY / "slurm.sh")
    run = tmp_path / "a run"
    found = started(tmp_path, "srun", *command, "COCO", str(run))
    assert (found.run, found.resume, found.hosts.auto) == (str(run), True, True)
    assert subprocess.run(command, capture_output=True).returncode
