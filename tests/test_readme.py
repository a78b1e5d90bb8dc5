"""The README and FORMAT.md say what is true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from flowmason_secrets import config
from flowmason_secrets.api.routes import ROUTES
from flowmason_secrets.core.errors import SecretsError
from flowmason_secrets.core.status import STATUS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FORMAT = (ROOT / "service/flowmason_secrets/FORMAT.md").read_text(encoding="utf-8")

# Errors that no request can end with.
NOT_OVER_HTTP = {"another_log", "configuration", "log_damaged", "rotation_incomplete"}


def test_it_lists_every_variable_with_its_meaning() -> None:
    listed = dict(re.findall(r"^\| `(FLOWMASON_SECRETS_\w+)` \| (.*) \|$", README, re.MULTILINE))
    expected = {config.PREFIX + name: text for name, (_, text) in config.VARIABLES.items()}
    assert listed == expected


def test_it_lists_every_route() -> None:
    table = README[README.index("| route | scope | answer |") :].split("\n\n")[0]
    for route in ROUTES:
        tail = route.template.rpartition("/")[2]
        row = [line for line in table.splitlines() if f"/{tail}`" in line and route.method in line]
        assert row, (route.method, route.template)


def test_it_names_every_error_code() -> None:
    for error in STATUS:
        assert (
            error.code in NOT_OVER_HTTP
            or f"`{error.code}`" in README
            or error.code in ("api_key_not_found",)
        ), error.code
    assert SecretsError.code not in {error.code for error in STATUS}


def test_its_python_runs(tmp_path: Path) -> None:
    snippet = README[README.index("```python\n") + 10 :].partition("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        env={"HOME": str(tmp_path), "FLOWMASON_SECRETS_KEY": "k" * 40},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "OPENAI_API_KEY: api_key\n"


@pytest.mark.parametrize("path", sorted((ROOT / "service").rglob("*.py")), ids=lambda p: p.name)
def test_the_sections_that_code_cites_exist(path: Path) -> None:
    cited = re.findall(r"(?:format|FORMAT\.md) ((?:§[\d.]+(?:, )?)+)", path.read_text("utf-8"))
    sections = set(re.findall(r"^#{2,3} ([\d.]+?)\.? ", FORMAT, re.MULTILINE))
    for group in cited:
        for section in re.findall(r"§(\d+(?:\.\d+)?)", group):
            assert section in sections, f"{path.name} cites §{section}"
