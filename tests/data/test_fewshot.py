"""Few-shot models and data."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from jiio_plugins import Anderson, Joint, count_evaluations, optimize_input
from jiio_plugins.data.glyphs import SPLITS, load_glyphs, script_of, split_scripts
from jiio_plugins.data.omniglot import load_omniglot
from jiio_plugins.data.tasks import ClassImages, Sinusoids, cache_folder, sample_tasks
from jiio_plugins.models import MDEQFewShot, SinusoidDEQ
from jiio_plugins.models.fewshot import FiLM, TaskLinear

# Models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [14, 28])
@pytest.mark.parametrize(
    "settings",
    [{}, {"channels": (8, 16)}, {"channels": (8,), "stride": 2}, {"channels": (8, 8, 8)}],
    ids=str,
)
def test_model_shapes_and_gradients(settings: dict[str, Any], size: int) -> None:
    torch.manual_seed(0)
    model = MDEQFewShot(ways=3, **settings)
    torch.nn.init.normal_(model.head.weight)
    logits = model(torch.rand(2, 1, size, size))
    assert logits.shape == (2, 3)
    logits.square().sum().backward()
    for name, p in model.named_parameters():
        # at v = 0 the maps of the modulation have no gradient, as v itself multiplies them
        if not name.startswith("film"):
            assert p.grad is not None, name
            assert float(p.grad.abs().max()) > 0, name


def test_paper_size_splits_its_context_over_the_scales() -> None:
    model = MDEQFewShot.paper(ways=20)
    assert model.context.shape == (1, 400)
    assert model.film.sizes == [200, 200]
    assert FiLM((8, 24), 10).sizes == [2, 8]
    with torch.no_grad():
        assert model(torch.rand(1, 1, 28, 28)).shape == (1, 20)
    with pytest.raises(ValueError, match="context 1 is too small to be split over 2 scales"):
        FiLM((8, 8), 1)
    with pytest.raises(ValueError, match="stride must be 1, 2 or 4, got 3"):
        MDEQFewShot(stride=3)


def test_every_part_of_the_context_acts_on_the_answer() -> None:
    torch.manual_seed(0)
    model = MDEQFewShot(context=12).double()
    torch.nn.init.normal_(model.head.weight)
    model.equilibrium.solver = Anderson(tol=1e-10, max_iter=200)
    x = torch.rand(2, 1, 28, 28).double()
    (grad,) = torch.autograd.grad(model(x).square().sum(), model.context)
    assert float(grad.abs().min()) > 0


def test_each_row_can_have_its_own_task() -> None:
    torch.manual_seed(0)
    model = MDEQFewShot(context=12, solver=Anderson(tol=1e-10, max_iter=200)).double()
    x = torch.rand(3, 1, 28, 28).double()
    own = {
        "context": torch.randn(3, 12).double(),
        "head.weight": torch.randn(3, *model.head.weight.shape[1:]).double(),
        "head.bias": torch.randn(3, 5).double(),
    }
    with torch.no_grad():
        together = functional_call(model, own, (x,))
        for k in range(3):
            one = functional_call(model, {n: t[k : k + 1] for n, t in own.items()}, (x[k : k + 1],))
            assert torch.allclose(together[k : k + 1], one, atol=1e-8)


def test_any_context_leaves_the_cell_easy_to_solve() -> None:
    torch.manual_seed(0)
    model = MDEQFewShot(solver=Anderson(tol=1e-5, max_iter=60))
    x = torch.rand(16, 1, 28, 28)
    with torch.no_grad(), count_evaluations() as counter:
        functional_call(model, {"context": 10 * torch.randn(16, 64)}, (x,))
    assert counter.worst_residual <= 1e-5


def test_task_linear_is_a_linear_map() -> None:
    torch.manual_seed(0)
    head = TaskLinear(4, 3)
    weight, bias = torch.randn(1, 3, 4), torch.randn(1, 3)
    x = torch.randn(5, 4)
    shared = functional_call(head, {"weight": weight, "bias": bias}, (x,))
    rows = {"weight": weight.expand(5, -1, -1), "bias": bias.expand(5, -1)}
    assert torch.allclose(shared, x @ weight[0].T + bias)
    assert torch.allclose(shared, functional_call(head, rows, (x,)), atol=1e-6)


def test_joint_adaptation_fits_two_tasks_at_once() -> None:
    torch.manual_seed(0)
    model = MDEQFewShot(ways=2, context=12, solver=Anderson(tol=1e-6, max_iter=100))
    x = torch.rand(4, 1, 28, 28)
    y = torch.tensor([0, 1, 1, 0])
    found = optimize_input(
        model,
        x,
        lambda logits: cross_entropy(logits, y, reduction="none"),
        variables=("context", "head.weight"),
        groups=torch.tensor([0, 0, 1, 1]),
        method=Joint(max_iter=40, step_size=0.2),
    )
    assert isinstance(found.x, dict)
    assert found.x["context"].shape == (2, 12)
    assert bool((found.value < math.log(2)).all())  # from 2 log 2 at v = 0
    assert bool((found.output.argmax(1) == y).all())


def test_sinusoid_model_has_a_contraction() -> None:
    torch.manual_seed(0)
    model = SinusoidDEQ(width=10, context=3, solver=Anderson(tol=1e-6, max_iter=100))
    torch.nn.init.normal_(model.equilibrium.cell.weight, std=5.0)
    with torch.no_grad(), count_evaluations() as counter:
        y = functional_call(model, {"context": 5 * torch.randn(7, 3)}, (torch.randn(7, 1),))
    assert y.shape == (7, 1)
    assert counter.worst_residual <= 1e-6


# Tasks ------------------------------------------------------------------------------------------


def toy_classes(classes: int = 7, samples: int = 4) -> ClassImages:
    """Class c, sample s: an image that says so."""
    images = torch.zeros(classes, samples, 1, 2, 2, dtype=torch.uint8)
    images[:, :, 0, 0, 0] = torch.arange(classes)[:, None].to(torch.uint8)
    images[:, :, 0, 0, 1] = torch.arange(samples).to(torch.uint8)
    return ClassImages(images, tuple(f"c{k}" for k in range(classes)))


def test_tasks_are_what_they_say() -> None:
    data = toy_classes()
    tasks = sample_tasks(
        data, 30, ways=5, shots=1, queries=2, generator=torch.Generator().manual_seed(3)
    )
    assert tasks.x_support.shape == (30, 5, 1, 2, 2)
    assert tasks.x_query.shape == (30, 10, 1, 2, 2)
    assert tasks.y_support.tolist() == [[0, 1, 2, 3, 4]] * 30
    for x, y, x_query, y_query in zip(*tasks, strict=True):
        classes = (255 * x[:, 0, 0, 0]).round().long()
        assert len(classes.unique()) == 5
        assert torch.equal(classes[y_query], (255 * x_query[:, 0, 0, 0]).round().long())
        both = torch.cat([x, x_query]).flatten(1)
        assert len(both.unique(dim=0)) == 15  # no image is in both sets
        assert torch.equal(y, torch.arange(5))
    again = sample_tasks(
        data, 30, ways=5, shots=1, queries=2, generator=torch.Generator().manual_seed(3)
    )
    assert all(torch.equal(a, b) for a, b in zip(tasks, again, strict=True))
    with pytest.raises(ValueError, match="cannot draw 8 ways of 1 shots"):
        sample_tasks(data, 1, ways=8, queries=1)
    with pytest.raises(ValueError, match="from 7 classes of 4 images"):
        sample_tasks(data, 1, shots=4, queries=1)


def test_rotations_are_classes_of_their_own() -> None:
    data = toy_classes()
    turned = data.with_rotations()
    assert len(turned) == 28
    assert len(set(turned.names)) == 28
    assert torch.equal(turned.images[:7], data.images)
    assert torch.equal(turned.images[9], torch.rot90(data.images[2], 1, (2, 3)))


def test_sinusoids_are_the_published_ones() -> None:
    data = Sinusoids(tasks=400, points=5, seed=1)
    assert 0.1 <= float(data.amplitude.min()) < 0.3
    assert 4.8 < float(data.amplitude.max()) <= 5
    assert 0 <= float(data.phase.min()) < 0.1
    assert 3.0 < float(data.phase.max()) <= math.pi
    assert -5 <= float(data.x.min()) < -4.9
    x, y = data[5 * 3 + 2]
    assert x.shape == y.shape == (1,)
    assert float(y) == pytest.approx(
        float(data.amplitude[3] * torch.sin(x - data.phase[3])), abs=1e-5
    )
    assert torch.allclose(data.curve(3)(data.x[3]), data.y[3])
    tasks = data.sample(6, 2, torch.Generator().manual_seed(0))
    assert tasks.x_support.shape == (6, 2, 1)
    assert tasks.y_query.shape == (6, 3, 1)
    with pytest.raises(IndexError):
        data[2000]
    with pytest.raises(ValueError, match="tasks and points must be at least 1"):
        Sinusoids(tasks=0)
    with pytest.raises(ValueError, match="cannot draw 2 tasks of 5 shots"):
        data.sample(2, 5)


# Glyphs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two faces of matplotlib's: enough scripts, quickly drawn."""
    import matplotlib

    folder = tmp_path_factory.mktemp("fonts")
    for name in ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf"):
        shutil.copy(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def glyphs(fonts: Path, cache: Path, split: str = "train", **settings: Any) -> ClassImages:
    return load_glyphs(split, fonts=fonts, cache=cache, **{"samples": 4, "size": 14, **settings})


def test_glyphs_are_split_by_script(fonts: Path, cache: Path) -> None:
    splits = {split: glyphs(fonts, cache, split) for split in SPLITS}
    scripts = {s: {name.split(" ")[0] for name in data.names} for s, data in splits.items()}
    assert "LATIN" in scripts["train"]
    for first, second in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert not scripts[first] & scripts[second]
    for data in splits.values():
        assert data.images.shape[1:] == (4, 1, 14, 14)
        assert data.images.dtype == torch.uint8
        assert len(data.names) == len(data) >= 5
        ink = data.images.flatten(2).float().mean(2)
        assert float(ink.min()) > 0  # nothing is blank
    assert len(list(cache.glob("*.safetensors"))) == 1


def test_equal_shapes_are_one_class(fonts: Path, cache: Path) -> None:
    names = {name for split in SPLITS for name in glyphs(fonts, cache, split).names}
    assert "LATIN CAPITAL LETTER A" in names
    assert "GREEK CAPITAL LETTER ALPHA" not in names
    assert "CYRILLIC CAPITAL LETTER A" not in names
    assert "LATIN SMALL LETTER A WITH ACUTE" not in names
    # without any jitter, all classes differ as they were promised to
    still = [glyphs(fonts, cache, split, jitter=0.0, samples=1) for split in SPLITS]
    images = torch.cat([data.images for data in still]).flatten(1).float()
    images = images / images.norm(dim=1, keepdim=True)
    alike = images @ images.T - torch.eye(len(images))
    assert float(alike.max()) < 0.99


def test_glyphs_depend_on_the_seed_alone(fonts: Path, cache: Path, tmp_path: Path) -> None:
    first = glyphs(fonts, cache)
    assert torch.equal(first.images, glyphs(fonts, cache).images)  # from the cache
    assert torch.equal(first.images, glyphs(fonts, tmp_path).images)  # drawn anew
    assert not torch.equal(first.images, glyphs(fonts, cache, seed=1).images)


def test_samples_of_a_class_differ_and_belong_together(fonts: Path, cache: Path) -> None:
    data = glyphs(fonts, cache)
    tasks = sample_tasks(data, 100, queries=2, generator=torch.Generator().manual_seed(0))
    x, q = tasks.x_support.flatten(2), tasks.x_query.flatten(2)
    distance = torch.cdist(q, x)
    assert float(distance.min()) > 0.1
    nearest = float((distance.argmin(2) == tasks.y_query).double().mean())
    assert 0.4 < nearest < 0.95  # well above chance, and far from trivial


def test_scripts_are_dealt_out() -> None:
    scripts = ["LATIN"] * 60 + ["GREEK"] * 20 + ["LAO"] * 10 + ["NKO"] * 5
    assert split_scripts(scripts) == {
        "LATIN": "train",
        "GREEK": "test",
        "LAO": "validation",
        "NKO": "test",
    }
    assert script_of("Ω") == "GREEK"
    with pytest.raises(ValueError, match="at least three scripts, got LATIN, GREEK"):
        split_scripts(["LATIN", "LATIN", "GREEK"])


def test_bad_font_folders(fonts: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="apt install fonts-noto-core"):
        load_glyphs(fonts=tmp_path, cache=tmp_path)
    with pytest.raises(ValueError, match="split must be one of train, validation, test"):
        load_glyphs("val", cache=tmp_path)
    with pytest.raises(ValueError, match="no letter is in 3 of these 2 faces: lower min_faces"):
        glyphs(fonts, tmp_path, min_faces=3)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "broken.ttf").write_bytes(b"not a font")
    with (
        pytest.warns(UserWarning, match=r"skipped the font .*broken\.ttf"),
        pytest.raises(ValueError, match="no letter is in"),
    ):
        load_glyphs(fonts=broken, cache=tmp_path)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "jiio-plugins"
    assert cache_folder("here") == Path("here")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / ".cache" / "jiio-plugins"


# Omniglot ---------------------------------------------------------------------------------------


def write_omniglot(root: Path) -> None:
    """Torchvision's folder in small: 16 classes of two drawings, black ink on white."""
    from PIL import Image

    for part, alphabets in (("images_background", ("Greek", "Latin")), ("images_evaluation", "N")):
        for alphabet in alphabets:
            for character in range(6 if part == "images_background" else 4):
                folder = root / "omniglot-py" / part / alphabet / f"character{character:02d}"
                folder.mkdir(parents=True)
                for sample in range(2):
                    image = Image.new("1", (105, 105), 1)
                    image.paste(0, (10 + character, 10, 60, 40 + sample))
                    image.save(folder / f"{character:04d}_{sample:02d}.png")


def test_omniglot_from_torchvisions_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import Omniglot

    write_omniglot(tmp_path)
    # the archives that torchvision asks for cannot be made here, only what is read out of them
    monkeypatch.setattr(Omniglot, "_check_integrity", lambda self: True)
    cache = tmp_path / "cache"
    train, test = (load_omniglot(tmp_path, s, cache=cache) for s in ("train", "test"))
    held = load_omniglot(tmp_path, "validation", cache=cache, size=28)
    assert len(train) == 4 * 12  # 1,200 of 1,623 classes, each in four turns
    assert len(test) == 4
    assert len(held) == 1
    assert train.images.shape[1:] == (2, 1, 28, 28)
    assert not set(train.names) & set(test.names)
    assert set(held.names) <= set(train.names)
    assert float(train.images[:, :, 0, 0, 0].max()) == 0  # paper is 0, ink is high
    assert float(train.images.flatten(2).max(2).values.min()) > 200
    assert len(load_omniglot(tmp_path, "test", rotations=True, cache=cache)) == 16


def test_missing_omniglot_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_omniglot(tmp_path, cache=tmp_path)
    assert "download=True" in str(caught.value)
    assert "omniglot-py" in str(caught.value)
    with pytest.raises(ValueError, match="split must be"):
        load_omniglot(tmp_path, "val", cache=tmp_path)


def test_images_are_tensors_of_tasks() -> None:
    tasks = sample_tasks(toy_classes(), 2, queries=1)
    moved = tasks.to("cpu")
    assert all(isinstance(t, Tensor) for t in moved)
    assert moved.x_support.dtype == torch.float32
