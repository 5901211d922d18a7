"""Colour of what is read, to sRGB: transparency over white, profiles of stills, wide gamuts and HDR of videos.

The rules are in docs/media.md. Numbers of transfers and primaries are those of ITU-T H.273, which FFmpeg uses too.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

Light = NDArray[np.float32]  # [..., 3], linear; 1 is the white of SDR
PQ, HLG, BT2020, DISPLAY_P3 = 16, 18, 9, 12
HDR = (PQ, HLG)
WIDE = (BT2020, DISPLAY_P3)
SDR_WHITE = 203.0  # nits: BT.2408 puts the white of SDR there
_ROWS = 64  # of a frame at once: what is computed in between is 30 times as large as the frame
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # what a profile calls the channels of Pillow's modes
# Linear light of other primaries to those of BT.709 (and sRGB), white D65: BT.2087, equation of M2; SMPTE EG 432-1.
_TO_709 = {
    BT2020: [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]],
    DISPLAY_P3: [[1.224940, -0.224940, 0.0], [-0.042057, 1.042057, 0.0], [-0.019638, -0.078636, 1.098274]],
}


def over_white(image: Image.Image) -> Image.Image:
    """RGBA (colours not multiplied by alpha) -> RGB, what shows when it lies on white."""
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def still_to_srgb(image: Image.Image, info: Mapping[Any, Any]) -> Image.Image:
    """A picture of mode L, LA, RGB, RGBA, CMYK or LAB -> RGB, sRGB over white.

    info: what Pillow read beside the pixels: the ICC profile, the H.273 numbers of `h273`, the gamma of a png. The perceptual
    intent of the profile is used, as Pillow does. A profile that is damaged, or for other channels than the picture has, is
    ignored, as viewers do; CMYK without a profile is taken as the complement of RGB.
    """
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colours = _to_srgb(image if alpha is None else image.convert(image.mode[:-1]), info)
    if alpha is None:
        return colours
    colours.putalpha(alpha)
    return over_white(colours)


def h273(head: bytes) -> tuple[int, int] | None:
    """(transfer, primaries) that a png (chunk cICP) or an avif (box colr) says at its beginning; Pillow does not look."""
    head = head.partition(b"IDAT")[0]
    if (at := head.find(b"cICP")) >= 0 and head.startswith(b"\x89PNG") and len(head) >= at + 6:
        return head[at + 5], head[at + 4]
    if (at := head.find(b"colrnclx")) >= 0 and head[4:8] == b"ftyp" and len(head) >= at + 12:
        primaries, transfer = struct.unpack_from(">HH", head, at + 8)
        return transfer, primaries
    return None


def _to_srgb(image: Image.Image, info: Mapping[Any, Any]) -> Image.Image:
    """L, RGB, CMYK or LAB -> RGB, sRGB: by the first of HDR, profile, wide gamut and gamma that the file has."""
    transfer, primaries = info.get("h273") or (2, 2)
    profile, gamma = info.get("icc_profile"), info.get("gamma")
    if transfer in HDR or (primaries in WIDE and not profile):
        codes = np.asarray(image.convert("RGB")).astype(np.uint16) * np.uint16(257)
        return Image.fromarray(video_to_srgb(codes, transfer, primaries))
    if image.mode == "LAB" or profile:
        return _through(image, profile)
    image = image.convert("RGB")
    if gamma and "srgb" not in info and abs(gamma * 2.2 - 1) > 0.05:  # else that of sRGB, nearly
        light: Light = (np.arange(256, dtype=np.float32) / np.float32(255)) ** np.float32(1 / gamma)
        return image.point(np.rint(255 * _srgb_encode(light)).astype(int).tolist() * 3)
    return image


def _through(image: Image.Image, profile: bytes | None) -> Image.Image:
    try:
        if image.mode == "LAB":
            source: Any = ImageCms.createProfile("LAB")
        else:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile or b""))
            if source.profile.xcolor_space.strip() != _SPACES[image.mode]:
                return image.convert("RGB")
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        if image.mode == "LAB":
            raise
        return image.convert("RGB")
    assert converted is not None  # it is only None for a conversion in place
    return converted


def video_to_srgb(codes: NDArray[np.uint16], transfer: int, primaries: int) -> NDArray[np.uint8]:
    """RGB [h,w,3] of 0..65535, as the frame's transfer and primaries code it -> sRGB uint8 [h,w,3].

    PQ and HLG: light of 203 nits is white, as in SDR; what is brighter is scaled down to what white allows, keeping its
    hue. All other transfers are taken as that of sRGB, so that greys stay as they are. Colours outside sRGB are clipped.
    """
    matrix = np.array(_TO_709.get(BT2020 if transfer in HDR and primaries == 2 else primaries, np.eye(3)), np.float32)
    pixels = np.empty(codes.shape, np.uint8)
    for top in range(0, len(codes), _ROWS):
        signal = codes[top : top + _ROWS].astype(np.float32) / np.float32(65535)
        light = {PQ: _pq, HLG: _hlg}.get(transfer, _srgb_decode)(signal) @ matrix.T
        light = np.maximum(light, 0) / np.maximum(light.max(-1, keepdims=True), 1)
        pixels[top : top + _ROWS] = np.rint(255 * _srgb_encode(light))
    return pixels


def _pq(signal: Light) -> Light:
    """SMPTE ST 2084, equation 4.1 (BT.2100, table 4): 1 is 10000 nits."""
    root = signal ** np.float32(32 / 2523)
    light = (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** np.float32(8192 / 1305)
    return np.asarray(light * (10000 / SDR_WHITE), np.float32)


def _hlg(signal: Light) -> Light:
    """BT.2100, table 5: the inverse OETF, then the OOTF of a display of 1000 nits (gamma 1.2)."""
    a = 0.17883277
    b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    luminance = scene @ np.array([0.2627, 0.6780, 0.0593], np.float32)
    return np.asarray(scene * luminance[..., None] ** 0.2 * (1000 / SDR_WHITE), np.float32)


def _srgb_decode(signal: Light) -> Light:
    """IEC 61966-2-1."""
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


def _srgb_encode(light: Light) -> Light:
    """IEC 61966-2-1; 0..1."""
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
