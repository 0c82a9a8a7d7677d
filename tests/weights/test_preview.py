"""Preview decoders on disk: ours beside the VAE, published files of all suffixes, and every refusal."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from orrery.errors import InputError
from orrery.nn.preview import PRESETS, Preview, PreviewConfig
from orrery.nn.vae import VAEConfig
from orrery.weights.conversion import convert
from orrery.weights.parts import ModelFiles
from orrery.weights.preview import PREVIEW, find_preview, infer_config, load_preview, save_preview
from orrery.weights.sources import find_model

MINI = find_model("mini", controls=())
NARROW = {"widths": (8, 6, 4, 4)}
LATENTS = torch.linspace(-2, 2, 16 * 2 * 3 * 3).reshape(1, 16, 2, 3, 3)


@pytest.fixture
def files(tiny_folder: Path, tmp_path: Path) -> ModelFiles:
    """A model of the tiny networks in a folder of its own."""
    return find_model(Path(shutil.copytree(tiny_folder, tmp_path / "model")))


def network(**changes: Any) -> Preview:
    torch.manual_seed(0)
    preview = Preview(dataclasses.replace(PRESETS["taew2.1"], **NARROW | changes)).eval()
    return preview.requires_grad_(False)


def published(preview: Preview) -> dict[str, Tensor]:
    """As a published file has it: with an encoder."""
    encoder = {"encoder.0.weight": torch.ones(2, 3, 3, 3), "encoder.2.conv.weight": torch.ones(2, 4, 1, 1)}
    return encoder | preview.state_dict()


def wan(files: ModelFiles) -> ModelFiles:
    """The same model with a VAE config that has the published factors and latents with statistics."""
    vae = VAEConfig(latent_mean=(0.5,) * 16, latent_std=(2.0,) * 16)
    return dataclasses.replace(files, config=dataclasses.replace(files.config, vae=vae))


def test_a_folder_keeps_its_own(files: ModelFiles) -> None:
    assert files.folder is not None
    assert load_preview(files) is None
    preview = Preview(dataclasses.replace(PRESETS["mini"], widths=(8, 4)))
    save_preview(files.folder / PREVIEW, preview, files.config.vae, {"recipe": "a test"}, torch.float32)
    loaded = load_preview(files)
    assert loaded is not None and loaded.config == preview.config and not loaded.training
    assert torch.equal(loaded.decode(LATENTS), preview.decode(LATENTS))
    half = load_preview(files, dtype=torch.bfloat16)
    assert half is not None and half.decode(LATENTS.bfloat16()).dtype == torch.bfloat16


def test_it_goes_with_the_vae(files: ModelFiles, tmp_path: Path) -> None:
    assert files.folder is not None
    preview = Preview(dataclasses.replace(PRESETS["mini"], widths=(8, 4)))
    save_preview(files.folder / PREVIEW, preview, files.config.vae, {})
    convert(files, tmp_path / "copy", "orrery")
    assert (tmp_path / "copy" / PREVIEW).read_bytes() == (files.folder / PREVIEW).read_bytes()
    other = find_model(files.folder, vae=MINI.folder)
    assert find_preview(other) != files.folder / PREVIEW


def test_of_another_vae_it_is_refused(files: ModelFiles) -> None:
    assert files.folder is not None
    other = dataclasses.replace(files.config.vae, latent_mean=(0.1,) * 16)
    save_preview(files.folder / PREVIEW, Preview(PRESETS["mini"]), other, {})
    with pytest.raises(InputError, match=r"another VAE.*mini-preview\.toml"):
        load_preview(files)


def test_the_embedded_models_share_one() -> None:
    mini, tabletop = load_preview(MINI), load_preview(find_model("tabletop"))
    assert mini is not None and tabletop is not None
    assert mini.config == PRESETS["mini"]
    assert torch.equal(mini.decode(LATENTS), tabletop.decode(LATENTS))
    assert MINI.folder is not None and (MINI.folder / PREVIEW).stat().st_size < 500_000


def test_the_embedded_one_draws_what_the_vae_draws() -> None:
    """Measured on held-out clips by recipes/mini-preview.toml; here on a picture that anyone can make."""
    from orrery.weights import load_part

    vae: Any = load_part(MINI, "vae")
    preview = load_preview(MINI)
    assert preview is not None
    ramp = torch.linspace(-0.8, 0.8, 64)
    frames = torch.stack([ramp.expand(64, 64), ramp.view(-1, 1).expand(64, 64), torch.zeros(64, 64)])
    frames = frames[None, :, None].repeat(1, 1, 5, 1, 1)
    with torch.no_grad():
        latents = vae.encode(frames)
        error = (preview.decode(latents).clamp(-1, 1) - vae.decode(latents).clamp(-1, 1)).square().mean() / 4
    assert -10 * error.log10() > 20


@pytest.mark.parametrize("name", ["taew2_1.pth", "taew2_1.safetensors"])
def test_published_files_are_read(name: str, files: ModelFiles, tmp_path: Path) -> None:
    preview, path = network(), tmp_path / name
    if path.suffix == ".pth":
        torch.save(published(preview), path)
    else:
        save_file(published(preview), path)
    loaded = load_preview(wan(files), path)
    assert loaded is not None and loaded.config == preview.config
    assert torch.equal(loaded.decode(LATENTS), preview.decode(LATENTS))


def test_of_lightx2v_it_takes_latents_before_normalisation(
    files: ModelFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preview, path = network(), tmp_path / "lighttaew2_1.pth"
    torch.save(preview.state_dict(), path)
    loaded = load_preview(wan(files), path)
    assert loaded is not None
    torch.testing.assert_close(loaded.decode(LATENTS), preview.decode(LATENTS * 2 + 0.5))
    assert "before normalisation" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [{"time_up": (2, 2, 2)}, {"patch": 2, "latent_channels": 48}, {"widths": (9, 7, 5, 3)}],
    ids=["time", "wan2.2", "widths"],
)
def test_the_network_is_read_off_the_shapes(changes: dict[str, Any]) -> None:
    preview = network(**changes)
    assert infer_config(preview.state_dict(), "a file") == preview.config


def test_faulty_files_are_refused(files: ModelFiles, tmp_path: Path) -> None:
    model, whole = wan(files), published(network())
    lacking = {key: value for key, value in whole.items() if key != "decoder.4.conv.2.bias"}
    cases: dict[str, tuple[dict[str, Tensor], str]] = {
        "lacking": (lacking, r"lacks 1 weights: decoder\.4\.conv\.2\.bias"),
        "more": (whole | {"decoder.30.weight": torch.ones(1)}, r"holds unknown 1 weights: decoder\.30\.weight"),
        "shape": (whole | {"decoder.3.conv.0.bias": torch.ones(9)}, r"decoder\.3\.conv\.0\.bias is \[9\]"),
        "other": ({"weight": torch.ones(1)}, r"no TAEHV decoder: it lacks the convolution decoder\.1\.weight"),
        "channels": (network(latent_channels=48).state_dict(), "another VAE: 48 channels"),
        "factor": (network(time_up=(2, 2, 2)).state_dict(), "8 frames"),
    }
    for name, (tensors, message) in cases.items():
        save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / f"{name}.safetensors")
        with pytest.raises(InputError, match=message):
            load_preview(model, tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match="no such file"):
        load_preview(model, tmp_path / "none.pth")
    torch.save(nn.Linear(1, 1), tmp_path / "pickle.pth")
    with pytest.raises(InputError, match="wants to run"):
        load_preview(model, tmp_path / "pickle.pth")


def test_metadata_that_is_no_config_is_refused(files: ModelFiles) -> None:
    from safetensors import safe_open

    assert files.folder is not None
    path = files.folder / PREVIEW
    save_preview(path, Preview(PRESETS["mini"]), files.config.vae, {})
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata | {"preview": '{"width": 3}'})
    with pytest.raises(InputError, match="no config of a preview decoder"):
        load_preview(files)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    preview = Preview(PreviewConfig(widths=(4, 4), time_up=(1,), space_up=(1,)))
    with torch.no_grad():
        preview.decoder[1].bias.fill_(1e6)
    with pytest.raises(ValueError, match=r"decoder\.1\.bias is not finite in float16"):
        save_preview(tmp_path / PREVIEW, preview, MINI.config.vae, {})
    assert not (tmp_path / PREVIEW).exists()
