"""The report: complete, self-contained, and safe to open whatever the models wrote."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from flexolmo_jax.errors import ArgumentError, UserError
from flexolmo_jax.evaluation import plots, report
from flexolmo_jax.evaluation.loss import Loss, ModelResults

DOMAINS = ["public", "code", "news"]
SHARES = {"anchor": 0.25, "code": 0.45, "news": 0.3}


def losses(values, shares=SHARES, size=1000):
    """{corpus: loss} of bits per byte, {corpus: value}."""
    return {corpus: Loss(3, 12_345, size, value * math.log(2) * size, shares) for corpus, value in values.items()}


BITS = {
    "base": {"public": 1.92, "code": 3.16, "news": 2.39},
    "base + code": {"public": 2.11, "code": 2.58, "news": 2.61},
    "both": {"public": 1.934, "code": 2.741, "news": 2.118},
    "both without news": {"public": 1.931, "code": 2.7, "news": 2.4},
}
RESULTS = {
    "base": ModelResults(["anchor"], losses(BITS["base"])),
    "base + code": ModelResults(["anchor", "code"], losses(BITS["base + code"])),
    "both": ModelResults(["anchor", "code", "news"], losses(BITS["both"]), {"news": losses(BITS["both without news"])}),
}
FACTS = {"expert": "news", "files": 12345, "guarantee": "exact, before any tuning"}
SAMPLE = {"title": "code", "prompt": "def f", "text": "(x):\n    return x", "experts": SHARES}
CURVES = {
    "anchor": [
        {"step": i, "loss": 5 / (i + 1), "tokens": 2048.0} | ({"evaluation/code": 3.0} if i % 50 == 0 else {})
        for i in range(200)
    ],
    "expert code": [{"step": 1, "loss": 2.5}],
}
OPTIONS = {
    "certificates": [report.Certificate("Opt-out certificate", FACTS, True)],
    "curves": CURVES,
    "samples": [SAMPLE],
    "settings": {"d_model": 128, "tokens": 1_228_800, "device": "CPU"},
}
HOSTILE = (
    "</pre><script>alert(\"x\")</script><img src=http://evil.example/a.png onerror='x'>&{{ title }}\x00\x1b[0m\ud800"
)


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
    report.write_report(path, RESULTS, **OPTIONS)
    return Page(path)


def write(tmp_path, results, **options):
    report.write_report(tmp_path / "report.html", results, **options)
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
    for scores in BITS.values():
        for value in [*scores.values(), sum(scores.values()) / len(scores)]:
            assert f"{value:.3f}" in page.text
    for result in RESULTS.values():
        for loss in result.losses.values():
            assert f"{loss.nats / loss.tokens:.3f}" in page.text
    for difference in (1.934 - 1.92, 2.741 - 3.16, 2.4 - 2.118):  # against the anchor; then after the opt-out
        assert f"{difference:+.3f}".replace("-", "\N{MINUS SIGN}") in page.text
    for expected in ("25%", "45%", "12,345", "2,048", "exact, before any tuning", "1,228,800", "    return x"):
        assert expected in page.text
    assert "lowers the average from 2.490 to 2.264 bits per byte" in page.text


def test_page_tables_line_up(page):
    scores = page.rows[: len(BITS) + 1]
    assert scores[0] == ["model", *DOMAINS, "average"]
    assert [row[0] for row in scores[1:]] == list(BITS)
    assert {len(row) for row in scores} == {len(DOMAINS) + 2}
    nats, page.rows = page.rows[len(scores) :][: len(RESULTS) + 1], page.rows[len(scores) + len(RESULTS) + 1 :]
    assert [row[0] for row in nats] == ["model", *RESULTS]
    assert {len(row) for row in nats} == {len(DOMAINS) + 1}
    assert page.rows[: len(RESULTS) + 1] == [
        ["model", "contributed experts"], ["base", "none"], ["base + code", "code"], ["both", "code, news"],
    ]  # fmt: skip
    assert {len(row) for row in page.rows[len(RESULTS) + 1 :]} == {4}  # corpora and their sizes; runs and their ends
    assert "text-align: right" in page.source
    assert "tabular-nums" in page.source


def test_best_of_each_column_is_bold(page):
    for value in ("1.920", "2.580", "2.118", "2.264"):
        assert f"<td><b>{value}</b></td>" in page.source
    assert page.source.count("<td><b>") == 4


def test_plots_are_described_and_their_ids_unique(page):
    described = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(described) == page.tags.count("svg") == 5
    assert all(described)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for _, name, value in page.attributes if name == "xlink:href"}
    assert used | set(re.findall(r"url\(#([^)]*)\)", page.source)) <= set(ids)


def test_no_placeholder_colour_remains(page):
    assert plots._INK not in page.source
    assert plots._RULE not in page.source


def test_page_is_deterministic(page, tmp_path):
    assert write(tmp_path, RESULTS, **OPTIONS).source == page.source


def test_hostile_text_is_only_text(tmp_path):
    name = '"><b>-->$y$'
    loss = losses({name: 2.0}, {name: 1.0})
    results = {
        "anchor": ModelResults(["anchor"], loss, certificate={"removed": [{"name": name}], "guarantee": HOSTILE}),
        f"anchor + {name}": ModelResults(["anchor", name], loss),
        name: ModelResults(["anchor", name, "other"], loss, {name: {}}),
    }
    page = write(
        tmp_path,
        results,
        title=HOSTILE,
        introduction=HOSTILE,
        certificates=report.opt_out_certificates(results),
        samples=[{"title": name, "prompt": HOSTILE, "text": HOSTILE, "experts": {name: 1.0}}],
        curves={name: [{"step": 1, "loss": 1.0, f"evaluation/{name}": 1.0}]},
        settings={HOSTILE: HOSTILE},
    )
    assert_fetches_nothing(page)
    assert '<script>alert("x")</script>' in page.text
    assert "{{ title }}" in page.text
    # Columns of the three heat maps; two models, an opt-out and an expert beside them; a panel of a plot.
    assert page.labels.count(name) == 8
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", page.source)


@pytest.mark.parametrize("missing", ["curves", "certificates", "samples", "settings", "all"])
def test_optional_sections_may_be_missing(tmp_path, missing):
    options = {key: value for key, value in OPTIONS.items() if missing not in (key, "all")}
    page = write(tmp_path, RESULTS, **options)
    titles = {"curves": "Training", "certificates": "certificate", "samples": "Samples", "settings": "Settings"}
    for key, title in titles.items():
        assert (title in page.text) == (key in options)


@pytest.mark.parametrize("labels", [[], ["base"], ["both"], ["base + code", "both"], ["base", "base + code"]])
def test_any_set_of_models(tmp_path, labels):
    results = {label: RESULTS[label] for label in labels}
    page = write(tmp_path, results, curves={"run": [{"step": 1, "evaluation/code": 2.0}]})
    assert "nan" not in page.text.lower()
    assert [row[0] for row in page.rows[1 : 1 + len(labels)]] == [label for label in BITS if label in labels]
    assert ("opt-out costs" in page.text) == ("both" in labels)
    assert ("Share of the routing weight" in page.text) == (labels not in ([], ["base"]))


def test_several_merged_models_have_a_matrix_each(tmp_path):
    other = RESULTS["both"]._replace(without={"news": losses(BITS["base"])})
    page = write(tmp_path, {"first": RESULTS["both"], "second": other})
    described = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert [text.split(":")[0] for text in described] == ["second", "without news", "without news", "anchor", "anchor"]
    assert "+0.419" in page.text.replace("\N{MINUS SIGN}", "-")  # code, which the second loses most on


def test_models_are_compared_with_the_reference(tmp_path):
    page = write(tmp_path, RESULTS, reference="both")
    assert f"{3.16 - 2.741:+.3f}" in page.text
    with pytest.raises(ArgumentError, match=r"reference=nosuch: .* base, base \+ code, both"):
        write(tmp_path, RESULTS, reference="nosuch")


def test_certificate_of_an_opted_out_model(tmp_path):
    certificate = {"removed": [{"name": "code"}, {"name": "news"}], "guarantee": "exact: all of it"}
    results = {"left": RESULTS["base"]._replace(certificate=certificate), "both": RESULTS["both"]}
    (found,) = report.opt_out_certificates(results)
    assert (found.holds, found.facts["experts removed"]) == (True, "code, news")
    assert "certificate of left" in write(tmp_path, results, certificates=[found]).text


def test_unmeasured_corpus_is_a_dash(tmp_path):
    results = {"base": RESULTS["base"], "code": ModelResults(["anchor", "code"], losses({"code": 2.58}))}
    assert ["code", "-", "2.580", "-", "-"] in write(tmp_path, results).rows


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
