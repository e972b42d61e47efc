"""The tasks that read slices: their values are tested with the windows (`test_read_windows.py`)."""

import pickle
import subprocess
import sys
from pathlib import Path

from ktray.storage.store import Dir
from ktray.training.read_slices import ReadSlice, SliceTask

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import pickle, sys
task = pickle.loads(sys.stdin.buffer.read())
print(type(task).__name__, sorted({"torch", "timm", "faiss", "mlflow"} & set(sys.modules)))
"""


def test_a_process_reads_without_loading_torch(tmp_path: Path) -> None:
    """A new process of Ray gets the task in this form, and loads what it needs."""
    task = pickle.dumps(SliceTask(ReadSlice(Dir(str(tmp_path)), ["pixels"], "")))
    done = subprocess.run([sys.executable, "-c", CODE], input=task, cwd=ROOT, capture_output=True, check=True)
    assert done.stdout.decode().strip() == "SliceTask []"
