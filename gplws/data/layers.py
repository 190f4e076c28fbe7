"""Renders batches of scenes by layers, fast enough to train on: one geometry, many scenes.

The physics is that of `gplws.data.simulator.render_focal_stack`; the layers differ. There every
frame has its own layers, dense around its focal plane, and each may hide those below it. Here all
frames and scenes share one set of layers: each layer is transformed once, what happens to it in a
frame is one multiplication in Fourier space, and layers are summed there in a few *occlusion
groups*, each of which may hide the groups below. With one group per layer nothing is left out; the
fewer groups there are, the more light from below shines through steps within one group.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gplws.data.optics import Lens
from gplws.data.randomness import radial_frequency

# A group without a point of its own under the blur disk has no colour there (the wall of a hole);
# below this coverage the colour is taken from its surroundings.
_COVERAGE_FLOOR = 1e-3
# Transfer functions of a chunk of frames for one group of layers: 64 MiB.
_CHUNK_ELEMENTS = 2**24


class RenderedLayers(NamedTuple):
    """Irradiance of a batch of focal stacks.

    Attributes:
        irradiance: (B, C, N, H, W) float32, >= 0, in the unit of the radiance.
        visibility: (B, H, W) float32, share of the light cone that reaches each point in the frame
            that is focused closest to it, as far as the occlusion groups tell.
    """

    irradiance: Tensor
    visibility: Tensor


def render_layers(
    height_um: Tensor,
    radiance: Tensor,
    focus_positions_um: Tensor,
    lens: Lens,
    *,
    window: tuple[slice, slice] | None = None,
    layer_spacing_px: float = 1.0,
    occlusion_groups: int | None = 6,
    shift_px: Tensor | None = None,
    magnification: Tensor | None = None,
) -> RenderedLayers:
    """Focal stacks of a batch of scenes, all with the same lens and focus positions.

    Scenes are periodic: what leaves at one border enters at the other. Leave a margin around the
    window as wide as the largest blur, or draw scenes that may meet their own far side.

    Args:
        height_um: (B, P, Q) surfaces, um, up (towards the objective) is positive.
        radiance: (B, C, P, Q) brightness of the surfaces, >= 0, shading included.
        focus_positions_um: (N,) heights of the focal planes, um, in any order.
        lens: optics and pixel size.
        window: rows and columns to return; the whole scene by default.
        layer_spacing_px: distance of the layers, as the growth of the blur radius from one to the
            next, pixels. Heights between layers keep their place and gain a blur whose variance is
            at most a sixteenth of the spacing's square.
        occlusion_groups: how many groups of layers may hide one another; None: each layer.
        shift_px: (B, N, 2) by how much each frame is displaced (down, right), pixels.
        magnification: (B, N) by how much each frame is larger than the scene, about the window's
            middle.

    Returns:
        Irradiance and visibility on the device of ``height_um``. Not differentiable.

    Raises:
        ValueError: shapes that do not belong together, or a spacing or number that is not positive.
    """
    _check(height_um, radiance, focus_positions_um, layer_spacing_px, occlusion_groups)
    batch, rows, columns = height_um.shape
    channels, frames = radiance.shape[1], focus_positions_um.numel()
    if window is None:
        window = (slice(0, rows), slice(0, columns))
    focus = focus_positions_um.to(height_um)
    highest, lowest = float(height_um.max()), float(height_um.min())
    spacing_um = layer_spacing_px / lens.radius_px_per_um
    count = max(1, math.ceil((highest - lowest) / spacing_um - 1e-3)) + 1
    nodes = torch.linspace(
        highest, max(lowest, highest - (count - 1) * spacing_um), count, dtype=torch.float32
    )
    nodes = nodes.to(height_um)  # (K,), highest first
    place = (highest - height_um) * ((count - 1) / max(highest - lowest, 1e-9))  # in layers
    parts = torch.arange(count).tensor_split(min(occlusion_groups or count, count))
    groups = [(int(part[0]), int(part[-1]) + 1) for part in parts]

    sampling = _Sampling((rows, columns), window, shift_px, magnification, height_um.device)
    seen = height_um[..., window[0], window[1]]
    closest = (focus[:, None, None, None] - seen).abs().argmin(0)  # (B, H, W)
    own_layer = place[..., window[0], window[1]].round()
    target = (frames, batch, 1, *seen.shape[1:])
    image = height_um.new_zeros((frames, batch, channels, *target[3:]))
    plain = torch.zeros_like(image)  # all layers, as if none hid another
    resolved = height_um.new_zeros(target)
    plain_weight = torch.zeros_like(resolved)
    reached = torch.zeros_like(resolved)  # share of the light cone that has met the surface
    visibility = height_um.new_zeros(closest.shape)
    widest_um = max(highest - float(focus.min()), float(focus.max()) - lowest)
    frequency = radial_frequency((rows, columns), height_um.device)
    # Once for the real and once for the imaginary part of each element.
    frequency = frequency.repeat_interleave(2, -1)  # (P, 2 F)
    for first, stop in groups:
        spectra = _real(torch.fft.rfft2(_sources(place, radiance, first, stop)))
        last = stop == count
        solid_spectrum = None if last else _real(torch.fft.rfft2((stop - place).clamp(0, 1)))
        chunk = max(1, _CHUNK_ELEMENTS // ((stop - first) * frequency.numel()))
        for start in range(0, frames, chunk):
            some = slice(start, min(start + chunk, frames))
            defocus = (focus[some, None] - nodes[first:stop]).abs()  # (n, k)
            transfer = _transfers(lens, defocus, widest_um, frequency)  # (n, k, P, 2 F)
            blurred = sampling.image(_mixed(transfer, spectra), some)  # (n, B, C + 1, H, W)
            # Sharp edges of masks ring a little below zero; light may, as it is not divided by.
            weight = blurred[:, :, -1:].clamp(min=0)
            light = blurred[:, :, :-1] * (weight > 0)
            before = reached[some]  # (n, B, 1, H, W)
            if solid_spectrum is None:
                met = torch.ones_like(before)
            else:
                solid = sampling.image(transfer[:, -1, None, None] * solid_spectrum[:, None], some)
                met = torch.maximum(solid.clamp_(max=1), before)
            gained = met - before
            share = gained / (weight + _COVERAGE_FLOOR)
            image[some].addcmul_(share, light)
            resolved[some].addcmul_(share, weight)
            plain[some] += light
            plain_weight[some] += weight
            reached[some] = met
            inside = (closest >= some.start) & (closest < some.stop)
            inside &= (own_layer >= first) & (own_layer < stop)
            frame = (closest - some.start).clamp(0, some.stop - some.start - 1)
            through = gained[:, :, 0].gather(0, frame[None])[0]  # (B, H, W)
            visibility = torch.where(inside, through, visibility)
    image.addcmul_(1 - resolved, plain / plain_weight.clamp(min=1e-6)).clamp_(min=0)
    return RenderedLayers(image.permute(1, 2, 0, 3, 4).contiguous(), visibility)


def _check(
    height_um: Tensor,
    radiance: Tensor,
    focus_positions_um: Tensor,
    layer_spacing_px: float,
    occlusion_groups: int | None,
) -> None:
    if height_um.ndim != 3 or height_um.numel() == 0:
        raise ValueError(f"height_um: expected (B, P, Q), not empty, got {tuple(height_um.shape)}")
    batch, rows, columns = height_um.shape
    if radiance.ndim != 4 or (radiance.shape[0], *radiance.shape[2:]) != (batch, rows, columns):
        raise ValueError(
            f"radiance: expected ({batch}, C, {rows}, {columns}), got {tuple(radiance.shape)}"
        )
    if focus_positions_um.ndim != 1 or focus_positions_um.numel() == 0:
        raise ValueError(
            f"focus_positions_um: expected (N,), N >= 1, got {tuple(focus_positions_um.shape)}"
        )
    if not layer_spacing_px > 0:
        raise ValueError(f"layer_spacing_px: expected > 0, got {layer_spacing_px}")
    if occlusion_groups is not None and occlusion_groups < 1:
        raise ValueError(f"occlusion_groups: expected >= 1 or None, got {occlusion_groups}")


def _sources(place: Tensor, radiance: Tensor, first: int, stop: int) -> Tensor:
    """Light and coverage of layers ``first`` to ``stop``: (k, B, C + 1, P, Q)."""
    layers = torch.arange(first, stop, device=place.device).view(-1, 1, 1, 1, 1)
    members = (1 - (place[:, None] - layers).abs()).clamp(min=0)  # (k, B, 1, P, Q)
    return torch.cat([members * radiance, members], 2)


def _real(spectrum: Tensor) -> Tensor:
    """View (..., 2 F) of a spectrum (..., F): real and imaginary parts take turns."""
    return torch.view_as_real(spectrum).flatten(-2)


def _transfers(lens: Lens, defocus_um: Tensor, widest_um: float, frequency: Tensor) -> Tensor:
    """Transfer function of each layer in each frame, (n, k, P, Q), at frequencies (P, Q)."""
    radius_px = defocus_um * lens.radius_px_per_um  # (n, k)
    # Blur radii within 1/16 pixel near focus, or 3% far from it, share one transfer function.
    steps = (32 * torch.asinh(radius_px / 2)).round().flatten()
    steps, which = steps.unique(return_inverse=True)
    distinct_um = 2 * torch.sinh(steps / 32) / lens.radius_px_per_um
    transfer = lens.transfer_on_grid(distinct_um, frequency, widest_um=widest_um)
    return transfer[which].view(*radius_px.shape, *frequency.shape)


def _mixed(transfer: Tensor, spectra: Tensor) -> Tensor:
    """Sum of the layers of a group in each frame.

    Args:
        transfer: (n, k, P, 2 F).
        spectra: (k, B, C + 1, P, 2 F).

    Returns:
        (n, B, C + 1, P, 2 F).
    """
    wide = transfer[:, :, None, None]  # (n, k, 1, 1, P, 2 F)
    total = wide[:, 0] * spectra[0]
    for k in range(1, spectra.shape[0]):
        total.addcmul_(wide[:, k], spectra[k])
    return total


class _Sampling:
    """From the spectrum of a scene to the pixels of a window, displaced and magnified."""

    def __init__(
        self,
        size: tuple[int, int],
        window: tuple[slice, slice],
        shift_px: Tensor | None,
        magnification: Tensor | None,
        device: torch.device,
    ) -> None:
        self._size, self._window = size, window
        self._phases: list[Tensor] | None = None
        self._waves: list[Tensor] | None = None
        if shift_px is None and magnification is None:
            return
        known = shift_px if shift_px is not None else magnification
        assert known is not None
        leading = tuple(known.shape[:2])
        shift = torch.zeros(*leading, 2, dtype=torch.float32) if shift_px is None else shift_px
        shift = shift.to(device).transpose(0, 1)  # (N, B, 2)
        lattices = (
            torch.fft.fftfreq(size[0], dtype=torch.float32, device=device),
            torch.fft.rfftfreq(size[1], dtype=torch.float32, device=device),
        )
        if magnification is None:
            self._phases = [
                torch.polar(
                    torch.ones_like(angle := -2 * math.pi * shift[..., axis, None] * lattice),
                    angle,
                )
                for axis, lattice in enumerate(lattices)
            ]  # (N, B, P) and (N, B, F)
            return
        scale = magnification.to(device).T[..., None]  # (N, B, 1)
        self._waves = []
        for axis, lattice in enumerate(lattices):
            start, stop = window[axis].start, window[axis].stop
            middle = (start + stop - 1) / 2
            pixel = torch.arange(start, stop, dtype=torch.float32, device=device) - middle
            source = middle + (pixel - shift[..., axis, None]) / scale  # (N, B, H)
            # A real signal from half its spectrum: every frequency but 0 (and the last) stands for
            # two.
            factor = torch.full_like(lattice, 1 / size[axis])
            if axis == 1:
                factor[1 : (size[1] + 1) // 2] *= 2
            # Hundreds of turns: float32 would lose the third digit of the angle.
            turns = (source[..., None].double() * lattice.double()).remainder(1).float()
            angle = 2 * math.pi * turns
            self._waves.append(torch.polar(factor.expand_as(angle), angle))  # (N, B, H, P or F)

    def image(self, spectrum: Tensor, frames: slice) -> Tensor:
        """Pixels (n, B, C, H, W) of a spectrum (n, B, C, P, 2 F) of these frames."""
        full = torch.view_as_complex(spectrum.unflatten(-1, (-1, 2)))
        rows, columns = self._window
        if self._waves is not None:
            down, right = (wave[frames, :, None] for wave in self._waves)
            half = down @ full  # (n, B, ..., H, F)
            # The real part of a product, without the imaginary part.
            return half.real @ right.real.mT - half.imag @ right.imag.mT
        if self._phases is not None:
            down, right = (phase[frames, :, None] for phase in self._phases)
            full = full * down[..., None] * right[..., None, :]
        half = torch.fft.ifft(full, dim=-2)[..., rows, :]
        return torch.fft.irfft(half, n=self._size[1], dim=-1)[..., columns]
