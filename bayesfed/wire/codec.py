"""The format in which named arrays travel: as they are, or in 16 bits an entry."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from bayesfed.errors import BadMessage, Diverged, InputError, choice
from bayesfed.wire.records import pack, unpack

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
FORMATS = ("full", *HALVES)


class Codec:
    """How a posterior's arrays travel: as they are (``full``), or in 16 bits an entry (``float16``, ``bfloat16``).

    In 16 bits the server sends its mean, one ``scale`` (the geometric mean of its precisions, in full) and
    ``log(precision / scale)``; a client answers with what it changed, ``mean - server's mean`` and ``log(precision /
    server's precision)``, against the server's arrays *as they came out of the message*. So precisions are always
    positive, relative errors are those of small numbers, and no client loses an update that is smaller than the spacing
    of 16-bit floats around its mean.

    What an array decodes to is a function of the bits in the message: sender and receiver get the same numbers, in
    ``dtype``, and form duals from them (:mod:`bayesfed.federation.duals`). The names of the arrays say the format, so
    that a message in another one is refused. bfloat16 travels as its bits in uint16, because numpy has no such type.

    Args:
        format: ``full``, ``float16`` or ``bfloat16``.
        shapes: of the arrays, by name; the one called ``precision`` must be positive.
        dtype: of the arrays, before and after.

    Raises:
        InputError: no such format, or a matrix as precision in 16 bits.
    """

    def __init__(self, format: str, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype):
        choice("wire", format, FORMATS)
        if format != "full" and len(shapes.get("precision", ())) == 2:
            fix = "a full covariance can't travel in 16 bits (a matrix's logarithm is not elementwise); use wire=full"
            raise InputError("wire", format, fix)
        self.format, self.shapes, self.dtype = format, {n: tuple(shape) for n, shape in shapes.items()}, dtype

    def encode(
        self, arrays: Mapping[str, Tensor], reference: Mapping[str, Tensor] | None = None
    ) -> tuple[ArrayRecord, dict[str, Tensor]]:
        """The record to send, and the arrays it decodes to.

        Args:
            arrays: named as in ``shapes``, on the CPU.
            reference: the server's arrays as received, for a client's answer; None on the server.

        Raises:
            BadMessage: an entry is not finite or too large for the format, or a precision is not positive; names array
                and entry.
        """
        if self.format == "full":
            return pack(arrays), dict(arrays)
        parts: dict[str, Tensor] = {}
        if reference is None and "precision" in arrays:
            parts["scale"] = arrays["precision"].double().log().mean().exp().to(self.dtype)
        for name, value in arrays.items():
            base = self._base(name, parts, reference)
            wide = value.double()
            line = (wide / base).log() if name == "precision" else wide - base
            parts[name] = line.to(HALVES[self.format])
            self._require_finite(name, wide, parts[name])
        names = self._names(reference is not None)
        record = pack({names[n]: value if n == "scale" else value.view(self._line_dtype) for n, value in parts.items()})
        return record, self._values(parts, reference)

    def decode(
        self,
        record: object,
        reference: Mapping[str, Tensor] | None = None,
        to: torch.dtype | None = None,
        copy: bool = True,
    ) -> dict[str, Tensor]:
        """The arrays in ``record``, in dtype ``to``; ``reference`` as for :meth:`encode`, ``copy`` for :func:`unpack`.

        Raises:
            BadMessage: another format, or names, shapes or dtypes that are not expected.
        """
        found = {name.partition("/")[0] if "/" in name else "full" for name in _names_of(record)}
        if found & set(FORMATS) - {self.format}:
            raise BadMessage(
                f"the arrays travel in format '{', '.join(sorted(found))}', this side is set up for wire={self.format}"
            )
        if self.format == "full":
            return unpack(record, self.shapes, self.dtype, to, copy)
        names = self._names(reference is not None)
        shapes = {line: self.shapes.get(name, ()) for name, line in names.items()}
        dtypes = {line: self.dtype if name == "scale" else self._line_dtype for name, line in names.items()}
        lines = unpack(record, shapes, dtypes)
        half = HALVES[self.format]
        parts = {name: lines[line] if name == "scale" else lines[line].view(half) for name, line in names.items()}
        return {name: value.to(to or self.dtype) for name, value in self._values(parts, reference).items()}

    def keep_rounding(
        self, arrays: Mapping[str, Tensor], exact: Mapping[str, Tensor], sent: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """``arrays`` moved by what rounding took from ``exact`` when it was ``sent``.

        The server's new posterior is built on what it sent. Without this, a step below the spacing of 16-bit floats
        would be rounded away in every message and the server would stall; so it adds up (as with master weights in
        mixed-precision training).
        """
        kept = {}
        for name, value in arrays.items():
            new, before, after = value.double(), exact[name].double(), sent[name].double()
            kept[name] = (new * (before / after) if name == "precision" else new + (before - after)).to(self.dtype)
        return kept

    @property
    def _line_dtype(self) -> torch.dtype:
        return torch.uint16 if self.format == "bfloat16" else torch.float16

    def _names(self, answer: bool) -> dict[str, str]:
        """Names on the line, by the array they stand for (``scale`` is the server's only)."""
        change = "_change" if answer else ""
        names = {n: f"{self.format}/{'log_' if n == 'precision' else ''}{n}{change}" for n in self.shapes}
        if "precision" in self.shapes and not answer:
            names["scale"] = f"{self.format}/precision_scale"
        return names

    @staticmethod
    def _base(name: str, parts: Mapping[str, Tensor], reference: Mapping[str, Tensor] | None) -> Tensor:
        """What the line is relative to, in float64: the factor of a precision, the origin of another array."""
        if reference is not None:
            return reference[name].double()
        return parts["scale"].double() if name == "precision" else torch.zeros((), dtype=torch.float64)

    def _values(self, parts: Mapping[str, Tensor], reference: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        values = {}
        for name in self.shapes:
            base, line = self._base(name, parts, reference), parts[name].double()
            values[name] = (base * line.exp() if name == "precision" else base + line).to(self.dtype)
        return values

    def _require_finite(self, name: str, values: Tensor, line: Tensor) -> None:
        bad = (~line.isfinite()).reshape(-1).nonzero()
        if len(bad):
            entry = int(bad[0])
            limit = torch.finfo(line.dtype).max
            raise (BadMessage if bool(values.isfinite().all()) else Diverged)(
                f"{name} can't be sent as {self.format} in {len(bad)} of {line.numel()} entries, first entry {entry}: "
                f"{float(values.reshape(-1)[entry]):g} (finite and at most {limit:g}, precisions positive); "
                "use wire=full"
            )


def _names_of(record: object) -> list[str]:
    return list(record) if isinstance(record, ArrayRecord) else []
