"""The door of all pictures: upright, 8 bits, within a limit, whatever the file."""

from __future__ import annotations

import io
import os
import re
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from cmpose.data.pictures import (
    FrameError,
    decode_picture,
    is_picture,
    look,
    picture_size,
    pixel_limit,
    read_picture,
    turn_box,
    turn_picture,
    turn_points,
)
from tests.shared_data import PROJECT

EXACT = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}, "BMP": {}, "PPM": {}, "JPEG2000": {}}
TAGGED = ("JPEG", "PNG", "WEBP", "TIFF")


def blocks(width=48, height=32):
    """RGB noise in blocks of 8 pixels, which a JPEG keeps; no turn of it looks like another."""
    rng = np.random.default_rng(3)
    small = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return np.kron(small, np.ones((8, 8, 1), np.uint8))


def encode(pixels, format, orientation=None, **options):
    """A picture file's bytes by Pillow."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    if format == "JPEG":
        options = {"quality": 100, "subsampling": 0} | options
    buffer = io.BytesIO()
    image.save(buffer, format, **EXACT.get(format, {}) | options)
    return buffer.getvalue()


def rgb(data):
    return decode_picture(data, "x")[..., ::-1]


@pytest.mark.parametrize("format", TAGGED)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_every_format_stands_upright(tmp_path, format, orientation):
    data = encode(blocks(), format, orientation)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    (tmp_path / "a").write_bytes(data)
    shown = read_picture(tmp_path / "a")
    assert shown.shape == upright.shape
    assert shown.dtype == np.uint8
    assert shown.flags.c_contiguous
    np.testing.assert_allclose(shown[..., ::-1].astype(int), upright, atol=4)
    assert picture_size(tmp_path / "a") == upright.shape[1::-1]
    assert look(tmp_path / "a").stored_size == (48, 32)
    assert look(tmp_path / "a").orientation == orientation


def test_wherever_the_tag_stands_and_however_it_is_written():
    plain = encode(blocks(), "PNG")
    tagged = encode(blocks(), "PNG", 6)
    at = tagged.index(b"eXIf") - 4
    length = int.from_bytes(tagged[at : at + 4], "big") + 12
    chunk = tagged[at : at + length]
    behind = plain[:-12] + chunk + plain[-12:]
    np.testing.assert_array_equal(rgb(behind), rgb(tagged))
    little = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    segment = b"Exif\0\0" + little
    jpeg = encode(blocks(), "JPEG")
    segment = b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment
    other = b"\xff\xe1\x00\x08http:/"  # XMP stands in the same kind of segment
    assert rgb(jpeg[:2] + other + segment + jpeg[2:]).shape == (48, 32, 3)
    webp = encode(blocks(), "WEBP", 6)
    at = webp.index(b"EXIF")
    assert webp[at + 8 : at + 10] in (b"MM", b"II")
    size = int.from_bytes(webp[at + 4 : at + 8], "little") + 6
    named = webp[: at + 4] + size.to_bytes(4, "little") + b"Exif\0\0" + webp[at + 8 :]
    named = named[:4] + (len(named) - 8).to_bytes(4, "little") + named[8:]
    assert rgb(named).shape == (48, 32, 3), "some writers repeat JPEG's header"
    for nonsense in (0, 9, 65535):
        assert rgb(encode(blocks(), "JPEG", nonsense)).shape == (32, 48, 3)


def test_points_and_boxes_turn_with_the_pixels():
    for orientation in range(1, 9):
        stored = np.zeros((20, 30, 3), np.uint8)
        stored[4, 7] = 255
        stored[10:16, 20:24] = 100
        turned = turn_picture(stored, orientation)
        [(y, x)] = np.argwhere(turned[..., 0] == 255)
        assert turn_points(np.array([[7, 4]]), orientation, (30, 20)).tolist() == [[x, y]]
        low, high = (f(np.argwhere(turned[..., 0] == 100), axis=0) for f in (np.min, np.max))
        box = [*low[::-1], *(high - low + 1)[::-1]]
        assert turn_box(np.array([20, 10, 4, 6]), orientation, (30, 20)).tolist() == box


SIZES = [(1, 1), (7, 300), (300, 7)]
WRITTEN = [
    (format, size)
    for format in (*EXACT, "JPEG")
    for size in SIZES
    if (format, size) != ("JPEG2000", (1, 1))  # OpenJPEG writes no single pixel
]


@pytest.mark.parametrize(("format", "size"), WRITTEN)
def test_the_header_tells_the_size(tmp_path, format, size):
    path = tmp_path / "a"
    path.write_bytes(encode(np.zeros((size[1], size[0], 3), np.uint8), format))
    assert look(path).size == size
    assert read_picture(path).shape == (size[1], size[0], 3)


# What there is beside three times 8 bits ---------------------------------------------------------


def sixteen(top):
    """A grey ramp of 16 bits up to ``top``, and what it is in 8 bits when ``white`` is white."""
    return np.linspace(0, top, 64).astype(np.uint16)[None].repeat(64, 0)


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".pgm", ".jp2"])
@pytest.mark.parametrize(
    ("top", "white"),
    [(200, 255), (255, 255), (1000, 1023), (4095, 4095), (2100, 4095), (9000, 16383)]
    + [(20000, 65535), (65535, 65535)],
)
def test_sixteen_bits_that_hold_fewer_are_no_black_picture(suffix, top, white):
    ramp = sixteen(top)
    data = cv2.imencode(suffix, ramp)[1].tobytes()
    expected = np.rint(ramp * (255 / white))
    np.testing.assert_allclose(decode_picture(data, "x")[..., 1], expected, atol=1)
    assert decode_picture(data, "x").max() >= 255 // 4


def test_sixteen_bits_in_colour_and_turned():
    ramp = np.dstack([sixteen(4095), sixteen(2000), sixteen(100)])
    for suffix in (".png", ".tiff"):
        data = cv2.imencode(suffix, ramp)[1].tobytes()
        np.testing.assert_array_equal(
            decode_picture(data, "x"), cv2.convertScaleAbs(ramp, alpha=255 / 4095)
        )
    turned = encode(Image.fromarray(sixteen(4095)[:10]), "TIFF", 6)
    assert decode_picture(turned, "x").shape == (64, 10, 3)
    assert decode_picture(turned, "x")[:, 0, 0].tolist()[::63] == [0, 255]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (b"P5 2 1 15\n\x0f\x07", [255, 119]),
        (b"P2 2 1 15\n15 7\n", [255, 119]),
        (b"P5 # a comment\n2 1\n1000\n" + b"\x03\xe8\x01\xf4", [255, 128]),
        (b"P2 2 1 1000\n1000 500\n", [255, 128]),
        (b"P1 2 1\n0 1\n", [255, 0]),
        (b"P4 2 1\n\x40", [255, 0]),
    ],
)
def test_a_pnm_says_what_is_white(text, values):
    assert decode_picture(text, "x")[0, :, 0].tolist() == values


def test_grey_palettes_bits_and_alpha():
    """Alpha is left out and colours stay as they are stored, also where nothing would be seen."""
    image = Image.fromarray(blocks())
    for format in ("PNG", "TIFF", "BMP", "WEBP"):
        for mode in ("1", "L", "P"):
            converted = image.convert(mode)
            expected = np.asarray(converted.convert("RGB"))
            np.testing.assert_array_equal(rgb(encode(converted, format)), expected)
    for format in ("PNG", "TIFF", "WEBP", "BMP"):
        clear = image.convert("RGBA")
        clear.putalpha(Image.new("L", image.size, 40))
        options = {"exact": True} if format == "WEBP" else {}
        np.testing.assert_array_equal(rgb(encode(clear, format, **options)), blocks())
    np.testing.assert_allclose(
        rgb(encode(image.convert("CMYK"), "JPEG")).astype(int), blocks(), atol=6
    )
    floats = cv2.imencode(".tiff", np.zeros((9, 9), np.float32))[1].tobytes()
    with pytest.raises(FrameError, match=r"x: not a readable picture"):
        decode_picture(floats, "x")


# The limit ---------------------------------------------------------------------------------------


def claims(format, width, height):
    """A small file whose header says another size."""
    data = bytearray(encode(blocks(), format))
    w, h = width.to_bytes(4, "big"), height.to_bytes(4, "big")
    if format == "PNG":
        data[16:24] = w + h
        data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    elif format == "JPEG":
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = h[2:] + w[2:]
    elif format == "BMP":
        data[18:26] = width.to_bytes(4, "little") + (-height).to_bytes(4, "little", signed=True)
    elif format == "PPM":
        data = bytearray(b"P6 %d %d 255\n" % (width, height))
    elif format == "JPEG2000":
        at = data.index(b"\xff\x4f\xff\x51")
        data[at + 8 : at + 16] = w + h
    else:
        assert format == "TIFF"
        for tag, value in ((256, width), (257, height)):
            at = data.index(tag.to_bytes(2, "little") + b"\x04\x00\x01\x00\x00\x00")
            data[at + 8 : at + 12] = value.to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "PPM", "JPEG2000", "TIFF"])
@pytest.mark.parametrize("side", [30_000, 60_000])
def test_more_pixels_than_the_limit_are_refused_by_the_header(tmp_path, monkeypatch, format, side):
    path = tmp_path / "a.png"
    path.write_bytes(claims(format, side, side))
    monkeypatch.setattr(cv2, "imdecode", None)  # nothing is decoded
    for read in (read_picture, picture_size):
        with pytest.raises(FrameError) as info:
            read(path)
        assert str(info.value) == (
            f"{path}: {side}×{side} pixels by its header, more than the 100,000,000 that are "
            "decoded; make it smaller, or raise CMPOSE_MAX_PIXELS"
        )
        assert info.value.reason == "picture too large"


def test_a_jpeg_of_too_few_bytes_for_its_size_is_no_grey_picture():
    with pytest.raises(FrameError, match=r"x: its header says 9000×9000 pixels, for which \d+ byt"):
        decode_picture(claims("JPEG", 9000, 9000), "x")
    for progressive in (False, True):  # the emptiest picture that there is
        for subsampling in (0, 2):
            options = {"quality": 1, "optimize": True, "progressive": progressive}
            flat = np.zeros((1601, 1203, 3), np.uint8)
            data = encode(flat, "JPEG", subsampling=subsampling, **options)
            assert rgb(data).max() <= 1


def test_the_limit_can_be_set(monkeypatch):
    data = encode(blocks(), "PNG")
    monkeypatch.setenv("CMPOSE_MAX_PIXELS", str(48 * 32))
    assert rgb(data).shape == (32, 48, 3)
    monkeypatch.setenv("CMPOSE_MAX_PIXELS", str(48 * 32 - 1))
    with pytest.raises(FrameError, match=r"x: 48×32 pixels by its header, more than the 1,535"):
        rgb(data)
    for text in ("0", "many", "-5", "1e9", str(2**30 + 1), "9" * 5000):
        monkeypatch.setenv("CMPOSE_MAX_PIXELS", text)
        with pytest.raises(ValueError, match=r"CMPOSE_MAX_PIXELS=.*: expected a number of pixels"):
            pixel_limit()


# What is no picture -----------------------------------------------------------------------------


def test_files_that_systems_leave_beside_pictures_are_none():
    for name in ("a.jpg", "B.PNG", "x.y.webp", "f.tif", "f.jp2", "f.pgm"):
        assert is_picture(name)
    for name in ("._a.jpg", ".DS_Store", "Thumbs.db", ".a.png", "desktop.ini", "a.txt", "jpg", ""):
        assert not is_picture(name)


def test_a_pipe_or_a_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.jpg")
    for path in (tmp_path / "p.jpg", tmp_path):
        with pytest.raises(FrameError, match=r": cannot be read: it is no file"):
            read_picture(path)


def test_a_disk_that_fails_while_it_is_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encode(blocks(), "PNG"))

    def failing(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("cmpose.data.pictures.read_header", failing)
    with pytest.raises(FrameError, match=r"a\.png: cannot be read: Input/output error"):
        read_picture(tmp_path / "a.png")


@pytest.mark.parametrize("format", [*EXACT, "JPEG"])
def test_cut_and_changed_files_are_pictures_or_one_error(format):
    """Whatever bytes are changed: an array of 8 bits within the limit, or a FrameError."""
    rng = np.random.default_rng(0)
    data = encode(blocks(16, 8), format, 6 if format in TAGGED else None)
    outcomes = set()
    for trial in range(150):
        changed = bytearray(data if trial % 3 else data[: rng.integers(len(data))])
        for _ in range(trial % 3):
            changed[rng.integers(min(len(data), 80 if trial % 2 else len(data)))] ^= 1 << (
                trial % 8
            )
        try:
            picture = decode_picture(bytes(changed), "x")
        except FrameError:
            outcomes.add("refused")
        else:
            assert (picture.dtype, picture.ndim, picture.shape[2]) == (np.uint8, 3, 3)
            outcomes.add("read")
    assert outcomes == {"refused", "read"}


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("PNG", "is an animated PNG, a video: cmpose frames makes"),
        ("WEBP", "is an animated WebP, of which FFmpeg decodes no frame: take it apart"),
        ("TIFF", "holds several pages, and one picture is expected: take them apart"),
    ],
)
def test_a_file_of_several_pictures_is_refused(tmp_path, format, message):
    """OpenCV decodes the first one, and says nothing of the others."""
    first, *others = (Image.new("RGB", (16, 8), (80 * n, 0, 0)) for n in range(3))
    path = tmp_path / f"a.{format.lower()}"
    for read in (read_picture, picture_size):
        path.write_bytes(encode(first, format, save_all=True, append_images=others))
        with pytest.raises(FrameError, match=rf"a\.{format.lower()}: {message}") as raised:
            read(path)
        assert raised.value.reason == "several pictures in a file"
        path.write_bytes(encode(first, format, save_all=True))
        read(path)


def test_a_preview_beside_a_picture_is_no_second_one():
    preview = Image.new("RGB", (4, 2))
    preview.encoderinfo = {"tiffinfo": {254: 1}}
    data = encode(Image.new("RGB", (16, 8)), "TIFF", save_all=True, append_images=[preview])
    assert decode_picture(data, "a.tif").shape == (8, 16, 3)
    assert Image.open(io.BytesIO(data)).n_frames == 2


def test_a_part_of_a_png_that_is_longer_than_the_file_takes_no_memory():
    data = encode(blocks(), "PNG")
    at = data.index(b"IDAT") - 4
    for damaged in (data[:at] + b"\xf0" + data[at + 1 :], data[: at + 40]):
        with pytest.raises(FrameError, match=r"a\.png: the PNG is damaged, or cut off after"):
            decode_picture(damaged, "a.png")
    assert decode_picture(data[:-4] + b"more", "a.png").shape == blocks().shape  # behind IEND


def test_nothing_else_decodes_pictures():
    """But for two: ``examples/serve_onnx.py`` shows how to do without this package, and rendered
    pictures are compressed in memory and decoded again for the marks that it leaves."""
    decoders = re.compile(r"\b(imread|imdecode)|from (cv2|PIL) import|import PIL")
    folders = [PROJECT / folder for folder in ("cmpose", "bench", "kernels", "examples")]
    others = {
        str(path.relative_to(PROJECT))
        for folder in folders
        for path in folder.rglob("*.py")
        if decoders.search(path.read_text(encoding="utf-8"))
    }
    assert others == {
        "cmpose/data/pictures.py",
        "cmpose/render/footage.py",
        "examples/serve_onnx.py",
    }
