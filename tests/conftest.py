"""Every test, and every notebook that is run as one, writes to a folder of its own, never to the
project's runs/."""
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["VIT_HOME"] = tempfile.mkdtemp(prefix="vit-tests-")      # read by vit_helpers, here and
                                                                    # in kernels
os.environ.setdefault("OMP_NUM_THREADS", "1")       # several tests at a time
os.environ.setdefault("TORCH_WARM_POOL", "0")       # no processes for Triton: CPUs do not use it
for name in ("VIT_JOB", "VIT_CWD", "VIT_SETUP", "NPROC"):
    os.environ.pop(name, None)

import vit_helpers
from jobs import SMALL, small_config, train_job


def pytest_sessionfinish(session):
    """nbval marks the cells after a timed-out one as expected failures: that must not pass.  And
    nothing is left behind."""
    shutil.rmtree(os.environ["VIT_HOME"], ignore_errors=True)
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and reporter.stats.get("xfailed"):
        session.exitstatus = 1


@pytest.fixture(scope="session")
def models():
    return vit_helpers.load_notebook("01_models")


@pytest.fixture(scope="session")
def datasets():
    return vit_helpers.load_notebook("02_data")


@pytest.fixture(scope="session")
def training():
    return vit_helpers.load_notebook("04_training")


@pytest.fixture(scope="session")
def running():
    return vit_helpers.load_notebook("06_run")


@pytest.fixture(scope="session")
def digits(datasets):
    return datasets.load_data("digits")


@pytest.fixture
def settings():
    """Makes the config of a small run on digits, three epochs unless other changes say so."""
    return lambda **changes: small_config(**{"epochs": 3, **changes})


@pytest.fixture
def train(digits, training):
    """Trains a fresh model by a config and returns (model, history)."""
    def run(config, folder=None, data=digits, **options):
        model = vit_helpers.build_model(config)
        return model, training.train_and_validation_loop(model, data, config, folder, **options)
    return run


@pytest.fixture(scope="session")
def whole():
    """What `bash train_job.sh` printed for the run "whole", undisturbed: the reference of all
    disturbed ones."""
    shown = train_job(*SMALL, "-r", "run", "whole")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    return shown
