"""train_job.sh on a real SLURM: two virtual nodes on this machine (up.sh), gloo, real notebooks,
real signals.  Their GPUs are none, so the jobs say `device cpu`."""
import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

import vit_helpers
from jobs import SCRIPT, SMALL, untimed

HERE = Path(__file__).parent
missing = [tool for tool in ("sbatch", "slurmctld", "slurmd", "munged") if not shutil.which(tool)]
REASON = f"needs SLURM (no {', '.join(missing)}; apt-get install slurm-wlm munge) and root"
pytestmark = pytest.mark.skipif(bool(missing) or os.geteuid() != 0, reason=REASON)
EPOCHS = 60             # more than 30 s with the start of it all: by then SLURM has warned `timed`
ON_TIME = ["--time=3", "--signal=B:USR1@150"]       # a warning after 30 s, and 150 to save
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
TWO = ["--gpus-per-node=2", "--nodes=1"]


@pytest.fixture(scope="module", autouse=True)
def slurm(tmp_path_factory):
    """SLURM for these tests, in a folder of its own; gone afterwards."""
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([HERE / "up.sh", folder], check=True)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    yield folder
    subprocess.run([HERE / "down.sh", folder])
    del os.environ["SLURM_CONF"]


def submit(tmp_path, *options, run, parameters=()):
    """sbatch train_job.sh; returns the job's number."""
    command = ["sbatch", "--parsable", f"--chdir={tmp_path}", *options, str(SCRIPT), *SMALL,
               "-p", "device", "cpu", "-r", "run", run, *map(str, parameters)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True,
                           stdin=subprocess.DEVNULL)
    return shown.stdout.strip()


def job(number):
    """The fields of scontrol's record of a job; asked again where the daemon is too busy."""
    command = ["scontrol", "-o", "show", "job", number]
    for _ in range(20):
        shown = subprocess.run(command, capture_output=True, text=True)
        words = shown.stdout.split("\n")[0].split()
        fields = dict(word.split("=", 1) for word in words if "=" in word)
        if "JobState" in fields:
            return fields
        time.sleep(0.5)
    raise AssertionError(f"no record of job {number}: {shown.stdout}{shown.stderr}")


@pytest.fixture(autouse=True)
def nothing_left(slurm):
    """What a test leaves behind, having failed, must not take its cores from the next."""
    yield
    subprocess.run(["scancel", "--signal=KILL", "--full", "--user", "root"], capture_output=True)
    subprocess.run(["scancel", "--user", "root"], capture_output=True)
    deadline = time.monotonic() + 30
    while subprocess.run(["squeue", "--noheader"], capture_output=True).stdout.strip():
        assert time.monotonic() < deadline, "jobs are left, and do not end"
        time.sleep(0.5)


def wait(number, tmp_path, states=ENDED, seconds=300):
    """Wait until the job is in one of these states; returns its record."""
    deadline = time.monotonic() + seconds
    while (record := job(number))["JobState"] not in states:
        state = record["JobState"]
        assert time.monotonic() < deadline, f"job {number} is {state}\n{log_of(number, tmp_path)}"
        time.sleep(0.5)
    return record


def log_of(number, tmp_path):
    path = tmp_path / f"vit-{number}.log"
    return path.read_text() if path.exists() else ""


def wait_for_line(number, tmp_path, text, seconds=200):
    deadline = time.monotonic() + seconds
    while text not in log_of(number, tmp_path):
        going = job(number)["JobState"] in ("PENDING", "RUNNING", "CONFIGURING")
        assert time.monotonic() < deadline and going, log_of(number, tmp_path)
        time.sleep(0.2)


def config(run):
    return json.loads((vit_helpers.RUNS / run / "config.json").read_text())


def test_preempted_and_out_of_time_two_ranks_end_alike(tmp_path):
    """One is out of time, one is preempted, at other steps: equal numbers are those of a run in
    peace, too, as those of the array's first task are."""
    epochs = ["-p", "epochs", EPOCHS]
    timed = submit(tmp_path, *TWO, *ON_TIME, "--nodelist=n1", run="slurm/timed",
                   parameters=epochs)
    preempted = submit(tmp_path, *TWO, "--nodelist=n2", run="slurm/preempted", parameters=epochs)
    wait_for_line(preempted, tmp_path, f"epoch   3/{EPOCHS}")
    subprocess.run(["sbatch", "-p", "high", "--nodelist=n2", "--gpus-per-node=2", "--exclusive",
                    f"--chdir={tmp_path}", "--wrap", "sleep 2"], check=True)
    while job(timed)["Restarts"] == "0":
        going = job(timed)["JobState"] in ("RUNNING", "COMPLETING", "PENDING")
        assert going, log_of(timed, tmp_path)
        time.sleep(0.5)
    subprocess.run(["scontrol", "update", f"JobId={timed}", "TimeLimit=10"], check=True)    # once
    records = {number: wait(number, tmp_path) for number in (preempted, timed)}
    assert config("slurm/timed")["ranks"] == 2
    assert config("slurm/timed")["threads"] == int(os.environ["OMP_NUM_THREADS"])
    for number, record in records.items():
        ended_well = record["JobState"] == "COMPLETED" and int(record["Restarts"]) >= 1
        assert ended_well, log_of(number, tmp_path)
    assert "TERM: the training saves" in log_of(preempted, tmp_path)
    assert "USR1: the training saves" in log_of(timed, tmp_path)
    assert untimed("slurm/preempted") == untimed("slurm/timed")


def test_two_nodes_and_a_failing_rank(tmp_path):
    number = submit(tmp_path, "--nodes=2", "--gpus-per-node=2", run="slurm/four",
                    parameters=["-p", "epochs", 1])
    assert wait(number, tmp_path)["JobState"] == "COMPLETED", log_of(number, tmp_path)
    assert config("slurm/four")["ranks"] == 4
    number = submit(tmp_path, "--nodes=2", run="slurm/failing", parameters=["-p", "epochs", 200])
    wait_for_line(number, tmp_path, "epoch   1/200")
    for kernel in processes(RANK="1", SLURM_JOB_ID=number):
        if "ipykernel_launcher" in command_of(kernel):
            os.kill(kernel, 9)
    started = time.monotonic()
    record = wait(number, tmp_path)
    assert record["JobState"] == "FAILED" and record["Restarts"] == "0"
    assert time.monotonic() - started < 200         # the other ranks would wait half an hour
    time.sleep(3)
    assert not processes(SLURM_JOB_ID=number)
    assert "failed with code" in log_of(number, tmp_path)       # nobody asked it to stop


def test_a_cancelled_job_stays_cancelled(tmp_path):
    """It asks for GPUs by --gres and hands on three variables alone: all the same, each of its two
    ranks sees both GPUs."""
    number = submit(tmp_path, "--gres=gpu:2", "--export=VIT_HOME,OMP_NUM_THREADS,TORCH_WARM_POOL",
                    run="slurm/cancelled", parameters=["-p", "epochs", 200])
    wait_for_line(number, tmp_path, "epoch   2/200")
    assert config("slurm/cancelled")["ranks"] == 2
    assert processes(SLURM_JOB_ID=number, RANK="1", CUDA_VISIBLE_DEVICES="0,1")
    subprocess.run(["scancel", number], check=True)
    record = wait(number, tmp_path)
    assert record["JobState"] == "CANCELLED" and record["Restarts"] == "0"
    time.sleep(3)
    assert job(number)["JobState"] == "CANCELLED" and not processes(SLURM_JOB_ID=number)
    last = vit_helpers.SAVED_MODELS / "slurm" / "cancelled" / "last.pt"
    assert vit_helpers.load_checkpoint(last)["epoch"] >= 2


def test_an_array_trains_a_seed_a_task_and_the_first_equals_bash(tmp_path, whole):
    number = submit(tmp_path, "--array=0-1", run="slurm/array")
    for task in range(2):
        record = wait(f"{number}_{task}", tmp_path)
        log = log_of(record["JobId"], tmp_path)
        assert record["JobState"] == "COMPLETED" and "epoch  12/12  loss" in log, log
    runs = vit_helpers.read_runs(["slurm/array-*"])
    assert [run["config"]["seed"] for run in runs] == [0, 1]
    assert len({run["results"]["val_loss"] for run in runs}) == 2
    assert untimed("slurm/array-seed0") == untimed("whole")
    assert (vit_helpers.RUNS / "slurm" / "array-seed0" / "06_run.ipynb").exists()
    assert not list(vit_helpers.RUNS.glob(f".job-{number}_*"))


def command_of(process):
    """What a process was started with; "" if it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes().decode().replace("\0", " ")
    return ""


def processes(**marks):
    """The processes that have these variables in their environment."""
    wanted = {f"{name}={value}".encode() for name, value in marks.items()}
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted <= set(path.read_bytes().split(b"\0")):
                found.append(int(path.parent.name))
        except OSError:
            continue                                    # it has ended, or is not ours to read
    return found
