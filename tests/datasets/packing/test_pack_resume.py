from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest

from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.datasets.packing import pack as packing
from s4g_ray.datasets.packing import tar_shards
from s4g_ray.datasets.packing.layout import PackOptions
from s4g_ray.datasets.packing.pack import Packed, pack
from s4g_ray.errors import InputError, RunError, StoreError
from s4g_ray.storage import files, manifest
from s4g_ray.storage.manifest import open_published
from tests.support.packed_datasets import (
    NUM_IMAGES,
    SMALL,
    files_of,
    images_of,
    shards_of,
)

ROOT = Path(__file__).parents[3]
KILLED = """
import os, signal, sys
from s4g_ray.datasets.packing.pack import pack
from tests.support.packed_datasets import SMALL

def die(done, total):
    if done >= 45:
        os.kill(os.getpid(), signal.SIGKILL)

pack(sys.argv[1], sys.argv[2], SMALL, num_threads=2, on_progress=die)
"""


def test_a_killed_pack_resumes_and_writes_the_bytes_of_an_uninterrupted_one(
    mixed: GeoDataset, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", KILLED, mixed.uri, str(tmp_path / "killed")]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.raises(InputError, match="no data set at"):
        open_dataset(str(tmp_path / "killed"))
    with pytest.raises(
        InputError,
        match=r"part of data set mixed \(.*\) with quality=95, but mixed \(.*\) with quality=80 is",
    ):
        pack(mixed.uri, str(tmp_path / "killed"), PackOptions(shard_mb=0.02, quality=80))
    seen: list[tuple[int, int]] = []
    resumed = pack(
        mixed.uri, str(tmp_path / "killed"), SMALL, on_progress=lambda *now: seen.append(now)
    )
    assert 2 <= resumed.reused_shards < resumed.num_shards
    assert seen[-1] == (NUM_IMAGES, NUM_IMAGES)
    whole = pack(mixed.uri, str(tmp_path / "whole"), SMALL, num_threads=1)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    assert resumed.dataset.fingerprint == whole.dataset.fingerprint != mixed.fingerprint


def test_a_finished_pack_is_returned_as_it_is_and_anything_else_there_is_refused(
    mixed: GeoDataset, packed: Packed, tmp_path: Path
) -> None:
    before = files_of(packed.dataset.uri)
    again = pack(mixed.uri, packed.dataset.uri, SMALL)
    assert (again.reused_shards, again.num_images) == (packed.num_shards, packed.num_images)
    assert files_of(packed.dataset.uri) == before
    for options in (PackOptions(shard_mb=0.02, reference_size=(8, 8)), PackOptions()):
        with pytest.raises(
            InputError, match="holds a data set already; remove it or choose another folder"
        ):
            pack(mixed.uri, packed.dataset.uri, options)
    shutil.copytree(packed.dataset.uri, tmp_path / "copy")
    Path(shards_of(open_dataset(str(tmp_path / "copy")))[0]).unlink()
    with pytest.raises(RunError, match=r"queries-test-00000.tar is in the manifest but missing"):
        pack(mixed.uri, str(tmp_path / "copy"), SMALL)


def test_a_shard_that_the_store_garbles_is_found_and_written_again(
    mixed: GeoDataset, packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = [0]  # the byte to garble

    @contextmanager
    def garbling(uri: str) -> Iterator[IO[bytes]]:
        with tar_shards.new_object(uri) as file:
            yield file
            if uri.endswith("references-val-00000.tar"):
                file.seek(at[0])
                file.write(b"x")

    monkeypatch.setattr(packing, "new_object", garbling)
    for at[0], message in (
        (700, r"tar: references/\d{9}\.\w+ at byte 512 is not what"),
        (3, r"tar is not what was"),
    ):
        with pytest.raises(RunError, match=message):
            pack(mixed.uri, str(tmp_path / "packed"), SMALL)
    monkeypatch.undo()
    found = pack(mixed.uri, str(tmp_path / "packed"), SMALL)
    assert found.reused_shards > 0
    assert images_of(found.dataset) == images_of(packed.dataset)


def test_fixed_images_are_packed_by_the_next_call_and_no_file_of_an_earlier_attempt_stays(
    mixed: GeoDataset, damaged: GeoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "packed"
    skip = replace(SMALL, on_bad_image="skip")
    monkeypatch.setattr(packing, "publish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pack(damaged.uri, str(target), skip)
    monkeypatch.undo()
    shutil.copytree(
        Path(mixed.uri).parent / "pictures",
        Path(damaged.uri).parent / "pictures",
        dirs_exist_ok=True,
    )
    for name in ("queries-train-00099.tar", ".queries-train-00000.tar.0a1b2c3d.tmp", "mine.tar"):
        (target / "shards" / name).write_bytes(b"another's")
    found = pack(damaged.uri, str(target), skip)
    assert found.reused_shards > 0
    assert (found.skipped, found.num_images) == ((), NUM_IMAGES)
    published = {part.name for part in open_published(f"{target}/shards", packing.KIND).parts}
    assert set(files_of(target / "shards")) == {*published, files.MANIFEST, "mine.tar"}


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("name", ["read_json", "open_part"])
def test_a_store_that_does_not_answer_is_an_error_and_not_taken_for_an_empty_one(
    finished: bool,
    name: str,
    mixed: GeoDataset,
    packed: Packed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "packed"
    if finished:
        shutil.copytree(packed.dataset.uri, target)
    else:
        monkeypatch.setattr(packing, "publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pack(mixed.uri, str(target), SMALL)
        monkeypatch.undo()
    before = files_of(target)
    # every module that looks the function up
    modules = (files, manifest) if name == "read_json" else (packing,)
    function = getattr(modules[0], name)

    def fail_in_target(uri: str, *more: Any) -> Any:
        if uri.startswith(str(target)) and not uri.endswith("dataset.json"):
            raise StoreError("did not answer")
        return function(uri, *more)

    for module in modules:
        monkeypatch.setattr(module, name, fail_in_target)
    with pytest.raises(StoreError, match="did not answer"):
        pack(
            mixed.uri,
            str(target),
            replace(SMALL, quality=80) if name == "read_json" else SMALL,
            num_threads=1,
        )
    assert files_of(target) == before


@pytest.mark.parametrize("claim", ["[]", "{}", '{"key": "other"}', '{"key'])
def test_an_altered_claim_is_written_again(claim: str, mixed: GeoDataset, tmp_path: Path) -> None:
    (tmp_path / "_work").mkdir()
    (tmp_path / "_work/pack.json").write_text(claim)
    assert pack(mixed.uri, str(tmp_path), PackOptions()).num_images == NUM_IMAGES
