"""What an actor does with a block and with a part: encode, commit, keep, join. Without Ray."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from s4g_ray.config.data_schema import DataConfig
from s4g_ray.config.training_schema import ModelConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.image_table import ImageTable, View
from s4g_ray.data.images import load_view
from s4g_ray.data.tables.embedding_table import ROWS_PER_GROUP, encode_part, join_parts
from s4g_ray.encoder.checkpoint import save_checkpoint
from s4g_ray.encoder.embedding.block_encoder import BlockEncoder, StoppedError, order_of_files
from s4g_ray.encoder.embedding.outcomes import EncodingJob, rows_key
from s4g_ray.encoder.embedding.part_plan import PlannedPart, plan_parts
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics
from s4g_ray.errors import BadImageError, GpuMemoryError, RunError
from s4g_ray.storage.manifest import Part, open_published, read_part
from tests.conftest import NUM_TEST, SIZE, write_synthetic
from tests.support.sample_images import with_uris

MODEL = ModelConfig(name="test_convnext", pretrained=False)
BATCH = 4


def make_encoder(num_decoders: int = 2, ahead_bytes: int = 10**6) -> BlockEncoder:
    return BlockEncoder(MODEL, 1, num_decoders, ahead_bytes, torch.device("cpu"))


@pytest.fixture(scope="module")
def encoder() -> BlockEncoder:
    return make_encoder()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("weights") / "c")
    save_checkpoint(uri, Encoder.build(MODEL, seed=1), None, epoch=0, step=0)
    return uri


@dataclass
class Scene:
    """A job on the test queries of a data set."""

    job: EncodingJob
    table: ImageTable
    part: PlannedPart

    def vectors_of(self, part: Part | None) -> Any:
        """Return the embeddings of a written file."""
        assert part is not None
        column = pq.read_table(Path(self.job.target, part.name))["embedding"].combine_chunks()
        return column.flatten().to_numpy().reshape(part.rows, -1)

    def wanted(self, rows: range) -> Any:
        """Return the embeddings that the encoder gives image by image."""
        images = [load_view(self.table, row, "queries", self.job.data, seed=3) for row in rows]
        oracle = Encoder.build(MODEL, seed=1).eval()
        with torch.inference_mode():
            vectors = oracle.embed(torch.stack(images), "queries")
            return torch.nn.functional.normalize(vectors).numpy()


def make_scene(dataset: GeoDataset, weights: str, target: Path, **values: Any) -> Scene:
    data = DataConfig(uri=dataset.uri, query_size=(SIZE, SIZE), reference_size=(SIZE, SIZE))
    table = dataset.table("queries", ["test"])
    (part,) = plan_parts("queries", table.ids, table.place_ids, part_rows=99, batch_size=BATCH)
    sha256 = open_published(weights, "checkpoint").info["weights_sha256"]
    job = EncodingJob(
        token="t",
        key="k",
        checkpoint=weights,
        weights_sha256=sha256,
        numerics=Numerics(),
        target=str(target),
        batch_size=BATCH,
        dtype="float32",
        data=data,
        fingerprint=dataset.fingerprint,
        splits={"queries": ("test",)},
        seed=3,
        resumes=False,
    )
    return Scene(replace(job, **values), table, part)


@pytest.fixture
def scene(synthetic: GeoDataset, weights: str, tmp_path: Path) -> Scene:
    return make_scene(synthetic, weights, tmp_path / "table")


def test_a_block_holds_the_embeddings_of_its_images_in_order(
    encoder: BlockEncoder, scene: Scene
) -> None:
    (block,) = scene.part.blocks
    result = encoder.encode(scene.job, block)
    assert (result.images, result.reused, encoder.progress()) == (NUM_TEST, False, {})
    np.testing.assert_allclose(
        scene.vectors_of(result.written.part), scene.wanted(range(NUM_TEST)), atol=1e-5
    )


@pytest.mark.parametrize("ahead_bytes", [1, 10**6])
@pytest.mark.parametrize("num_decoders", [1, 5])
def test_the_bits_do_not_depend_on_decoders_and_memory(
    encoder: BlockEncoder, scene: Scene, num_decoders: int, ahead_bytes: int
) -> None:
    (block,) = scene.part.blocks
    first = encoder.encode(scene.job, block).written.part
    other = make_encoder(num_decoders, ahead_bytes).encode(scene.job, block).written.part
    assert first is not None
    assert other == first  # with its sha256


def test_images_are_read_in_the_order_in_which_they_are_stored(scene: Scene) -> None:
    texts = replace(scene.table.uris, codes=np.array([1, 0] * (NUM_TEST // 2), dtype=np.int32))
    offsets = np.arange(NUM_TEST)[::-1].copy()
    order = order_of_files(replace(scene.table, uris=texts, offsets=offsets))
    assert order.tolist() == [*range(23, 0, -2), *range(22, -1, -2)]


def test_a_committed_block_is_kept_and_a_damaged_one_or_of_another_key_is_not(
    encoder: BlockEncoder, scene: Scene
) -> None:
    (block,) = scene.part.blocks
    resumed = replace(scene.job, resumes=True)
    assert not encoder.encode(resumed, block).reused
    found = encoder.encode(resumed, block)
    assert found.reused
    assert not encoder.encode(replace(resumed, key="another"), block).reused
    assert not encoder.encode(resumed, block).reused  # overwritten by that
    assert found.written.part is not None
    path = Path(scene.job.target, found.written.part.name)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert not encoder.encode(resumed, block).reused


def test_blocks_become_a_part_that_is_committed(
    encoder: BlockEncoder, synthetic: GeoDataset, weights: str, tmp_path: Path
) -> None:
    scene = make_scene(synthetic, weights, tmp_path / "table", batch_size=1)
    ids = scene.table.ids
    (part,) = plan_parts("queries", ids, scene.table.place_ids, part_rows=99, batch_size=1)
    assert len(part.blocks) == 3
    assert encoder.find_part(scene.job, part) is None
    blocks = [encoder.encode(scene.job, block).written for block in part.blocks]
    written = encoder.join(scene.job, part, blocks)
    assert written.part is not None
    read_part(scene.job.target, written.part)
    assert written.part.name == "queries/part-00000.parquet"
    table = pq.read_table(Path(scene.job.target, written.part.name))
    assert table["id"].to_pylist() == ids.tolist()
    np.testing.assert_allclose(
        scene.vectors_of(written.part), scene.wanted(range(NUM_TEST)), atol=1e-5
    )
    assert encoder.find_part(scene.job, part) == written
    assert encoder.join(scene.job, part, blocks) == written  # by an actor that took it over
    assert encoder.find_part(replace(scene.job, key="another"), part) is None
    left = [p.name for p in Path(scene.job.target, "_work").rglob("*") if p.is_file()]
    assert left == ["part-00000.parquet.json"]


def test_parts_have_row_groups_of_bounded_size() -> None:
    count = ROWS_PER_GROUP + 100
    ids = np.arange(count)
    vectors = np.zeros((count, 2), dtype=np.float32)
    pieces = [
        encode_part(ids[own], ids[own], vectors[own], "float16")
        for own in (slice(0, 1000), slice(1000, None))
    ]
    parquet = pq.ParquetFile(io.BytesIO(join_parts(pieces)))
    sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    assert sizes == [ROWS_PER_GROUP, 100]
    assert parquet.read()["id"].to_pylist() == ids.tolist()


@pytest.fixture
def damaged(weights: str, tmp_path: Path) -> Scene:
    """The test queries of a data set, of which one image is no image."""
    dataset = write_synthetic(tmp_path / "damaged")
    (tmp_path / "damaged/images/queries/100.png").write_bytes(b"\x89PNG nothing")
    scene = make_scene(dataset, weights, tmp_path / "table", resumes=True)
    skip = scene.job.data.model_copy(update={"on_bad_image": "skip"})
    scene.job = replace(scene.job, data=skip)
    return scene


def test_bad_images_are_left_out_and_named_and_checked_again_on_resuming(
    encoder: BlockEncoder, damaged: Scene, tmp_path: Path
) -> None:
    (block,) = damaged.part.blocks
    found = encoder.encode(damaged.job, block)
    assert found.written.bad_ids == (100,)
    assert found.written.bad[0].startswith("id 100, ")
    assert found.written.part is not None
    assert found.written.part.rows == NUM_TEST - 1
    found = encoder.encode(damaged.job, block)
    assert found.reused
    fail = damaged.job.data.model_copy(update={"on_bad_image": "fail"})
    for fresh in (False, True):
        job = replace(damaged.job, data=fail, resumes=not fresh)
        with pytest.raises(BadImageError, match=r"^id 100, "):
            encoder.encode(job, block)
    image = tmp_path / "damaged/images/queries/100.png"
    image.write_bytes((tmp_path / "damaged/images/queries/101.png").read_bytes())
    repaired = encoder.encode(damaged.job, block)
    assert not repaired.reused
    assert repaired.written.num_rows == NUM_TEST


def test_a_part_without_a_readable_image_has_no_file(
    encoder: BlockEncoder, damaged: Scene, tmp_path: Path
) -> None:
    for path in (tmp_path / "damaged/images/queries").iterdir():
        path.write_bytes(b"")
    blocks = [encoder.encode(damaged.job, block).written for block in damaged.part.blocks]
    assert [block.part for block in blocks] == [None]
    written = encoder.join(damaged.job, damaged.part, blocks)
    assert written.part is None
    assert len(written.bad) == NUM_TEST
    assert encoder.find_part(damaged.job, damaged.part) == written


def test_the_key_of_rows_changes_with_each_of_their_inputs(synthetic: GeoDataset) -> None:
    table = synthetic.table("queries", ["train"])
    five = table.take(np.arange(5))
    six = table.take(np.arange(6))
    later = table.take(np.arange(1, 6))
    turned = replace(five, headings=np.full(5, 90.0, dtype=np.float32))
    moved = with_uris(five, {4: Path("elsewhere.png")})
    ranged = replace(five, offsets=np.array([-1, -1, -1, -1, 512]))
    changed = (five, six, turned, moved, ranged, later)
    keys = {rows_key("job", "queries", rows) for rows in changed}
    keys.add(rows_key("job", "references", five))
    keys.add(rows_key("another", "queries", five))
    assert len(keys) == 8
    read_again = synthetic.table("queries", ["train"]).take(np.arange(5))
    assert rows_key("job", "queries", read_again) in keys


def test_a_data_set_that_changed_since_it_was_planned_is_refused(
    encoder: BlockEncoder, scene: Scene
) -> None:
    (block,) = scene.part.blocks
    for other in (replace(block, digest="x"), replace(block, rows=block.rows + 999)):
        with pytest.raises(RunError, match="was changed while it was embedded; start again"):
            encoder.encode(scene.job, other)


def test_embeddings_that_are_not_finite_are_named(encoder: BlockEncoder, scene: Scene) -> None:
    (block,) = scene.part.blocks
    with pytest.raises(
        RunError, match=rf"of queries id 97 is not finite \(6 such in {block.name}\), computed"
    ):
        encoder.encode(replace(scene.job, numerics=Infinite()), block)


def test_a_gpu_without_memory_is_an_error_with_a_remedy(
    encoder: BlockEncoder, scene: Scene
) -> None:
    (block,) = scene.part.blocks
    with pytest.raises(
        GpuMemoryError,
        match=r"no GPU memory for a batch of 4 images: lower embedding\.batch_size, .*raise"
        r" embedding\.gpus_per_actor, .*torch says: CUDA out of memory\. Tried to allocate 2\.00",
    ):
        encoder.encode(replace(scene.job, numerics=FullGpu()), block)
    assert not encoder.encode(scene.job, block).reused  # the buffers are back


def test_a_job_that_has_ended_gets_no_more_blocks(encoder: BlockEncoder, scene: Scene) -> None:
    (block,) = scene.part.blocks
    encoder.stop("other")
    encoder.encode(scene.job, block)
    encoder.stop(scene.job.token)
    with pytest.raises(StoppedError, match="was given up"):
        encoder.encode(scene.job, block)
    encoder.stop("")


def test_weights_are_read_again_only_when_they_change(scene: Scene, tmp_path: Path) -> None:
    encoder = make_encoder()
    (block,) = scene.part.blocks
    first = encoder.encode(scene.job, block).written
    gone = replace(scene.job, checkpoint=str(tmp_path / "none"))
    assert encoder.encode(gone, block).written == first
    other = replace(gone, weights_sha256="x")
    with pytest.raises(RunError, match="holds no published checkpoint"):
        encoder.encode(other, block)
    with pytest.raises(RunError, match=r"no longer holds the model\.safetensors"):
        encoder.encode(replace(scene.job, weights_sha256="x"), block)
    assert json.loads(Path(scene.job.target, f"_work/{block.name}.json").read_text())["key"]


@dataclass(frozen=True)
class FullGpu(Numerics):
    """Numerics whose passes find no memory, as torch says it."""

    def embed(self, encoder: Encoder, images: torch.Tensor, view: View) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


@dataclass(frozen=True)
class Infinite(Numerics):
    """Numerics that give one row of each batch that is not finite."""

    def embed(self, encoder: Encoder, images: torch.Tensor, view: View) -> torch.Tensor:
        vectors = super().embed(encoder, images, view).clone()
        vectors[1] = torch.inf
        return vectors


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_gpu_gives_the_embeddings_of_the_cpu_from_few_page_locked_buffers(
    scene: Scene, channels_last: bool
) -> None:
    (block,) = scene.part.blocks
    job = replace(scene.job, numerics=Numerics(channels_last=channels_last))
    for ahead_bytes in (1, 10**6):
        gpu = BlockEncoder(MODEL, 1, 3, ahead_bytes, torch.device("cuda"))
        for _ in range(5):  # a buffer that is overwritten while it is copied would show
            found = gpu.encode(job, block)
            np.testing.assert_allclose(
                scene.vectors_of(found.written.part), scene.wanted(range(NUM_TEST)), atol=1e-3
            )
        gpu.release_memory()
