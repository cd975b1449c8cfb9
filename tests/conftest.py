"""`pytest` leaves out the tests marked slow (they train for minutes); `pytest -m slow` runs them."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))  # jedi, evaluate and tests are imported from the root of the repository


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: trains for minutes; run with -m slow")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="slow; run with -m slow"))
