# SPDX-License-Identifier: Apache-2.0
"""Metrics of sounds against the float model's sounds with the same seeds; they need no weights."""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW = 1024
"""Samples of a Hann window; consecutive windows overlap by three quarters."""
SILENCE_DB = -60.0
"""Power below the largest of the float model's sound under which everything counts as silence."""
_TINY = 1e-20


def snr(candidate: Tensor, reference: Tensor) -> Tensor:
    """Signal-to-noise ratio in dB, the difference of the waveforms being the noise.

    Args:
        candidate: float (B, channels, samples).
        reference: of the float model.

    Returns:
        float64 (B,); inf for equal sounds, silent ones too.
    """
    signal, noise = (
        x.double().square().flatten(1).sum(1) for x in (reference, candidate - reference)
    )
    ratio = 10 * torch.log10((signal + _TINY) / noise)
    return ratio.where(noise > 0, torch.inf)


def level_change(candidate: Tensor, reference: Tensor) -> Tensor:
    """Absolute change of the level in dB (B,): of the RMS over all channels and samples.

    Args:
        candidate: float (B, channels, samples).
        reference: of the float model.
    """
    power, before = (x.double().square().flatten(1).mean(1) + _TINY for x in (candidate, reference))
    return (10 * torch.log10(power / before)).abs()


def spectral_distance(candidate: Tensor, reference: Tensor) -> Tensor:
    """Log-spectral distance in dB, which unlike the waveform's error leaves phases out.

    The RMS over frequencies of the difference of the power spectra in dB, mean over windows
    (Gray & Markel, Distance measures for speech processing, 1976, sec. IV), here with a floor of
    :data:`SILENCE_DB`, so that silence and near silence are alike.

    Args:
        candidate: float (B, channels, samples).
        reference: of the float model.

    Returns:
        float64 (B,).
    """
    power, before = _power(candidate), _power(reference)
    floor = before.flatten(1).amax(1).clamp(min=_TINY) * 10 ** (SILENCE_DB / 10)
    floor = floor[:, None, None, None]
    ratio = 10 * torch.log10(power.maximum(floor) / before.maximum(floor))
    return ratio.square().mean(2).sqrt().flatten(1).mean(1)


def sound_metrics(candidate: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """Every metric of sounds (B, channels, samples) against the float model's, each (B,)."""
    return {
        "snr": snr(candidate, reference),
        "level": level_change(candidate, reference),
        "spectrum": spectral_distance(candidate, reference),
    }


def _power(sounds: Tensor) -> Tensor:
    """Power spectra, float64 (B, channels, frequencies, windows)."""
    flat = sounds.double().flatten(0, 1)
    window = torch.hann_window(WINDOW, dtype=flat.dtype)
    spectra = torch.stft(
        flat, WINDOW, WINDOW // 4, window=window, pad_mode="constant", return_complex=True
    )
    return spectra.abs().square().unflatten(0, sounds.shape[:2])
