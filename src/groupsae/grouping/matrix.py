"""The matrix of distances between layers: what it must be, and the files it comes from."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Shaped

from groupsae.errors import InputError
from groupsae.grouping.layers import checked_layers, format_layers

Matrix = Float64[np.ndarray, "layer layer"]
AnyArray = Shaped[np.ndarray, "..."]

# What the entries are, by the similarity that they come from.
QUANTITIES = {
    "angular": "angular distance",
    "cka": "1 − linear CKA",
    "svcca": "1 − SVCCA",
}

# A matrix from elsewhere may have been computed in float32, where arccos near a cosine of 1 is off
# by 3e-4 / pi and the two triangles may round differently.
DIAGONAL_TOLERANCE = 1e-3
SYMMETRY_TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class Distances:
    """Distance between the residual streams of every two layers.

    Attributes:
        layers: The layers' numbers in the host model, ascending; one row and column each.
        matrix: Distances in [0, 1]. Symmetric, zero on the diagonal; read-only.
        standard_error: Standard error of each entry, or None where it is unknown.
        tokens: Tokens that were averaged over, or None where it is unknown.
        center: Whether each layer's mean was subtracted first, or None where it is unknown.
        similarity: What the distances are, a key of `QUANTITIES`: mean angle / pi, 1 - linear CKA
            or 1 - SVCCA.

    Raises:
        InputError: The matrix is none of distances, or does not fit the layers.
    """

    layers: tuple[int, ...]
    matrix: Matrix
    standard_error: Matrix | None = None
    tokens: int | None = None
    center: bool | None = None
    similarity: str = "angular"

    def __post_init__(self) -> None:
        layers = checked_layers(self.layers, "distances")
        _check_similarity(self.similarity, "distances")
        matrix = self.matrix.copy()
        _check_square(matrix, "distances", len(layers))
        _check_values(matrix, "distances")
        if np.any(np.diagonal(matrix)) or not np.array_equal(matrix, matrix.T):
            raise InputError(
                "distances: the matrix must be exactly symmetric with a zero diagonal; "
                "Distances.from_matrix mends rounding and lower-triangular matrices"
            )
        matrix.setflags(write=False)
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "matrix", matrix)
        if self.standard_error is not None:
            standard_error = self.standard_error.copy()
            _check_square(standard_error, "standard errors of the distances", len(layers))
            standard_error.setflags(write=False)
            object.__setattr__(self, "standard_error", standard_error)

    @classmethod
    def from_matrix(
        cls,
        matrix: AnyArray,
        layers: Sequence[int] | None = None,
        *,
        standard_error: Matrix | None = None,
        tokens: int | None = None,
        center: bool | None = None,
        similarity: str = "angular",
        source: str = "distances",
    ) -> Distances:
        """Distances from a matrix made elsewhere: symmetric, or lower-triangular.

        The upper triangle of a lower-triangular matrix is all zero or all NaN and is filled from
        the lower one. Rounding of a float32 computation is forgiven (diagonal up to 1e-3, triangles
        up to 1e-6 apart) and mended.

        Args:
            matrix: Real numbers, square.
            layers: The rows' layers; 0, 1, 2, ... by default.
            standard_error: As in `Distances`, like `tokens` and `center`.
            tokens: How many were averaged over.
            center: Whether each layer's mean was subtracted.
            similarity: What they are: a key of `QUANTITIES`.
            source: What error messages name.

        Raises:
            InputError: naming the source and what is wrong with it.
        """
        if matrix.dtype.kind not in "fiu":
            raise InputError(f"{source}: holds {matrix.dtype} values; distances are real numbers")
        full = matrix.astype(np.float64)
        _check_square(full, source, None if layers is None else len(layers))
        lower = np.tril(full, -1)
        upper = full[np.triu_indices_from(full, 1)]
        if np.isnan(upper).all() or (not upper.any() and lower.any()):
            full = lower + lower.T + np.diag(np.diagonal(full))
        _check_values(full, source)
        largest = np.diagonal(full).max()
        if largest > DIAGONAL_TOLERANCE:
            raise InputError(
                f"{source}: the diagonal holds {largest:g}; the distance of a layer from itself "
                "is 0 (is this a matrix of similarities?)"
            )
        row, column = np.unravel_index(np.abs(full - full.T).argmax(), full.shape)
        if abs(full[row, column] - full[column, row]) > SYMMETRY_TOLERANCE:
            raise InputError(
                f"{source}: neither symmetric nor lower-triangular: row {row}, column {column} "
                f"holds {full[row, column]:g} but row {column}, column {row} holds "
                f"{full[column, row]:g}; give the full matrix or its lower triangle"
            )
        full = (full + full.T) / 2
        np.fill_diagonal(full, 0.0)
        return cls(
            layers=tuple(range(len(full))) if layers is None else checked_layers(layers, source),
            matrix=full,
            standard_error=standard_error,
            tokens=tokens,
            center=center,
            similarity=similarity,
        )

    def select(self, layers: Sequence[int]) -> Distances:
        """The same distances for some of the layers only.

        Raises:
            InputError: A layer has no row here.
        """
        chosen = checked_layers(layers)
        for layer in chosen:
            if layer not in self.layers:
                raise InputError(
                    f"layers: the distances know no layer {layer}, only layers "
                    f"{format_layers(self.layers)}; measure it, or leave it out"
                )
        rows = [self.layers.index(layer) for layer in chosen]
        square = np.ix_(rows, rows)
        return Distances(
            layers=chosen,
            matrix=self.matrix[square],
            standard_error=None if self.standard_error is None else self.standard_error[square],
            tokens=self.tokens,
            center=self.center,
            similarity=self.similarity,
        )

    @property
    def quantity(self) -> str:
        """The name of what the entries are: "angular distance"."""
        return QUANTITIES[self.similarity]

    def to_json(self) -> dict[str, Any]:
        """What `distances.json` of a run directory holds; floats survive the way there and back."""
        return {
            "layers": list(self.layers),
            "matrix": self.matrix.tolist(),
            "standard_error": (
                None if self.standard_error is None else self.standard_error.tolist()
            ),
            "tokens": self.tokens,
            "center": self.center,
            "similarity": self.similarity,
        }

    @classmethod
    def from_json(cls, data: object, source: str = "distances.json") -> Distances:
        """Distances from the parsed content of a `distances.json`; unknown keys are left alone.

        Only `layers` and `matrix` must be there.

        Raises:
            InputError: naming the source, the key and what is wrong with it.
        """
        if not isinstance(data, dict):
            raise InputError(
                f"{source}: holds no JSON object; expected the keys "
                "layers, matrix, standard_error, tokens, center, similarity"
            )
        for key in ("layers", "matrix"):
            if not isinstance(data.get(key), list):
                raise InputError(f"{source}: the key {key!r} must be there and hold a list")
        tokens, center = data.get("tokens"), data.get("center")
        if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool)):
            raise InputError(f"{source}: tokens is {tokens!r}; expected an integer or null")
        if center is not None and not isinstance(center, bool):
            raise InputError(f"{source}: center is {center!r}; expected true, false or null")
        similarity = data.get("similarity", "angular")
        _check_similarity(similarity, source)
        layers = checked_layers(data["layers"], f"{source}: layers")
        standard_error = None
        if data.get("standard_error") is not None:
            name = f"{source}: standard_error"
            standard_error = _from_rows(data["standard_error"], name)
            _check_square(standard_error, name, len(layers))
            if not (np.isfinite(standard_error) & (standard_error >= 0)).all():
                raise InputError(f"{name}: holds a value that is negative or no finite number")
        return cls.from_matrix(
            _from_rows(data["matrix"], f"{source}: matrix"),
            layers,
            source=source,
            standard_error=standard_error,
            tokens=tokens,
            center=center,
            similarity=similarity,
        )


def threshold_note(similarity: str) -> str | None:
    """What to know of AMAD's threshold where the distances are no angles; None where they are."""
    if similarity == "angular":
        return None
    return (
        f"The threshold of 0.2 on AMAD was chosen for angular distances; {QUANTITIES[similarity]} "
        "has another scale, so look at every G and set grouping.threshold or grouping.groups."
    )


def load_distances(path: str | Path) -> Distances:
    """Reads a matrix of distances from anywhere; no model is needed, nothing is unpickled.

    Args:
        path: `.json` as in a run directory (`Distances.from_json`); `.npy`, a square array; or
            `.csv`, comma-separated, with or without a first row and a first column of labels,
            each of which holds its layer's number (`3`, `layer 3`). Lower-triangular is fine: the
            upper triangle zero, NaN, empty or left out.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    path = Path(path)
    readers = {".json": _read_json, ".npy": _read_npy, ".csv": _read_csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: distances are read from {', '.join(readers)} files")
    try:
        return reader(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read_json(path: Path) -> Distances:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not valid JSON ({error})") from error
    return Distances.from_json(data, str(path))


def _read_npy(path: Path) -> Distances:
    try:
        matrix = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(
            f"{path}: is no plain .npy array of numbers ({error}); save it with numpy.save"
        ) from error
    if not isinstance(matrix, np.ndarray):
        raise InputError(f"{path}: is an archive of arrays; save one matrix with numpy.save")
    return Distances.from_matrix(matrix, source=str(path))


def _read_csv(path: Path) -> Distances:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: is no comma-separated text ({error})") from error
    rows = [row for row in rows if any(row)]
    if not rows:
        raise InputError(f"{path}: the file is empty")
    rows, labels = _split_labels(rows)
    layers = None if labels is None else [_layer_number(label, path) for label in labels]
    values: list[list[float | None]] = []
    for row in rows:
        try:
            values.append([float(cell) if cell else None for cell in row])
        except ValueError as error:
            raise InputError(f"{path}: {error}; the cells must be numbers") from error
    return Distances.from_matrix(_from_rows(values, str(path)), layers, source=str(path))


def _split_labels(rows: list[list[str]]) -> tuple[list[list[str]], list[str] | None]:
    """Parts a table from its labels: a first row, a first column, both or neither.

    A table with both has a corner that is no number; one with a single line of labels is not
    square. Labels of rows and columns are taken to be the same, as the matrix is symmetric.
    """
    height, width = len(rows), max(map(len, rows))
    corner_is_label = not _is_number(rows[0][0]) and any(rows[0][1:])
    if height == width and corner_is_label:
        return [row[1:] for row in rows[1:]], rows[0][1:]
    if height == width + 1:
        return rows[1:], rows[0]
    if width == height + 1:
        return [row[1:] for row in rows], [row[0] for row in rows]
    return rows, None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _layer_number(label: str, path: Path) -> int:
    found = re.fullmatch(r"\D*(\d{1,6})(?:\.0*)?\D*", label)
    if found is None:
        raise InputError(
            f"{path}: the label {label!r} names no layer; label rows and columns with the layers' "
            "numbers, or not at all"
        )
    return int(found[1])


def _from_rows(rows: object, source: str) -> AnyArray:
    """A matrix from lists of numbers; None and what a short row leaves out become NaN."""
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise InputError(f"{source}: must be a list of rows, each a list of numbers")
    width = max(map(len, rows), default=0)
    matrix = np.full((len(rows), width), np.nan)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            if value is None:
                continue
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise InputError(f"{source}: row {i}, column {j} holds {value!r}, not a number")
            try:
                matrix[i, j] = value
            except OverflowError as error:
                raise InputError(f"{source}: row {i}, column {j}: {error}") from error
    return matrix


def _check_similarity(similarity: object, source: str) -> None:
    if not isinstance(similarity, str) or similarity not in QUANTITIES:
        raise InputError(
            f"{source}: similarity is {similarity!r}; expected one of {', '.join(QUANTITIES)}"
        )


def _check_square(matrix: AnyArray, source: str, n_layers: int | None) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        shape = " x ".join(map(str, matrix.shape))
        raise InputError(
            f"{source}: the shape is {shape or 'a single number'}; "
            "expected a square matrix, one row and column per layer"
        )
    if n_layers is not None and len(matrix) != n_layers:
        raise InputError(f"{source}: {n_layers} layers but {len(matrix)} rows; give one row each")


def _check_values(matrix: AnyArray, source: str) -> None:
    unfit = ~((matrix >= 0) & (matrix <= 1))
    if unfit.any():
        row, column = np.argwhere(unfit)[0]
        value = matrix[row, column]
        mend = (
            "every entry of the lower triangle must be a finite number"
            if not np.isfinite(value)
            else "distances lie in [0, 1] (divide angles in radians by pi)"
        )
        raise InputError(f"{source}: row {row}, column {column} holds {value:g}; {mend}")
