"""A torchvision that is built for another torch: one line that says what to install."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest

from jiio_plugins.cli.main import main
from jiio_plugins.data import load_labelled
from jiio_plugins.utils.builds import OtherBuildError, importing_torchvision
from jiio_plugins.utils.factory import load_function
from tests.helpers import ROOT

if TYPE_CHECKING:
    from pathlib import Path

REASONS = {
    "nms": 'raise RuntimeError("operator torchvision::nms does not exist")',
    "symbol": 'raise ImportError("undefined symbol")',
    "again": 'raise AttributeError("partially initialized module")',  # at a second attempt
}
SAID = "built for another torch than .*: install torch and torchvision from the same place"


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path whose torchvision cannot be imported."""
    (tmp_path / "torchvision.py").write_text(REASONS["nms"])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    return tmp_path


@pytest.mark.parametrize("reason", REASONS.values())
def test_another_build_says_what_to_install(broken: Path, reason: str) -> None:
    (broken / "torchvision.py").write_text(reason)
    with pytest.raises(OtherBuildError, match=SAID), importing_torchvision():
        import torchvision  # type: ignore[import-untyped]  # noqa: F401


def test_other_errors_are_left_alone(broken: Path) -> None:
    (broken / "torchvision.py").write_text("import surely_none")
    with pytest.raises(ModuleNotFoundError, match="surely_none"), importing_torchvision():
        import torchvision  # noqa: F401
    with pytest.raises(RuntimeError, match="torchvision in its text"), importing_torchvision():
        raise RuntimeError("torchvision in its text")
    (broken / "torchvision.py").write_text(f"def nms():\n    {REASONS['nms']}")
    with pytest.raises(RuntimeError, match=r"^operator"), importing_torchvision():
        importlib.import_module("torchvision").nms()


def test_data_and_models_that_need_it(broken: Path) -> None:
    with pytest.raises(ImportError, match=SAID):
        load_labelled("cifar-10", "test", broken)
    (broken / "my_features.py").write_text("import torchvision\n")
    with pytest.raises(ImportError, match=SAID):
        load_function("my_features:build", "--features")


def test_adapters_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(name: str) -> Any:
        raise OtherBuildError("of another torch", name="torchvision")

    monkeypatch.setattr("jiio_plugins.cli.main.load_adapter", fails)
    main(["adapters"])
    said = capsys.readouterr().out
    assert "deepinv" in said
    assert "needs torchvision: install torch and torchvision from the same place" in said


@pytest.mark.skipif(find_spec("torchmetrics") is None, reason="torchmetrics is not installed")
def test_samples_are_not_begun(broken: Path) -> None:
    out = broken / "out"
    run = subprocess.run(
        [sys.executable, "-m", "jiio_plugins", "sample", "digits-generator", f"--out={out}"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(broken), str(ROOT)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    (line,) = run.stdout.splitlines()
    assert line.startswith("jiio: torchvision cannot be imported, as it is built for another torch")
    assert not out.exists()
