"""From a layer's policy, and the artifact when there is one, to the codec that kernels run."""

import torch
from torch import Tensor

from kernels.attention.quantized.cache import KeyShift, LayerCodec
from kernels.attention.quantized.codec import RowCodec, default_clip
from kernels.attention.quantized.layout import RowLayout
from kernels.attention.quantized.transforms import Chain, Hadamard, HeadTransform, Identity, Permutation, Rotation
from kvcache.calibration import Calibration, CalibrationError
from kvcache.policy import HADAMARD, LayerPolicy

# Without statistics: e4m3 then holds zeros up to 224 for keys and 28 for values, with full precision for steps down to
# 1/128 and 1/1024. Keys are the larger ones, and single large channels are spread by the rotation.
KEY_PRESCALE = 2.0**-1
VALUE_PRESCALE = 2.0**-4


def uncalibrated_codec(
    layer: LayerPolicy, num_kv_heads: int, head_dim: int, prescales: tuple[Tensor, Tensor] | None = None
) -> LayerCodec:
    """Rotated, or plain, channels with one clip for each width.

    prescales: of keys and of values, each [num_kv_heads] float32, when something is known of their size
    (kernels.attention.quantized.codec.prescale_for).
    """
    if prescales is None:
        prescales = torch.full((num_kv_heads,), KEY_PRESCALE), torch.full((num_kv_heads,), VALUE_PRESCALE)
    rotated = layer.transform == HADAMARD
    codecs = []
    for bits, prescale in zip((layer.key_bits, layer.value_bits), prescales, strict=True):
        layout = RowLayout(bits, head_dim, layer.group_size)
        clip = default_clip(bits, layer.group_size) if rotated else 1.0
        codecs.append(RowCodec(layout, torch.full((num_kv_heads, layout.num_groups), clip), prescale))
    transform = Hadamard() if rotated else Identity()
    return LayerCodec(codecs[0], codecs[1], transform, transform, layer.window, layer.num_sinks)


def calibrated_codec(layer: LayerPolicy, calibration: Calibration, index: int) -> LayerCodec:
    """What the artifact says of layer `index`. Raises CalibrationError when it was made for something else."""
    check_made_for(layer, calibration, index)
    header, codecs = calibration.header, []
    for bits, clip, prescale in (
        (layer.key_bits, calibration.k_clip, calibration.k_ps),
        (layer.value_bits, calibration.v_clip, calibration.v_ps),
    ):
        layout = RowLayout(bits, header.head_dim, layer.group_size)
        clips = clip[index].float() if layout.num_groups else torch.ones(header.num_kv_heads, 0)
        codecs.append(RowCodec(layout, clips, prescale[index], header.clip_mode))
    turned = header.hadamard[index]
    mean, scale = calibration.k_mean[index], calibration.k_scale[index]
    shift = KeyShift(mean, scale) if bool((mean != 0).any()) or bool((scale != 1).any()) else None
    transforms = (
        _transform(
            calibration.k_perm[index], turned[0], None if calibration.k_rot is None else calibration.k_rot[index]
        ),
        _transform(
            calibration.v_perm[index], turned[1], None if calibration.v_rot is None else calibration.v_rot[index]
        ),
    )
    return LayerCodec(codecs[0], codecs[1], *transforms, layer.window, layer.num_sinks, shift)


def check_made_for(layer: LayerPolicy, calibration: Calibration, index: int) -> None:
    """Raises CalibrationError when layer `index` has other widths or groups in the artifact. Window and sinks may
    differ: they choose the tokens that are read quantized, not how."""
    header = calibration.header
    wanted, made_for = (layer.key_bits, layer.value_bits), header.bits[index]
    if wanted != made_for or layer.group_size != header.group_size:
        raise CalibrationError(
            f"layer {index} is to have {wanted[0]:g} and {wanted[1]:g} bits in groups of {layer.group_size}, and was "
            f"calibrated for {made_for[0]:g} and {made_for[1]:g} in groups of {header.group_size}: use that policy, or "
            "calibrate for this one"
        )


def _transform(perm: Tensor, hadamard: bool, rotation: Tensor | None) -> HeadTransform:
    """What does nothing is left out: kernels make the rest themselves where they can."""
    parts: list[HeadTransform] = []
    if not torch.equal(perm, torch.arange(perm.shape[-1], dtype=perm.dtype).expand_as(perm)):
        parts.append(Permutation(perm.long()))
    if hadamard:
        parts.append(Hadamard())
    if rotation is not None:
        parts.append(Rotation(rotation))
    if len(parts) > 1:
        return Chain(tuple(parts))
    return parts[0] if parts else Identity()
