"""Reports computed from a run's ledger and the metrics files that it names.

`write_report(folder)` writes one self-contained page: no network, no script, charts drawn as inline SVG.
"""

from __future__ import annotations

import os
from pathlib import Path

from pyengine.report.page import page
from pyengine.report.run import load_run

FILE_NAME = "report.html"


def write_report(run_folder: str | os.PathLike[str]) -> Path:
    """Write `report.html` into a run folder. The same ledger and metrics give the same bytes.

    Returns:
        The path of the page.

    Raises:
        LedgerError: the ledger is missing or does not verify.
    """
    run = load_run(run_folder)
    path = run.folder / FILE_NAME
    temporary = path.with_name(f".{FILE_NAME}.{os.getpid()}")
    try:
        temporary.write_text(page(run), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
