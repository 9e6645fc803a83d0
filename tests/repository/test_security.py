"""Files from storage are data: none runs code, fills the memory or names a file elsewhere."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from s4g_ray.config.loading import dump_config, load_config
from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.data.images import FORMATS, MAX_PIXELS, ImageFile, decode, decode_jpeg, read_images
from s4g_ray.data.tables.batch_plan import load_plan
from s4g_ray.data.tables.embedding_table import read_embedding_part, read_part_head
from s4g_ray.data.tables.neighbor_graph import (
    read_graph_part,
    read_graph_places,
    read_graph_samples,
)
from s4g_ray.encoder.checkpoint import Checkpoint, load_encoder, save_checkpoint
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.pretrained import read_state
from s4g_ray.errors import InputError, RunError
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Part, open_published, publish, write_part
from s4g_ray.storage.part_commits import read_commit, write_commit
from tests.conftest import tiny_config, write_synthetic
from tests.support.dangerous_calls import dangerous_calls, unguarded_parquet_reads
from tests.support.resealed import reseal
from tests.support.sample_images import encode_image

ROOT = Path(__file__).parents[2]


class Payload:
    """An object whose pickle runs code when it is loaded: it makes the folder `trace`."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def payload(tmp_path: Path) -> Payload:
    """Return a payload that has run once, to show that it works; its folder is removed."""
    working = Payload(tmp_path / "ran")
    pickle.loads(pickle.dumps(working))
    working.trace.rmdir()
    return working


def python_files() -> list[str]:
    folders = ("s4g_ray", "jobs", "benchmarks", "cluster")
    return sorted(
        str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py")
    )


@pytest.mark.parametrize("name", python_files())
def test_no_module_makes_a_call_that_could_run_code_from_storage(name: str) -> None:
    assert dangerous_calls((ROOT / name).read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads as f",
        "import ray\nray.cloudpickle.loads(b)",
        "from ray import cloudpickle",
        "import joblib",
        "import torch\ntorch.load(f)",
        "import torch as t\nt.load(f, weights_only=False)",
        "from torch import load\nload(f, weights_only=flag)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import numpy as np\nnp.load(f, allow_pickle=flag)",
        "import yaml\nyaml.load(t, Loader=yaml.Loader)",
        "from yaml import unsafe_load\nunsafe_load(t)",
        "import yaml\nyaml.full_load(t)",
        "eval(t)",
        "exec(t)",
        "import os\nos.system(t)",
        "import subprocess\nsubprocess.run(t, shell=True)",
        "from subprocess import run\nrun(t, shell=flag)",
        "import tarfile\ntarfile.open(f).extractall(p)",
        "archive.extract(m, p, filter='fully_trusted')",
        "import shutil\nshutil.unpack_archive(f)",
        "import torch\ntorch.hub.load(r, m)",
        "from PIL import Image\nImage.open(f)",
        "import torch\ntorch.load(f, weights_only=True, **more)",
        "import torch\ntorch.serialization.load(f)",
        "import subprocess\nsubprocess.getoutput(t)",
        "import os\nos.execvp(t, a)",
        "import numpy as np\nnp.load(f, None, True)",
        "import numpy as np\nnp.load(f, **more)",
        "from numpy.lib.npyio import load\nload(f, allow_pickle=True)",
        "import builtins\nbuiltins.eval(t)",
        "import ray\nray.data.read_parquet(u)",
        "import torch\nload = torch.load\nload(f)",
        "from PIL import Image\nImage.open(f, **more)",
    ],
)
def test_the_check_finds_each_dangerous_call(source: str) -> None:
    assert len(dangerous_calls(source)) == 1


def test_the_check_leaves_safe_calls_alone() -> None:
    safe = (
        "import io, subprocess, tarfile, numpy as np, torch, yaml\n"
        "torch.load(f, weights_only=True)\n"
        "np.load(f)\n"
        "np.load(f, allow_pickle=False)\n"
        "yaml.safe_load(t)\n"
        "subprocess.run([a], shell=False)\n"
        "tarfile.open(f).extractall(p, filter='data')\n"
        "model.eval()\n"
        "re.compile(t)\n"
    )
    assert dangerous_calls(safe) == []


def test_every_read_of_a_parquet_file_refuses_extension_types_or_checks_the_schema() -> None:
    files = [ROOT / name for name in python_files() if name.startswith("s4g_ray")]
    unguarded = [path for path in files if unguarded_parquet_reads(path.read_text())]
    # validation.py accepts only the exact types of its schema
    assert unguarded == [ROOT / "s4g_ray/data/validation.py"]


def test_a_parquet_read_beside_a_guarded_one_is_found() -> None:
    source = """
def read(f):
    table = pq.read_table(f)
    other = pq.read_table(f)
    whole = refuse_extension_types(pq.ParquetFile(f).read(columns=c), u)
    return refuse_extension_types(table, u), other, pq.ParquetFile(f).read(columns=c)
"""
    assert unguarded_parquet_reads(source) == [4, 6]
    batches = "def read(f):\n    {}\n    return list(f.iter_batches())"
    guard = "refuse_extension_types(f.schema_arrow.empty_table(), u)"
    assert unguarded_parquet_reads(batches.format("pass")) == [3]
    assert unguarded_parquet_reads(batches.format(guard)) == []


def replace_part(folder: str, name: str, data: bytes) -> None:
    """Replace a file of a published folder and its manifest, as anyone who may write there can."""
    manifest = open_published(folder, "checkpoint")
    parts = [
        write_part(folder, name, data, 1) if part.name == name else part for part in manifest.parts
    ]
    publish(folder, "checkpoint", parts, info=manifest.info)


def pickles(payload: Payload) -> list[bytes]:
    """Return files that run the payload: a bare pickle, torch's format and its old format."""
    found = [pickle.dumps({"optimizer": payload})]
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save({"optimizer": payload}, buffer, _use_new_zipfile_serialization=zipped)
        found.append(buffer.getvalue())
    return found


def test_a_checkpoint_whose_files_are_pickles_is_refused_and_runs_nothing(
    synthetic: GeoDataset, payload: Payload, tmp_path: Path
) -> None:
    config, folder = tiny_config(tmp_path / "run", synthetic.uri), str(tmp_path / "checkpoint")
    encoder = Encoder.build(config.model)
    save_checkpoint(folder, encoder, {"optimizer": {}}, epoch=1, step=2)
    assert Checkpoint.read(folder).training_state() is not None
    for data in pickles(payload):
        replace_part(folder, "training_state.pt", data)
        with pytest.raises(
            RunError,
            match=r"training_state\.pt holds (more than tensors|the bytes .*no state).*not loaded",
        ):
            Checkpoint.read(folder).training_state()
        replace_part(folder, "model.safetensors", data)
        with pytest.raises(InputError, match=r"model\.safetensors is not a safetensors file"):
            load_encoder(config.model, folder)
    for header in (
        struct.pack("<Q", 2**62),
        struct.pack("<Q", 2**27) + b"{" * 64,
        struct.pack("<Q", 2) + b"[]",
    ):
        replace_part(folder, "model.safetensors", header)
        with pytest.raises(InputError, match="is not a safetensors file"):
            load_encoder(config.model, folder)
    assert not payload.trace.exists()


def test_weights_that_are_pickles_are_refused_and_run_nothing(
    payload: Payload, tmp_path: Path
) -> None:
    for number, data in enumerate(pickles(payload)):
        for ending in ("pth", "pt", "safetensors"):
            path = tmp_path / f"weights{number}.{ending}"
            path.write_bytes(data)
            with pytest.raises(InputError, match="not tensors alone"):
                read_state(str(path))
    assert not payload.trace.exists()


def test_a_configuration_or_weights_that_would_run_code_are_exit_2(
    synthetic: GeoDataset, payload: Payload, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    text = dump_config(tiny_config(tmp_path / "run", synthetic.uri))
    tag = f"!!python/object/apply:os.mkdir [{payload.trace}]"
    path.write_text(text + f"seed: {tag}\n")
    with pytest.raises(InputError, match="not valid YAML"):
        load_config(path)
    path.write_text(text)
    with pytest.raises(InputError, match="the value is not valid YAML"):
        load_config(path, [f"seed={tag}"])
    (tmp_path / "weights.pth").write_bytes(pickles(payload)[1])
    arguments = ["evaluate", str(tmp_path / "weights.pth"), synthetic.uri, "--config", str(path)]
    done = subprocess.run(
        [sys.executable, "-m", "s4g_ray.cli.app", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "not tensors alone" in done.stderr
    assert "Traceback" not in done.stderr
    assert not payload.trace.exists()


def with_objects(table: pa.Table, name: str, payload: Payload) -> bytes:
    """Return Parquet with one column of objects, or of lists of one, as Ray Data writes them."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

    objects: Any = ArrowPythonObjectArray.from_objects([payload] * len(table))
    if pa.types.is_list(table.schema.field(name).type):
        objects = pa.ListArray.from_arrays(
            pa.array(np.arange(len(table) + 1, dtype=np.int32)), objects
        )
    buffer = io.BytesIO()
    pq.write_table(table.set_column(table.column_names.index(name), name, objects), buffer)
    return buffer.getvalue()


def test_objects_in_a_parquet_file_are_not_unpickled(payload: Payload, tmp_path: Path) -> None:
    """Graphs, embedding tables and plans; the process knows Ray Data's types, as a driver does."""
    folder = str(tmp_path)
    ids = pa.array(np.arange(4))
    graph = pa.table({"place_id": ids, "neighbors": [[1], [2], [3], [0]], "scores": [[0.5]] * 4})
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(8, np.float32)), 2)
    embedded = pa.table({"id": ids, "place_id": ids, "embedding": vectors})
    metadata = {"s4g.num_batches": "2", "s4g.batch_size": "2", "s4g.gallery_size": "0"}
    plan = pa.table({"query_id": ids, "reference_id": ids}).replace_schema_metadata(metadata)
    cases: list[tuple[pa.Table, str, Callable[[Part], Any]]] = [
        (graph, "place_id", lambda part: read_graph_part(folder, part)),
        (graph, "neighbors", lambda part: read_graph_part(folder, part, with_scores=True)),
        (graph, "scores", lambda part: read_graph_part(folder, part, with_scores=True)),
        (graph, "neighbors", lambda part: read_graph_samples(folder, part)),
        (graph, "place_id", lambda part: list(read_graph_places(folder, [part]))),
        (embedded, "place_id", lambda part: read_embedding_part(folder, part)),
        (embedded, "place_id", lambda part: read_part_head(folder, part)),
        (plan, "reference_id", lambda part: load_plan(f"{folder}/{part.name}")),
    ]
    for table, name, read in cases:
        part = write_part(folder, "part.parquet", with_objects(table, name, payload), 4)
        with pytest.raises(
            RunError,
            match=f"column '{name}' has the extension type ray.data.arrow_pickled_object",
        ):
            read(part)
        assert not payload.trace.exists()
    files.write_bytes(f"{folder}/part.parquet", with_objects(graph[:1], "neighbors", payload))
    read_table = pq.read_table(f"{folder}/part.parquet")  # without refuse_extension_types
    read_table["neighbors"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    assert payload.trace.exists()


def test_objects_in_a_data_set_are_not_unpickled(payload: Payload, tmp_path: Path) -> None:
    dataset = write_synthetic(tmp_path / "data")
    (file,) = (tmp_path / "data/queries").glob("*.parquet")
    for name in ("uri", "region", "split", "place_id"):
        whole = file.read_bytes()
        file.write_bytes(with_objects(pq.read_table(file), name, payload))
        reseal(tmp_path / "data")
        with pytest.raises(
            InputError, match=f"column '{name}' is extension<ray.data.arrow_pickled_object"
        ):
            open_dataset(dataset.uri)
        file.write_bytes(whole)
    assert not payload.trace.exists()


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/hostname",
        "s3://other/secret",
        "a/../../secret",
        "..",
        "",
        ".",
        "a/.",
        "a//b",
        "part\0",
    ],
)
def test_a_manifest_that_names_a_file_outside_its_folder_is_refused(
    name: str, tmp_path: Path
) -> None:
    folder = str(tmp_path / "published")
    (tmp_path / "secret").write_bytes(b"secret")
    part = write_part(folder, "part", b"secret", 1)
    publish(folder, "checkpoint", [part])
    manifest = files.read_json(f"{folder}/{files.MANIFEST}")
    manifest["parts"][0]["name"] = name
    files.write_json(f"{folder}/{files.MANIFEST}", manifest)
    with pytest.raises(RunError, match="names a file outside itself"):
        open_published(folder, "checkpoint")
    write_commit(f"{folder}/commit", "key", part)
    assert (
        read_commit(f"{folder}/commit", "key", lambda v: Part(**v), lambda p: [(folder, p)]) == part
    )
    files.write_json(f"{folder}/commit", {"key": "key", "outcome": {**asdict(part), "name": name}})
    assert (
        read_commit(f"{folder}/commit", "key", lambda v: Part(**v), lambda p: [(folder, p)]) is None
    )


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '"x"',
        '{"kind": "checkpoint"}',
        "[" * 100_000,
        *(
            f'{{"kind": "checkpoint", "parts": [], "stamp": null, "info": {info}}}'
            for info in ("[]", "null", '"x"')
        ),
    ],
)
def test_an_invalid_manifest_is_a_run_error(text: str, tmp_path: Path) -> None:
    (tmp_path / files.MANIFEST).write_text(text)
    with pytest.raises(RunError, match=str(tmp_path)):
        open_published(str(tmp_path), "checkpoint")


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG file of a few bytes whose header claims this size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    made = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b"")]
    packed = (
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in made
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def jpeg(width: int, height: int) -> bytes:
    """Return a small JPEG whose header claims this size."""
    data = bytearray(encode_image("JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def read_one(path: Path) -> Any:
    (found,) = read_images([ImageFile(7, str(path), None, None, 0.0)])
    return found


@pytest.mark.parametrize(
    "data", [png(60_000, 60_000), jpeg(60_000, 60_000), png(20_000, MAX_PIXELS // 20_000 + 1)]
)
def test_an_image_of_too_many_pixels_is_a_bad_image_by_its_header(
    data: bytes, tmp_path: Path
) -> None:
    (tmp_path / "bomb").write_bytes(data)
    bad = read_one(tmp_path / "bomb")
    assert str(bad).startswith(f"id 7, {tmp_path}/bomb: Image size (")
    assert (
        f"exceeds limit of {MAX_PIXELS} pixels: decoding it could take all memory; cut it up"
        in str(bad)
    )


def test_the_limit_itself_is_not_refused_by_the_header() -> None:
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ValueError, match="truncated"):
        decode(png(20_000, MAX_PIXELS // 20_000))


def test_a_jpeg_whose_two_readers_see_different_sizes_is_left_to_pillow() -> None:
    assert decode_jpeg(encode_image("JPEG"), (32, 32)) is not None
    assert decode_jpeg(jpeg(60_000, 60_000), (32, 32)) is None


@pytest.mark.parametrize(
    ("name", "head"), [(b"zTXt", b"key\0\0"), (b"iTXt", b"key\0\1\0\0\0"), (b"iCCP", b"name\0\0")]
)
def test_a_png_whose_text_or_profile_unpacks_to_256_mib_takes_little_memory(
    name: bytes, head: bytes
) -> None:
    code = zlib.compressobj(9)
    compressed = [code.compress(bytes(2**20)) for _ in range(256)]  # 256 MiB
    bomb = head + b"".join(compressed) + code.flush()
    assert len(bomb) < 2**19
    tracemalloc.start()
    with suppress(ValueError):  # the image is refused, or its text ignored
        decode(png(8, 8, (name, bomb)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**25


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_each_format_that_is_named_is_read(kind: str) -> None:
    assert decode(encode_image(kind)).shape == (3, 32, 32)


def test_postscript_is_not_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would pass it to Ghostscript."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\nmkdir -p {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "image").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    )
    assert "not an image file of a known format" in str(read_one(tmp_path / "image"))
    assert not (tmp_path / "ran").exists()
