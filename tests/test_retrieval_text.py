"""What each format gives, and what is refused: broken, protected, too large, and files made to hurt."""

from __future__ import annotations

import io
import struct
import zipfile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pypdf import PdfReader
from pypdf.errors import DependencyError

from middleware.retrieval.text import Block, ExtractionError, Limits, absent, extract, kind_of
from middleware.retrieval.text.passages import passages
from tests.support.documents import bomb, encrypted, pdf, rezipped, word

WORD = word(lambda made: made.add_paragraph("Hello from Word."))
PDF = pdf(["Hello from a page."])
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


def blocks(content: bytes, name: str, **limits: Any) -> list[tuple[str, tuple[str, ...]]]:
    return [(block.text, block.heading) for block in extract(content, name, "", Limits(**limits)).blocks]


def text(content: bytes, name: str = "", media_type: str = "") -> str:
    return "\n".join(block.text for block in extract(content, name, media_type).blocks)


def refusal(content: bytes, name: str = "", media_type: str = "", **limits: Any) -> str:
    with pytest.raises(ExtractionError) as caught:
        extract(content, name, media_type, Limits(**limits))
    return str(caught.value)


def read_or_refused(content: bytes, name: str) -> bool:
    """Whether there is text, or a sentence that says why not; any other exception is raised."""
    try:
        return bool(extract(content, name).blocks)
    except ExtractionError as error:
        return str(error).endswith(".")


# Kinds


@pytest.mark.parametrize(
    ("content", "name", "media_type", "kind"),
    [
        (PDF, "notes.txt", "text/plain", "pdf"),
        (b"rubbish\n" + PDF, "", "", "pdf"),
        (b"A PDF begins with %PDF-1.4, they say.", "x.txt", "", "txt"),
        (b"PKZIP was a program.", "x.txt", "", "txt"),
        (WORD, "report.pdf", "application/pdf", "docx"),
        (b"<!DOCTYPE html><p>x", "page.txt", "", "html"),
        (b"\xef\xbb\xbf <!-- saved --><html>", "page.pdf", "application/pdf", "html"),
        (b"<html>x", "read.md", "", "md"),
        (b"# x", "README.MD", "application/octet-stream", "md"),
        (b"a,b", "", "text/csv; charset=utf-8", "csv"),
        (b"a\tb", "x.tsv", "", "csv"),
        (b"{}", "x", "application/json", "json"),
        (b"{}\n{}", "x.jsonl", "", "jsonl"),
        (b"print(1)", "x.py", "", "txt"),
        ("ä".encode("utf-16"), "x", "", "txt"),
    ],
)
def test_the_content_tells_the_kind_then_the_name_then_the_type(content: bytes, name: str, media_type: str, kind: str) -> None:
    assert kind_of(content, name, media_type) == kind


@pytest.mark.parametrize("content", [PNG, b"\x7fELF\x02\x01\0", b"GIF89a\1\0", b"text\0text"])
def test_what_is_no_text_is_refused_with_a_list_of_what_is_taken(content: bytes) -> None:
    told = refusal(content, "x.txt", "text/plain")
    assert "PDF, Word (docx), HTML, Markdown, CSV, JSON" in told


def test_other_archives_and_old_office_files_are_refused_by_name() -> None:
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w") as archive:
        archive.writestr("xl/workbook.xml", "<x/>")
    assert "other than Word's" in refusal(output.getvalue(), "x.docx")
    assert "broken or incomplete" in refusal(WORD[: len(WORD) // 2], "x.docx")
    assert "old or a protected Office file" in refusal(bytes.fromhex("d0cf11e0a1b11ae1") + bytes(512), "x.doc")
    assert refusal(b"just text", "x.pdf") == "The file is called a PDF, but its content is none."


def test_all_that_the_extra_names_is_there() -> None:
    assert absent() == []


def test_sizes_are_bounded() -> None:
    assert refusal(b"12345", bytes=4) == "The file has 5 bytes; the most that is taken is 4."
    assert "more than 4 characters" in refusal(b"12345", characters=4)
    assert refusal(b"") == refusal(b" \n") == "The file is empty."
    assert refusal(b"<p> </p>", "x.html") == "The file has no text."


# Text


@pytest.mark.parametrize(
    "content",
    [
        "Café – “x”".encode(),
        b"\xef\xbb\xbf" + "Café – “x”".encode(),
        "Café – “x”".encode("utf-16"),
        b"\xfe\xff" + "Café – “x”".encode("utf-16-be"),
        "Café – “x”".encode("cp1252"),
    ],
)
def test_text_in_the_usual_encodings(content: bytes) -> None:
    assert text(content, "x.txt") == "Café – “x”"


def test_a_charset_that_is_named_is_heard_where_it_is_not_utf_8() -> None:
    assert text("Привет".encode("koi8-r"), "", "text/plain; charset=koi8-r") == "Привет"
    assert text("“é”".encode("cp1252"), "", 'text/plain; charset="ISO-8859-1"') == "“é”"
    assert text("é".encode(), "", "text/plain; charset=nonsense") == "é"
    assert "neither UTF-8 nor" in refusal(b"\x81\x8d", "x.txt")


def test_what_cannot_be_stored_is_cleaned() -> None:
    assert text("a\r\nb\rc\u00ad\x1bd \ufb01n e\u0301".encode()) == "a\nb\ncd fin é"
    assert text(b'["\\ud800x\\u0000y"]', "x.json") == "\ufffdxy"


# Markdown

MARKDOWN = b"""---
title: A page
---
Before.

# One #
Text of one.

```sh
# no heading
---
```

Two
---
- item
---
~~~
# open to the end
"""


def test_markdown_has_headings_and_whole_fences() -> None:
    assert blocks(MARKDOWN, "x.md") == [
        ("---\ntitle: A page\n---", ()),
        ("Before.", ()),
        ("Text of one.", ("One",)),
        ("```sh\n# no heading\n---\n```", ("One",)),
        ("- item\n---", ("One", "Two")),
        ("~~~\n# open to the end", ("One", "Two")),
    ]


def test_a_fence_is_closed_by_its_own_kind_only() -> None:
    found = extract(b"````\n```\n# x\n````\nafter\n\n| a | b |\n|---|---|\n| 1 | 2 |", "x.md").blocks
    assert found == (
        Block("````\n```\n# x\n````", (), None, "code"),
        Block("after", (), None, "text"),
        Block("| a | b |\n|---|---|\n| 1 | 2 |", (), None, "rows"),
    )


def test_a_heading_with_nothing_under_it_is_text() -> None:
    assert blocks(b"# A\n## B\n# C\n# D\nx", "x.md") == [("B", ("A",)), ("C", ()), ("x", ("D",))]
    assert blocks(b"# Alone", "x.md") == [("Alone", ())]


@given(st.text(st.sampled_from("#-=`~|> \nab"), max_size=80))
def test_nothing_of_markdown_is_lost(source: str) -> None:
    try:
        found = extract(source.encode(), "x.md")
    except ExtractionError:
        assert not set(source) & set("ab")
        return
    kept = " ".join([*(block.text for block in found.blocks), *(name for block in found.blocks for name in block.heading)])
    assert all(kept.count(letter) >= source.count(letter) for letter in "ab")


# HTML

PAGE = """<html><head><title>The title</title><meta charset="koi8-r"><style>x{}</style></head><body>
<nav>Home | About</nav><script>var x = "no";</script><template>no</template><p hidden>no</p><!-- no -->
<p style="color:red; DISPLAY : none">no</p>
<h2>First &amp; last</h2><p>Привет, <b>wor</b>ld<br>again&nbsp;&eacute;</p>
<table><caption>Sums</caption><tr><th>Name<th>Age<tr><td>Ada<td>36<tr><td>Bob<td></table>
<ul><li>one<li>two</ul><pre>a
  b</pre>tail <img alt="a drawing"></body></html>""".encode("koi8-r")


def test_html_has_what_a_reader_sees() -> None:
    assert blocks(PAGE, "x.html") == [
        ("Привет, world again é", ("The title", "First & last")),
        ("Sums\nName: Ada; Age: 36\nName: Bob", ("The title", "First & last")),
        ("- one", ("The title", "First & last")),
        ("- two", ("The title", "First & last")),
        ("a\n  b", ("The title", "First & last")),
        ("tail a drawing", ("The title", "First & last")),
    ]


def test_a_table_that_lays_out_a_page_is_no_table() -> None:
    page = b"<title>no</title><table><tr><td><h1>Head</h1><p>One<p>Two<td><table><tr><td>a<td>b</table></table>"
    assert blocks(page, "x.html") == [("One", ("Head",)), ("Two", ("Head",)), ("a | b", ("Head",))]


def test_a_table_of_headings_alone_is_kept() -> None:
    assert text(b"<table><tr><th>a<th>b</table>", "x.html") == "a | b"


@pytest.mark.parametrize("tag", ["div", "b", "ul><li", "table><tr><td", "blockquote", "nav-x"])
def test_pages_that_nest_without_end_are_read(tag: str) -> None:
    depth = 3000
    assert text(b"<p>first</p>" + f"<{tag}>".encode() * depth + b"deep", "x.html").split()[-1] == "deep"


PIECES = [
    "<p>",
    "</p>",
    "<td>",
    "<table>",
    "<![CDATA[",
    "<!--",
    "-->",
    "<?xml",
    "<!DOCTYPE html>",
    "&#0;",
    "&#x110000;",
    "&amp",
    "<h1>",
    "<",
    ">",
    "a",
]


@given(
    st.lists(
        st.sampled_from([*PIECES, "<nav>", "</nav>", "<a href='", "\ufffe", "<html>", "é", "\x85", "<br/>", "</x>"]), max_size=30
    ).map("".join)
)
def test_no_page_makes_anything_but_text_or_a_clear_error(page: str) -> None:
    assert read_or_refused(page.encode(), "x.html")


def test_a_zero_deep_in_a_page_does_not_end_it() -> None:
    assert text(b"<p>" + b"x " * 40_000 + b"\0 the end", "x.html").endswith("the end")


# CSV


def test_every_row_of_a_csv_file_names_its_values() -> None:
    content = b'name;born;said\r\nAda;1815;"one;\r\ntwo ""three"""\r\nBob;;x\r\n;;\r\nEve;1;y;more\r\n'
    assert text(content, "x.csv").split("\n") == [
        'name: Ada; born: 1815; said: one; two "three"',
        "name: Bob; said: x",
        "name: Eve; born: 1; said: y; more",
    ]


@pytest.mark.parametrize("sign", [",", ";", "\t", "|"])
def test_the_sign_between_cells_is_found(sign: str) -> None:
    rows = [["city", "people, about"], ["Ulm", "126,000"], ["Bonn", "330,000"]]
    content = "\n".join(sign.join(f'"{cell}"' for cell in row) for row in rows)
    assert text(content.encode(), "x.csv") == "city: Ulm; people, about: 126,000\ncity: Bonn; people, about: 330,000"


def test_a_csv_file_without_header_is_rows() -> None:
    assert text(b"1,2\n3,4", "x.csv") == "1 | 2\n3 | 4"
    assert text(b"a,b", "x.csv") == "a | b"


def test_an_unclosed_quote_is_one_long_value_not_an_endless_one() -> None:
    assert text(b'a,b\n1,"' + b"x\n" * 100_000, "x.csv").count("x") == 100_000


@given(st.lists(st.lists(st.text(max_size=5), min_size=1, max_size=4), max_size=6), st.sampled_from(",;\t|"))
def test_no_csv_file_makes_anything_but_text_or_a_clear_error(rows: list[list[str]], sign: str) -> None:
    content = "\n".join(sign.join(row) for row in rows).encode(errors="replace")
    assert read_or_refused(content, "x.csv")


# JSON


def test_json_is_a_line_per_value_with_its_path_as_written() -> None:
    content = b'{"a": {"b": [{"x": 1.50, "y": [1, 2]}, {"x": 12345678901234567890123}]}, "t": true, "t": null, "e": [], "o": {}}'
    assert [block.text for block in extract(content, "x.json").blocks] == [
        "a.b[0].x: 1.50\na.b[0].y: 1, 2",
        "a.b[1].x: 12345678901234567890123",
        "t: true",
        "t: null",
        "e: []",
        "o: {}",
    ]


def test_json_lines_are_a_block_each_and_a_broken_one_is_named() -> None:
    assert [block.text for block in extract(b'{"a": 1}\n\n{"a": "x\\ny"}\n', "x.jsonl").blocks] == ["a: 1", "a: x\ny"]
    assert refusal(b'{"a": 1}\n{"a": \n', "x.jsonl") == "The JSON is broken in line 2, column 7: Expecting value."
    assert refusal(b'{\n"a": 1,\n}', "x.json").startswith("The JSON is broken in line ")


@pytest.mark.parametrize("content", [b"[" * 101 + b"]" * 101, b"[" * 100_000, b'{"a":' * 101 + b"1" + b"}" * 101])
def test_json_that_nests_too_deep_is_refused(content: bytes) -> None:
    assert refusal(content, "x.json") == "The JSON is nested too deep; the most that is taken is 100 levels."


def test_paths_that_multiply_a_small_file_are_bounded() -> None:
    content = b'[{"' + b"k" * 50_000 + b'": {' + b",".join(b'"%d": 1' % number for number in range(2000)) + b"}}]"
    assert "characters of text" in refusal(content, "x.json")


# PDF


def test_a_pdf_has_pages() -> None:
    found = extract(pdf(["The first (1) page.\nA sen-\ntence.", "", "The third page."]), "x.pdf").blocks
    assert [(block.text.split(), block.page) for block in found] == [
        (["The", "first", "(1)", "page.", "A", "sentence."], 1),
        (["The", "third", "page."], 3),
    ]


def test_a_pdf_without_text_says_so() -> None:
    assert refusal(pdf(["", ""])) == "The PDF has no text, only images; run it through text recognition (OCR) first."


def test_a_pdf_with_a_password_is_refused_and_one_with_an_empty_one_is_read() -> None:
    assert refusal(encrypted(PDF, "secret")) == "The PDF needs a password; save it without one."
    assert text(encrypted(PDF, "")).strip() == "Hello from a page."


def test_a_pdf_that_is_protected_by_what_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def decrypt(self: PdfReader, password: str) -> None:
        raise DependencyError("cryptography>=3.1 is required for AES algorithm")

    monkeypatch.setattr(PdfReader, "decrypt", decrypt)
    assert "save it without protection" in refusal(encrypted(PDF, ""))


def test_a_pdf_of_too_many_pages_is_refused() -> None:
    assert refusal(pdf(["x"] * 3), pages=2) == "The PDF has 3 pages; the most that is taken is 2."


def test_a_page_that_unpacks_to_too_much_is_refused() -> None:
    assert refusal(pdf(["x"], bomb(80_000_000))) == "Page 1 of the PDF unpacks to more than is taken."


@given(st.integers(0, len(PDF)), st.integers(0, len(PDF)), st.binary(max_size=8))
def test_a_damaged_pdf_gives_text_or_a_clear_error(begin: int, end: int, put: bytes) -> None:
    content = PDF[:begin] + put + PDF[max(begin, end) :]
    assert read_or_refused(content, "x.pdf")


# Word


def full(made: Any) -> None:
    made.add_heading("The report", 0)
    made.add_heading("Numbers", 1)
    made.add_paragraph("Before the table.")
    table = made.add_table(3, 2)
    for row, cells in enumerate([("Name", "Age"), ("Ada", "36"), ("Bob", "41")]):
        for column, value in enumerate(cells):
            table.cell(row, column).text = value
    made.add_paragraph("First item", style="List Bullet")
    made.add_heading("Deeper", 2)
    made.add_paragraph("Tab\there.")
    made.add_heading("End", 1)


def test_a_word_file_has_headings_tables_and_lists_in_order() -> None:
    assert blocks(word(full), "x.docx") == [
        ("Before the table.", ("The report", "Numbers")),
        ("Name | Age\nAda | 36\nBob | 41", ("The report", "Numbers")),
        ("- First item", ("The report", "Numbers")),
        ("Tab\there.", ("The report", "Numbers", "Deeper")),
        ("End", ("The report",)),
    ]


def test_a_style_that_builds_on_a_heading_is_one() -> None:
    def fill(made: Any) -> None:
        own = made.styles.add_style("Company Chapter", 1)
        own.base_style = made.styles["Heading 1"]
        made.add_paragraph("Chapter", style=own)
        made.add_paragraph("Text.")

    assert blocks(word(fill), "x.docx") == [("Text.", ("Chapter",))]


W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'


def document_xml(body: str, before: str = "") -> bytes:
    return rezipped(WORD, {"word/document.xml": f"{before}<w:document {W}><w:body>{body}</w:body></w:document>".encode()})


def test_what_is_inserted_is_text_and_what_is_deleted_is_not() -> None:
    run, gone = "<w:r><w:t>{}</w:t></w:r>", "<w:del><w:r><w:delText>gone</w:delText></w:r></w:del>"
    inserted, control = f"<w:ins>{run.format('new')}</w:ins>", "<w:sdt><w:sdtContent><w:p>{}</w:p></w:sdtContent></w:sdt>"
    body = f"<w:p>{run.format('Old ')}{inserted}{gone}</w:p>{control.format(run.format('In a control'))}"
    assert text(document_xml(body)) == "Old new\nIn a control"


def test_a_table_with_a_marked_header_names_its_values_and_may_hold_another() -> None:
    cell = "<w:tc><w:p><w:r><w:t>{}</w:t></w:r></w:p>{}</w:tc>"
    inner = f"<w:tbl><w:tr>{cell.format('deep', '')}</w:tr></w:tbl><w:p/>"
    first = f"<w:tr><w:trPr><w:tblHeader/></w:trPr>{cell.format('Name', '')}{cell.format('Age', '')}</w:tr>"
    body = f"<w:tbl>{first}<w:tr>{cell.format('Ada', '')}{cell.format('36', inner)}</w:tr></w:tbl>"
    assert text(document_xml(body)) == "Name: Ada; Age: 36 deep"


def test_a_word_file_that_unpacks_to_too_much_is_refused() -> None:
    told = "The Word file unpacks to more than 1,000,000 bytes, which is the most that is taken."
    assert refusal(rezipped(WORD, {"word/media/x.bin": bytes(2_000_000)}), inflated=1_000_000) == told


def test_an_archive_that_lies_about_its_size_is_refused() -> None:
    """Both in the part's own header and in the table of contents."""
    size = 2_000_000
    content = rezipped(WORD, {"word/document.xml": b" " * size})
    lied = content.replace(struct.pack("<I", size), struct.pack("<I", 100))
    assert lied != content
    assert refusal(lied, inflated=1_000_000) == "The Word file is broken or incomplete."


def test_a_word_file_of_too_many_parts_is_refused() -> None:
    told = refusal(rezipped(WORD, {f"word/{number}.xml": b"" for number in range(50)}), entries=50)
    assert told.endswith("parts; the most that is taken is 50.")


LAUGHS = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("before", [0, 65_530])
def test_xml_entities_are_refused_in_any_encoding(encoding: str, before: int) -> None:
    xml = f"<?xml version='1.0' encoding='{encoding}'?>{' ' * before}{LAUGHS}<w:document {W}><w:body/></w:document>"
    content = rezipped(WORD, {"word/document.xml": xml.encode(encoding)})
    assert refusal(content) == "The Word file declares XML entities, which no honest one does."


def test_a_word_file_with_macros_is_refused_by_name() -> None:
    with zipfile.ZipFile(io.BytesIO(WORD)) as archive:
        types = archive.read("[Content_Types].xml")
    plain = b"vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
    changed = types.replace(plain, b"vnd.ms-word.document.macroEnabled.main+xml")
    assert (
        refusal(rezipped(WORD, {"[Content_Types].xml": changed})) == "The Word file is a template or has macros; save it as docx."
    )


@pytest.mark.parametrize("part", [b"", b"<w:document", b"<a/>", b"\xff\xff", b"<a>" * 5000])
def test_a_broken_part_is_a_broken_file(part: bytes) -> None:
    assert refusal(rezipped(WORD, {"word/document.xml": part})).startswith(("The Word file is broken", "The file has no text"))


@given(st.integers(0, len(WORD)), st.integers(0, 200), st.binary(max_size=4))
def test_a_damaged_word_file_gives_text_or_a_clear_error(begin: int, length: int, put: bytes) -> None:
    assert read_or_refused(WORD[:begin] + put + WORD[begin + length :], "x.docx")


# One line


@pytest.mark.parametrize(("name", "times"), [("x.txt", 600_000), ("x.md", 60_000), ("x.html", 60_000), ("x.csv", 60_000)])
def test_a_line_of_one_or_ten_megabytes_is_cut_into_passages(name: str, times: int) -> None:
    found = passages(extract(b"word and another, " * times, name, "", Limits(characters=20_000_000)))
    assert sum(passage.text.count("another") for passage in found) == times


def test_a_line_of_json_is_cut_into_passages() -> None:
    content = b"[" + b",".join(b'{"k": "a value"}' for _ in range(20_000)) + b"]"
    assert sum(passage.text.count("a value") for passage in passages(extract(content, "x.json"))) == 20_000
