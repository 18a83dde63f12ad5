"""Training a generator: what it reaches and leaves, its data and memory, several processes."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from jiio_plugins import Joint
from jiio_plugins.data.classification import load_digits
from jiio_plugins.envelope import joint_solution
from jiio_plugins.generative import TrainConfig, fit, load_generator, train
from jiio_plugins.generative.config import FitConfig, SampleConfig
from jiio_plugins.generative.fit_files import fit_files
from jiio_plugins.generative.pictures import write_sheet
from jiio_plugins.generative.sample_run import sample_run
from jiio_plugins.generative.step import SquaredError, WithLatent
from tests.generative.helpers import assert_same, config, run, states

if TYPE_CHECKING:
    from pathlib import Path

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
    w = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(again(w), done.decoder.eval()(w))
    table = states(done.out)["progress"]["table"]
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


@pytest.mark.parametrize("name", ["batch_size", "checkpoint_every", "latents_kept", "epochs"])
def test_settings_that_make_no_run(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        config(tmp_path / "run", **{name: 0})


def test_training_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    train(config(tmp_path / "run", steps=1))
    assert torch.equal(torch.get_rng_state(), state)


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


# Its data, and who draws from it ----------------------------------------------------------------


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
    printed = capsys.readouterr().err
    assert f"skipped, not readable: {pictures / 'broken.png'}" in printed
    assert "18 training and 2 held-out images (1, 8, 8), 1 files skipped" in printed


def test_pictures_of_a_run_are_no_data(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k, image in enumerate(load_digits("train")[0][:20]):
        write_sheet(folder / f"{k:02d}.png", image[None], 1)
    train(config(folder / "run", data=str(folder), steps=2, batch_size=4))
    assert list((folder / "run").glob("*.png"))
    train(config(folder / "run", data=str(folder), steps=3, batch_size=4, resume=True))
    again = SampleConfig(str(folder / "run"), count=4, measured=4, fits=2, overwrite=True)
    sample_run(again)
    (folder / "00.png").unlink()
    with pytest.raises(ValueError, match=r"another set of training images, '18, .* with '17, "):
        train(config(folder / "run", data=str(folder), steps=4, batch_size=4, resume=True))
    with pytest.raises(ValueError, match=r"are not those that .* was trained on"):
        sample_run(again)


def test_sampling_wants_latents_of_the_generator_that_is_there(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(config(out, steps=2, latent_penalty=1.0))
    drawn = SampleConfig(str(out), out=tmp_path / "drawn", count=4, measured=4, fits=8)
    report = sample_run(drawn)
    model, (images, _) = load_generator(out), load_digits("test")
    fitted = fit(model, images[:8], latent_penalty=1.0)
    assert report["held-out fits"]["PSNR"] == pytest.approx(float(fitted.psnr.mean()), abs=0.01)

    def kill(step: int, _: Any) -> None:
        if step == 5:  # after a checkpoint
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config(out, steps=6, resume=True), on_step=kill)
    with pytest.raises(ValueError, match=r"latents in .* step 2, its generator is of step 4"):
        sample_run(SampleConfig(str(out), count=4, metrics=False))
    with pytest.raises(ValueError, match="is the folder of a run, whose latents would be"):
        fit_files(FitConfig(out, (out / "samples.png",), out))


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
    pytest.importorskip("lightning_fabric")  # the processes would only say so
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
    visited = states(two)["progress"]["table"].any(1)
    assert int(visited.sum()) == int(states(one)["progress"]["table"].any(1).sum()) == 40 * 16
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
