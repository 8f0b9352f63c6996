"""Fixtures for all tests. What tests import is in helpers.py, because this file and course/conftest.py share a name."""

import json
import sys
from pathlib import Path

import pytest
import torch

# Installed packages come before the current folder, because a user may have a torch.py there.
sys.path.sort(key=lambda entry: Path(entry).resolve() == Path.cwd())
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers import FIXTURES, TOY, Golden  # noqa: E402

from minioutro import load  # noqa: E402

ONLY_IF_NAMED = ("with_transformers", "with_browser", "full")     # folders that need more packages, or minutes

torch.set_num_threads(1)             # the tensors are tiny, so a second thread only slows them down


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def golden():
    """A function: golden("dev_a") is that checkpoint with its golden values."""
    return {path.name: Golden(path.name) for path in FIXTURES.iterdir() if path.is_dir()}.__getitem__


@pytest.fixture(scope="session")
def toy():
    return load(TOY)


@pytest.fixture(scope="session")
def decoded():
    """The answers of transformers and of the published code, by case."""
    return json.loads((FIXTURES / "decode.json").read_text())


def pytest_ignore_collect(collection_path, config):
    """Leave out the folders of ONLY_IF_NAMED unless the command line names them."""
    name = collection_path.name
    if name in ONLY_IF_NAMED and not any(name in Path(arg.split("::")[0]).parts for arg in config.args):
        return True
