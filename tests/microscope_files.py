"""Small files in the formats of microscopes, as their programs write them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def write_czi(
    path: Path,
    scenes: Sequence[np.ndarray],
    *,
    voxel_um: tuple[float, float, float] | None = None,
    compression: str | None = None,
    left_out: Sequence[int] = (),
) -> None:
    """CZI file of scenes (Z, C, H, W) or RGB (Z, C, H, W, 3), without some frames of the first."""
    from pylibCZIrw import czi

    options = {} if compression is None else {"compression_options": compression}
    with czi.create_czi(str(path), **options) as file:
        left = 0
        for number, planes in enumerate(scenes):
            for z, channel in np.ndindex(*planes.shape[:2]):
                if number == 0 and z in left_out:
                    continue
                file.write(
                    np.ascontiguousarray(
                        planes[z, channel, ..., ::-1] if planes.ndim == 5 else planes[z, channel]
                    ),
                    plane={"Z": z, "C": channel, "T": 0},
                    location=(left, 0),
                    **({"scene": number} if len(scenes) > 1 else {}),
                )
            left += planes.shape[3] + 10
        if voxel_um is not None:
            scales = dict(zip(("scale_x", "scale_y", "scale_z"), voxel_um, strict=True))
            file.write_metadata("a stack", **{name: 1e-6 * um for name, um in scales.items()})


def write_lif(
    path: Path,
    images: Mapping[str, np.ndarray],
    *,
    voxel_um: tuple[float, float, float] = (0.5, 0.5, 2.0),
    unit: str = "m",
) -> None:
    """LIF file of images (Z, C, H, W), or (Z, H, W, 3), whose samples are stored blue first."""
    elements, blocks = [], []
    for number, (name, planes) in enumerate(images.items()):
        rgb = planes.shape[-1] == 3
        stored = np.ascontiguousarray(planes[..., ::-1] if rgb else planes)
        size = stored.itemsize
        if rgb:
            frames, height, width, channels = stored.shape
            steps, channel_step = (3 * size, 3 * size * width, 3 * size * width * height), size
            tags = (3, 2, 1)
        else:
            frames, channels, height, width = stored.shape
            steps = (size, size * width, size * width * height * channels)
            channel_step, tags = size * width * height, (0,) * channels
        described = "".join(
            f'<ChannelDescription DataType="0" ChannelTag="{tags[k]}" Resolution="{8 * size}" '
            f'NameOfMeasuredQuantity="" Min="0" Max="1" Unit="" LUTName="Gray" IsLUTInverted="0" '
            f'BytesInc="{k * channel_step}" BitInc="0"/>'
            for k in range(channels)
        )
        dimensions = "".join(
            f'<DimensionDescription DimID="{axis}" NumberOfElements="{count}" Origin="0" '
            f'Length="{1e-6 * um * (count - 1)!r}" Unit="{unit}" BitInc="0" BytesInc="{step}"/>'
            for axis, count, um, step in zip(
                (1, 2, 3), (width, height, frames), voxel_um, steps, strict=True
            )
            if count > 1
        )
        elements.append(
            f'<Element Name="{name}" Visibility="1"><Data><Image><ImageDescription>'
            f"<Channels>{described}</Channels><Dimensions>{dimensions}</Dimensions>"
            f'</ImageDescription></Image></Data><Memory Size="{stored.nbytes}" '
            f'MemoryBlockID="MemBlock_{number}"/></Element>'
        )
        blocks.append((f"MemBlock_{number}", stored.tobytes()))
    xml = (
        '<LMSDataContainerHeader Version="2"><Element Name="project"><Children>'
        f"{''.join(elements)}</Children></Element></LMSDataContainerHeader>"
    )
    text = xml.encode("utf-16-le")
    with path.open("xb") as file:
        file.write(struct.pack("<IIBI", 0x70, 5 + len(text), 0x2A, len(xml)) + text)
        for name, data in blocks:
            label = name.encode("utf-16-le")
            head = struct.pack("<IIBQBI", 0x70, 14 + len(label), 0x2A, len(data), 0x2A, len(name))
            file.write(head + label + data)


def write_nd2(
    path: Path,
    stack: np.ndarray,
    *,
    pixel_size_um: float | None = 0.5,
    z_step_um: float = 2.0,
    top_first: bool = False,
    positions: Sequence[str] = (),
    compressed: bool = False,
    left_out: Sequence[int] = (),
) -> None:
    """ND2 file, version 3, of a stack (Z, C, H, W), or of one (P, Z, C, H, W) for each position."""
    planes = stack if positions else stack[None]
    _, frames, channels, height, width = planes.shape
    size = planes.itemsize
    attributes = {
        "uiWidth": width,
        "uiWidthBytes": width * channels * size,
        "uiHeight": height,
        "uiComp": channels,
        "uiBpcInMemory": 8 * size,
        "uiBpcSignificant": 8 * size,
        "uiSequenceCount": planes.shape[0] * frames,
        "eCompression": 0 if compressed else 2,
    }
    spectrum = {"uiCount": 0}
    probe = {"m_ExcitationSpectrum": spectrum, "m_EmissionSpectrum": spectrum}
    planes_of_light = {
        f"p{k}": {"uiCompCount": 1, "sDescription": "light", "pFluorescentProbe": probe}
        for k in range(channels)
    }
    picture = {
        "sPicturePlanes": {"uiCount": channels, "sPlaneNew": planes_of_light},
        "bCalibrated": pixel_size_um is not None,
        "dCalibration": pixel_size_um or 0.0,
    }
    loop: dict[str, Any] = {
        "eType": 4,
        "uLoopPars": {"uiCount": frames, "dZStep": z_step_um, "iType": 4 if top_first else 0},
    }
    if positions:
        points = {f"p{k}": {"dPosX": 0.0, "pPosName": name} for k, name in enumerate(positions)}
        loop = {
            "eType": 2,
            "uLoopPars": {"uiCount": len(positions), "Points": points},
            "ppNextLevelEx": {"i0000000000": loop},
        }
    chunks = {
        "ImageAttributesLV!": _variant("SLxImageAttributes", attributes),
        "ImageMetadataSeqLV|0!": _variant("SLxPictureMetadata", picture),
        "ImageMetadataLV!": _variant("SLxExperiment", loop),
    }
    for index, place in enumerate(np.ndindex(*planes.shape[:2])):
        if index in left_out:
            continue
        pixels = np.moveaxis(planes[place], 0, -1).tobytes()  # channels of a pixel lie together
        data = struct.pack("<d", index) + (zlib.compress(pixels) if compressed else pixels)
        chunks[f"ImageDataSeq|{index}!"] = data
    with path.open("xb") as file:
        file.write(_chunk(b"ND2 FILE SIGNATURE CHUNK NAME01!", b"Ver3.0".ljust(64, b"\0")))
        entries = b""
        for name, data in chunks.items():
            file.write(bytes(-file.tell() % 4096))
            label = name.encode()
            entries += label + struct.pack("<QQ", file.tell(), len(data))
            file.write(_chunk(label.ljust(4096 - 24, b"\0"), data))
        file.write(bytes(-file.tell() % 4096))
        start = struct.pack("<Q", file.tell())
        end = b"ND2 CHUNK MAP SIGNATURE 0000001!" + start
        file.write(_chunk(b"ND2 FILEMAP SIGNATURE NAME 0001!", entries + end))


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack("<IIQ", 0x0ABECEDA, len(name), len(data)) + name + data


def _variant(name: str, values: Mapping[str, Any]) -> bytes:
    """Named values as XML, which readers of the format take wherever a binary form is usual."""
    return f'<variant version="1.0">{_element(name, values)}</variant>'.encode()


def _element(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        content = "".join(_element(key, item) for key, item in value.items())
        return f'<{name} runtype="CLxVariant">{content}</{name}>'
    kinds = {bool: "bool", int: "lx_int32", float: "double", str: "CLxStringW"}
    return f'<{name} runtype="{kinds[type(value)]}" value="{value}"/>'


def write_zarr(
    path: Path,
    images: Mapping[str, np.ndarray],
    axes: str,
    *,
    scale_um: Mapping[str, float] | None = None,
    version: str = "0.5",
) -> None:
    """OME-Zarr folder: one image at its root, or several in numbered groups."""
    import zarr

    root = zarr.create_group(path, zarr_format=3 if version == "0.5" else 2)
    if len(images) > 1:
        _set_ome(root, version, {"bioformats2raw.layout": 3})
    for number, (name, pixels) in enumerate(images.items()):
        group = root if len(images) == 1 else root.create_group(str(number))
        chunks = tuple(
            min(size, 2 if axis == "z" else 16)
            for axis, size in zip(axes, pixels.shape, strict=True)
        )
        for level in range(2):
            array = group.create_array(
                str(level), shape=pixels.shape, chunks=chunks, dtype=pixels.dtype
            )
            array[...] = pixels if level == 0 else 0
        kinds = {"t": "time", "c": "channel"}
        named = [
            {"name": axis, "type": kinds.get(axis, "space")}
            | ({"unit": "micrometer"} if axis in "zyx" and scale_um else {})
            for axis in axes
        ]
        scale = [(scale_um or {}).get(axis, 1.0) for axis in axes]
        datasets = [
            {"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]}
            for level in range(2)
        ]
        image = {"name": name, "axes": named, "datasets": datasets}
        _set_ome(group, version, {"multiscales": [image]})


def _set_ome(group: Any, version: str, values: Mapping[str, Any]) -> None:
    group.attrs.update(
        {"ome": {"version": version, **values}} if version == "0.5" else dict(values)
    )
