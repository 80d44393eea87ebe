"""The report: complete, self-contained, and safe to open whatever the models wrote."""

import copy
import json
import re
from html.parser import HTMLParser

import pytest

from flexolmo_jax.errors import UserError
from flexolmo_jax.evaluation import figures, report

DOMAINS = ["public", "code", "news"]
BITS = {
    "merged": {"public": 1.934, "code": 2.741, "news": 2.118},
    "merged-without:news": {"public": 1.931, "code": 2.7, "news": 2.4},
    "anchor": {"public": 1.92, "code": 3.16, "news": 2.39},
    "pair:code": {"public": 2.11, "code": 2.58, "news": 2.61},
}
SHARES = {"anchor": 0.25, "code": 0.45, "news": 0.3}
RESULTS = {
    "bits_per_byte": BITS,
    "routing": {domain: SHARES for domain in DOMAINS},
    "opt_out": {"expert": "news", "files": 12345, "identical": True, "guarantee": "exact, before any tuning"},
    "samples": [{"domain": "code", "prompt": "def f", "text": "(x):\n    return x", "experts": SHARES}],
    "settings": {"d_model": 128, "tokens": 1_228_800, "device": "CPU"},
}
CURVES = {
    "anchor": [
        {"step": i, "loss": 5 / (i + 1), "tokens": 2048.0} | ({"evaluation/code": 3.0} if i % 50 == 0 else {})
        for i in range(200)
    ],
    "expert code": [{"step": 1, "loss": 2.5}],
}
HOSTILE = "</pre><script>alert(\"x\")</script><img src=http://evil.example/a.png onerror='x'>&$tiles\x00\x1b[0m\ud800"


class Page(HTMLParser):
    """Checks that elements nest, and keeps attributes, visible text and tables."""

    VOID = ("meta", "link", "img", "br", "input")

    def __init__(self, path):
        super().__init__()
        self.open, self.attributes, self.tags, self.rows, self.text, self.labels = [], [], [], [], "", ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if "text" in self.open:  # of an SVG
            self.labels += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    report.write_report(path, RESULTS, CURVES)
    return Page(path)


def write(tmp_path, results, curves):
    report.write_report(tmp_path / "report.html", results, curves)
    return Page(tmp_path / "report.html")


def assert_fetches_nothing(page):
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "xlink:href", "action"):
            assert value.startswith("#"), (tag, name, value)
    assert all(url.startswith("#") for url in re.findall(r"url\(['\"]?([^)]*)", page.source))
    assert "@import" not in page.source


def test_page_fetches_nothing(page):
    assert_fetches_nothing(page)


def test_page_has_every_number(page):
    for row in BITS.values():
        for value in [*row.values(), sum(row.values()) / len(row)]:
            assert f"{value:.3f}" in page.text
    for difference in (1.934 - 1.92, 2.741 - 3.16, 2.4 - 2.118):  # against the anchor; then after the opt-out
        assert f"{difference:+.3f}".replace("-", "\N{MINUS SIGN}") in page.text
    for expected in ("25%", "45%", "12,345", "2,048", "exact, before any tuning", "1,228,800", "    return x"):
        assert expected in page.text
    assert "lowers the average from 2.490 to 2.264 bits per byte" in page.text


def test_page_tables_line_up(page):
    scores = page.rows[: len(BITS) + 1]
    assert scores[0] == ["model", *DOMAINS, "average"]
    assert [row[0] for row in scores[1:]] == ["anchor", "anchor + code", "merged", "merged without news"]
    assert {len(row) for row in scores} == {len(DOMAINS) + 2}
    assert {len(row) for row in page.rows[len(scores) :]} == {4}  # run, steps, tokens per step, loss
    assert "text-align: right" in page.source
    assert "tabular-nums" in page.source


def test_best_of_each_column_is_bold(page):
    for value in ("1.920", "2.580", "2.118", "2.264"):
        assert f"<td><b>{value}</b></td>" in page.source
    assert page.source.count("<td><b>") == 4


def test_figures_are_described_and_their_ids_unique(page):
    described = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(described) == page.tags.count("svg") == 5
    assert all(described)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for _, name, value in page.attributes if name == "xlink:href"}
    assert used | set(re.findall(r"url\(#([^)]*)\)", page.source)) <= set(ids)


def test_no_placeholder_ink_remains(page):
    assert figures._INK not in page.source
    assert figures._RULE not in page.source


def test_page_is_deterministic(page, tmp_path):
    assert write(tmp_path, RESULTS, CURVES).source == page.source


def test_hostile_text_is_only_text(tmp_path):
    name = '"><b>-->$y$'
    bits = {"anchor": {name: 2.0}, f"pair:{name}": {name: 1.0}, "merged": {name: 1.5}, f"merged-without:{name}": {}}
    results = {
        "bits_per_byte": bits,
        "routing": {name: {name: 1.0}},
        "opt_out": {"expert": name, "files": 1, "identical": False, "guarantee": HOSTILE},
        "samples": [{"domain": name, "prompt": HOSTILE, "text": HOSTILE, "experts": {name: 1.0}}],
        "settings": {HOSTILE: HOSTILE},
    }
    page = write(tmp_path, results, {name: [{"step": 1, "loss": 1.0, f"evaluation/{name}": 1.0}]})
    assert_fetches_nothing(page)
    assert '<script>alert("x")</script>' in page.text
    assert page.labels.count(name) == 8  # three columns, four rows and a panel
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", page.source)


@pytest.mark.parametrize("missing", ["routing", "opt_out", "samples", "settings", "all"])
def test_optional_parts_may_be_missing(tmp_path, missing):
    results = copy.deepcopy(RESULTS)
    for key in RESULTS.keys() - {"bits_per_byte"} if missing == "all" else {missing}:
        del results[key]
    page = write(tmp_path, results, {} if missing == "all" else CURVES)
    titles = {"routing": "largest share", "opt_out": "certificate", "samples": "writes", "settings": "Settings"}
    for key, title in titles.items():
        assert (title in page.text) == (key in results)


@pytest.mark.parametrize("models", [[], ["anchor"], ["merged"], ["pair:code", "merged-without:news"]])
def test_any_set_of_models(tmp_path, models):
    bits = {model: BITS[model] for model in models}
    page = write(tmp_path, {"bits_per_byte": bits}, {"run": [{"step": 1, "evaluation/code": 2.0}]})
    assert "nan" not in page.text.lower()


def test_unmeasured_domain_is_a_dash(tmp_path):
    bits = {"anchor": {"public": 1.92, "code": 3.16}, "pair:code": {"code": 2.58}}
    page = write(tmp_path, {"bits_per_byte": bits}, {})
    assert ["anchor + code", "-", "2.580", "-"] in page.rows


def test_read_curve_merges_what_a_resumed_run_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}, {"step": 2, "evaluation/code": 2.0}]
    records += [{"step": 1, "loss": 2.9}, {"step": 3, "loss": 2.2}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert report.read_curve(path) == [
        {"step": 1, "loss": 2.9},
        {"step": 2, "loss": 2.5, "evaluation/code": 2.0},
        {"step": 3, "loss": 2.2},
    ]


@pytest.mark.parametrize("line", ["{", '{"loss": 1.0}', "[1]", "3"])
def test_read_curve_names_the_bad_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: .*\"step\""):
        report.read_curve(path)
