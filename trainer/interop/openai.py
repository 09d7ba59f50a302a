"""OpenAI's released files: read them into our networks, and give our weights their layout.

Always holds: files are read with `weights_only`, so nothing in them is executed; every key and shape is compared before
a weight is used; weights become float32. Called by `glidepath import`, by whoever wants a released network in Python,
and by `export`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.errors import UserError
from trainer.interop.arguments import ClipArguments, GlideArguments, Kind, read_arguments
from trainer.models.glide import Glide
from trainer.models.noised_clip import NoisedClip

# The noised CLIP is released as two files, each the state dict of one encoder.
CLIP_FILES = {"image_encoder.": "clip_image_enc.pt", "text_encoder.": "clip_text_enc.pt"}


def load_release(kind: Kind, arguments: Mapping[str, Any], path: str | Path) -> nn.Module:
    """A released network with its weights, float32, in evaluation mode: a `Glide`, or a `NoisedClip` for kind clip.

    `kind`: base, upsample, base-inpaint, upsample-inpaint or clip. `arguments`: the release's constructor arguments;
    those left out are the released file's. `path`: the state dict; for clip the folder of its two files, one of them
    (the other lies beside it), or one file of both: {"image_encoder": state dict, "text_encoder": state dict}, or one
    state dict whose keys begin with image_encoder. and text_encoder. instead.

    Raises UsageError for arguments that are unknown or not computed here, UserError if a file is absent, is no state
    dict of tensors, one of its keys does not fit (the line names the key and both shapes), or a weight is no number.
    """
    state = read_state(kind, Path(path))
    with torch.device("meta"):
        module = build_network(read_arguments(kind, arguments))
    refuse_misfit(str(path), {name: values.shape for name, values in module.state_dict().items()}, state)
    # A copy: what torch mapped from the file would change with it.
    copies = {name: values.to(torch.float32, copy=True).contiguous() for name, values in state.items()}
    refuse_not_finite(str(path), copies)
    module.load_state_dict(copies, assign=True)
    return module.eval()


def build_network(arguments: GlideArguments | ClipArguments) -> Glide | NoisedClip:
    """Our network of these arguments, with its own initialisation."""
    if isinstance(arguments, ClipArguments):
        return NoisedClip(arguments.model())
    return Glide(arguments.model(), arguments.dropout)


def release_files(kind: Kind, path: Path) -> dict[str, Path]:
    """{prefix of its keys in our network: file} of what `load_release` reads. Raises UserError if one is absent."""
    if kind == "clip" and (path.is_dir() or path.name in CLIP_FILES.values()):
        folder = path if path.is_dir() else path.parent
        files = {prefix: folder / name for prefix, name in CLIP_FILES.items()}
    else:
        files = {"": path}
    for file in files.values():
        if not file.is_file():
            raise UserError(f"{file}", "a released file", "none", "check the path")
    return files


def read_state(kind: Kind, path: Path) -> dict[str, Tensor]:
    """The state dict under our keys, mapped from the file, in its own dtypes. Raises UserError."""
    return {
        prefix + name: values
        for prefix, file in release_files(kind, path).items()
        for name, values in _read_file(file).items()
    }


def _read_file(file: Path) -> dict[str, Tensor]:
    try:
        # Files of before torch 1.6 are no zip archives and cannot be mapped.
        mapped = zipfile.is_zipfile(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except torch.serialization.pickle.UnpicklingError:
        # Its own message proposes to run what is in the file.
        raise _unreadable(file, "other bytes, or objects that are no tensors") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise _unreadable(file, next(iter(str(error).splitlines()), type(error).__name__)) from None
    if not isinstance(state, dict) or not state:
        raise UserError(f"{file}", "a state dict", type(state).__name__, "give the file of the weights alone")
    state = _joined(state)
    for name, values in state.items():
        if not isinstance(name, str) or not isinstance(values, Tensor) or not values.is_floating_point():
            found = f"{values.dtype} tensor" if isinstance(values, Tensor) else type(values).__name__
            raise UserError(f"{file}: {name}", "a tensor of weights", found, "give the file of the weights alone")
        if values.layout is not torch.strided:
            raise UserError(f"{file}: {name}", "a dense tensor", f"layout {values.layout}", "save it by to_dense()")
    return state


def _joined(document: dict[Any, Any]) -> dict[Any, Any]:
    """A noised CLIP in one file, {"image_encoder": state dict, "text_encoder": state dict}, under our keys."""
    joined = dict(document)
    for prefix in CLIP_FILES:
        if isinstance(document.get(encoder := prefix.removesuffix(".")), dict):
            joined |= {f"{prefix}{name}": values for name, values in joined.pop(encoder).items()}
    return joined


def _unreadable(file: Path, found: str) -> UserError:
    return UserError(f"{file}", "a state dict that torch.load reads with weights_only", found, "fetch it again")


def refuse_misfit(source: str, expected: Mapping[str, torch.Size], state: Mapping[str, Tensor]) -> None:
    """Raise UserError naming the first key that does not fit, with both shapes, and how many more there are."""
    found = {name: values.shape for name, values in state.items()}
    bad = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    if bad:
        more = f" (and {len(bad) - 1} more keys do not fit)" if len(bad) > 1 else ""
        raise UserError(
            f"{source}: {bad[0]}",
            f"shape {list(expected[bad[0]])}" if bad[0] in expected else "no such key",
            (f"shape {list(found[bad[0]])}" if bad[0] in found else "none") + more,
            "give the kind and the arguments that the file was made with",
        )


def refuse_not_finite(source: str, state: Mapping[str, Tensor]) -> None:
    """Raise UserError naming the first key with NaN or infinity, which would draw black pictures, and how many more."""
    bad = [name for name, values in state.items() if not values.isfinite().all()]
    if bad:
        count, total = int((~state[bad[0]].isfinite()).sum()), state[bad[0]].numel()
        more = f" (and {len(bad) - 1} more keys have some)" if len(bad) > 1 else ""
        found = f"NaN or infinity in {count} of {total} values{more}"
        raise UserError(f"{source}: {bad[0]}", "finite weights", found, "fetch it again, or give another file")


def release_file_name(kind: Kind) -> str:
    """What the release calls the file of a U-Net: base.pt, upsample.pt, base_inpaint.pt, upsample_inpaint.pt."""
    return f"{kind.replace('-', '_')}.pt"


def release_states(kind: Kind, module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """{file name: state dict} of a network in the release's layout, float32."""
    state = {name: values.detach().float().contiguous() for name, values in module.state_dict().items()}
    if kind != "clip":
        return {release_file_name(kind): state}
    return {
        file: {name.removeprefix(prefix): values for name, values in state.items() if name.startswith(prefix)}
        for prefix, file in CLIP_FILES.items()
    }
