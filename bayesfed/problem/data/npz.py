"""Bring your own arrays."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np

from bayesfed.errors import InputError, did_you_mean, number
from bayesfed.problem.data.source import Loaded, Source, from_table

REQUIRED, OPTIONAL = ("x", "y"), ("client", "x_test", "y_test")


class Npz(Source):
    """A NumPy ``.npz`` file.

    Arrays: ``x`` (N, ...) numbers (images as (N, C, H, W)), ``y`` (N,) whole-number labels or (N,) / (N, D) floats;
    optional ``client`` (N,) ids (the partitioner is then skipped), ``x_test`` and ``y_test`` (else ``test_fraction`` is
    held out).

    Args:
        path: the file.
        fraction: see ``Source``.
        scaling: see ``Source``; ``unit`` divides uint8 by 255 and maps the training range of floats to [0, 1].
        test_fraction: held out with the run's seed if there is no ``x_test``.

    Raises:
        InputError: naming the option, the array or the first bad row.
    """

    def __init__(
        self, path: str | None = None, *, fraction: float = 1.0, scaling: str = "raw", test_fraction: float = 0.2
    ):
        super().__init__(fraction=fraction, scaling=scaling)
        number("test_fraction", test_fraction, above=0)
        if test_fraction >= 1:
            raise InputError("test_fraction", test_fraction, "must be below 1")
        self.path = existing_file(path, "a .npz file with arrays x and y")
        self.test_fraction = float(test_fraction)

    def load(self, seed: int) -> Loaded:
        arrays = self._read()
        test = (arrays["x_test"], arrays["y_test"]) if "x_test" in arrays else None
        return from_table(
            arrays["x"],
            arrays["y"],
            test=test,
            client=arrays.get("client"),
            test_fraction=self.test_fraction,
            seed=seed,
        )

    def _read(self) -> dict[str, np.ndarray]:
        known = (*REQUIRED, *OPTIONAL)
        try:
            file = np.load(self.path, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise InputError("path", self.path, "holds a single array; needs an .npz file with arrays x and y")
            with file:
                names = list(file.files)
                for name in names:
                    if name not in known:
                        fix = f"holds an unknown array '{name}': {did_you_mean(name, known)}known: {', '.join(known)}"
                        raise InputError("path", self.path, fix)
                for name in REQUIRED:
                    if name not in names:
                        raise InputError(
                            "path", self.path, f"holds no array '{name}'; found: {', '.join(names) or 'none'}"
                        )
                if ("x_test" in names) != ("y_test" in names):
                    raise InputError("path", self.path, "holds only one of x_test and y_test; needs both or neither")
                return {name: file[name] for name in names}
        except InputError:
            raise
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise InputError("path", self.path, f"not a readable .npz file of plain arrays ({error})") from error


def existing_file(path: str | None, expected: str) -> Path:
    """``path`` as a Path.

    Raises:
        InputError: if it is not given or is no file, saying what is ``expected`` there.
    """
    if path is None:
        raise InputError("path", path, f"needs {expected}")
    file = Path(path).expanduser()
    if not os.path.isfile(file):  # False also for names that are too long
        reason = "is a folder" if os.path.isdir(file) else "does not exist"
        raise InputError("path", path, f"{reason}; needs {expected}")
    return file
