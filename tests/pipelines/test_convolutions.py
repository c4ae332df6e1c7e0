"""A loaded VAE's convolutions: by oneDNN in every dtype, with the results and gradients of PyTorch's own."""

import copy
from importlib.resources import files

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch.profiler import ProfilerActivity, profile

from ziggurat.pipelines import load
from ziggurat.pipelines.convolutions import through_onednn


@pytest.fixture(scope="module")
def vaes():
    """The embedded model's, as diffusers loads it and as we do."""
    plain = AutoencoderKLWan.from_pretrained(str(files("ziggurat.assets")) + "/shapes", subfolder="vae")
    return plain, load("shapes", dtype=torch.float32).vae


def test_videos_and_latents_are_the_same(vaes):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 8, 3, 12, 20, generator=generator)
    with torch.no_grad():
        videos = [vae.decode(latents).sample for vae in vaes]
        back = [vae.encode(videos[0]).latent_dist.mode() for vae in vaes]
    torch.testing.assert_close(*videos, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*back, rtol=1e-4, atol=1e-4)


def test_gradients_are_the_same(vaes):
    latents = [torch.randn(1, 8, 2, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in vaes]
    grads = []
    for vae, start in zip(vaes, latents, strict=True):
        weight = vae.decoder.conv_in.weight
        grads.append(torch.autograd.grad(vae.decode(start).sample.square().mean(), [start, weight]))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_none_runs_by_the_slow_loop(vaes, dtype):
    vae = copy.deepcopy(vaes[1]).to(dtype)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as seen:
        decoded = vae.decode(torch.randn(1, 8, 1, 8, 8, dtype=dtype)).sample
    names = {event.key for event in seen.key_averages()}
    assert decoded.dtype == dtype
    assert "aten::mkldnn_convolution" in names
    assert not any("slow_conv3d" in name for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [{"bias": False}, {"stride": (1, 2, 2)}, {"groups": 2}, {"dilation": 2, "padding": 1}, {"padding": "same"}],
    ids=str,
)
def test_every_kind_of_convolution(sizes, dtype):
    torch.manual_seed(0)
    plain = torch.nn.Conv3d(4, 6, 3, **sizes)
    ours = copy.deepcopy(plain)
    through_onednn(ours)
    # Not contiguous, and none of its sides like another.
    x = torch.randn(1, 4, 9, 7, 6).transpose(2, 4)
    eps = torch.finfo(dtype).eps
    got = ours.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), plain(x), rtol=4 * eps, atol=max(4 * eps, 1e-5))


def test_autocast_keeps_its_say():
    conv = torch.nn.Conv3d(2, 2, 3)
    through_onednn(conv)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(torch.randn(1, 2, 3, 4, 5)).dtype == torch.bfloat16


def test_circular_padding_is_left_alone():
    conv = torch.nn.Conv3d(2, 2, 3, padding=1, padding_mode="circular")
    through_onednn(conv)
    assert "_conv_forward" not in vars(conv)
