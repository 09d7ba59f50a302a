"""The networks behind FID and the CLIP score: layouts, arithmetic, resize rules, and files that are other ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from data_pipeline.clip_tokenizer import clip_tokens
from data_pipeline.config import Settings, parse
from data_pipeline.errors import UsageError, UserError
from data_pipeline.manifests import sha256_of
from trainer.evaluation.feature_metrics import inception_score, too_few
from trainer.evaluation.feature_networks import (
    CLIP_B32_SHA256,
    INCEPTION_SHA256,
    ClipNetwork,
    InceptionNetwork,
    NetworkSettings,
    _by_tf1,
    _clean,
    identify,
    load_network,
    unit_rows,
)
from trainer.evaluation.figures import MetricSettings, figures_of, take
from trainer.models import inception
from trainer.models.inception import Inception, averaged, maximal
from trainer.models.openai_clip import ClipSize, OpenAiClip, size_of

SMALL_CLIP = ClipSize(
    image_size=32,
    patch_size=8,
    image_width=128,
    image_layers=2,
    text_context=16,
    vocabulary=49408,
    text_width=64,
    text_layers=2,
    embedding=24,
)


class Holder(Settings):
    network: NetworkSettings


def settings_of(**values: Any) -> NetworkSettings:
    return parse(Holder, {"network": values}, "evaluate").network


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real architecture with weights of its own, stored as the public port is: without counters of batches."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "inception.pth"
    state = Inception().state_dict()
    torch.save({name: values for name, values in state.items() if not name.endswith("num_batches_tracked")}, file)
    return file


@pytest.fixture(scope="module")
def clip_model() -> OpenAiClip:
    torch.manual_seed(1)
    return OpenAiClip(SMALL_CLIP)


@pytest.fixture
def pictures() -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)


def test_the_inception_has_the_layout_of_the_public_port(inception_file: Path) -> None:
    state = torch.load(inception_file, weights_only=True)
    with torch.device("meta"):
        parameters = sum(values.numel() for values in Inception().parameters())
    # 27,161,264 of torchvision's, without 3,326,696 of the auxiliary classifier, with 1008 instead of 1000 classes
    assert parameters == 27_161_264 - 3_326_696 + 8 * 2049
    assert len(state) == 94 * 5 + 2  # 94 convolutions with their normalisation, and the classifier
    shapes = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Mixed_5b.branch_pool.bn.running_var": (32,),
        "Mixed_6b.branch7x7dbl_5.conv.weight": (192, 128, 1, 7),
        "Mixed_6e.branch7x7_3.conv.weight": (192, 192, 7, 1),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7c.branch3x3dbl_3b.bn.bias": (384,),
        "fc.weight": (1008, 2048),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def test_the_inception_pools_as_the_fid_graph_does() -> None:
    ones = torch.ones(1, 1, 4, 4)
    assert torch.equal(averaged(ones), ones)  # the padding is not counted
    with torch.device("meta"):
        blocks = dict(Inception().named_modules())
    assert blocks["Mixed_7b"].pool is averaged
    assert blocks["Mixed_7c"].pool is maximal  # the graph's own error, which every published figure has


def test_inception_features_are_the_pooled_last_block_and_logits_have_no_bias(
    inception_file: Path, pictures: np.ndarray[Any, np.dtype[np.uint8]]
) -> None:
    digest = sha256_of(inception_file)
    network = load_network(settings_of(kind="inception", file=inception_file, sha256=digest))
    assert isinstance(network, InceptionNetwork)
    assert network.identity.name == f"inception-tf1-{digest[:8]}"
    pooled, logits = network.features_and_logits(pictures)
    assert pooled.shape == (3, 2048) and pooled.dtype == np.float32

    model = network._model
    last: list[Tensor] = []
    model.get_submodule("Mixed_7c").register_forward_hook(lambda _, __, output: last.append(output))
    x = (torch.from_numpy(_by_tf1(pictures, 299)).permute(0, 3, 1, 2) - 128) / 128
    with torch.no_grad():
        model(x)
    assert last[0].shape == (3, 2048, 8, 8)
    np.testing.assert_allclose(pooled, last[0].mean(dim=(2, 3)).numpy(), rtol=1e-5)
    weights = torch.load(inception_file, weights_only=True)["fc.weight"].numpy()
    np.testing.assert_allclose(logits, pooled @ weights.T, rtol=1e-3, atol=1e-4)

    drawn = take(network, [pictures[:2], pictures[2:]], passed=(counts := []).append)
    assert counts == [2, 3]
    figures, warnings = figures_of(network, drawn, ["a"] * 3, None, [], MetricSettings())
    score = figures[f"inception_score/inception-tf1-{digest[:8]}"]
    assert score == pytest.approx(inception_score(logits).mean, rel=1e-4)
    assert warnings == [too_few("inception_score", 3, 3)]


def test_the_tensorflow_1_resize_reads_between_pixels_of_equal_corners_without_smoothing() -> None:
    ramp = np.broadcast_to(np.arange(0, 160, 40, dtype=np.uint8)[None, None, :, None], (1, 4, 4, 3))
    expected = np.minimum(np.arange(8) * 0.5, 3) * 40  # output i reads at i * 4 / 8; beyond the last pixel it stays
    np.testing.assert_allclose(_by_tf1(ramp, 8)[0, 0, :, 0], expected)
    # A pixel that no output reads is not seen: there is no antialiasing.
    spike = np.zeros((1, 4, 4, 3), np.uint8)
    spike[0, 1, 1] = 255
    assert _by_tf1(spike, 2).max() == 0
    assert _clean(spike, 2).max() > 0


def test_the_clean_resize_is_pillows_on_floats_cut_to_the_range(
    pictures: np.ndarray[Any, np.dtype[np.uint8]],
) -> None:
    found = _clean(pictures, inception.SIDE)
    assert found.min() == 0 and found.max() == 255
    pictures = pictures // 4 + 90  # away from the ends, where 8 bits are cut between the two directions
    found = _clean(pictures, inception.SIDE)
    eight_bit = np.asarray(Image.fromarray(pictures[0]).resize((299, 299), Image.Resampling.BICUBIC), np.float32)
    assert np.abs(found[0] - eight_bit).max() <= 2.0  # which rounds, twice
    assert (found[0] != np.round(found[0])).mean() > 0.5


def torchs_layer(state: dict[str, Tensor], prefix: str, width: int) -> nn.TransformerEncoderLayer:
    """A block of the released layout as torch's own layer."""
    layer = nn.TransformerEncoderLayer(
        width,
        width // 64,
        4 * width,
        dropout=0.0,
        activation=lambda x: x * torch.sigmoid(1.702 * x),
        batch_first=True,
        norm_first=True,
    )
    renamed = {
        "attn.": "self_attn.",
        "mlp.c_fc.": "linear1.",
        "mlp.c_proj.": "linear2.",
        "ln_1.": "norm1.",
        "ln_2.": "norm2.",
    }
    own = {name.removeprefix(prefix): values for name, values in state.items() if name.startswith(prefix)}
    for old, new in renamed.items():
        own = {name.replace(old, new): values for name, values in own.items()}
    layer.load_state_dict(own)
    return layer.eval()


def test_clip_features_equal_those_of_torchs_own_transformer_layers(clip_model: OpenAiClip) -> None:
    state, size = clip_model.state_dict(), SMALL_CLIP
    assert size_of({name: values.shape for name, values in state.items()}) == size
    x = torch.rand(2, 3, 32, 32)
    tokens, lengths = (
        torch.from_numpy(values.astype(np.int64)) for values in clip_tokens(["a cat", "two dogs and a house"], 16)
    )
    with torch.no_grad():
        means = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
        deviations = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
        patches = nn.functional.conv2d((x - means) / deviations, state["visual.conv1.weight"], stride=8)
        sequence = torch.cat([state["visual.class_embedding"].expand(2, 1, 128), patches.flatten(2).mT], 1)
        sequence = sequence + state["visual.positional_embedding"]
        sequence = nn.functional.layer_norm(
            sequence, (128,), state["visual.ln_pre.weight"], state["visual.ln_pre.bias"]
        )
        for block in range(2):
            sequence = torchs_layer(state, f"visual.transformer.resblocks.{block}.", 128)(sequence)
        normed = nn.functional.layer_norm(
            sequence[:, 0], (128,), state["visual.ln_post.weight"], state["visual.ln_post.bias"]
        )
        torch.testing.assert_close(clip_model.encode_image(x), normed @ state["visual.proj"], rtol=1e-4, atol=1e-5)

        sequence = state["token_embedding.weight"][tokens] + state["positional_embedding"]
        for block in range(2):
            layer = torchs_layer(state, f"transformer.resblocks.{block}.", 64)
            sequence = layer(sequence, src_mask=nn.Transformer.generate_square_subsequent_mask(16))
        ends = tokens.argmax(dim=1)  # the end token has the highest number
        normed = nn.functional.layer_norm(
            sequence[torch.arange(2), ends], (64,), state["ln_final.weight"], state["ln_final.bias"]
        )
        expected = normed @ state["text_projection"]
        torch.testing.assert_close(clip_model.encode_text(tokens, lengths), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["state dict", "TorchScript archive"])
def test_a_clip_file_gives_cosines_of_its_directions(
    form: str, clip_model: OpenAiClip, tmp_path: Path, pictures: np.ndarray[Any, np.dtype[np.uint8]]
) -> None:
    file = tmp_path / "clip.pt"
    if form == "state dict":
        torch.save(clip_model.half().state_dict() | {"context_length": torch.tensor(16)}, file)
        clip_model.float()
    else:
        torch.jit.save(torch.jit.trace_module(clip_model, {"encode_image": torch.rand(1, 3, 32, 32)}), str(file))
    network = load_network(settings_of(kind="clip", file=file, sha256=sha256_of(file)))
    assert isinstance(network, ClipNetwork)
    assert network.identity.name == f"clip-{sha256_of(file)[:8]}"
    features = network.features(pictures)
    assert features.shape == (3, 24) and features.dtype == np.float32
    found = (unit_rows(features) * unit_rows(network.text_features(["a cat", "a dog", "a cat"]))).sum(axis=1)
    tokens, lengths = (torch.from_numpy(v.astype(np.int64)) for v in clip_tokens(["a cat", "a dog", "a cat"], 16))
    with torch.no_grad():
        texts = clip_model.encode_text(tokens, lengths)
    expected = nn.functional.cosine_similarity(torch.from_numpy(features), texts)
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-3 if form == "state dict" else 1e-5)


def test_files_that_are_not_the_stated_network_are_refused_by_name(
    inception_file: Path, clip_model: OpenAiClip, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"inception.pth: expected sha256 6726825d0af5, found [0-9a-f]{12}; fetch it"):
        identify(settings_of(kind="inception", file=inception_file))
    with pytest.raises(UserError, match=r"absent.pt: expected a file of weights, found none; "):
        identify(settings_of(kind="clip", file=tmp_path / "absent.pt"))
    with pytest.raises(UserError, match=r"no-clip.pt: expected a CLIP with a vision transformer, found no key"):
        torch.save({"weight": torch.zeros(3)}, other := tmp_path / "no-clip.pt")
        load_network(settings_of(kind="clip", file=other, sha256=sha256_of(other)))
    with pytest.raises(UserError, match=r"expected no such key, found shape \[64, 24\]|expected shape"):
        torch.save(clip_model.state_dict(), other := tmp_path / "clip.pt")
        load_network(settings_of(kind="inception", file=other, sha256=sha256_of(other)))
    with pytest.raises(UserError, match=r"text.pt: expected a state dict or a TorchScript archive, found "):
        (other := tmp_path / "text.pt").write_text("no weights at all")
        load_network(settings_of(kind="clip", file=other, sha256=sha256_of(other)))
    with pytest.raises(UsageError, match="key network"):
        settings_of(kind="inception", file=inception_file, sha256="6726825d")
    assert (INCEPTION_SHA256[:8], CLIP_B32_SHA256[:8]) == ("6726825d", "40d36571")
