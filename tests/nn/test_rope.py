"""The rotary table against the published layout's facts (spec 1.5), and the rotation's own properties."""

import math

import pytest
import torch

from orrery.nn.rope import apply_rope, axis_frequencies, axis_sizes, rope_table


def test_published_head_split():
    assert axis_sizes(128) == (44, 42, 42)
    assert axis_sizes(48) == (16, 16, 16)


@pytest.mark.parametrize("head_dim", [8, 10, 27])
def test_impossible_head_is_refused(head_dim):
    with pytest.raises(ValueError, match=str(head_dim)):
        axis_sizes(head_dim)


def test_published_base_frequency():
    spatial = axis_frequencies(42, 3.0, False, None)
    assert spatial[0] == 1.0
    assert math.isclose(spatial[1].item(), 31694.0193 ** (-2 / 42), rel_tol=1e-6)
    temporal = axis_frequencies(44, 1.0, False, None)
    assert math.isclose(temporal[-1].item(), 10000.0 ** (-42 / 44), rel_tol=1e-6)


@pytest.mark.parametrize(
    ("dim", "ratio", "last", "frequency_error", "phase_error"),
    [(44, 1.0, 23, 0.016, 0.021), (42, 3.0, 43, 0.019, 0.028), (42, 3.0, 79, 0.019, 0.052)],
)
def test_bf16_exponents_give_the_published_errors(dim, ratio, last, frequency_error, phase_error):
    exact, rounded = (axis_frequencies(dim, ratio, bf16, None).double() for bf16 in (False, True))
    assert ((rounded - exact) / exact).abs().max().item() == pytest.approx(frequency_error, abs=6e-4)
    assert ((rounded - exact) * last).abs().max().item() == pytest.approx(phase_error, abs=6e-4)


def test_each_token_has_the_angles_of_its_three_positions():
    size, dims = (2, 3, 4), (44, 42, 42)
    cos, sin = rope_table(size, 128, (1.0, 3.0, 2.0), bf16_exponents=False)
    assert cos.shape == sin.shape == (24, 128)
    assert cos.dtype == torch.float32
    for token, position in {0: (0, 0, 0), 1: (0, 0, 1), 4: (0, 1, 0), 12: (1, 0, 0), 23: (1, 2, 3)}.items():
        expected = []
        for place, dim, ratio in zip(position, dims, (1.0, 3.0, 2.0), strict=True):
            theta = 10000.0 * ratio ** (dim / (dim - 2))
            expected += [place / theta ** (2 * i / dim) for i in range(dim // 2)]
        expected = torch.tensor(expected * 2, dtype=torch.float64)
        torch.testing.assert_close(cos[token].double(), expected.cos(), atol=1e-6, rtol=0)
        torch.testing.assert_close(sin[token].double(), expected.sin(), atol=1e-6, rtol=0)


def test_fps_modulation_stretches_time_only():
    plain = rope_table((5, 2, 2), 48)
    for same, table in zip(plain, rope_table((5, 2, 2), 48, fps=24.0), strict=True):
        torch.testing.assert_close(same, table)
    half_rate = rope_table((3, 2, 2), 48, fps=12.0)[0].view(3, 4, 48)
    torch.testing.assert_close(half_rate, plain[0].view(5, 4, 48)[::2])  # frame k stands where 2k stood
    with pytest.raises(ValueError, match="-1"):
        rope_table((1, 1, 1), 48, fps=-1)


def test_empty_size_is_refused():
    with pytest.raises(ValueError, match="0"):
        rope_table((0, 2, 2), 48)


def test_rotation_pairs_entry_i_with_i_plus_half():
    x = torch.zeros(1, 2, 1, 48)
    x[..., 5] = 1.0
    angle = torch.full((2, 48), 0.3)
    rotated = apply_rope(x, angle.cos(), angle.sin())
    assert rotated[0, 0, 0, 5].item() == pytest.approx(math.cos(0.3))
    assert rotated[0, 0, 0, 29].item() == pytest.approx(math.sin(0.3))
    assert rotated[0, 0, 0].count_nonzero() == 2


def test_scores_depend_on_relative_position_only():
    torch.manual_seed(0)
    q, k = torch.randn(48), torch.randn(48)
    cos, sin = rope_table((4, 4, 4), 48)
    rotate = lambda x: apply_rope(x.expand(1, 64, 1, 48), cos, sin)[0, :, 0]  # noqa: E731
    scores = (rotate(q) @ rotate(k).T).view(4, 4, 4, 4, 4, 4)
    torch.testing.assert_close(scores[0, 1, 2, 1, 2, 3], scores[2, 0, 1, 3, 1, 2])
    assert not torch.isclose(scores[0, 1, 2, 1, 2, 3], scores[0, 1, 2, 1, 3, 2])


def test_bf16_is_rotated_in_fp32_and_rounded_once():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 3, 48).bfloat16()
    table = rope_table((2, 2, 2), 48)
    assert torch.equal(apply_rope(x, *table), apply_rope(x.float(), *table).bfloat16())
