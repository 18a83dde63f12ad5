"""Files: whole or absent, sealed, one writer; what the system refuses is named for what it is."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from jiio_plugins import __version__, plots
from jiio_plugins.data import glyphs
from jiio_plugins.data.images import read_files
from jiio_plugins.generative import Architecture, TrainConfig, load_generator, load_latents
from jiio_plugins.generative.config import CONFIG
from jiio_plugins.generative.files import save_config, save_generator, save_latents
from jiio_plugins.generative.pictures import write_sheet
from jiio_plugins.utils import checkpoint, files
from tests.data.helpers import save_picture
from tests.helpers import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = Architecture(latent=(3,), channels=(4, 4), stride=1)


def write_checkpoint(path: Path) -> None:
    checkpoint.write(path, {"format": "none", "progress": {"step": 3, "table": torch.ones(5, 2)}})


def write_generator(path: Path) -> None:
    save_generator(path, SIZES.build((1, 8, 8)), SIZES, step=4)


def write_latents(path: Path) -> None:
    save_latents(path, torch.ones(4, 3), step=4, images="abc")


def write_config(path: Path) -> None:
    save_config(path, TrainConfig(data="digits", out=path.parent, seed=7))


def write_glyphs(path: Path) -> None:
    alphabets = "ABCDE", "αβγδε", "абвгд"
    glyphs._store(path, torch.ones(15, 2, 1, 4, 4, dtype=torch.uint8), "".join(alphabets))


FORMATS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
    "run.pt": (write_checkpoint, checkpoint.read),
    "generator.safetensors": (write_generator, load_generator),
    "latents.safetensors": (write_latents, load_latents),
    CONFIG: (write_config, TrainConfig.read),
    "glyphs.safetensors": (write_glyphs, lambda path: glyphs._load(path, "train")),
}
every_format = pytest.mark.parametrize("name", FORMATS)


# Damage -----------------------------------------------------------------------------------------


@every_format
def test_a_flipped_bit_anywhere_is_an_error(name: str, tmp_path: Path) -> None:
    write, read = FORMATS[name]
    path = tmp_path / name
    write(path)
    read(path)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    places = [*range(16), *range(len(whole) - 80, len(whole))]  # heads, and what is padding
    places += generator.integers(len(whole), size=60).tolist()
    for place in places:
        bit = 1 << int(generator.integers(8))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"is damaged|settings in the run's config|has no "):
            read(path)


@every_format
def test_what_is_no_such_file_is_an_error_of_one_line(name: str, tmp_path: Path) -> None:
    _, read = FORMATS[name]
    path = tmp_path / name
    other = tmp_path / "other.safetensors"
    save_file({"weights": torch.ones(3)}, other)
    files.save_tensors(tmp_path / "sealed.safetensors", {"x": torch.ones(2)}, architecture="[1]")
    contents = [b"", b"\x00", b"[]", b"{}", b"\xff\xfe notes", 200 * b"{", other.read_bytes()]
    for content in [*contents, (tmp_path / "sealed.safetensors").read_bytes()]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged") as caught:
            read(path)
        assert "\n" not in str(caught.value)


@every_format
def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_not_waited_for(
    name: str, tmp_path: Path
) -> None:
    _, read = FORMATS[name]
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / name)
    (tmp_path / name).mkdir()
    for path in (tmp_path / "pipe" / name, tmp_path / name):
        with pytest.raises((OSError, ValueError), match=r"no regular file|there (is|are) no"):
            read(path)


def test_a_config_whose_settings_are_of_other_kinds(tmp_path: Path) -> None:
    write_config(tmp_path / CONFIG)
    good = json.loads((tmp_path / CONFIG).read_text())
    for change in ({"model": 3}, {"epochs": "many"}, {"model": {"latent": 1, "channels": []}}):
        values = {**good, **change, "checksum": files.EMPTY_SEAL}
        (tmp_path / CONFIG).write_bytes(files.sealed(json.dumps(values).encode()))
        with pytest.raises(ValueError, match=r"config\.json is damaged"):
            TrainConfig.read(tmp_path / CONFIG)
    write_config(tmp_path / CONFIG)
    edited = (tmp_path / CONFIG).read_text().replace('"seed": 7', '"seed": 8')
    (tmp_path / CONFIG).write_text(edited)
    with pytest.raises(ValueError, match=r"damaged or was edited: .* on the command line"):
        TrainConfig.read(tmp_path / CONFIG)


def test_a_flipped_bit_in_a_name_of_a_setting_is_damage(tmp_path: Path) -> None:
    write_config(tmp_path / CONFIG)
    whole = (tmp_path / CONFIG).read_bytes()
    for name in (b'"epochs"', b'"checksum"', b"sha256:"):
        at = whole.index(name) + 2
        (tmp_path / CONFIG).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="damaged or was edited: its checksum"):
            TrainConfig.read(tmp_path / CONFIG)


def test_what_json_has_no_word_for() -> None:
    said = files.as_json({"a": float("inf"), "b": [float("nan"), 1.0], "c": Path("d")})
    version = {"jiio_plugins": __version__}
    assert json.loads(said) == {**version, "a": "inf", "b": [None, 1.0], "c": "d"}


def test_benchmarks_write_results_by_what_adds_the_version() -> None:
    own = {"tables.py"}  # it has the version, and the commit besides
    paths = [path for path in (ROOT / "benchmarks").glob("*.py") if path.name not in own]
    assert [path.name for path in paths if "json.dumps(" in path.read_text()] == []


def write_a_figure(path: Path) -> None:
    from matplotlib.figure import Figure

    plots.save(path, Figure(figsize=(1, 1)))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("results.json", lambda path: files.write_json(path, {"figures": [1.5, None]})),
        ("curve.png", write_a_figure),
    ],
)
def test_results_are_written_whole_and_to_no_other_place(
    name: str, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, path = tmp_path / "victim", tmp_path / "new" / name
    victim.write_text("precious")
    path.parent.mkdir()
    path.symlink_to(victim)
    write(path)
    assert victim.read_text() == "precious"
    assert not path.is_symlink()
    before = path.read_bytes()
    assert json.loads(before) if name == "results.json" else before.startswith(b"\x89PNG")

    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=rf"could not write {name}; the one before is kept .* full"):
        write(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [name]


def test_a_seal_in_the_content_is_no_hindrance(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    for text in (files.EMPTY_SEAL, "sha256:" + 64 * "a"):
        checkpoint.write(path, {"text": text, "model": torch.ones(2)})
        whole = path.read_bytes()
        checkpoint.read(path)
        path.write_bytes(whole.replace(b"model", b"mudel"))
        with pytest.raises(ValueError, match="damaged"):
            checkpoint.read(path)


# Writing ----------------------------------------------------------------------------------------


def test_nothing_that_lies_in_the_way_is_followed_or_written_over(tmp_path: Path) -> None:
    """Neither a link in the place of the file nor one under a name that it has meanwhile."""
    private, path = tmp_path / "private", tmp_path / "out" / "latents.safetensors"
    private.write_text("mine")
    path.parent.mkdir()
    names = [path.name, f"{path.name}.tmp", f".{path.name}.tmp"]
    for name in (*names, "sheet.png"):
        (path.parent / name).symlink_to(private)
    write_latents(path)
    write_sheet(path.parent / "sheet.png", torch.rand(2, 1, 8, 8), 2)
    assert private.read_text() == "mine"
    assert len(load_latents(path)) == 4
    (path.parent / ".run.pt.lock").symlink_to(private)
    with (
        pytest.raises(OSError, match=r"could not write run.pt"),
        files.owning(path.parent / "run.pt"),
    ):
        pass
    assert private.read_text() == "mine"


def test_two_writers_share_no_file(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    with files.replacing(path) as first:
        first.write(b"first")
        with files.replacing(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full. Free some space"),
        (errno.EDQUOT, "the disk is full. Free some space"),
        (errno.EROFS, "the folder is not yours to write to. Choose another"),
        (errno.EACCES, "the folder is not yours to write to. Choose another"),
        (errno.EIO, "Input/output error. Choose another place"),
    ],
)
def test_what_the_system_refuses_is_named(
    number: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    write_checkpoint(tmp_path / "run.pt")
    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match=rf"could not write run.pt; the one before is kept .*{words}"):
        write_checkpoint(tmp_path / "run.pt")
    assert checkpoint.read(tmp_path / "run.pt")["progress"]["step"] == 3


# One writer -------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    script = (
        "import sys; from jiio_plugins.utils.files import owning\n"
        "with owning(sys.argv[1]): print('mine', flush=True); sys.stdin.read()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"mine\n"
    refused = pytest.raises(BlockingIOError, match=r"run\.pt is being written by another process")
    with refused, files.owning(path):
        pass
    other.kill()  # the system takes its lock away
    other.communicate()
    (tmp_path / ".run.pt.0123.tmp").write_bytes(b"half")
    (tmp_path / ".other.pt.0123.tmp").write_bytes(b"not ours")
    with files.owning(path):
        assert not (tmp_path / ".run.pt.0123.tmp").exists()
        with refused, files.owning(path):
            pass
        failures: list[BaseException] = []

        def own() -> None:
            try:
                with files.owning(path):
                    pass
            except BlockingIOError as error:
                failures.append(error)

        thread = threading.Thread(target=own)
        thread.start()
        thread.join()
        assert len(failures) == 1
    assert [p.name for p in tmp_path.iterdir()] == [".other.pt.0123.tmp"]


# What is read -----------------------------------------------------------------------------------


def test_pipes_devices_and_huge_images_are_skipped(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    Image.new("1", (13000, 13000)).save(tmp_path / "large.png")
    Image.new("1", (10000, 10000)).save(tmp_path / "rather-large.png")
    save_picture(tmp_path / "small.png", (6, 6))
    names = sorted(tmp_path.iterdir())
    pixels, skipped = read_files(names, resize=4)
    assert pixels.shape == (1, 1, 4, 4)
    assert skipped == names[:-1]


def test_a_font_that_is_a_pipe_is_skipped(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.ttf")
    with pytest.raises(FileNotFoundError, match=r"no \.ttf or .otf fonts"):
        glyphs.load_glyphs(fonts=tmp_path, cache=tmp_path)
