"""Store an executed notebook: without papermill's metadata, widgets' states and timings.

python tests/strip_notebook.py executed.ipynb stored.ipynb
"""
import sys

import nbformat

notebook = nbformat.read(sys.argv[1], 4)
for part in (notebook, *notebook.cells):
    for name in ("papermill", "widgets", "execution"):
        part.metadata.pop(name, None)
for cell in notebook.cells:
    if not cell.metadata.get("tags"):
        cell.metadata.pop("tags", None)
nbformat.write(notebook, sys.argv[2])
