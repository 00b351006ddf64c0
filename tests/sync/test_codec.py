"""Codecs: bounds of what they lose, bytes to the byte, the same bytes again, nothing hidden."""

import pytest
import torch

from unisono.errors import ConfigError
from unisono.sync import codec as codec_file
from unisono.sync.codec import Codec, make_codec

KINDS = [("int8", False, True), ("int8", True, True), ("int4", False, True), ("int4", True, True), ("int4", False, False)]  # fmt: skip
LENGTHS = [0, 1, 5, 31, 32, 33, 255, 256, 257, 1000, 65_536, 65_536 + 300, 200_001]


def codec_of(kind: tuple[str, bool, bool]) -> Codec:
    name, stochastic, rotated = kind
    return make_codec(name, stochastic=stochastic, rotated=rotated)


def normal(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def there_and_back(codec: Codec, values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    out = torch.full_like(values, 7.0)
    codec.decode(codec.encode(values, seed), out)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", LENGTHS)
def test_bytes_are_the_formula_and_errors_are_bounded(kind: tuple, n: int) -> None:
    codec, values = codec_of(kind), normal(n)
    code = codec.encode(values, 3)
    blocks = (n + 255) // 256
    wanted = n + 4 * blocks if codec.name == "int8" else (n + 31) // 32 * 16 + 4 * blocks
    assert code.dtype == torch.uint8 and code.numel() == codec.encoded_bytes(n) == wanted
    out = torch.empty(n)
    codec.decode(code, out)
    # A step of a code, half of it to nearest; a rotation spreads an error without making it longer.
    largest = 127 if codec.name == "int8" else 7
    rotated = kind[2] and codec.name == "int4"
    for a in range(0, n, 256):
        part, error = values[a : a + 256], (out - values)[a : a + 256]
        step = part.abs().amax() / largest * (32**0.5 if rotated else 1)
        bound = step * (1.0 if kind[1] else 0.5)
        norm = (error.norm() / len(error) ** 0.5) if rotated else error.abs().amax()
        assert norm <= bound * 1.001


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_is_what_was_not_sent_and_adding_adds(kind: tuple) -> None:
    codec, values = codec_of(kind), normal(66_000)
    left = torch.empty_like(values)
    code = codec.encode(values, 5, left)
    out, added = torch.empty_like(values), values.clone()
    codec.decode(code, out)
    codec.decode(code, added, add=True)
    torch.testing.assert_close(out + left, values, rtol=0, atol=2e-6)
    torch.testing.assert_close(added, values + out, rtol=0, atol=2e-6)
    in_place = values.clone()
    assert torch.equal(codec.encode(in_place, 5, in_place), code)
    assert torch.equal(in_place, left)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_values_and_seed_give_the_same_bytes(kind: tuple) -> None:
    codec, values = codec_of(kind), normal(70_000)
    torch.manual_seed(1)
    first = codec.encode(values, 11)
    torch.manual_seed(2)
    assert torch.equal(first, codec.encode(values, 11))
    assert torch.equal(first, codec.encode(values, 12)) == (not kind[1]), "noise is of the seed"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("n", "at"), [(1, 0), (300, 20), (300, 299), (66_000, 65_999)])
def test_what_is_not_finite_stays_so(kind: tuple, bad: float, n: int, at: int) -> None:
    codec, values = codec_of(kind), normal(n)
    values[at] = bad
    out = there_and_back(codec, values)
    block = slice(at // 256 * 256, at // 256 * 256 + 256)
    assert not torch.isfinite(out[block]).all()
    out[block] = 0
    assert torch.isfinite(out).all(), "other blocks are not touched"


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_what_is_very_small_or_large(kind: tuple) -> None:
    codec = codec_of(kind)
    left = torch.full((700,), 7.0)
    codec.encode(torch.zeros(700), 0, left)
    assert not there_and_back(codec, torch.zeros(700)).any() and not left.any()
    for scale in (1e-45, 1e-38, 1e-25, 1e25):
        out = there_and_back(codec, normal(700) * scale)
        assert torch.isfinite(out).all()
        assert (out - normal(700) * scale).abs().amax() <= max(scale * 4, 1e-29)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_stochastic_rounding_has_the_right_mean(name: str) -> None:
    codec = make_codec(name, stochastic=True)
    values = normal(3000)
    total = torch.zeros(3000, dtype=torch.float64)
    count = 4000
    for seed in range(count):
        total += there_and_back(codec, values, codec_file.mix(seed))
    step = (
        float(values.abs().amax()) / (127 if name == "int8" else 7) * (1 if name == "int8" else 2)
    )
    # The error of a mean of `count`, each within a step: six deviations.
    assert (total / count - values).abs().amax() <= 6 * step / 2 / count**0.5
    nearest = there_and_back(make_codec(name), values)
    assert (nearest - values).abs().amax() > 6 * step / 2 / count**0.5, "the control"


def test_a_rotation_saves_what_lies_beside_an_outlier() -> None:
    values = normal(4096)
    values[::256] = 50.0
    errors = {}
    for rotated in (True, False):
        out = there_and_back(make_codec("int4", rotated=rotated), values)
        rest = torch.arange(4096) % 256 != 0
        errors[rotated] = float((out - values)[rest].norm() / values[rest].norm())
    assert errors[True] < 0.6 < 0.99 < errors[False]


def test_codes_may_lie_anywhere_in_memory() -> None:
    for kind in KINDS:
        codec, values = codec_of(kind), normal(777)
        code = codec.encode(values, 1)
        memory = torch.zeros(len(code) + 3, dtype=torch.uint8)
        memory[3:] = code
        out, moved = torch.empty(777), torch.empty(777)
        codec.decode(code, out)
        codec.decode(memory[3:], moved)
        assert torch.equal(out, moved)


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(ConfigError, match="int3"):
        make_codec("int3")
