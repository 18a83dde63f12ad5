"""Training a generator: the gradient, the loop, checkpoints, several processes."""

from __future__ import annotations

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

from jiio_plugins import Anderson, Joint, checkpoint
from jiio_plugins.data import load_digits
from jiio_plugins.generative import Architecture, TrainConfig, load_generator, train
from jiio_plugins.generative.files import CHECKPOINT, GENERATOR, load_checkpoint, save_checkpoint
from jiio_plugins.generative.step import SquaredError, WithLatent
from jiio_plugins.models import MDEQDecoder
from jiio_plugins.training import envelope_loss, joint_solution

ROOT = Path(__file__).resolve().parents[2]
SMALL = Architecture(latent=(4,), channels=(4, 4), stride=1)
OPTIONS = [
    "--data=digits", "--batch-size=16", "--steps=12", "--iterations=3", "--warmup=2",
    "--step-size=0.3", "--model.latent", "4", "--model.channels", "4", "4",
    "--checkpoint-every=2", "--accelerator=cpu", "--latents-kept=64",
]  # fmt: skip


def config(out: Path, **kw: Any) -> TrainConfig:
    base = TrainConfig(
        data="digits", out=out, model=SMALL, batch_size=16, steps=4, iterations=3, warmup=2,
        step_size=0.3, accelerator="cpu", checkpoint_every=2, latents_kept=64,
    )  # fmt: skip
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
        "checkpoint.pt", "config.json", "generator.safetensors", "latents.safetensors",
        "reconstructions.png", "samples.png", "interpolations.png",
    }  # fmt: skip
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


# Several processes ------------------------------------------------------------------------------


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    options = ("--steps", "40", "--lr", "1e-2")
    single = run(one, *options)
    double = run(two, *options, launcher=(*torchrun, "-m", "jiio_plugins"))
    outputs = [process.communicate()[0] for process in (single, double)]
    assert single.returncode == 0, outputs[0]
    assert double.returncode == 0, outputs[1]
    # 16 images a step over both, none twice: rank 0 has the even ones, rank 1 the odd ones
    visited = states(two)["table"].any(1)
    assert int(visited.sum()) == int(states(one)["table"].any(1).sum()) == 40 * 16
    assert int(visited[0::2].sum()) == int(visited[1::2].sum())
    x, _ = load_digits("test")
    errors = []
    for out in (one, two):
        model = WithLatent(load_generator(out))
        objective = SquaredError(x[:200], 0.01)
        method = Joint(max_iter=40, step_size=0.3)
        solution = joint_solution(model, torch.zeros(200, 4), objective, method=method)
        errors.append(float(solution.loss.mean()))
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
