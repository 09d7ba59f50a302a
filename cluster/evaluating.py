"""`glidepath evaluate`: how good a checkpoint's pictures are, by figures of named networks against real pictures.

Always holds: figures are of the stored PNG files, 8 bits a channel; picture i is drawn for caption i of the dataset at
position i of the seed, so pictures that are there already are kept, whatever stopped the command before, and asking for
more draws only those; a finished result is read, not taken again. Called by the command line.

    evaluations/<pictures>/pictures/00000000.png    what the checkpoint drew under these settings
    evaluations/<pictures>/result-<digest>.json     the figures of so many of them
    evaluations/sweep-<digest>.json and .png        several settings side by side
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from cluster.drawing import (
    description,
    device_of,
    load_models,
    make_pipeline,
    read_configs,
    unguidable,
    unwarned,
)
from cluster.evaluation_config import FOLDER, EvaluateConfig, named_server
from cluster.evaluation_curves import curves_png
from cluster.training import DEMO_DATASETS, build_demo_dataset
from data_pipeline import manifests
from data_pipeline.config import state_folder
from data_pipeline.errors import UserError
from data_pipeline.images import ImageError, decode
from data_pipeline.manifests import Document, digest_of, sha256_of
from data_pipeline.shards import Dataset, open_dataset
from data_pipeline.storage import ObjectStore, canonical_json, open_store
from trainer.config import HeldoutSettings
from trainer.engine.group import Group
from trainer.evaluation.feature_networks import (
    RESIZE_RULES,
    FeatureNetwork,
    Float32,
    Identity,
    NoisedClipSettings,
    identify,
    load_network,
)
from trainer.evaluation.figures import (
    COMPARING,
    FIGURES_VERSION,
    aesthetic_figures,
    figures_of,
    metrics_of,
    refuse_untakeable,
    take,
    with_captions,
)
from trainer.evaluation.heldout import heldout_bits_per_dimension, heldout_loss
from trainer.evaluation.linear_probe import fit_probe
from trainer.evaluation.reference import captions_of, in_blocks, reference_features
from trainer.pictures import png_bytes
from trainer.recipes.recipe import Pixels
from trainer.run import dataset_uri, run_identity
from trainer.sampling import Progress, cut_prompts, unwatched
from trainer.tracking.mlflow import check_server, store_results
from trainer.tracking.server import is_server
from trainer.tracking.tracker import HELDOUT
from trainer.weights import Checkpoint, Trained, open_checkpoint

FORMAT = "glidepath-evaluation-1"
REFERENCES = "references"  # of the state folder


@dataclass(frozen=True)
class Parts:
    """What an evaluation is of, found before anything is loaded or drawn. `side`: of the drawn pictures, in pixels."""

    config: EvaluateConfig
    base: Checkpoint
    upsampler: Checkpoint | None
    dataset: Dataset
    identities: tuple[Identity, ...]
    side: int
    store: ObjectStore

    def pictures_digest(self, point: EvaluateConfig) -> str:
        """sha256 of all that decides the pictures; how many of them does not."""
        enlarging = (self.upsampler.manifest_sha256, point.upsampling.model_dump()) if self.upsampler else None
        sampled = [self.base.manifest_sha256, point.weights, point.seed, point.sampling.model_dump()]
        return digest_of([FORMAT, *sampled, enlarging, self.dataset.id])

    def result_digest(self, point: EvaluateConfig) -> str:
        """sha256 of all that decides the figures."""
        networks = [identity.digest for identity in self.identities]
        counts = [point.images, point.reference_images]
        probe = point.probe and [point.probe.sha256, sha256_of(point.probe.ratings), point.probe.ridge]
        heldout = point.heldout and point.heldout.model_dump()
        how = [FIGURES_VERSION, sorted(point.metrics), point.constants.model_dump(), probe, heldout]
        return digest_of([self.pictures_digest(point), networks, counts, *how])

    def folder(self, point: EvaluateConfig) -> str:
        return f"{FOLDER}/{self.pictures_digest(point)[:16]}"


def find_parts(config: EvaluateConfig) -> Parts:
    """Raises UserError or UsageError for whatever cannot be evaluated: absent, damaged, or not fitting together."""
    base = open_checkpoint(config.checkpoint)
    upsampler = open_checkpoint(config.upsampler) if config.upsampler else None
    identities = tuple(identify(settings) for settings in config.features)
    # The newest checkpoint of a run that still trains is another one tomorrow.
    features = tuple(
        settings.model_copy(update={"checkpoint": identity.source})
        if isinstance(settings, NoisedClipSettings)
        else settings
        for settings, identity in zip(config.features, identities, strict=True)
    )
    pinned = {"checkpoint": base.uri, "upsampler": upsampler.uri if upsampler else None, "features": features}
    config = config.model_copy(update=pinned)
    refuse_untakeable(config.metrics, [identity.kind for identity in identities])
    if config.probe:
        for identity in identities:
            if "aesthetic" in metrics_of(identity.kind, config.metrics):
                fit_probe(config.probe, identity)  # refuses what does not fit, before anything is drawn
    for point in config.points():
        configs = read_configs(point.drawing())
    if config.dataset in DEMO_DATASETS:
        build_demo_dataset(config.dataset)
    dataset = open_dataset(dataset_uri(config.dataset))
    side = configs.get("upsampler", configs["base"]).model.image_size
    store = open_store(config.store) if config.store else base.store
    return Parts(config, base, upsampler, dataset, identities, side, store)


class Evaluation:
    """One evaluation, of one or several settings. Models and networks are loaded, and real pictures passed, before
    the first picture is drawn: what does not fit costs nothing, and retention may remove the checkpoints."""

    def __init__(
        self,
        parts: Parts,
        progress: Progress = unwatched,
        warn: Callable[[str], None] = unwarned,
    ) -> None:
        self.parts, self.progress, self.warn = parts, progress, warn
        self.captions = captions_of(parts.dataset, parts.config.images)

    @cached_property
    def models(self) -> dict[str, Trained]:
        return load_models(self.parts.config.drawing())

    @cached_property
    def networks(self) -> tuple[FeatureNetwork, ...]:
        device = device_of(self.parts.config.drawing())
        return tuple(load_network(settings, device) for settings in self.parts.config.features)

    @cached_property
    def real(self) -> dict[str, Float32]:
        """Features of the real pictures, by the name of each network that is to compare with them."""
        parts, references = self.parts, open_store(str(state_folder() / REFERENCES))
        metrics, limit = parts.config.metrics, parts.config.reference_images
        return {
            network.identity.name: reference_features(
                parts.dataset, parts.side, network, references, limit, self.progress
            )
            for network in self.networks
            if set(COMPARING) & set(metrics_of(network.identity.kind, metrics))
        }

    @cached_property
    def heldout(self) -> dict[str, float]:
        """The base model's loss on rows of the dataset, the same for every point; {} where it is not asked for."""
        asked, parts = self.parts.config.heldout, self.parts
        if asked is None:
            return {}
        base, group = self.models["base"], Group(device=device_of(parts.config.drawing()))
        settings = HeldoutSettings(dataset=parts.config.dataset, images=asked.images)
        found = heldout_loss(base.config, base.modules, parts.dataset, settings, group)
        if asked.bits_per_dimension:
            bits = heldout_bits_per_dimension(base.config, base.modules, parts.dataset, asked.bits_per_dimension, group)
            found["bits_per_dimension"] = bits
        return {f"{HELDOUT}{name}": value for name, value in found.items()}

    def result(self, point: EvaluateConfig) -> Document:
        """The stored result of one point, or a new one, which is stored; "drawn_now": pictures. Raises UserError."""
        store, key = self.parts.store, self.result_key(point)
        if stored := manifests.read(store, key):
            return stored | {"drawn_now": 0}
        drawn = self.draw_missing(point)
        store.put_if_absent(key, manifests.seal(self.take_figures(point)))  # of two at once the first one's stays
        return (manifests.read(store, key) or {}) | {"drawn_now": drawn}

    def result_key(self, point: EvaluateConfig) -> str:
        return f"{self.parts.folder(point)}/result-{self.parts.result_digest(point)[:16]}.json"

    def draw_missing(self, point: EvaluateConfig) -> int:
        """Draw and store the pictures that are not there yet; how many."""
        store, prefix = self.parts.store, f"{self.parts.folder(point)}/pictures/"
        there = {info.key for info in store.list(prefix)}
        missing = {number for number in range(point.images) if picture_key(prefix, number) not in there}
        if not missing:
            return 0
        settings = point.drawing()
        pipeline, about = make_pipeline(settings, self.models), description(settings, self.models)
        _ = self.real  # after the models, before hours of drawing
        for line in (*unguidable(settings, self.models), *cut_prompts(self.captions, 0, self.models, None)):
            self.warn(line)
        label = f"guidance {point.sampling.guidance_scale:g}, {point.sampling.spacing} steps"
        # Groups that begin at multiples of the batch: a picture is drawn beside the same others at every attempt.
        for begin in sorted({number // point.batch * point.batch for number in missing}):
            prompts = self.captions[begin : begin + point.batch]

            def told(done: int, total: int, stage: str, begin: int = begin) -> None:
                self.progress(begin, point.images, f"{label}: {stage} step {done} of {total}")

            drawn = pipeline.draw(prompts, begin, None, told)
            for number, prompt, pixels in zip(count(begin), prompts, drawn.images, strict=False):
                if number in missing:  # others may stand in a result, and a batch of another size differs by a level
                    drawing = settings.model_copy(update={"first_number": number}).model_dump_json()
                    text = {"prompt": prompt, "number": str(number), "candidate": "0", "drawing": drawing, **about}
                    store.put(picture_key(prefix, number), [png_bytes(Image.fromarray(pixels), text)])
        return len(missing)

    def drawn_pictures(self, point: EvaluateConfig) -> Iterator[Pixels]:
        """As they are stored, uint8 [s, s, 3]. Raises UserError for one that is no picture."""
        store, prefix = self.parts.store, f"{self.parts.folder(point)}/pictures/"
        for number in range(point.images):
            key = picture_key(prefix, number)
            try:
                yield decode(store.get(key))
            except ImageError as error:
                name = f"drawn picture {store.uri}/{key}"
                raise UserError(name, "a PNG as it was drawn", str(error), "delete it; it is drawn again") from None

    def take_figures(self, point: EvaluateConfig) -> Document:
        """Every metric by every network that takes it, with what they were taken of."""
        figures, warnings = dict(self.heldout), list[str]()
        for network in self.networks:
            name = network.identity.name

            def passed(done: int, name: str = name) -> None:
                self.progress(done, point.images, f"drawn pictures by {name}")

            drawn = take(network, in_blocks(self.drawn_pictures(point)), passed)
            drawn = with_captions(network, drawn, self.captions, point.metrics)
            real, constants = self.real.get(name), point.constants
            found, lines = figures_of(network, drawn, self.captions, real, point.metrics, constants)
            figures |= found
            if point.probe:
                figures |= aesthetic_figures(network, drawn, point.metrics, point.probe)
            warnings += [f"{line} ({name})" for line in lines]
        compared = max(map(len, self.real.values()), default=0)
        return self.about(point) | {"reference_images": compared, "metrics": figures, "warnings": warnings}

    def about(self, point: EvaluateConfig) -> Document:
        """What a result is of, and by what rules."""
        parts = self.parts
        upsampling: Document = {}
        if parts.upsampler:
            upsampling = {"upsampler": parts.upsampler.uri, "upsampling": point.upsampling.model_dump()}
        networks = {
            identity.name: {
                "kind": identity.kind,
                "sha256": identity.sha256,
                "resize": RESIZE_RULES[identity.rule],
                "source": identity.source,
            }
            for identity in parts.identities
        }
        return {
            "format": FORMAT,
            "run": parts.base.manifest.run,
            "checkpoint": parts.base.uri,
            "checkpoint_sha256": parts.base.manifest_sha256,
            "trained_images": parts.base.manifest.position,
            **upsampling,
            "weights": point.weights,
            "sampling": point.sampling.model_dump(),
            "seed": point.seed,
            "images": point.images,
            "pixels": parts.side,
            "dataset": {"uri": parts.dataset.uri, "id": parts.dataset.id, "rows": parts.dataset.rows},
            "crop": parts.dataset.manifest["identity"].get("crop", "centre"),
            "pictures": f"{parts.store.uri}/{parts.folder(point)}/pictures",
            "networks": networks,
            "constants": point.constants.model_dump(),
        }


def picture_key(prefix: str, number: int) -> str:
    return f"{prefix}{number:08d}.png"


def evaluate(
    config: EvaluateConfig, progress: Progress = unwatched, warn: Callable[[str], None] = unwarned
) -> dict[str, Any]:
    """Evaluate every point; the document that the command shows. Raises UserError."""
    parts = find_parts(config)
    server = server_of(parts)
    if server:
        check_server(server)
    evaluation = Evaluation(parts, progress, warn)
    results = []
    for point in parts.config.points():
        result = evaluation.result(point)
        for line in result["warnings"]:
            warn(line)
        uri = f"{parts.store.uri}/{evaluation.result_key(point)}"
        run_id = logged(server, parts, point, result, warn) if server else None
        results.append({**result, "result": uri, "mlflow_run_id": run_id})
    if config.sweep is None:
        return results[0]
    return {"checkpoint": parts.base.uri, "points": results, **store_sweep(parts, results)}


def store_sweep(parts: Parts, results: Sequence[Document]) -> dict[str, str]:
    """The table and the curves of a sweep, where it has figures to draw; where they lie."""
    key = f"{FOLDER}/sweep-{digest_of([parts.result_digest(point) for point in parts.config.points()])[:16]}"
    rows = [sweep_row(result) for result in results]
    document = {"format": FORMAT, "checkpoint": parts.base.uri, "points": rows}
    parts.store.put(f"{key}.json", [manifests.seal(document)])
    where = {"sweep": f"{parts.store.uri}/{key}.json"}
    if curves := curves_png(rows, f"{parts.base.manifest.run}, {parts.base.manifest.position:,} images"):
        parts.store.put(f"{key}.png", [curves])
        where["curves"] = f"{parts.store.uri}/{key}.png"
    return where


def sweep_row(result: Document) -> dict[str, Any]:
    """One point as a row of a table."""
    sampling = result["sampling"]
    return {"spacing": sampling["spacing"], "guidance_scale": sampling["guidance_scale"], **result["metrics"]}


def server_of(parts: Parts) -> str | None:
    """The tracking server that results go to, if there is one. Raises UsageError as `named_server` does."""
    found = named_server(parts.config.tracking) or parts.base.config.tracking.uri
    return found if is_server(found) else None


def logged(
    server: str, parts: Parts, point: EvaluateConfig, result: Document, warn: Callable[[str], None]
) -> str | None:
    """The id of the child run that has the result; None, said, where the server does not take it: it is stored."""
    run = parts.base.config.model_copy(update={"store": parts.base.store.uri})
    sampling = {f"sampling.{key}": str(value) for key, value in point.sampling.model_dump().items()}
    params = {key: str(result[key]) for key in ("checkpoint", "weights", "seed", "images", "reference_images")}
    params |= {"dataset": parts.dataset.id, **sampling}
    parents = [run_identity(run)]
    if parts.upsampler:
        store = {"store": parts.upsampler.store.uri}
        parents.append(run_identity(parts.upsampler.config.model_copy(update=store)))
        params["upsampler"] = parts.upsampler.uri
    name = f"{run.run} evaluation, guidance {point.sampling.guidance_scale:g}, {point.sampling.spacing} steps"
    step, digest = parts.base.manifest.position, parts.result_digest(point)
    try:
        with TemporaryDirectory(prefix="glidepath-") as folder:
            Path(folder, "result.json").write_bytes(canonical_json(result))
            files = Path(folder)
            return store_results(server, "evaluation", digest, name, step, result["metrics"], files, parents, params)
    except UserError as error:
        warn(f"not logged: {error}")
        return None
