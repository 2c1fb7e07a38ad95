"""A one-dimensional array in a file, read piece by piece where it is asked for.

Not mapped into memory: a mapped file that is cut off while a process reads it ends the process (SIGBUS) before anybody
can say why. A read that comes back short is an error with the file's name.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np

from moda_jax.data.file_guard import DataLostError

_BLOCK = 1024  # numbers that a search reads at once


class FileArray:
    """The array [N] of a .npy file, as `np.load` has it, but that every access reads the file.

    Args:
        filename: the file. It is kept open: those who have it may go on when it is deleted.

    Raises:
        ValueError: not a .npy file of one dimension, or shorter than its header says.
    """

    def __init__(self, filename: Path) -> None:
        self.filename = filename
        with filename.open("rb") as file:
            try:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, self.dtype = read(file)
            except ValueError as error:
                raise ValueError(
                    f"{filename}: not an array that can be read ({error}); delete {filename.parent}"
                ) from error
            if len(shape) != 1 or self.dtype.hasobject:
                raise ValueError(f"{filename}: holds {self.dtype} {shape}, expected numbers in one dimension")
            self.shape, self._begin = shape, file.tell()
            self._descriptor = os.dup(file.fileno())
        size = os.fstat(self._descriptor).st_size
        if size < self._begin + shape[0] * self.dtype.itemsize:
            raise ValueError(
                f"{filename}: {size} bytes are too few for {shape[0]} x {self.dtype}; delete {filename.parent}"
            )

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        """What NumPy returns, copied: a number or a slice reads just that, any other index the whole array.

        Raises:
            DataLostError: the file has become shorter.
        """
        if isinstance(index, slice):
            begin, end, step = index.indices(len(self))
            if step == 1:
                return self._read(begin, max(begin, end))
        elif isinstance(index, int | np.integer):
            place = index + len(self) if index < 0 else index
            if not 0 <= place < len(self):
                raise IndexError(f"index {index}: expected one of {len(self)}")
            return self._read(place, place + 1)[0]
        return self[:][index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it in memory."""
        if copy is False:
            raise ValueError("an array in a file can only be copied")
        whole = self[:]
        return whole if dtype is None else whole.astype(dtype)

    def tolist(self) -> list:
        """All of its numbers, as Python has them."""
        return self[:].tolist()

    def searchsorted(self, value: int, side: str = "left") -> int:
        """As `np.ndarray.searchsorted`, for one number: of a sorted array it reads one block, and once the firsts of
        all blocks.

        Raises:
            DataLostError: see `__getitem__`.
        """
        block = int(self._firsts.searchsorted(value, side)) - 1
        if block < 0:
            return 0
        begin = block * _BLOCK
        return begin + int(self[begin : begin + _BLOCK].searchsorted(value, side))

    @functools.cached_property
    def _firsts(self) -> np.ndarray:
        return np.array([self[i] for i in range(0, len(self), _BLOCK)], self.dtype)

    def __reduce__(self) -> tuple:
        return FileArray, (self.filename,)

    def __del__(self, close: Any = os.close) -> None:  # the module may be gone before its objects
        if hasattr(self, "_descriptor"):
            close(self._descriptor)

    def _read(self, begin: int, end: int) -> np.ndarray:
        result = np.empty(end - begin, self.dtype)
        view, done = memoryview(result).cast("B") if len(result) else b"", 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], self._begin + begin * self.dtype.itemsize + done)
            if count == 0:
                raise DataLostError(
                    f"{self.filename}: was changed while the run read it: it ends before number {end} of {len(self)}; "
                    f"delete {self.filename.parent} and start again from the last checkpoint"
                )
            done += count
        return result
