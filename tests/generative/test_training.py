"""Training a generator: the gradient, the loop, checkpoints, several processes."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from jiio_plugins import Anderson, Joint
from jiio_plugins.cli.main import main
from jiio_plugins.data.classification import load_digits
from jiio_plugins.envelope import envelope_loss, joint_solution
from jiio_plugins.generative import Architecture, TrainConfig, fit, load_generator, train
from jiio_plugins.generative.config import CONFIG
from jiio_plugins.generative.files import (
    CHECKPOINT,
    GENERATOR,
    load_checkpoint,
    save_checkpoint,
    save_generator,
)
from jiio_plugins.generative.fit_files import fit_files
from jiio_plugins.generative.pictures import write_sheet
from jiio_plugins.generative.sample_run import sample_run
from jiio_plugins.generative.step import SquaredError, TrainingStep, WithLatent, default_step_size
from jiio_plugins.models import MDEQDecoder, load_pretrained
from jiio_plugins.utils import checkpoint

ROOT = Path(__file__).resolve().parents[2]
SMALL = Architecture(latent=(4,), channels=(4, 4), stride=1)
OPTIONS = [
    "--data=digits",
    "--batch-size=16",
    "--steps=12",
    "--iterations=3",
    "--warmup=2",
    "--step-size=0.3",
    "--model.latent",
    "4",
    "--model.channels",
    "4",
    "4",
    "--checkpoint-every=2",
    "--accelerator=cpu",
    "--latents-kept=64",
]


def config(out: Path, **kw: Any) -> TrainConfig:
    base = TrainConfig(
        data="digits",
        out=out,
        model=SMALL,
        batch_size=16,
        steps=4,
        iterations=3,
        warmup=2,
        step_size=0.3,
        accelerator="cpu",
        checkpoint_every=2,
        latents_kept=64,
    )
    return replace(base, **kw)


def run(out: Path, *extra: str, launcher: tuple[str, ...] = ("-m", "jiio_plugins")) -> Any:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
    command = [sys.executable, *launcher, "train-generator", "--out", str(out), *OPTIONS, *extra]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


# The gradient -----------------------------------------------------------------------------------


def test_envelope_gradient_agrees_with_finite_differences() -> None:
    """d/dθ min_u ℓ by the envelope theorem and by solving the whole problem at θ ± h."""
    torch.manual_seed(0)
    solver = Anderson(max_iter=400, tol=1e-13)
    decoder = MDEQDecoder(
        latent_shape=2, image_shape=(1, 4, 4), channels=(4, 4), stride=1, solver=solver
    ).double()
    model = WithLatent(decoder)
    images = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    objective = SquaredError(images, 0.5)
    method = Joint(max_iter=300, step_size=0.1, acceleration=0, relaxation=1.0)
    start = decoder.zeros(2)

    def fitted() -> Any:
        return joint_solution(model, start, objective, method=method)

    solution = fitted()
    assert float(solution.z_residual.max()) < 1e-10
    assert float(solution.costate_residual.max()) < 1e-10
    loss = envelope_loss(model, solution, objective, refine=200, reduction="sum")
    parameters = [p for p in decoder.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters)
    direction = [torch.randn_like(p) for p in parameters]
    slope = float(sum((g * d).sum() for g, d in zip(grads, direction, strict=True)))

    def value(h: float) -> float:
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(h * d)
        found = fitted()
        with torch.no_grad():
            total = float(objective(model(found.x)).sum())
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(h * d)
        return total

    h = 1e-5
    numeric = (value(h) - value(-h)) / (2 * h)
    assert abs(numeric) > 1e-3
    assert slope == pytest.approx(numeric, rel=1e-5)


# The loop ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("latents", ["zero", "table", "encoder"])
def test_training_lowers_the_error_and_leaves_a_run(tmp_path: Path, latents: Any) -> None:
    errors: list[float] = []
    settings = config(tmp_path / "run", latents=latents, steps=30, lr=1e-2, jacobian_weight=0.02)
    done = train(settings, on_step=lambda _, result: errors.append(float(result.mse.mean())))
    assert done.steps == 30
    assert len(errors) == 30
    assert sum(errors[-5:]) < 0.9 * sum(errors[:5])
    names = {p.name for p in done.out.iterdir()}
    assert names >= {
        "checkpoint.pt",
        "config.json",
        "generator.safetensors",
        "latents.safetensors",
        "reconstructions.png",
        "samples.png",
        "interpolations.png",
    }
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert load_file(done.out / "latents.safetensors")["latents"].shape == (64, 4)
    again = load_generator(done.out)
    u = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(again(u), done.decoder.eval()(u))
    table = load_checkpoint(done.out / CHECKPOINT)["table"]
    assert int(table.any(1).sum()) == 30 * 16  # no image twice in an epoch


def test_bfloat16_keeps_the_solver_in_float32(tmp_path: Path) -> None:
    seen: list[Any] = []
    train(
        config(tmp_path / "run", precision="bf16-mixed"),
        on_step=lambda _, result: seen.append(result),
    )
    assert all(r.latents.dtype == torch.float32 for r in seen)
    assert all(r.z_residual.dtype == torch.float32 for r in seen)
    assert all(bool(torch.isfinite(r.loss)) for r in seen)


def test_config_is_the_record_of_the_run(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", seed=3)
    assert TrainConfig.from_json(settings.to_json()) == settings
    with pytest.raises(ValueError, match="unknown settings in the run's config: colour"):
        TrainConfig.from_json('{"colour": 1}')
    with pytest.raises(
        ValueError, match=r"config\.json has no data, folder, model, out: it is dam"
    ):
        TrainConfig.from_json("{}")
    with pytest.raises(ValueError, match=r"config\.json is damaged: Expecting value"):
        TrainConfig.from_json('{"data": ')


# Checkpoints ------------------------------------------------------------------------------------


def states(out: Path) -> dict[str, Any]:
    return load_checkpoint(out / CHECKPOINT)


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    first_run = run(whole, "--latents", "table")
    output, _ = first_run.communicate()
    assert first_run.returncode == 0, output
    process = run(killed, "--latents", "table")
    deadline = time.monotonic() + 120
    while not (killed / CHECKPOINT).is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 0 < states(killed)["step"] < 12
    resumed = run(killed, "--resume")
    output, _ = resumed.communicate()
    assert resumed.returncode == 0, output
    first, second = states(whole), states(killed)
    for part in ("step", "training", "optimizer", "ema", "table"):
        assert_same(first[part], second[part])
    assert_same(load_file(whole / GENERATOR), load_file(killed / GENERATOR))


def test_runs_that_cannot_start(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(config(out, steps=2))
    with pytest.raises(FileExistsError, match=r"exists and is not empty: .*--resume"):
        train(config(out))
    with pytest.raises(FileNotFoundError, match=r"there is no run in .*leave out --resume"):
        train(config(tmp_path / "other", resume=True))
    content = (out / CHECKPOINT).read_bytes()
    (out / CHECKPOINT).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged"):
        train(config(out, resume=True))
    checkpoint.write(out / CHECKPOINT, {"format": "something else"})
    with pytest.raises(ValueError, match="not a checkpoint of jiio train-generator"):
        train(config(out, resume=True))
    wider = config(tmp_path / "wide", steps=2, model=replace(SMALL, channels=(8, 4)))
    train(wider)
    (out / CHECKPOINT).write_bytes((wider.out / CHECKPOINT).read_bytes())
    with pytest.raises(ValueError, match="belongs to another model: size mismatch"):
        train(config(out, resume=True))
    (out / CHECKPOINT).unlink()
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):  # there was one
        train(config(out, steps=9, resume=True))
    assert TrainConfig.from_json((out / CONFIG).read_text()).steps == 2


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path: Path) -> None:
    out = tmp_path / "run"

    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config(out), on_step=kill)
    assert not (out / CHECKPOINT).exists()
    train(config(out, resume=True))
    whole = config(tmp_path / "whole")
    train(whole)
    assert_same(states(out)["training"], states(whole.out)["training"])


@pytest.mark.parametrize("first", [True, False])
def test_a_diverged_run_keeps_what_it_has(tmp_path: Path, first: bool) -> None:
    out = tmp_path / "run"
    if not first:
        train(config(out, steps=2))
        kept = (out / GENERATOR).read_bytes()

    def diverge(step: int, _: Any) -> None:
        modules = [m for m in gc.get_objects() if type(m) is TrainingStep]
        if step == (2 if first else 4):  # its own loss was finite, and a checkpoint is due
            with torch.no_grad():
                for module in modules:
                    next(module.parameters()).fill_(torch.nan)

    said = "There is no checkpoint yet" if first else "The last checkpoint is from before"
    with pytest.raises(FloatingPointError, match=f"NaN or Inf at step .*{said}"):
        train(config(out, steps=4, resume=not first), on_step=diverge)
    if first:
        assert not (out / CHECKPOINT).exists()
    else:
        assert states(out)["step"] == 2
        assert (out / GENERATOR).read_bytes() == kept


def test_training_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    train(config(tmp_path / "run", steps=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_typed_on_resuming_counts_also_where_it_is_a_default(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(config(out, steps=2, epochs=2, seed=3))
    words = ["train-generator", "--data=digits", f"--out={out}", "--resume", "--accelerator=cpu"]
    with pytest.raises(SystemExit, match=r"seed was 3 and cannot be 0 in a resumed run"):
        main([*words, "--seed", "0"])
    main([*words, "--steps", "None", "--epochs", "1"])
    saved = TrainConfig.from_json((out / CONFIG).read_text())
    assert (saved.steps, saved.epochs, saved.seed, saved.model) == (None, 1, 3, SMALL)
    assert states(out)["step"] == 81


def test_pictures_of_a_run_are_no_data(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k, image in enumerate(load_digits("train")[0][:20]):
        write_sheet(folder / f"{k:02d}.png", image[None], 1)
    train(config(folder / "run", data=str(folder), steps=2, batch_size=4))
    assert list((folder / "run").glob("*.png"))
    train(config(folder / "run", data=str(folder), steps=3, batch_size=4, resume=True))
    sample_run(str(folder / "run"), count=4, measured=4, fits=2)
    (folder / "00.png").unlink()
    with pytest.raises(ValueError, match="the data has changed"):
        train(config(folder / "run", data=str(folder), steps=4, batch_size=4, resume=True))
    with pytest.raises(ValueError, match=r"are not those that .* was trained on"):
        sample_run(str(folder / "run"), count=4, measured=4, fits=2)


def test_sampling_wants_latents_of_the_generator_that_is_there(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(config(out, steps=2, latent_penalty=1.0))
    report = sample_run(str(out), tmp_path / "drawn", count=4, measured=4, fits=8)
    model, (images, _) = load_generator(out), load_digits("test")
    fitted = fit(model, images[:8], latent_penalty=1.0)
    assert report["held-out fits"]["PSNR"] == pytest.approx(float(fitted.psnr.mean()), abs=0.01)

    def kill(step: int, _: Any) -> None:
        if step == 5:  # after a checkpoint
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config(out, steps=6, resume=True), on_step=kill)
    with pytest.raises(ValueError, match=r"latents in .* step 2, its generator is of step 4"):
        sample_run(str(out), count=4, measure=False)
    with pytest.raises(ValueError, match="is the folder of a run, whose latents would be"):
        fit_files(out, [out / "samples.png"], out)


def test_a_resumed_run_keeps_its_settings(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(config(out, steps=2, epochs=3))
    train(TrainConfig(data="digits", out=out, steps=3, resume=True))
    saved = TrainConfig.from_json((out / "config.json").read_text())
    assert (saved.epochs, saved.steps, saved.checkpoint_every) == (3, 3, 2)
    with pytest.raises(ValueError, match=r"lr was 0\.003 and cannot be 0\.1 in a resumed run"):
        train(TrainConfig(data="digits", out=out, lr=0.1, resume=True))


@pytest.mark.parametrize("name", ["batch_size", "checkpoint_every", "latents_kept", "epochs"])
def test_settings_that_make_no_run(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        config(tmp_path / "run", **{name: 0})


def test_a_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / CHECKPOINT
    save_checkpoint(path, {"step": 1})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"could not write checkpoint.pt; the one before is kept"):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_run_goes_on_after_the_disk_was_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    train(config(out, steps=2))
    weights = load_file(out / GENERATOR)
    write = Path.open

    def full(self: Path, mode: str = "r", **rest: Any) -> Any:
        return write(Path("/dev/full") if self.suffix == ".tmp" else self, mode, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(OSError, match=r"could not write checkpoint.pt; the one before is kept"):
            train(config(out, steps=2, resume=True))
        with pytest.raises(OSError, match=r"could not write config.json; the one before is kept"):
            train(config(out, steps=4, resume=True))
        with pytest.raises(OSError, match=r"could not write g.safetensors: .*Free some space"):
            save_generator(out / "g.safetensors", SMALL.build((1, 8, 8)), SMALL)
    assert states(out)["step"] == 2
    assert TrainConfig.from_json((out / CONFIG).read_text()) == config(out, steps=2)
    assert_same(load_file(out / GENERATOR), weights)
    train(config(out, steps=4, resume=True))
    whole = config(tmp_path / "whole", steps=4)
    train(whole)
    assert_same(states(out)["training"], states(whole.out)["training"])


def test_unreadable_files_are_skipped_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for k, image in enumerate(load_digits("test")[0][:20]):
        write_sheet(pictures / f"{k:02d}.png", image[None], 1)
    (pictures / "broken.png").write_bytes(b"no image")
    settings = config(tmp_path / "run", data=str(pictures), resize=8, batch_size=8, steps=2)
    train(settings)
    printed = capsys.readouterr().out
    assert f"skipped, not readable: {pictures / 'broken.png'}" in printed
    assert "18 training and 2 held-out images (1, 8, 8), 1 files skipped" in printed


# Memory -----------------------------------------------------------------------------------------


def test_memory_does_not_grow_over_epochs(tmp_path: Path) -> None:
    """Number and size of all live tensors at the end of each epoch, with checkpoints in each."""
    seen: list[tuple[int, int]] = []

    def look(step: int, _: Any) -> None:
        if step % 3 == 0:
            gc.collect()
            live = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]
            seen.append((len(live), sum(t.nbytes for t in live)))

    settings = config(
        tmp_path / "run",
        latents="table",
        batch_size=432,
        epochs=5,
        steps=None,
        iterations=1,
        warmup=1,
        checkpoint_every=3,
        pictures_every=3,
        latents_kept=16,
    )
    train(settings, on_step=look)
    assert len(seen) == 5
    assert len(set(seen[1:])) == 1  # the first epoch ends before the first checkpoint


# The step size ----------------------------------------------------------------------------------


def test_default_step_size_by_the_sizes_of_latent_and_image(tmp_path: Path) -> None:
    digits: Any = load_pretrained("digits-generator")
    assert default_step_size(digits) == pytest.approx(2.5 / 8)
    spatial = MDEQDecoder(latent_shape=(4, 7, 7), image_shape=(1, 28, 28))
    assert default_step_size(spatial) == pytest.approx(2.5 / 4)
    settings = config(tmp_path / "run", step_size=None)
    assert TrainConfig.from_json(settings.to_json()).step_size is None
    assert TrainingStep(digits, None, settings).method.step_size == pytest.approx(2.5 / 8)
    assert TrainingStep(digits, None, config(tmp_path / "run")).method.step_size == 0.3
    x, _ = load_digits("test")
    default, by_hand, too_small = (
        float(fit(digits, x[:24], method=Joint(max_iter=10, step_size=step)).psnr.mean())
        for step in (None, 0.3, 0.03)
    )
    assert default > by_hand - 0.1 > too_small


# Several processes ------------------------------------------------------------------------------

RANK = """
import atexit, os, sys, torch, tyro
from jiio_plugins.cli.generative import TrainGenerator
from jiio_plugins.generative import train

# what is registered first runs last: by then the process group must have been closed
def report():  # in one piece, as two processes write to one pipe
    os.write(1, f"left open: {torch.distributed.is_initialized()}\\n".encode())
atexit.register(report)
config = tyro.cli(TrainGenerator, args=sys.argv[2:])
torch.save(train(config).decoder.state_dict(), config.out / f"rank{os.environ['RANK']}.pt")
"""


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    options = ("--steps", "40", "--lr", "1e-2")
    single = run(one, *options)
    (tmp_path / "rank.py").write_text(RANK)
    double = run(two, *options, launcher=(*torchrun, str(tmp_path / "rank.py")))
    outputs = [process.communicate()[0] for process in (single, double)]
    assert single.returncode == 0, outputs[0]
    assert double.returncode == 0, outputs[1]
    assert outputs[1].count("left open: False") == 2
    # 16 images a step over both, none twice: rank 0 has the even ones, rank 1 the odd ones
    visited = states(two)["table"].any(1)
    assert int(visited.sum()) == int(states(one)["table"].any(1).sum()) == 40 * 16
    assert int(visited[0::2].sum()) == int(visited[1::2].sum())
    weights = [torch.load(two / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert_same(*weights)
    x, _ = load_digits("test")
    errors = []
    for out in (one, two):
        model = WithLatent(load_generator(out))
        objective = SquaredError(x[:200], 0.01)
        method = Joint(max_iter=40, step_size=0.3)
        solution = joint_solution(model, torch.zeros(200, 4), objective, method=method)
        errors.append(float(solution.loss.mean()))
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
