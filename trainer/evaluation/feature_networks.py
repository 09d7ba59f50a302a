"""Feature networks: what pictures and captions are compared by, each named with the figure that was taken with it.

Always holds: a network is given by a file and its sha256 (or a checkpoint, by its manifest's), and is refused under
another; `name` is its kind, its resize rule where the kind has several, and the first 8 digits of that digest, so that
two figures of one name were taken with the same network on pictures resized the same way; pictures are uint8, so drawn
ones are judged as they are stored. Called by evaluation and by the linear probe.

The weights are not part of the installation: the Inception of FID is `pt_inception-2015-12-05-6726825d.pth` of the
pytorch-fid release, CLIP's files are OpenAI's.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from data_pipeline.clip_tokenizer import clip_tokens
from data_pipeline.config import Settings
from data_pipeline.errors import UserError
from data_pipeline.images import AREA_FILTER_VERSION
from data_pipeline.manifests import digest_of, sha256_of
from trainer.evaluation.clip_score import open_clip_checkpoint
from trainer.interop.openai import refuse_misfit
from trainer.models import inception
from trainer.models.noised_clip import NoisedClip
from trainer.models.openai_clip import OpenAiClip, size_of
from trainer.recipes.glide import reduced
from trainer.recipes.noised_clip import PART, NoisedClipRecipe
from trainer.recipes.recipe import Pixels, on_device
from trainer.weights import load_trained

Float32 = NDArray[np.float32]
Kind = Literal["inception", "clip", "noised-clip"]
Resize = Literal["tf1", "clean"]

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
CLIP_B32_SHA256 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"  # ViT-B-32.pt
SHA256 = r"^[0-9a-f]{64}$"

# How a picture becomes the network's input; raise a version when the same picture can give another one.
RESIZE_RULES = {
    "tf1": "bilinear to 299, corners as in TensorFlow 1, no antialiasing (the FID graph's own); version 1",
    "clean": "Pillow's bicubic to 299 in float32, antialiased, cut at 0 and 255 (clean-fid); version 1",
    "clip": "Pillow's bicubic to the network's side, 8-bit; version 1",
    "area": f"the area filter to the network's side, {AREA_FILTER_VERSION}; not enlarged",
}


class InceptionSettings(Settings):
    """The Inception-v3 of FID."""

    kind: Literal["inception"]
    file: Path
    sha256: Annotated[str, Field(pattern=SHA256)] = INCEPTION_SHA256
    resize: Resize = "tf1"


class ClipSettings(Settings):
    """An OpenAI CLIP with a vision transformer."""

    kind: Literal["clip"]
    file: Path
    sha256: Annotated[str, Field(pattern=SHA256)] = CLIP_B32_SHA256


class NoisedClipSettings(Settings):
    """A noised CLIP of our own, told the first timestep: it reads pictures without noise."""

    kind: Literal["noised-clip"]
    checkpoint: str  # URI, or a run (then its newest)


NetworkSettings = Annotated[InceptionSettings | ClipSettings | NoisedClipSettings, Field(discriminator="kind")]


class Identity(NamedTuple):
    """What a network is, known before its weights are loaded. `source`: where its weights were found."""

    kind: Kind
    sha256: str
    rule: str
    source: str

    @property
    def name(self) -> str:
        """Such as inception-tf1-6726825d: what stands behind the slash in the names of figures."""
        resize = f"-{self.rule}" if self.kind == "inception" else ""
        return f"{self.kind}{resize}-{self.sha256[:8]}"

    @property
    def digest(self) -> str:
        """sha256 of all that features depend on besides the pictures."""
        return digest_of([self.kind, self.sha256, RESIZE_RULES[self.rule]])


class FeatureNetwork(Protocol):
    """A loaded network."""

    identity: Identity

    def features(self, pictures: Sequence[Pixels] | Pixels) -> Float32:
        """[n, D] of n square pictures, each uint8 [s, s, 3]. Raises UserError for pictures that it does not take."""


def identify(settings: NetworkSettings) -> Identity:
    """Raises UserError for a file that is not there or has another digest, and as `open_clip_checkpoint` does."""
    if isinstance(settings, NoisedClipSettings):
        checkpoint = open_clip_checkpoint(settings.checkpoint)
        return Identity("noised-clip", checkpoint.manifest_sha256, "area", checkpoint.uri)
    name = f"feature network {settings.file}"
    if not settings.file.is_file():
        raise UserError(name, "a file of weights", "none", "fetch it, and give its path")
    found = sha256_of(settings.file)
    if found != settings.sha256:
        next_step = f"fetch it again, or set sha256 if another {settings.kind} is meant"
        raise UserError(name, f"sha256 {settings.sha256[:12]}", found[:12], next_step)
    rule = settings.resize if isinstance(settings, InceptionSettings) else "clip"
    return Identity(settings.kind, found, rule, str(settings.file.resolve()))


def load_network(settings: NetworkSettings, device: str = "cpu") -> FeatureNetwork:
    """The network of settings, on its device. Raises UserError as `identify` does, and for weights that do not fit."""
    identity = identify(settings)
    if isinstance(settings, NoisedClipSettings):
        return NoisedClipNetwork(identity, device)
    state = _read_state(settings.file)
    if isinstance(settings, InceptionSettings):
        return InceptionNetwork(identity, state, device)
    return ClipNetwork(identity, state, device)


def _read_state(file: Path) -> dict[str, Tensor]:
    """The weights of a file whose digest was checked; OpenAI's CLIP files are TorchScript archives."""
    try:
        if _is_torchscript(file):
            state = torch.jit.load(str(file), map_location="cpu").state_dict()
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (torch.serialization.pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        found = next(iter(str(error).splitlines()), type(error).__name__)
        name, expected = f"feature network {file}", "a state dict or a TorchScript archive"
        raise UserError(name, expected, found, "fetch it again") from None
    if not isinstance(state, dict) or not all(isinstance(values, Tensor) for values in state.values()):
        raise UserError(f"feature network {file}", "a state dict", type(state).__name__, "give the weights alone")
    return {name: values for name, values in state.items() if not name.endswith("num_batches_tracked")}


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _filled(module: nn.Module, state: dict[str, Tensor], identity: Identity, device: str) -> nn.Module:
    """The module with a file's weights, float32, frozen. Raises UserError for weights of another network."""
    expected = {name: v.shape for name, v in module.state_dict().items() if not name.endswith("num_batches_tracked")}
    refuse_misfit(identity.source, expected, state)
    module.load_state_dict({name: values.float() for name, values in state.items()}, strict=False, assign=True)
    return module.eval().requires_grad_(False).to(device)


class InceptionNetwork:
    """It also knows classes, for the Inception Score."""

    def __init__(self, identity: Identity, state: dict[str, Tensor], device: str = "cpu") -> None:
        self.identity, self._device = identity, device
        self._model = _filled(inception.Inception(), state, identity, device)

    def features(self, pictures: Sequence[Pixels] | Pixels) -> Float32:
        return self.features_and_logits(pictures)[0]

    def features_and_logits(self, pictures: Sequence[Pixels] | Pixels) -> tuple[Float32, Float32]:
        """([n, 2048] pooled features, [n, 1008] of classes)"""
        resized = _by_tf1 if self.identity.rule == "tf1" else _clean
        inputs = (torch.from_numpy(resized(pictures, inception.SIDE)) - 128) / 128  # the graph's own scale
        with torch.no_grad():
            pooled, logits = self._model(inputs.permute(0, 3, 1, 2).to(self._device))
        return pooled.cpu().numpy(), logits.cpu().numpy()


class ClipNetwork:
    """OpenAI's CLIP: the cosine of a picture's and a caption's features says how well they fit."""

    def __init__(self, identity: Identity, state: dict[str, Tensor], device: str = "cpu") -> None:
        self.identity, self._device = identity, device
        state = {
            name: v for name, v in state.items() if name not in ("input_resolution", "context_length", "vocab_size")
        }
        try:
            size = size_of({name: values.shape for name, values in state.items()})
        except KeyError as missing:
            expected, found = "a CLIP with a vision transformer", f"no key {missing}"
            raise UserError(f"feature network {identity.source}", expected, found, "give such a file") from None
        model = _filled(OpenAiClip(size), state, identity, device)
        assert isinstance(model, OpenAiClip)
        self._model = model

    def features(self, pictures: Sequence[Pixels] | Pixels) -> Float32:
        side = self._model.size.image_size
        square = (side, side)
        resized = [np.asarray(Image.fromarray(p).resize(square, Image.Resampling.BICUBIC)) for p in pictures]
        inputs = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            return np.asarray(self._model.encode_image(inputs.to(self._device)).cpu().numpy())

    def text_features(self, captions: Sequence[str]) -> Float32:
        tokens, lengths = clip_tokens(captions, self._model.size.text_context)
        inputs = torch.from_numpy(tokens.astype(np.int64)).to(self._device)
        with torch.no_grad():
            return np.asarray(self._model.encode_text(inputs, torch.from_numpy(lengths).to(self._device)).cpu().numpy())


class NoisedClipNetwork:
    """The EMA weights of a checkpoint, compared as those of ClipNetwork."""

    def __init__(self, identity: Identity, device: str = "cpu") -> None:
        self.identity, self._device = identity, device
        trained = load_trained(identity.source, "ema")
        model = trained.modules[PART]
        assert isinstance(trained.recipe, NoisedClipRecipe) and isinstance(model, NoisedClip)
        self._recipe, self._model = trained.recipe, model.requires_grad_(False).to(device)

    def features(self, pictures: Sequence[Pixels] | Pixels) -> Float32:
        inputs = reduced(pictures, self._model.config.image_size).to(self._device)
        first = torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)
        with torch.no_grad():
            noiseless = self._recipe.process.q_sample(inputs, first, torch.zeros_like(inputs))
            return np.asarray(self._model.encode_image(noiseless, first).cpu().numpy())

    def text_features(self, captions: Sequence[str]) -> Float32:
        inputs = on_device(self._recipe.captions(captions), torch.device(self._device))
        with torch.no_grad():
            return np.asarray(self._model.encode_text(inputs["tokens"], inputs["lengths"]).cpu().numpy())


def unit_rows(features: Float32) -> NDArray[np.float64]:
    """Rows [n, D] at length 1, in float64: the product of two is their cosine."""
    rows = features.astype(np.float64)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def _by_tf1(pictures: Sequence[Pixels] | Pixels, side: int) -> Float32:
    """[n, side, side, 3] in 0..255: output pixel i reads between input pixels around i * (s / side), unsmoothed."""
    return np.stack([_bilinear(picture.astype(np.float32), side) for picture in pictures])


def _bilinear(values: Float32, side: int) -> Float32:
    source = np.arange(side, dtype=np.float32) * np.float32(len(values) / side)
    low = np.floor(source).astype(np.int64)
    high, share = np.minimum(low + 1, len(values) - 1), (source - low).astype(np.float32)
    across, down = share[:, None], share[:, None, None]
    values = values[:, low] * (1 - across) + values[:, high] * across
    return np.asarray(values[low] * (1 - down) + values[high] * down, np.float32)


def _clean(pictures: Sequence[Pixels] | Pixels, side: int) -> Float32:
    """[n, side, side, 3] in 0..255, channel by channel in float32."""
    out = np.empty((len(pictures), side, side, 3), np.float32)
    for number, picture in enumerate(pictures):
        for channel in range(3):
            plane = Image.fromarray(picture[:, :, channel].astype(np.float32))
            out[number, :, :, channel] = np.asarray(plane.resize((side, side), Image.Resampling.BICUBIC))
    return out.clip(0, 255)
