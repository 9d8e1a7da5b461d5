"""The embedded corpus: the handwritten digits that scikit-learn carries, as a Parquet file.

1,797 real pictures of 8x8 pixels in 17 greys (Alpaydin and Kaynak 1998, UCI, CC BY 4.0).
"""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from atoll.core.errors import MissingError
from atoll.core.storage import Storage

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FILE = "digits.parquet"


def caption_of(digit: int) -> str:
    """What a picture of the digit is called."""
    return f"a handwritten {NAMES[digit]}"


def write_digits(place: Storage) -> str:
    """Write the corpus below a place where it is not there yet; its URI."""
    if not place.exists(FILE):
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise MissingError(
                "The demo's digits come with scikit-learn, which is not installed",
                cure="pip install 'atoll[demo]', or give --corpus",
            ) from error
        digits = load_digits()
        rows = {
            "image": [_png(picture) for picture in digits.images],
            "caption": [caption_of(int(digit)) for digit in digits.target],
            "label": [NAMES[int(digit)] for digit in digits.target],
        }
        buffer = io.BytesIO()
        pq.write_table(pa.table(rows), buffer)
        place.write_bytes(FILE, buffer.getvalue())
    return f"{place.uri}/{FILE}"


def _png(picture: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> bytes:
    """Greys 0 to 16 as a PNG of greys 0 to 255."""
    buffer = io.BytesIO()
    Image.fromarray(np.round(picture * (255 / 16)).astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()
