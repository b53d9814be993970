"""What a row of a dataset is once it is tokenised."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SFTExample:
    """A demonstration, or a plain text or a piece of one with an empty prompt."""

    prompt_ids: np.ndarray
    """[P] int32."""
    response_ids: np.ndarray
    """[T] int32, ends in EOS unless the text goes on in the next example."""


@dataclass(frozen=True)
class RankedExample:
    """K completions, best first; each has its own prompt, which is nearly always the same one."""

    prompt_ids: tuple[np.ndarray, ...]
    """K arrays [P] int32."""
    response_ids: tuple[np.ndarray, ...]
    """K arrays [T] int32, each ends in EOS."""
