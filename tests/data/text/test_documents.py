"""Documents read from files of every kind, and the errors about bad ones."""

import bz2
import gzip
import io
import json
import lzma
import os
import sys
import tarfile
import threading
import zipfile

import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.data.text import json_values
from flexolmo_jax.data.text.bad_records import BadRecordError, BadRecords
from flexolmo_jax.data.text.documents import AUTO, file_state, line_ranges, read_documents, read_file
from flexolmo_jax.errors import UserError

TEXTS = ["first", "zwei\nLinien, ünï", "\U0001f9d1"]
RECORDS = [{"id": i, "text": text, "meta": {"raw": text.upper()}} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
BOM = b"\xef\xbb\xbf"


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").compress(data)


def parquet(column="text", values=TEXTS, **options) -> bytes:
    arrow = pytest.importorskip("pyarrow")
    file = io.BytesIO()
    pytest.importorskip("pyarrow.parquet").write_table(
        arrow.table({"id": range(len(values)), column: values}), file, **options
    )
    return file.getvalue()


def read(tmp_path, name, content, **options):
    (tmp_path / name).write_bytes(content)
    return list(read_documents([f"{tmp_path}/{name}"], **options))


def test_every_kind_of_file_in_sorted_order(tmp_path):
    (tmp_path / "d.txt").write_bytes("whole\r\nfile, ünï\n".encode())
    (tmp_path / "c.md").write_text("# title")
    (tmp_path / "b.jsonl").write_bytes(LINES + b"\n\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    expected = [*TEXTS, *TEXTS, "# title", "whole\r\nfile, ünï\n"]
    assert list(read_documents([f"{tmp_path}/*"])) == expected
    assert list(read_documents([f"{tmp_path}/*.md", f"{tmp_path}/[bc]*", f"{tmp_path}/c.md"])) == [
        "# title",
        *expected[:3],
    ]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.NdJson", "a.jsonlines", "a.json", "A.JSON", "a.b.json"]
)
@pytest.mark.parametrize("content", [LINES, BOM + LINES, LINES.replace(b"\n", b"\r\n\r\n"), LINES + BOM + LINES])
def test_json_lines_under_any_usual_name(tmp_path, name, content):
    assert read(tmp_path, name, content) == TEXTS * (2 if content.count(b"first") == 2 else 1)


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".gz", gzip.compress),
        (".GZ", lambda data: gzip.compress(data[:10]) + gzip.compress(data[10:])),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", zstd),
        (".Zst", lambda data: zstd(data[:10]) + zstd(data[10:])),
    ],
)
def test_compressed_files(tmp_path, suffix, compress):
    assert read(tmp_path, f"a.json{suffix}", compress(LINES)) == TEXTS
    assert read(tmp_path, f"a.jsonl{suffix}", compress(BOM + LINES)) == TEXTS
    assert read(tmp_path, f"b.json{suffix}", compress(json.dumps(RECORDS, indent=1).encode())) == TEXTS
    assert read(tmp_path, f"a.txt{suffix}", compress(BOM + "ünï\r\n".encode())) == ["ünï\r\n"]
    assert read(tmp_path, f"a{suffix}", compress(b"text")) == ["text"]
    assert read(tmp_path, "told-by-its-first-bytes", compress(b"text")) == ["text"]
    assert read(tmp_path, f"empty.txt{suffix}", compress(b"")) == [""]
    with pytest.raises(UserError, match=r"markup.*: holds JSON, and its name does not say so"):
        read(tmp_path, f"markup{suffix}", compress(LINES))
    long = b"".join(b'{"text": "%d"}\n' % number**9 for number in range(10_000))
    whole = [str(number**9) for number in range(10_000)]
    assert read(tmp_path, f"long.jsonl{suffix}", compress(long)) == whole
    cut = BadRecords(skip=True)
    documents = read(tmp_path, f"cut.jsonl{suffix}", compress(long)[:-20], bad_records=cut)
    assert documents == whole[: len(documents)]
    assert len(documents) > 5000 or suffix == ".bz2"
    assert cut.count == 1
    assert " file (" in cut.listed[0]["reason"]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("read_characters", [1, 7, 1 << 20])
def test_json_that_is_no_lines(tmp_path, monkeypatch, indent, read_characters):
    monkeypatch.setattr(json_values, "_READ_CHARACTERS", read_characters)
    as_json = lambda value: BOM + json.dumps(value, indent=indent).encode()  # noqa: E731
    assert read(tmp_path, "a.json", as_json(RECORDS)) == TEXTS
    assert read(tmp_path, "a.json", as_json(TEXTS)) == TEXTS
    assert read(tmp_path, "a.json", as_json(RECORDS[1])) == TEXTS[1:2]
    assert read(tmp_path, "a.json", as_json([])) == []
    assert read(tmp_path, "a.json", b"".join(json.dumps(r, indent=1).encode() for r in RECORDS)) == TEXTS
    assert read(tmp_path, "a.json", json.dumps(RECORDS, ensure_ascii=False).encode()) == TEXTS


def test_a_json_array_is_read_bit_by_bit():
    drawn = []
    item = json.dumps({"text": "x" * 1000}).encode()
    chunks = (drawn.append(number) or (b"[" if not number else b",") + item for number in range(5000))
    values = json_values.read_values(chunks)
    assert next(values)["text"] == "x" * 1000
    assert len(drawn) * len(item) < 3 << 20


def test_a_huge_value_in_small_chunks_is_one_value():
    content = json.dumps([{"text": "ü" * 3_000_000}, {"text": "b"}], ensure_ascii=False).encode()
    chunks = (content[start : start + 1001] for start in range(0, len(content), 1001))
    assert [len(value["text"]) for value in json_values.read_values(chunks)] == [3_000_000, 1]


@pytest.mark.parametrize("options", [{}, {"row_group_size": 2}, {"compression": "zstd", "use_dictionary": False}])
def test_parquet(tmp_path, options):
    assert read(tmp_path, "a.parquet", parquet(**options)) == TEXTS
    assert read(tmp_path, "a.PQ", parquet("content", **options), text_key="content") == TEXTS
    assert read(tmp_path, "a.parquet", parquet("meta", [{"raw": text} for text in TEXTS]), text_key="meta.raw") == TEXTS
    assert read(tmp_path, "a.parquet", parquet("text", [text.encode() for text in TEXTS])) == TEXTS
    left_out = BadRecords(skip=True)
    assert read(tmp_path, "a.parquet", parquet("text", [b"a", b"\xff", None, b"b"]), bad_records=left_out) == ["a", "b"]
    assert [bad["place"].rpartition("/")[2] for bad in left_out.listed] == ["a.parquet: row 2", "a.parquet: row 3"]


@pytest.mark.parametrize(("module", "name"), [("zstandard", "a.jsonl.zst"), ("pyarrow.parquet", "a.parquet")])
def test_a_missing_library_is_named_and_no_bad_record(tmp_path, monkeypatch, module, name):
    content = zstd(LINES) if "zst" in name else parquet()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"^{tmp_path}/{name}: reading .* needs .*; pip install .*data\]'$"):
        read(tmp_path, name, content, bad_records=BadRecords(skip=True))


def test_the_key_of_the_text(tmp_path):
    assert read(tmp_path, "a.jsonl", LINES, text_key="meta.raw") == [text.upper() for text in TEXTS]
    assert read(tmp_path, "a.jsonl", b'{"a.b": "x", "a": {"b": "y"}}', text_key="a.b") == ["x"]
    assert read(tmp_path, "a.json", json.dumps([{"content": "x"}]).encode(), text_key="content") == ["x"]


@pytest.mark.parametrize(
    "content",
    [
        b"{ 1, 2 };\nint main() {}\n",
        b"[1, 2, 3][0]\nprint(1)\n",
        b"{'text': 'python'}\n",
        b"[link](target) and more\n",
        b"[1]\nA note.\n[2]\nAnother.\n",
        b"{}\nvoid f()\n{}\n",
        b"# a heading\n" + LINES.splitlines(keepends=True)[0],
        b"{{ template }}",
        b"[",
        b'"a string"',
        b"[section]\nkey = 1\n",
        b"",
    ],
)
@pytest.mark.parametrize("name", ["a.py", "a.txt", "a"])
def test_text_that_looks_a_little_like_json_is_text(tmp_path, name, content):
    if content.startswith(b"# a"):
        content += b"more\n" * 3
    assert read(tmp_path, name, content) == [content.decode()]


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        BOM + b"\n" + LINES,
        json.dumps(RECORDS).encode(),
        json.dumps(RECORDS[0], indent=2).encode(),
        json.dumps(TEXTS).encode(),
        json.dumps([{"text": "x" * 100_000}]).encode(),
        json.dumps({"text": "x" * 100_000}).encode() + b"\n",
        json.dumps({"rows": list(range(50_000))}, indent=1).encode(),
        b"# a comment\n" + LINES,
        b"{bad\n" + LINES,
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a", "a.json.1", "a.jsonl.bak", "a.geojson", "a.ipynb"])
def test_markup_is_never_text_by_accident(tmp_path, name, content):
    with pytest.raises(UserError, match=rf"{name}: holds JSON, and its name does not say so; give format=jsonl or"):
        read(tmp_path, name, content)
    if content == LINES:
        assert read(tmp_path, name, content, format="jsonl") == TEXTS
        assert read(tmp_path, name, content, format="json") == TEXTS
    assert read(tmp_path, name, content, format="text") == [content.removeprefix(BOM).decode()]


def archive(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as opened:
            opened.writestr("a.txt", "text")
    else:
        with tarfile.open(fileobj=file, mode=kind) as opened:
            opened.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\xff", "is not UTF-8 .byte 3."),
        ("a.txt", "text".encode("utf-16"), "is UTF-16 or UTF-32; convert it to UTF-8"),
        ("a.jsonl", LINES.decode().encode("utf-16"), "is UTF-16 or UTF-32; convert it to UTF-8"),
        ("a.json", "[]".encode("utf-32"), "is UTF-16 or UTF-32; convert it to UTF-8"),
        ("a.txt", "text".encode("utf-16-le"), "holds NUL bytes"),
        ("a.bin", b"\x7fELF\x02\x01\0\0", "holds NUL bytes"),
        ("a.txt", b"%PDF-1.4\n", "is a PDF; extract its text"),
        ("a.zip", archive("zip"), "is a zip archive; unpack it"),
        ("a.tar", archive("w:"), "is a tar archive; unpack it"),
        ("a.tar.gz", archive("w:gz"), "is a tar archive; unpack it"),
        ("a.tgz", archive("w:gz"), "is a tar archive; unpack it"),
        ("a.txt.gz", gzip.compress(gzip.compress(b"text")), "is compressed twice; unpack it once"),
        ("a.jsonl.gz", gzip.compress(gzip.compress(LINES)), "is compressed twice; unpack it once"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', ":2: is not JSON "),
        ("a.jsonl", b'{"text": "ok"}\n\n["text"]\n', ':3: is not an object with a string under "text"'),
        ("a.jsonl", b'{"body": "x", "id": 1}', r':1: has nothing under "text" \(it has "body", "id"\); .*text_key'),
        ("a.jsonl", b'{"text": 1}', ':1: has a number under "text", not a string'),
        ("a.jsonl", b'{"text": null}', ':1: has null under "text", not a string'),
        ("a.jsonl", b'{"text": "\xff"}', ":1: is not UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}', ":1: escapes half of a surrogate pair"),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", ":1: is not JSON"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, ":1: is not JSON"),
        (
            "a.json",
            b'{"name": "package", "version": "1"}',
            r':1: has nothing under "text" \(it has "name", "version"\)',
        ),
        ("a.json", b'{\n  "name": "package"\n}', r': value 1: has nothing under "text" \(it has "name"\)'),
        ("a.json", b'{\n  // a comment\n  "text": 1\n}', ": is not JSON from character 0 on"),
        ("a.json", b'[{"text": "a"}, {"text": "b"} {"text": "c"}]', ": is not JSON from character 30 on .no comma"),
        ("a.json", b'[{"text": "a"}', ": is not JSON from character 14 on .no comma"),
        ("a.json", b'[{"text": "a"}] x', ": is not JSON from character 16 on .something follows"),
        ("a.json", b"plain text", ": is not JSON from character 0 on"),
        ("a.json", b'["\\ud83d"]', ": value 1: escapes half of a surrogate pair"),
        ("a.json", b'["\xff"]', ": value 1: is not UTF-8"),
        ("a.json", b'[["text"]]', ": value 1: is an array, not a string"),
        ("a.jsonl.gz", LINES, ": is not a gzip file; fetch it again, or drop .gz from its name"),
        ("a.txt.zst", b"", ": is not a zstd file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "cut"}\n' * 99, mtime=0)[:-12], ": is not a whole gzip file"),
        ("a.txt.bz2", bz2.compress(b"text")[:-9], ": is not a whole bzip2 file"),
        ("a.txt.xz", lzma.compress(b"text")[:-9], ": is not a whole xz file"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x00\x58\xa1\x00\x00not a real frame", ": is not a whole zstd file"),
        ("a.parquet", b"PAR1" + b"\xff" * 100 + b"PAR1", ": is not a whole Parquet file"),
        ("a.parquet", b"", ": is not a whole Parquet file"),
        ("a.parquet", parquet()[:-10], ": is not a whole Parquet file"),
        ("a.parquet", parquet("content"), r': has nothing under "text" \(it has "id", "content"\); .*text_key'),
        ("a.parquet.gz", gzip.compress(parquet()), ": cannot be read as Parquet from a pipe or a compressed file"),
        ("a.txt", parquet(), ": is a Parquet file; name it .parquet"),
    ],
    # Contents are left out of the names: some hold the time at which they were packed.
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, name, content)
    assert str(caught.value).startswith(f"{tmp_path}/{name}")
    assert "\n" not in str(caught.value)
    left_out = BadRecords(skip=True)
    read(tmp_path, name, content, bad_records=left_out)
    assert left_out.count == 1


def test_bad_records_are_counted_and_listed(tmp_path):
    first, *rest = LINES.splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(first + b'\n{"text": null}\n{"te\n' + b"".join(rest))
    (tmp_path / "b.txt").write_bytes(b"\xff")
    (tmp_path / "c.json").write_bytes(b'["one", 2, "three", {"text": "\\udc00"}, "five", oops]')
    (tmp_path / "d.txt").write_bytes(b"last")
    left_out = BadRecords(skip=True)
    documents = list(read_documents([f"{tmp_path}/*"], bad_records=left_out))
    assert documents == [*TEXTS, "one", "three", "five", "last"]
    places = [bad["place"].removeprefix(f"{tmp_path}/") for bad in left_out.listed]
    assert places == ["a.jsonl:3", "a.jsonl:4", "b.txt", "c.json: value 2", "c.json: value 4", "c.json"]
    assert left_out.count == len(places)


def test_a_text_that_fails_the_check_is_a_bad_record(tmp_path):
    def check(text):
        if text == "first":
            raise BadRecordError("is too long")

    with pytest.raises(UserError, match=r"a.jsonl:1: is too long$"):
        read(tmp_path, "a.jsonl", LINES, check=check)
    assert read(tmp_path, "a.jsonl", LINES, check=check, bad_records=BadRecords(skip=True)) == TEXTS[1:]


def test_directories_are_searched_where_the_pattern_says(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "y" / "deep.txt").write_text("deep")
    (tmp_path / "x" / "near.txt").write_text("near")
    assert list(read_documents([f"{tmp_path}/*/*.txt"])) == ["near"]
    assert sorted(read_documents([f"{tmp_path}/**/*.txt"])) == ["deep", "near"]


def test_relative_pattern(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    assert list(read_documents(["*.txt"])) == ["a"]
    assert list(read_documents(["a.txt"])) == ["a"]


def test_a_pipe_is_read_once(tmp_path):
    for name, expected in (("a.txt", ["text"]), ("a.json", TEXTS)):
        os.mkfifo(tmp_path / name)
        content = b"text" if name == "a.txt" else LINES
        writer = threading.Thread(target=(tmp_path / name).write_bytes, args=(content,))
        writer.start()
        assert list(read_documents([f"{tmp_path}/{name}"])) == expected
        writer.join()


def test_a_file_name_that_is_no_utf8_can_be_listed(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")
    with open(name, "wb") as file:
        file.write(b"\xff")
    left_out = BadRecords(skip=True)
    assert list(read_documents([name], bad_records=left_out)) == []
    left_out.first().encode()


def test_what_exists_is_no_pattern(tmp_path):
    for name in ("a[1].txt", "a1.txt", "what?.txt", "whatx.txt"):
        (tmp_path / name).write_text(name)
    assert list(read_documents([f"{tmp_path}/a[1].txt"])) == ["a[1].txt"]
    assert list(read_documents([f"{tmp_path}/what?.txt"])) == ["what?.txt"]
    (tmp_path / "a[1].txt").unlink()
    assert list(read_documents([f"{tmp_path}/a[1].txt"])) == ["a1.txt"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "is a directory; name files in it: '.*/[*]'"),
        ("nosuch*", "matches no file"),
        ("nosuch/a.txt", "matches no file"),
    ],
)
def test_patterns_that_match_nothing(tmp_path, pattern, message):
    with pytest.raises(UserError, match=f"^{tmp_path}/{pattern.replace('*', '.')}: {message}"):
        list(read_documents([f"{tmp_path}/{pattern}"], bad_records=BadRecords(skip=True)))


@pytest.mark.parametrize(
    "content",
    [
        b'[\n {"text": "a"},\n {"text": "b"},\n',
        b'{"text": "a",}',
        b'{"text": "cut',
        b'data: {"text": "a"}\n\ndata: {"text": "b"}\n',
        b'\x1e{"text": "a"}\n\x1e{"text": "b"}\n',
    ],
    ids=["cut array", "comma too many", "cut object", "event stream", "text sequence"],
)
def test_json_that_is_damaged_or_marked_is_no_text_either(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match="holds JSON"):
        list(read_documents([str(tmp_path / "a.txt")]))


def test_a_file_is_read_once_whatever_its_path(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("once")
    (tmp_path / "link.txt").symlink_to("a.txt")
    monkeypatch.chdir(tmp_path)
    assert list(read_documents(["a.txt", str(tmp_path / "a.txt"), "*.txt"])) == ["once"]


def test_a_long_first_line_hides_no_json_lines(tmp_path):
    lines = [json.dumps({"text": "x" * 3_000_000}), '{"text": oops}', '{"text": "kept"}']
    (tmp_path / "a.json").write_text("\n".join(lines))
    bad_records = BadRecords(skip=True)
    texts = list(read_documents([str(tmp_path / "a.json")], bad_records=bad_records))
    assert (list(map(len, texts)), bad_records.count) == ([3_000_000, 4], 1)


def array_record(path, records):
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def test_array_record_holds_text_or_objects(tmp_path):
    file = tmp_path / "a.array_record"
    array_record(file, [b'{"text": "an object"}', "plain \u00fc".encode(), b"\xff", b'{"a": 1}', b"{ no JSON", b""])
    left_out = BadRecords(skip=True)
    documents = list(read_documents([str(file)], bad_records=left_out))
    assert documents == ["an object", "plain \u00fc", "{ no JSON", ""]
    assert [bad["place"] for bad in left_out.listed] == [f"{file}: record 3", f"{file}: record 4"]
    assert left_out.kinds == {"not UTF-8": 1, "no text": 1}


@pytest.mark.parametrize("spoil", [lambda data: data[:-50], lambda data: b"garbage", lambda data: b""])
def test_a_damaged_array_record_file_is_named(tmp_path, spoil):
    file = tmp_path / "a.arrayrecord"
    array_record(file, [b"text"])
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(UserError, match=r"a\.arrayrecord: is not a whole ArrayRecord file"):
        list(read_documents([str(file)]))


def test_array_record_is_read_from_local_files_alone(tmp_path):
    file = tmp_path / "a.array_record"
    array_record(file, [b"text"])
    (tmp_path / "a.array_record.gz").write_bytes(gzip.compress(file.read_bytes()))
    with pytest.raises(
        UserError, match=r"record\.gz: cannot be read as ArrayRecord from a bucket, a pipe or a compressed"
    ):
        list(read_documents([f"{tmp_path}/a.array_record.gz"]))


def test_documents_of_dolma(tmp_path):
    record = {
        "id": "0001",
        "text": "A document.",
        "source": "wiki",
        "added": "2024-01-01T00:00:00.000Z",
        "created": "2020-01-01T00:00:00.000Z",
        "metadata": {"text": "not this one"},
    }
    assert read(tmp_path, "v1.jsonl.gz", gzip.compress(json.dumps(record).encode() + b"\n")) == ["A document."]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.txt", "a.parquet"])
def test_the_bytes_that_are_read_add_up_to_the_size_of_the_file(tmp_path, name):
    lines = LINES * 1000
    content = {"a.jsonl.gz": gzip.compress(lines), "a.parquet": parquet()}.get(name, lines)
    if name == "a.txt":
        content = b"text"
    (tmp_path / name).write_bytes(content)
    read_bytes = []
    assert list(read_file(epath.Path(tmp_path / name), advance=read_bytes.append))
    assert sum(read_bytes) == len(content)
    assert min(read_bytes) >= 0


_OBJECTS = [json.dumps({"text": text}).encode() for text in ("a", "\u2028\n", "b" * 90)]
lines = st.sampled_from([b"", b" ", b"\r", *_OBJECTS])


@settings(max_examples=50, deadline=None)
@given(st.lists(lines, min_size=1, max_size=12), st.booleans(), st.integers(1, 150))
def test_ranges_of_lines_hold_the_documents_of_the_file(tmp_path_factory, lines, ends, size):
    file = epath.Path(tmp_path_factory.mktemp("lines") / "a.jsonl")
    content = b"\n".join(lines) + b"\n" * ends
    file.write_bytes(content)
    ranges = line_ranges(file, file_state(file), AUTO, size)
    if len(content) <= size:
        assert ranges == [None]
        return
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert ranges[-1].stop == len(content)
    assert all(start < stop and content[start - 1 : start] in (b"", b"\n") for start, stop in ranges)
    assert all(stop - start <= size + max(map(len, lines)) for start, stop in ranges)
    read_bytes, texts = [], []
    for within in ranges:
        texts += read_file(file, within=within, advance=read_bytes.append)
    assert texts == list(read_file(file))
    assert sum(read_bytes) == len(content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.jsonl", gzip.compress(LINES)),
        ("a.json", LINES),
        ("a.txt", b"text\n" * 9),
        ("a.array_record", b"\n" * 99),
    ],
)
def test_other_files_are_not_divided(tmp_path, name, content):
    file = epath.Path(tmp_path / name)
    file.write_bytes(content)
    assert line_ranges(file, file_state(file), AUTO, 3) == [None]
