"""Tables of results: aligned in a log, the best value bold on a terminal, never cut."""

import io
import re

from rich.console import Console

from flexolmo_jax.evaluation.results import bits_per_byte_table, loss_table
from flexolmo_jax.tables import show

DOMAINS = ["public", "code"]
BITS = {
    "anchor": {"public": 1.5, "code": 3.0},
    "pair:code": {"public": 2.4, "code": 2.2},
    "merged": {"public": 1.7, "code": 2.3},
    "merged-without:news": {"public": 1.6, "code": 2.5},
}


def printed(table, **options):
    stream = io.StringIO()
    show(table, Console(file=stream, **options))
    return stream.getvalue()


def test_bits_per_byte_table_in_a_log():
    lines = [line for line in printed(bits_per_byte_table(BITS, DOMAINS)).splitlines() if line.strip()]
    assert len({len(line) for line in lines}) == 1
    assert "".join(lines).isascii()
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(BITS)
    assert lines[2].split() == ["|", "anchor", "|", "1.500", "|", "3.000", "|", "2.250", "|"]
    assert lines[2].split("|")[2:4] == ["  1.500 ", " 3.000 "]  # right aligned under "public" and "code"


def test_bits_per_byte_table_marks_the_best_on_a_terminal():
    text = printed(bits_per_byte_table(BITS, DOMAINS), force_terminal=True, width=100)
    assert re.findall(r"\x1b\[1m\s*(\d\.\d{3})", text) == ["1.500", "2.200", "2.000"]


def test_wide_table_is_neither_cut_nor_folded():
    bits = {model: {f"domain-{i}": 1 + i / 1000 for i in range(20)} for model in BITS}
    text = printed(bits_per_byte_table(bits, [f"domain-{i}" for i in range(20)]), width=80)
    assert len(text.strip().splitlines()) == len(BITS) + 2
    assert all(f"{1 + i / 1000:.3f}" in text for i in range(20))
    assert "domain-19" in text


def test_loss_table():
    row = {"documents": 12, "tokens": 34567, "bytes": 150_000}
    rates = {"nats_per_token": 2.13, "bits_per_byte": 0.831, "perplexity": 8.415}
    text = printed(loss_table({"corpus/[bold]code": row | rates, "empty": {"documents": 0}}), width=60)
    lines = text.strip().splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == [
        "data", "documents", "tokens", "bytes", "nats per token", "bits per byte", "perplexity",
    ]  # fmt: skip
    assert lines[2].split()[1::2] == ["corpus/[bold]code", "12", "34,567", "150,000", "2.130", "0.831", "8.415"]
    assert lines[3].split()[1::2] == ["empty", "0", "-", "-", "-", "-", "-"]
