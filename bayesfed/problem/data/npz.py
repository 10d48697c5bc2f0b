"""Bring your own arrays."""

from __future__ import annotations

import zipfile

import numpy as np

from bayesfed.errors import InputError, did_you_mean
from bayesfed.problem.data.own import Own
from bayesfed.problem.data.source import Loaded

REQUIRED, OPTIONAL = ("x", "y"), ("client", "x_test", "y_test")


class Npz(Own):
    """A NumPy ``.npz`` file.

    Arrays: ``x`` (N, ...) numbers (images as (N, C, H, W)), ``y`` (N,) labels of any kind or (N,) / (N, D) floats;
    optional ``client`` (N,) ids (the partitioner is then skipped), ``x_test`` and ``y_test`` (else ``test_fraction`` is
    held out).

    Args:
        path: the file.
        fraction: see ``Source``.
        scaling: see ``Source``; ``unit`` divides uint8 by 255, leaves booleans 0 and 1, and maps the training range of
            other numbers to [0, 1].
        test_fraction: held out with the run's seed if there is no ``x_test``.
        classes: see ``Own``.

    Raises:
        InputError: naming the option, the array or the first bad row.
    """

    expected = "a .npz file with arrays x and y"

    def load(self, seed: int) -> Loaded:
        arrays = self._read()
        test = (arrays["x_test"], arrays["y_test"]) if "x_test" in arrays else None
        return self.taken(arrays["x"], arrays["y"], seed, test=test, client=arrays.get("client"))

    def _read(self) -> dict[str, np.ndarray]:
        known = (*REQUIRED, *OPTIONAL)
        name = None
        try:
            file = np.load(self.path, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise InputError("path", self.path, "holds a single array; needs an .npz file with arrays x and y")
            with file:
                names = list(file.files)
                for each in names:
                    if each not in known:
                        fix = f"holds an unknown array '{each}': {did_you_mean(each, known)}known: {', '.join(known)}"
                        raise InputError("path", self.path, fix)
                for each in REQUIRED:
                    if each not in names:
                        raise InputError(
                            "path", self.path, f"holds no array '{each}'; found: {', '.join(names) or 'none'}"
                        )
                if ("x_test" in names) != ("y_test" in names):
                    raise InputError("path", self.path, "holds only one of x_test and y_test; needs both or neither")
                arrays = {}
                for name in names:
                    arrays[name] = file[name]
                return arrays
        except InputError:
            raise
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:  # NumPy's words are on pickles
            fix = "not a readable .npz file of plain arrays: "
            if name is None:
                fix += "it is no zip archive; write it with numpy.savez(path, x=x, y=y)"
            elif isinstance(error, ValueError) and "allow_pickle" in str(error):
                fix += f"'{name}' holds Python objects; store numbers or text, e.g. {name}.astype(float) or "
                fix += f"{name}.astype(str)"
            else:
                fix += f"'{name}' is damaged"
            raise InputError("path", self.path, fix) from error
