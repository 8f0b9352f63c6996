"""The fuzzer recognises wrong ends of a command, and finds none for its first inputs."""

import os
import subprocess
import sys

import pytest
from by_hand import fuzz


def test_first_inputs_end_well(tmp_path):
    command = [sys.executable, fuzz.__file__, "--end", "30", "--minutes", "9", "--keep", tmp_path / "finds"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("30 inputs\n") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("code, said", [
    ("print('{}')", None), ("raise ValueError('one line')", None), ("os._exit(3)", "exit code 3"),
    ("print('x')", "not JSON"), ("print('NaN')", "not JSON"), ("sys.exit(1)", "exit code 1"),
    ("raise RuntimeError('deep inside')", "deep inside"), ("print('{}'); os.write(2, b'from C')", "from C"),
    ("print('two\\nlines', file=sys.stderr); sys.exit(2)", "two")])
def test_wrong_ends_are_found(tmp_path, code, said):
    wrong = fuzz.ask(lambda: exec(code, {"os": os, "sys": sys}), [], tmp_path)[1]
    assert wrong is None if said is None else said in wrong
