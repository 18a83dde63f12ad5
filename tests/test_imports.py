"""What is imported when: torch only where it is needed, its compiler only by who compiles."""

import subprocess
import sys

import pytest

import jiio_plugins
import jiio_plugins.generative
import jiio_plugins.utils


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import jiio_plugins", "torch"),
        ("import jiio_plugins.cli.main", "torch"),
        ("from jiio_plugins import *", "torch._dynamo"),
    ],
)
def test_what_an_import_leaves_out(statement: str, absent: str) -> None:
    left_out = f"import sys\n{statement}\nassert {absent!r} not in sys.modules"
    subprocess.run([sys.executable, "-c", left_out], check=True)


@pytest.mark.parametrize("words", [["--help"], ["attack"]])
def test_help_and_usage_errors_need_no_torch(words: list[str]) -> None:
    run = (
        "import sys\nfrom jiio_plugins.cli.main import main\n"
        f"try: main({words})\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", run], check=True, capture_output=True)


@pytest.mark.parametrize(
    "package", [jiio_plugins, jiio_plugins.generative, jiio_plugins.utils], ids=lambda p: p.__name__
)
def test_every_public_name_is_there(package: object) -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
