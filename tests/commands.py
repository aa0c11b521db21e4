"""The command line, run inside the test's own process."""

from __future__ import annotations

import json
from typing import Any

from click.testing import CliRunner, Result

from bitport.cli import cli


def run(*words: str, code: int = 0) -> Result:
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done


def document(*words: str, code: int = 0) -> Any:
    return json.loads(run(*words, "--json", code=code).stdout)
