"""A notebook that is run as a test on its own, `pytest --nbval-lax notebooks/06_run.ipynb`, writes
to a folder of its own, too (tests/conftest.py sees to that where the tests are run with it)."""
import os
import shutil
import tempfile

MARK = "vit-tests-"
MINE = None
if MARK not in os.environ.get("VIT_HOME", ""):
    MINE = os.environ["VIT_HOME"] = tempfile.mkdtemp(prefix=MARK)


def pytest_sessionfinish():
    """Leave nothing behind."""
    if MINE:
        shutil.rmtree(MINE, ignore_errors=True)
