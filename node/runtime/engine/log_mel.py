"""Sound to log-mel frames, as Whisper was trained on them (Radford et al. 2022, section 2.2), in torch alone.

Sound is float32 in -1 to 1, mono, 16,000 samples a second. A window is 30 s, padded with silence: 3,000 frames of 10 ms.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

RATE: Final = 16_000
"""Samples a second."""
WINDOW_SECONDS: Final = 30
WINDOW: Final = RATE * WINDOW_SECONDS
"""Samples of one window."""
FRAMES: Final = 3_000
_FFT: Final = 400
_HOP: Final = 160


class LogMel:
    """Frames for a model with `bins` mel bins."""

    def __init__(self, bins: int, device: torch.device | str = "cpu") -> None:
        self._filters = mel_filters(bins).to(device)
        self._hann = torch.hann_window(_FFT, device=device)

    @torch.inference_mode()
    def __call__(self, sound: Tensor) -> Tensor:
        """float32 [samples] to float32 [bins, FRAMES]; what is shorter than a window is padded, longer is a `ValueError`."""
        if sound.ndim != 1 or not 0 < len(sound) <= WINDOW:
            raise ValueError(f"a window holds 1 to {WINDOW} samples, not {tuple(sound.shape)}")
        sound = torch.nn.functional.pad(sound.to(self._hann), (0, WINDOW - len(sound)))
        spectrum = torch.stft(sound, _FFT, _HOP, window=self._hann, center=True, return_complex=True)
        power = spectrum[:, :-1].abs().square()
        log = (self._filters @ power).clamp(min=1e-10).log10()
        return (log.maximum(log.max() - 8.0) + 4.0) / 4.0


def mel_filters(bins: int) -> Tensor:
    """Triangles on Slaney's mel scale from 0 to 8 kHz, each of area 1: float32 [bins, 201] (Slaney 1998, Auditory Toolbox)."""
    top = float(_mel(torch.tensor(RATE / 2.0, dtype=torch.float64)))
    edges = _hertz(torch.linspace(0.0, top, bins + 2, dtype=torch.float64))
    slopes = edges[None, :] - torch.linspace(0, RATE / 2, _FFT // 2 + 1, dtype=torch.float64)[:, None]
    widths = edges.diff()
    rising, falling = -slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]
    triangles = torch.minimum(rising, falling).clamp(min=0) * (2.0 / (edges[2:] - edges[:-2]))
    return triangles.T.float().contiguous()


def _mel(hertz: Tensor) -> Tensor:
    """Linear to 1 kHz (15 mel), logarithmic above."""
    above = 15.0 + torch.log(hertz.clamp(min=1000.0) / 1000.0) * (
        27.0 / torch.log(torch.tensor(6.4, dtype=torch.float64))
    )
    return torch.where(hertz < 1000.0, 3.0 * hertz / 200.0, above)


def _hertz(mel: Tensor) -> Tensor:
    above = 1000.0 * torch.exp((mel - 15.0).clamp(min=0.0) * (torch.log(torch.tensor(6.4, dtype=torch.float64)) / 27.0))
    return torch.where(mel < 15.0, 200.0 * mel / 3.0, above)
