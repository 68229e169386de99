from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from groupsae.errors import InputError
from groupsae.grouping.matrix import Distances, load_distances, threshold_note
from tests.grouping.matrices import any_matrix

FULL = np.array([[0.0, 0.2, 0.3], [0.2, 0.0, 0.1], [0.3, 0.1, 0.0]])


@given(any_matrix(), st.data())
@settings(deadline=None, max_examples=40)
def test_distances_survive_json_exactly(matrix: np.ndarray, data: st.DataObject) -> None:
    distances = Distances.from_matrix(matrix)
    standard_error = data.draw(
        arrays(np.float64, distances.matrix.shape, elements=st.floats(0, 1)) | st.none()
    )
    similarity = data.draw(st.sampled_from(["angular", "cka", "svcca"]))
    before = Distances(distances.layers, distances.matrix, standard_error, 10**7, True, similarity)
    after = Distances.from_json(json.loads(json.dumps(before.to_json(), allow_nan=False)))
    keys = ["layers", "matrix", "standard_error", "tokens", "center", "similarity"]
    assert list(before.to_json()) == keys
    assert (after.layers, after.tokens, after.center) == (before.layers, 10**7, True)
    assert after.similarity == similarity
    np.testing.assert_array_equal(after.matrix, before.matrix)
    if standard_error is None:
        assert after.standard_error is None
    else:
        np.testing.assert_array_equal(after.standard_error, standard_error)


def test_the_matrix_cannot_be_changed() -> None:
    source = FULL.copy()
    distances = Distances((0, 1, 2), source)
    source[0, 1] = 0.9
    np.testing.assert_array_equal(distances.matrix, FULL)
    with pytest.raises(ValueError, match="read-only"):
        distances.matrix[0, 1] = 0.5


def test_selecting_layers_keeps_their_entries() -> None:
    distances = Distances((4, 5, 9), FULL, FULL / 10, 100, False, "cka")
    some = distances.select([4, 9])
    assert (some.layers, some.tokens, some.center) == ((4, 9), 100, False)
    assert some.similarity == "cka"
    np.testing.assert_array_equal(some.matrix, [[0, 0.3], [0.3, 0]])
    assert some.standard_error is not None
    np.testing.assert_array_equal(some.standard_error, [[0, 0.03], [0.03, 0]])
    with pytest.raises(InputError, match="know no layer 6, only layers 4-5, 9"):
        distances.select([4, 6])


@given(any_matrix(), st.sampled_from(["npy", "csv", "json"]), st.sampled_from([0.0, np.nan]))
@settings(deadline=None, max_examples=40)
def test_full_and_lower_triangular_files_of_every_kind_give_the_same(
    tmp_path_factory: pytest.TempPathFactory, matrix: np.ndarray, kind: str, upper: float
) -> None:
    distances = Distances.from_matrix(matrix)
    folder = tmp_path_factory.mktemp("distances")
    lower = distances.matrix.copy()
    lower[np.triu_indices_from(lower, 1)] = upper
    for matrix in (distances.matrix, lower):
        loaded = load_distances(_write(folder / f"distances.{kind}", matrix))
        assert loaded.layers == distances.layers
        np.testing.assert_array_equal(loaded.matrix, distances.matrix)
        assert (loaded.standard_error, loaded.tokens, loaded.center) == (None, None, None)


def test_a_file_that_names_no_similarity_holds_angles() -> None:
    data = Distances((0, 1, 2), FULL, similarity="svcca").to_json()
    del data["similarity"]
    assert Distances.from_json(data).similarity == "angular"


@pytest.mark.parametrize("similarity", ["angular", "cka", "svcca"])
def test_only_of_angles_the_threshold_needs_no_note(similarity: str) -> None:
    note = threshold_note(similarity)
    if similarity == "angular":
        assert note is None
    else:
        assert note is not None
        assert "0.2 on AMAD was chosen for angular distances" in note


def test_a_run_directorys_file_brings_all_it_knows(tmp_path: Path) -> None:
    file = tmp_path / "distances.json"
    data = Distances((1, 2, 3), FULL, FULL / 100, 5000, True).to_json() | {"added": "later"}
    file.write_text(json.dumps(data))
    loaded = load_distances(str(file))
    assert (loaded.layers, loaded.tokens, loaded.center) == ((1, 2, 3), 5000, True)
    assert loaded.standard_error is not None
    np.testing.assert_array_equal(loaded.standard_error, FULL / 100)


@pytest.mark.parametrize(
    "text",
    [
        "0,0.2,0.3\n0.2,0,0.1\n0.3,0.1,0\n",
        "\ufeff0, 0.2, 0.3\r\n0.2, 0, 0.1\r\n0.3, 0.1, 0\r\n\r\n",
        "0\n0.2,0\n0.3,0.1,0\n",
        "0,,\n0.2,0,\n0.3,0.1,0\n",
        "0,nan,nan\n0.2,0,nan\n0.3,0.1,0\n",
        "0,1,2\n0,0.2,0.3\n0.2,0,0.1\n0.3,0.1,0\n",
        "0,0,0.2,0.3\n1,0.2,0,0.1\n2,0.3,0.1,0\n",
        ",0,1,2\n0,0,0.2,0.3\n1,0.2,0,0.1\n2,0.3,0.1,0\n",
        "layer,layer 0,layer 1,layer 2\nlayer 0,0,,\nlayer 1,0.2,0,\nlayer 2,0.3,0.1,0\n",
        ',"L0","L1","L2"\n"L0",0\n"L1",0.2,0\n"L2",0.3,0.1,0\n',
    ],
)
def test_csv_comes_with_or_without_labels(tmp_path: Path, text: str) -> None:
    file = tmp_path / "distances.csv"
    file.write_text(text, encoding="utf-8", newline="")
    loaded = load_distances(file)
    assert loaded.layers == (0, 1, 2)
    np.testing.assert_array_equal(loaded.matrix, FULL)


def test_csv_labels_name_the_layers(tmp_path: Path) -> None:
    file = tmp_path / "distances.csv"
    file.write_text(",3,5\n3,0,0.2\n5,0.2,0\n")
    assert load_distances(file).layers == (3, 5)
    file.write_text(",3\n3,0\n")
    assert load_distances(file).layers == (3,)


def test_rounding_of_float32_is_forgiven_and_mended() -> None:
    matrix = FULL.astype(np.float32)
    matrix[1, 1] = 1.6e-4
    matrix[0, 1] += np.float32(3e-8)
    mended = Distances.from_matrix(matrix)
    np.testing.assert_array_equal(mended.matrix, mended.matrix.T)
    assert not np.diagonal(mended.matrix).any()
    np.testing.assert_allclose(mended.matrix, FULL, atol=1e-7)


def _spoilt(row: int, column: int, value: float) -> np.ndarray:
    matrix = FULL.copy()
    matrix[row, column] = value
    return matrix


@pytest.mark.parametrize(
    ("matrix", "problem"),
    [
        (FULL[:2], "the shape is 2 x 3; expected a square matrix"),
        (FULL[0], "the shape is 3; expected"),
        (np.array(0.5), "the shape is a single number"),
        (np.zeros((0, 0)), "the shape is 0 x 0"),
        (_spoilt(2, 1, np.nan), "row 2, column 1 holds nan"),
        (_spoilt(0, 1, np.nan), "row 0, column 1 holds nan"),
        (_spoilt(0, 1, np.inf), "row 0, column 1 holds inf"),
        (_spoilt(2, 0, 1.5), r"row 2, column 0 holds 1.5; .* \[0, 1\] \(divide .* by pi"),
        (_spoilt(2, 0, -0.1), "row 2, column 0 holds -0.1"),
        (_spoilt(1, 1, 0.5), "the diagonal holds 0.5"),
        (_spoilt(1, 1, np.nan), "row 1, column 1 holds nan"),
        (1 - FULL, "the diagonal holds 1"),
        (_spoilt(0, 2, 0.4), "row 0, column 2 holds 0.4 but row 2, column 0 holds 0.3"),
        (np.triu(FULL), "neither symmetric nor lower-triangular"),
        (FULL > 0, "bool values"),
        (FULL + 0j, "complex128 values"),
    ],
)
def test_what_is_no_matrix_of_distances_is_refused(
    tmp_path: Path, matrix: np.ndarray, problem: str
) -> None:
    file = tmp_path / "distances.npy"
    np.save(file, matrix)
    with pytest.raises(InputError, match=f"^{file}: .*{problem}"):
        load_distances(file)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("d.txt", b"0", r"read from \.json, \.npy, \.csv files"),
        ("d.json", b"{", "is not valid JSON"),
        ("d.json", b"\xff\xfe", "is not valid JSON"),
        ("d.json", b"[" * 100_000, "is not valid JSON"),
        ("d.json", b"[[0]]", "holds no JSON object"),
        ("d.json", b'{"matrix": [[0]]}', "the key 'layers' must be there"),
        ("d.json", b'{"layers": [0]}', "the key 'matrix' must be there"),
        ("d.json", b'{"layers": [0], "matrix": [0]}', "must be a list of rows"),
        (
            "d.json",
            b'{"layers": [0], "matrix": [["0"]]}',
            "row 0, column 0 holds '0', not a number",
        ),
        ("d.json", b'{"layers": [0], "matrix": [[false]]}', "holds False, not a number"),
        ("d.json", b'{"layers": [0, 1], "matrix": [[0]]}', "2 layers but 1 rows"),
        ("d.json", b'{"layers": [1, 0], "matrix": [[0]]}', "layer 0 comes after layer 1"),
        (
            "d.json",
            b'{"layers": [0], "matrix": [[1' + b"0" * 400 + b"]]}",
            "row 0, column 0: int too large",
        ),
        ("d.json", b'{"layers": [0], "matrix": [[0]], "tokens": "many"}', "tokens is 'many'"),
        ("d.json", b'{"layers": [0], "matrix": [[0]], "center": 1}', "center is 1"),
        (
            "d.json",
            b'{"layers": [0], "matrix": [[0]], "similarity": "rsa"}',
            "similarity is 'rsa'; expected one of angular, cka, svcca",
        ),
        ("d.json", b'{"layers": [0], "matrix": [[0]], "similarity": null}', "similarity is None"),
        (
            "d.json",
            b'{"layers": [0], "matrix": [[0]], "standard_error": [[-1]]}',
            "standard_error: holds a value that is negative",
        ),
        (
            "d.json",
            b'{"layers": [0], "matrix": [[0]], "standard_error": [[0, 0]]}',
            "standard_error: the shape is 1 x 2",
        ),
        ("d.npy", b"", "is no plain .npy array"),
        ("d.npy", b"junk", "is no plain .npy array"),
        ("d.csv", b"", "the file is empty"),
        ("d.csv", b"\xff\xfe\x00", "is no comma-separated text"),
        ("d.csv", b"0,0.2\n0.2,x\n", "could not convert string to float: 'x'"),
        ("d.csv", b"a,b\n0,0.2\n0.2,0\n", "the label 'a' names no layer"),
        ("d.csv", b",1,0\n1,0,0.2\n0,0.2,0\n", "layer 0 comes after layer 1"),
        ("d.csv", b"0,0.2\n0.2,0\n0.1,0.1\n0,0\n", "the shape is 4 x 2"),
    ],
)
def test_a_spoilt_file_is_refused_by_name(
    tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"^{file}: .*{problem}"):
        load_distances(file)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    file = tmp_path / "distances.npy"
    np.save(file, np.array([[_Trap()]], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"is no plain \.npy array"):
        load_distances(file)
    assert not _Trap.sprung


def test_archives_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "distances.npz", FULL)
    file = (tmp_path / "distances.npz").rename(tmp_path / "distances.npy")
    with pytest.raises(InputError, match="is an archive of arrays"):
        load_distances(file)


@pytest.mark.parametrize("name", ["gone.json", "gone.npy", "gone.csv"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: there is no such file"):
        load_distances(tmp_path / name)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InputError, match=r"folder.csv: cannot be read \(Is a directory\)"):
        load_distances(tmp_path / "folder.csv")


def test_a_matrix_made_by_hand_must_be_exact() -> None:
    with pytest.raises(InputError, match="exactly symmetric"):
        Distances((0, 1, 2), np.tril(FULL))
    with pytest.raises(InputError, match="2 layers but 3 rows"):
        Distances((0, 1), FULL)


class _Trap:
    sprung = False

    def __reduce__(self) -> Any:
        return _spring, ()


def _spring() -> None:
    _Trap.sprung = True


def _write(file: Path, matrix: np.ndarray) -> Path:
    if file.suffix == ".npy":
        np.save(file, matrix)
    elif file.suffix == ".csv":
        np.savetxt(file, matrix, delimiter=",", fmt="%.17g")
    else:
        rows = [[None if np.isnan(cell) else cell for cell in row] for row in matrix.tolist()]
        file.write_text(json.dumps({"layers": list(range(len(matrix))), "matrix": rows}))
    return file
