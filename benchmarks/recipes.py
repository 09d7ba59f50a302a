"""Every recipe on real photographs, at a small size, over two ZeRO ranks, stopped in the middle and gone on: curves by
timestep quartile as json and PNG, pictures, and the figures that say whether each recipe learned what it is for.

    python -m benchmarks.recipes --corpus FOLDER [--scale 1.0] [--home FOLDER]

`--corpus` holds img2dataset output (`*/*.tar` with the captions of each picture in its json). One picture in ten is
held out. `--scale` multiplies how many images each run trains on. Runs that are in `--home` already go on or are taken
as they are. Writes `benchmarks/results/recipes/`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from PIL import Image

from benchmarks.measuring import RESULTS, machine
from cluster.training import build_swept, train_run
from data_pipeline.build import CorpusConfig, unheard
from data_pipeline.config import find_config, parse, read_values
from data_pipeline.draws import Draws
from data_pipeline.loader import Column
from data_pipeline.shards import Dataset, open_dataset
from trainer.clip_guide import ClipGuide
from trainer.config import SamplingSettings
from trainer.evaluation.heldout import first_rows
from trainer.evaluation.retrieval import Captions, heldout_retrieval
from trainer.models.noised_clip import NoisedClip
from trainer.pictures import grid
from trainer.recipes import parse_train_config
from trainer.recipes.glide import GlideRecipe, keywords
from trainer.recipes.noised_clip import PART, NoisedClipRecipe
from trainer.recipes.recipe import Batch
from trainer.sampling import Sampler, draw_images
from trainer.tracking.jsonl import read_curves, read_events
from trainer.weights import Trained, load_trained

OUT = RESULTS / "recipes"
HELD_OUT_EVERY = 10
GUIDED = 32  # pictures for each scale of CLIP guidance
WAYS = 100
SMALLER = ("model.image_size=16", "model.attention_resolutions=[8, 4]", "diffusion.prediction=v")
# Run -> preset, images to train on, and what differs from the preset. What is around a hole tells of it at high noise,
# which the loss on the noise hardly weighs; that on v does.
RUNS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "base": ("small-base", 20480, ()),
    "classifier-free": ("small-base-classifier-free", 6144, ("parent=base",)),
    "inpaint-base": ("small-base-inpaint", 10240, ("parent=base",)),
    "base-v": ("small-base", 30720, SMALLER),
    "inpaint-base-v": ("small-base-inpaint", 30720, ("parent=base-v", *SMALLER)),
    "upsampler": ("small-upsampler", 4096, ()),
    "inpaint-upsampler": ("small-upsampler-inpaint", 2048, ("parent=upsampler",)),
    "clip": ("small-noised-clip", 61440, ()),
    "clip-2": ("small-noised-clip", 61440, ("seed=1",)),
}
Curves = dict[str, dict[int, float]]
INPAINTING = ("inpaint-base", "inpaint-base-v", "inpaint-upsampler")


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--corpus", type=Path, required=True)
    arguments.add_argument("--home", type=Path, default=Path(".glidepath/recipes"))
    arguments.add_argument("--scale", type=float, default=1.0)
    options = arguments.parse_args()
    os.environ["GLIDEPATH_HOME"] = str(options.home.resolve())
    torch.set_num_threads(1)
    matplotlib.use("Agg")
    OUT.mkdir(parents=True, exist_ok=True)
    datasets = {share: built(options.corpus, options.home, share) for share in ("train", "heldout")}
    heldout = open_dataset(datasets["heldout"])
    report: dict[str, Any] = {"machine": machine(), "held_out_pictures": heldout.rows, "runs": {}}
    trained, curves = {}, {}
    for name in RUNS:
        report["runs"][name], curves[name] = train(name, options.home, datasets, options.scale)
        trained[name] = load_trained(str(options.home / "runs" / name))
        print(name, report["runs"][name], flush=True)
    plot(curves)
    (OUT / "curves.json").write_text(json.dumps(curves) + "\n")
    report["inpainting"] = {name: inpainting(trained[name], heldout) for name in INPAINTING}
    report["retrieval"] = {name: retrieval(trained[name], heldout) for name in ("clip", "clip-2")}
    report["clip_guidance"] = clip_guidance(trained, heldout)
    pictures(trained, heldout)
    (OUT / "recipes.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({name: report[name] for name in ("inpainting", "retrieval", "clip_guidance")}, indent=1))


def built(corpus: Path, home: Path, share: str) -> str:
    """The dataset of a share of the corpus, a row for each caption of a picture."""
    inputs = home / f"{share}.tar"
    if not inputs.exists():
        home.mkdir(parents=True, exist_ok=True)
        with tarfile.open(inputs, "w") as tar:
            for number, (jpeg, captions) in enumerate(read_pictures(corpus)):
                if (number % HELD_OUT_EVERY == 0) != (share == "heldout"):
                    continue
                for which, caption in enumerate(captions):
                    for suffix, data in (("jpg", jpeg), ("txt", caption.encode())):
                        info = tarfile.TarInfo(f"{number:06d}-{which}.{suffix}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
    values = {
        "inputs": [{"kind": "webdataset", "uri": str(inputs.resolve())}],
        "output": str((home / "datasets" / share).resolve()),
        "shard_rows": 256,
        "filters": {"preset": "none"},
        "budget": None,
    }
    build_swept(parse(CorpusConfig, values, share), unheard)
    return str(values["output"])


def read_pictures(corpus: Path) -> Iterator[tuple[bytes, list[str]]]:
    for path in sorted(corpus.glob("*/*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: member for member in tar.getmembers()}
            for name in sorted(name for name in members if name.endswith(".jpg")):
                picture, about = (tar.extractfile(members[name[:-3] + suffix]) for suffix in ("jpg", "json"))
                assert picture is not None and about is not None
                yield picture.read(), json.loads(about.read())["captions"]


def train(name: str, home: Path, datasets: dict[str, str], scale: float) -> tuple[dict[str, Any], Curves]:
    """Train to the half, then go on from the checkpoint to the end: figures, and curves by name and images."""
    preset, images, changes = RUNS[name]
    values = read_values(find_config("train", preset), changes)
    batch = values["batch"]
    images = max(round(images * scale) // batch, 2) * batch
    store = str((home / "runs" / name).resolve())
    values |= {"run": name, "store": store, "dataset": datasets["train"], "zero": {"stage": 2}}
    values["heldout"] = {"dataset": datasets["heldout"], "images": 192, "every_images": images}
    for until in (images // 2, images):
        result = train_run(parse_train_config({**values, "images": until}, name))
    tracking = Path(store, "tracking")
    curves = {
        key: {at: float(f"{value:.4g}") for at, value in points.items()}
        for key, points in read_curves(tracking).items()
        if key.startswith(("loss/", "heldout/"))
    }
    quartiles = [key for key in curves if key.startswith("loss/q")]
    figures = {
        "images": result["images"],
        "resumes": [event["text"] for event in read_events(tracking, "resume")],
        "first_and_last_tenth": {key: ends(curves[key]) for key in ["loss/total", *sorted(quartiles)]},
        "heldout": [curves["heldout/total"][at] for at in sorted(curves["heldout/total"])],
    }
    return figures, curves


def ends(points: dict[int, float]) -> list[float]:
    """Medians of the first and of the last tenth of a curve: a bound's term near T can be a hundred times the rest."""
    values = [points[at] for at in sorted(points)]
    tenth = max(len(values) // 10, 1)
    return [float(np.median(values[:tenth])), float(np.median(values[-tenth:]))]


def plot(runs: dict[str, Curves]) -> None:
    figure, axes = plt.subplots(3, 3, figsize=(15, 12), layout="constrained")
    for axis, (name, curves) in zip(axes.flat, runs.items(), strict=False):
        # A recipe that draws no timestep of a quartile has no curve of it.
        for key in (key for key in ("loss/q0", "loss/q1", "loss/q2", "loss/q3", "loss/total") if key in curves):
            images = sorted(curves[key])
            values = np.array([curves[key][at] for at in images])
            window = max(len(values) // 25, 1)
            # A median: the bound's term of a single batch near T can be a hundred times the rest.
            smooth = np.median(np.lib.stride_tricks.sliding_window_view(values, window), axis=1)
            style = {"color": "black", "linewidth": 2} if key == "loss/total" else {"linewidth": 1}
            axis.plot(images[window - 1 :], smooth, label=key.removeprefix("loss/"), **style)
        axis.set(title=name, xlabel="images", ylabel="loss, running median", yscale="log")
        axis.legend(fontsize=8)
    figure.savefig(OUT / "curves.png", dpi=80)


def heldout_batch(trained: Trained, dataset: Dataset, count: int) -> tuple[Batch, Draws]:
    draws = Draws(7, np.arange(count, dtype=np.int64))
    rows = first_rows(dataset, trained.recipe.columns, count)
    return trained.recipe.prepare(rows, draws), draws


def inpainting(trained: Trained, dataset: Dataset) -> dict[str, list[float]]:
    """The error of what the network predicts inside the erased region of held-out pictures, by timestep quartile: with
    the known pixels shown, with mask 0, and the first less the second with its standard error."""
    recipe, (model,) = trained.recipe, trained.modules.values()
    assert isinstance(recipe, GlideRecipe)
    batch, draws = heldout_batch(trained, dataset, 192)
    erased = (1 - batch["inpaint_mask"]).expand_as(batch["images"])
    masks = {"known_shown": batch["inpaint_mask"], "mask_0": torch.zeros_like(batch["inpaint_mask"])}
    errors: dict[str, list[float]] = {name: [] for name in (*masks, "difference", "difference_sem")}
    for quartile in range(4):
        place = (quartile + draws.uniform("timestep")) / 4
        timesteps = torch.from_numpy((place * recipe.process.steps).astype(np.int64))
        noised = recipe.process.q_sample(batch["images"], timesteps, batch["noise"])
        target = recipe.process.training_target(batch["images"], timesteps, batch["noise"])
        found = {}
        for name, mask in masks.items():
            shown = keywords({**batch, "inpaint_mask": mask})
            with torch.no_grad():
                predicted = [
                    model(noised[i : i + 16], timesteps[i : i + 16], **{k: v[i : i + 16] for k, v in shown.items()})
                    for i in range(0, len(noised), 16)
                ]
            squares = (torch.cat(predicted)[:, :3] - target).square() * erased
            found[name] = squares.sum(dim=(1, 2, 3)) / erased.sum(dim=(1, 2, 3))
            errors[name].append(float(found[name].mean()))
        difference = (found["known_shown"] - found["mask_0"]).numpy()
        errors["difference"].append(float(difference.mean()))
        errors["difference_sem"].append(float(difference.std(ddof=1) / len(difference) ** 0.5))
    return errors


def retrieval(trained: Trained, dataset: Dataset) -> dict[str, Any]:
    """Top-1 among 100 held-out pictures at several noise levels: with the first caption of each, and with all five."""
    recipe, model = trained.recipe, trained.modules[PART]
    assert isinstance(recipe, NoisedClipRecipe) and isinstance(model, NoisedClip)
    rows, kinds = dataset.rows, get_args(Captions)
    return {
        f"t={timestep}": {
            captions: heldout_retrieval(recipe, model, dataset, timestep, rows, WAYS, captions) for captions in kinds
        }
        for timestep in (0, 100, 250, 500)
    }


def clip_guidance(trained: dict[str, Trained], dataset: Dataset) -> dict[str, Any]:
    """Mean cosine of pictures and captions under the CLIP that guided them, and under one that it does not know."""
    base, captions = trained["base"], first_rows(dataset, (Column("base", "caption"),), GUIDED)["caption"]
    guide, other = ClipGuide(trained["clip"], base), ClipGuide(trained["clip-2"], base)
    positions, rows, sheets = np.arange(GUIDED, dtype=np.int64), [], []
    settings = SamplingSettings(guidance_scale=1.0, spacing="100", sampler="ancestral")
    for scale in (0.0, 1.0, 2.0):
        pull = (lambda prompts, scale=scale: guide.gradient(prompts, scale)) if scale else None
        drawn = Sampler(base.recipe, base.modules, settings, 0, guide=pull).draw(captions, positions)
        own, second = guide.scores(drawn, captions), other.scores(drawn, captions)
        error = float(second.std(ddof=1) / len(second) ** 0.5)
        rows.append({"scale": scale, "own": float(own.mean()), "second": float(second.mean()), "second_sem": error})
        sheets.append(drawn[:8])
    save(
        "clip-guidance", np.concatenate(sheets), [f"scale {row['scale']:g}: {c}" for row in rows for c in captions[:8]]
    )
    return {"logit_scale": guide.recipe.config.logit_scale, "scales": rows}


def pictures(trained: dict[str, Trained], dataset: Dataset) -> None:
    captions = first_rows(dataset, (Column("base", "caption"),), 8)["caption"]
    plain = SamplingSettings(guidance_scale=1.0, spacing="50", sampler="dpm++")
    for name in ("base", "classifier-free"):
        model = trained[name]
        save(name, draw_images(model.recipe, model.modules, captions, plain, 0), captions)
    model = trained["classifier-free"]
    save("unconditional", draw_images(model.recipe, model.modules, [""] * 8, plain, 0), ["(no caption)"] * 8)
    guided = plain.model_copy(update={"guidance_scale": 3.0})
    save("guided", draw_images(model.recipe, model.modules, captions, guided, 0), captions)
    for name in (*INPAINTING, "upsampler"):
        model = trained[name]
        batch, draws = heldout_batch(model, dataset, 8)
        drawn = model.recipe.sample(model.modules, batch, draws, plain)
        shown = batch["images"] * batch["inpaint_mask"] if "inpaint_mask" in batch else batch["low_res"]
        side = drawn.shape[1]
        given = torch.nn.functional.interpolate(shown, (side, side))
        before = ((given + 1) * 127.5).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        save(name, np.concatenate([before, drawn]), [*(f"given: {c}" for c in captions), *captions])


def save(name: str, images: Any, captions: list[str]) -> None:
    sheet: Image.Image = grid(images, captions, columns=8, cell=128)
    sheet.save(OUT / f"{name}.png")


if __name__ == "__main__":
    main()
