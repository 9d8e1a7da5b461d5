"""The correctly rounded mean by its definition, in fractions: what a fast one is held to."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

# dtype -> (bits of the significand, exponent of the smallest normal number)
FORMATS = {torch.float16: (11, -14), torch.bfloat16: (8, -126), torch.float32: (24, -126)}


def rounded(value: Fraction, dtype: torch.dtype) -> float:
    """IEEE 754 round to nearest, ties to even, subnormals included."""
    if not value:
        return 0.0
    precision, smallest = FORMATS[dtype]
    # The power of two below or at the magnitude, or one too many.
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    if abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, smallest) - precision + 1)
    return float(round(value / unit) * unit)  # round() of a Fraction is half to even


def reference(
    tensors: Sequence[Tensor], weights: Sequence[int], dtype: torch.dtype | None = None
) -> Tensor:
    """The mean of tensors in `dtype`, or in their own, or in float32 if they have several.

    Zeros are +0; what is too large for the dtype is infinite.
    """
    dtypes = {tensor.dtype for tensor in tensors}
    target = dtype or (dtypes.pop() if len(dtypes) == 1 else torch.float32)
    means = []
    for column in zip(*(tensor.double().tolist() for tensor in tensors), strict=True):
        total = sum(w * Fraction(v) for w, v in zip(weights, column, strict=True))
        means.append(rounded(total / sum(weights), target) + 0.0)  # -0 becomes +0
    return torch.tensor(means, dtype=torch.float64).to(target)
