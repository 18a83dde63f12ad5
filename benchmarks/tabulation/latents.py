"""Tables of latents that are fitted: of images, in the training of a generator, of measurements."""

from __future__ import annotations

from typing import Any

from .kept import table


def fits(found: dict[str, Any]) -> str:
    """The cheapest setting of each family by the cost of the batch, else by that of an image."""
    best: dict[str, dict[str, Any]] = {}
    for r in found["rows"]:
        old = best.get(r["family"])
        if old is None or price(r) < price(old):
            best[r["family"]] = r
    rows = []
    for r in best.values():
        batch = "not reached" if r["batch_cost"] is None else f"{r['batch_cost']:.0f}"
        seconds = "" if r["batch_seconds"] is None else f"{r['batch_seconds']:.2f}"
        cost = f"{r['f_evals'] + r['vjps']:.0f}"
        error = f"{r['error']:.5f}"
        rows.append([f"{r['family']}, {r['name']}", cost, str(r["missed"]), batch, seconds, error])
    head = "method, best setting | f + VJP an image | missed | of the batch | seconds | last error"
    return table(head, rows)


def price(row: dict[str, Any]) -> tuple[int, float]:
    """What is cheapest, and of what has not reached the target what missed it on fewest images."""
    cost = row["batch_cost"]
    return (row["missed"], row["f_evals"] + row["vjps"]) if cost is None else (-1, cost)


def trainings(found: dict[str, Any]) -> str:
    """What a generator's training took until its held-out fits met the target."""
    curves = found["curves"]
    ours = curves["JIIO"]["seconds"][-1]
    rows = [
        [
            name,
            str(c["steps"][-1]),
            f"{c['seconds'][-1]:.0f}",
            f"{c['seconds'][-1] / ours:.2f}",
            f"{c['f_evals']:.0f}",
            f"{c['vjps']:.0f}",
            f"{c['psnr'][-1]:.1f} dB",
        ]
        for name, c in curves.items()
    ]
    return table("latents by | steps | seconds | of JIIO's | f | VJP | fits at the end", rows)


def beside_vae(found: dict[str, Any]) -> str:
    """Both after the same seconds."""
    columns = {"PSNR": "{:.1f} dB", "frechet": "{:.1f}", "kernel": "{:.2f}"}
    rows = [
        [name, *(form.format(judged[key]) for key, form in columns.items())]
        for name, judged in found["judged"].items()
    ]
    return table("| held-out fits | Fréchet distance of samples | kernel distance", rows)


def memory(found: dict[str, Any]) -> str:
    """The first step by the clock, and the largest resident memory of each epoch."""
    _, seconds, of_processor, _ = found["first step, s"]
    megabytes = [f"{mb:.0f}" for mb in found["epochs, MB"]]
    first = f"{seconds:.1f} s, {of_processor:.1f} s of the processor"
    return table(
        "first step shown after | largest memory of each epoch, MB", [[first, ", ".join(megabytes)]]
    )


def samples(*found: dict[str, Any]) -> str:
    """Fits of held-out images, and how near samples are to the training images."""
    rows = []
    for r in found:
        fits, near = r["held-out fits"], r["nearest training images"]
        rows.append(
            [
                f"`{r['generator']}`",
                f"{fits['PSNR']:.1f} dB",
                f"{fits['SSIM']:.3f}",
                str(fits["images"]),
                near["distance in"],
                f"{near['samples']:.2f}",
                f"{near['held_out']:.2f}",
                f"{near['ratio']:.2f}",
                f"{100 * near['copies']:.1f} %",
            ]
        )
    head = "generator | fits, PSNR | SSIM | images | nearest training image by | from samples"
    return table(f"{head} | from held-out images | ratio | nearer than 99 % of these", rows)


def distances(*found: dict[str, Any]) -> str:
    """Distances of samples to held-out images, beside those of training images."""
    rows = [
        [
            f"`{r['generator']}`",
            what,
            f"{d['frechet']:.1f}",
            f"{d['kernel']:.3f} ± {d['kernel_std']:.3f}",
        ]
        for r in found
        for what, d in r["distances"].items()
    ]
    return table("generator | of | Fréchet distance | kernel distance", rows)


def reconstructions(found: dict[str, Any]) -> str:
    """PSNR and SSIM, a problem a column."""
    tasks = list(dict.fromkeys(r["task"] for r in found["results"]))
    rows = []
    for method in dict.fromkeys(r["method"] for r in found["results"]):
        of = {r["task"]: r for r in found["results"] if r["method"] == method}
        cells = [f"{of[task]['psnr']:.2f}, {of[task]['ssim']:.3f}" for task in tasks]
        seconds = [r["seconds"] for r in of.values()]
        rows.append([method, *cells, f"{min(seconds):.2g} to {max(seconds):.2g}"])
    return table("PSNR, SSIM | " + " | ".join(tasks) + " | s an image", rows)


def costs(found: dict[str, Any]) -> str:
    """What it takes to the PSNR at which cold Adam ends, less 0.1 dB."""
    tasks = list(found["costs"])
    cells: dict[str, list[str]] = {}
    for families in found["costs"].values():
        cold = next(runs for name, runs in families.items() if "cold" in name)
        target = max(r["psnr"] for r in cold) - 0.1
        ours = _first(families["JIIO"], target)
        for name, runs in families.items():
            cheapest = _first(runs, target)
            text = "not reached"
            if cheapest is not None:
                f_evals, vjps = cheapest["f_evals"], cheapest["vjps"]
                text = f"{f_evals:.0f} + {vjps:.0f}, {cheapest['seconds']:.2g} s"
                if ours is not None and name != "JIIO":
                    text += f", {(f_evals + vjps) / (ours['f_evals'] + ours['vjps']):.1f} times"
            cells.setdefault(name.partition(", rate")[0], []).append(text)
    rows = [[name, *texts] for name, texts in cells.items()]
    return table("f + VJP, seconds an image, cost over JIIO's | " + " | ".join(tasks), rows)


def _first(runs: list[dict[str, Any]], target: float) -> dict[str, Any] | None:
    """The cheapest run that reaches it."""
    reached = [r for r in runs if r["psnr"] >= target]
    return min(reached, key=lambda r: r["f_evals"] + r["vjps"], default=None)
