"""A checkpoint as files for other programs: safetensors with its configuration and a model card, and the release's
layout, which the public GLIDE code loads.

Always holds: the weights are those of verified blocks, float32; a new folder appears whole or not at all, an empty one
that was there is filled, the card last; nothing that was there before is touched; the release's layout is written only
for a network that the public code computes alike, and else the card says why it is absent. Called by
`glidepath checkpoints export`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from data_pipeline.errors import UserError
from data_pipeline.manifests import sha256_of
from trainer.config import TrainConfig
from trainer.interop.arguments import Kind, clip_arguments, glide_arguments, kind_of
from trainer.interop.importer import part_of
from trainer.interop.openai import release_file_name, release_states
from trainer.weights import Checkpoint, WeightsKind, load_trained, open_checkpoint

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
CARD = "README.md"
RELEASE = "release"
ARGUMENTS = "arguments.json"


@dataclass(frozen=True)
class Release:
    """What the release's layout of a network is made of: its kind and its constructor arguments; or why there is
    none."""

    kind: Kind
    arguments: dict[str, Any] | None
    why_not: str = ""


def export_checkpoint(uri: str, folder: Path, weights: WeightsKind = "ema", licence: str = "unknown") -> dict[str, Any]:
    """Write the model of a checkpoint, or of a run's newest, into `folder`: a new or an empty one. `licence`: of the
    training data.

    Returns {"checkpoint", "folder": absolute, "files" {path: sha256}, "parameters", "kind", "release": path or null,
    "why_not"}. Raises UserError if the folder holds something already or the checkpoint does not load, OSError if the
    folder cannot be written.
    """
    folder = folder.resolve()  # `.` and `..` have no name and no place beside them
    new = not folder.exists()
    if not new and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"folder {folder}", "none, or an empty one", "one with files", "give another --out")
    checkpoint = open_checkpoint(uri)
    part = part_of(checkpoint.config)
    module = load_trained(checkpoint.uri, weights).modules[part]
    release = release_of(checkpoint.config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # On the file system of `folder`, so that all is renamed into place, and under a name of its own: whatever else lies
    # there is not ours to remove.
    with TemporaryDirectory(prefix=".glidepath-export-", dir=folder.parent if new else folder) as private:
        partial = Path(private) / "export"
        partial.mkdir()  # with the usual permissions; the private folder is closed to others
        files = _write_files(partial, module, checkpoint.config, release)
        card = model_card(checkpoint, module, release, weights, licence, files)
        (partial / CARD).write_text(card, encoding="utf-8")
        if new:
            partial.rename(folder)
        else:
            _fill(folder, partial)
    return {
        "checkpoint": checkpoint.uri,
        "folder": str(folder),
        "files": files,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "kind": release.kind,
        "release": str(folder / RELEASE) if release.arguments is not None else None,
        "why_not": release.why_not,
    }


def _fill(folder: Path, partial: Path) -> None:
    """Rename what was written into a folder that was there: replacing it would take it from whoever stands in it
    (`--out .`) or mounted it."""
    for entry in sorted(partial.iterdir(), key=lambda entry: entry.name == CARD):
        entry.rename(folder / entry.name)


def release_of(config: TrainConfig) -> Release:
    """The release's kind and arguments of a configuration's network, or why the public code cannot compute it."""
    kind = kind_of(config.model)
    values = config.model_dump(mode="json")
    diffusion = values["diffusion"]
    try:
        if kind == "clip":
            return Release(kind, clip_arguments(config.model, values["logit_scale"], diffusion["schedule"]))
        if diffusion.get("prediction", "eps") != "eps":
            raise ValueError(f"diffusion.prediction is {diffusion['prediction']}, and the public code reads eps")
        arguments = glide_arguments(config.model, config.dropout, diffusion["schedule"], diffusion["steps"])
        return Release(kind, arguments)
    except ValueError as reason:
        return Release(kind, None, str(reason))


def _write_files(folder: Path, module: nn.Module, config: TrainConfig, release: Release) -> dict[str, str]:
    """Weights, configuration and the release's layout; {path in the folder: sha256}."""
    state = {name: values.detach().contiguous() for name, values in module.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    _write_json(folder / CONFIG, config.model_dump(mode="json"))
    written = [folder / WEIGHTS, folder / CONFIG]
    if release.arguments is not None:
        (folder / RELEASE).mkdir()
        for name, values in release_states(release.kind, module).items():
            written.append(folder / RELEASE / name)
            torch.save(values, written[-1])
        written.append(folder / RELEASE / ARGUMENTS)
        _write_json(written[-1], release.arguments)
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in written}


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def model_card(
    checkpoint: Checkpoint,
    module: nn.Module,
    release: Release,
    weights: WeightsKind,
    licence: str,
    files: dict[str, str],
) -> str:
    """What the model is, what it was trained on and how to load it, as Markdown."""
    manifest, config = checkpoint.manifest, checkpoint.config
    lineage = manifest.lineage.get(part_of(config))
    facts = {
        "Recipe": config.recipe,
        "Weights": "moving average of the trained weights (EMA)" if weights == "ema" else "trained weights (masters)",
        "Parameters": f"{sum(parameter.numel() for parameter in module.parameters()):,}",
        "Images seen": f"{manifest.position:,}",
        "Dataset": str(manifest.order.get("dataset_id", "unknown")),
        "Licence of the data": licence,
        "Started from": json.dumps(lineage, sort_keys=True) if lineage else "its own initialisation",
        "Checkpoint": f"{manifest.run}, {checkpoint.name}, committed {manifest.committed_at}",
        "Glidepath": manifest.code_version,
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    digests = "\n".join(f"| `{path}` | `{digest}` |" for path, digest in files.items())
    return CARD_TEXT.format(run=manifest.run, rows=rows, digests=digests, loading=_loading(release))


CARD_TEXT = """# {run}

A network of GLIDE (Nichol et al. 2021, arXiv 2112.10741), trained or imported with Glidepath.

| | |
|---|---|
{rows}

`config.json` is the resolved training configuration.

## Loading

{loading}
## Files

| file | sha256 |
|---|---|
{digests}
"""


def _loading(release: Release) -> str:
    if release.kind == "clip":
        network, config = "NoisedClip", "NoisedClipConfig"
        imports = "from trainer.models.noised_clip import NoisedClip, NoisedClipConfig"
    else:
        network, config = "Glide", "GlideModelConfig"
        imports = "from trainer.models.config import GlideModelConfig\nfrom trainer.models.glide import Glide"
    with_glidepath = f"""With Glidepath:

```python
import json
from safetensors.torch import load_file
{imports}

model = {network}({config}(**json.load(open("{CONFIG}"))["model"])).eval()
model.load_state_dict(load_file("{WEIGHTS}"))
```

"""
    if release.arguments is None:
        return f"{with_glidepath}There is no `{RELEASE}/` for the public GLIDE code: {release.why_not}.\n\n"
    if release.kind == "clip":
        public = (
            f"`{RELEASE}/` holds the two state dicts of the public GLIDE code's noised CLIP; `{ARGUMENTS}` stands for "
            "its `config.yaml`.\n\n"
        )
    else:
        public = f"""With the public GLIDE code (openai/glide-text2im):

```python
import json
import torch
from glide_text2im.model_creation import create_model_and_diffusion

model, diffusion = create_model_and_diffusion(**json.load(open("{RELEASE}/{ARGUMENTS}")))
model.load_state_dict(torch.load("{RELEASE}/{release_file_name(release.kind)}", weights_only=True), strict=True)
```

"""
    return with_glidepath + public
