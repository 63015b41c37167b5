import subprocess

import pytest

from openpilot.tools.lib import python


@pytest.mark.parametrize(
  "code, why",
  [
    (
      "import sys; print('first\\nerror: the last \\033[31mone', file=sys.stderr); sys.exit(2)",
      r"the last \x1b[31mone",
    ),
    ("raise ValueError('no such thing')", "ValueError: no such thing"),
    ("import sys; sys.exit(3)", "exit code 3"),
    ("import sys; sys.exit('x' * 5000)", None),
  ],
)
def test_why_a_process_failed(code, why):
  done = subprocess.run(python.command("-c", code), env=python.environment(), capture_output=True, text=True)
  said = python.why_failed(done)
  assert said == why if why else len(said) < 220
  assert "\n" not in said and said.isprintable()
