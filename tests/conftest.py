"""`pytest` leaves out the tests marked slow, which train; `pytest -m slow` runs them."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))  # from here jedi, evaluate and tests are imported


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: trains for minutes; run with -m slow")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="slow; run with -m slow"))
