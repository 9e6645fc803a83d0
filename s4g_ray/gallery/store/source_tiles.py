"""Read the references of a data set as tiles of a gallery, and compare them with those it has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s4g_ray.arrays import Bools, Ints
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.format.image_paths import list_prefixes, resolve, shorten
from s4g_ray.data.schema import SPLITS
from s4g_ray.data.sphere import metres_between
from s4g_ray.data.tables.arrow_texts import sort_by_id
from s4g_ray.errors import InputError
from s4g_ray.gallery.store.tiles import DIGEST_BYTES, SCHEMA
from s4g_ray.row_lookup import rows_of

OPTIONAL = ("size_m",)  # columns that older data sets lack
SAME_PLACE_M = 1000.0  # that a tile of unknown size may move, and keep its id
ATTRIBUTES = ("place_id", "lat", "lon", "size_m", "region", "source_id")


def read_source_tiles(dataset: GeoDataset, splits: Sequence[str] | None) -> pa.Table:
    """Read references as rows of SCHEMA, sorted by id; digest and embedded_in are placeholders.

    splits None: all of them. Raises InputError for unknown splits, for none that is left, and for
    references without coordinates, which cannot answer.
    """
    names = [*ATTRIBUTES, "id", "uri", "offset", "length"]
    names = [name for name in names if name in dataset.references.schema.names]
    chosen = None
    if splits is not None:
        unknown = set(splits) - set(SPLITS["references"])
        if unknown:
            raise InputError(f"split {min(unknown)!r} is none of {', '.join(SPLITS['references'])}")
        chosen = pc.field("split").isin(list(splits))
    table = sort_by_id(dataset.references.to_table(columns=names, filter=chosen))
    if not len(table):
        of_splits = f" of split {', '.join(splits)}" if splits is not None else ""
        raise InputError(f"{dataset.uri} holds no references{of_splits}; a gallery needs tiles")
    num_unknown = max(table["lat"].null_count, table["lon"].null_count)
    if num_unknown:
        raise InputError(
            f"{num_unknown} of {len(table)} references of {dataset.uri} have no lat and lon; a"
            " gallery answers with the position of a tile: add them, or leave these rows out"
        )
    columns = {name: table[name] for name in names}
    columns["uri"] = pa.array(_absolute(table["uri"], dataset.images_root), pa.string())
    for name in OPTIONAL:
        columns.setdefault(name, pa.nulls(len(table), SCHEMA.field(name).type))
    columns["size_m"] = _nan_as_null(columns["size_m"])
    columns["digest"] = pa.array([bytes(DIGEST_BYTES)] * len(table), pa.binary(DIGEST_BYTES))
    columns["embedded_in"] = pa.array(np.zeros(len(table), np.int32))
    return pa.table([columns[name].cast(SCHEMA.field(name).type) for name in SCHEMA.names], SCHEMA)


def _absolute(uris: pa.ChunkedArray, folder: str) -> list[str]:
    """Return URIs as an absolute path or with a scheme."""
    return [resolve(folder, uri) for uri in uris.to_pylist()]


def _nan_as_null(column: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    if column.null_count == len(column):
        return column
    return pc.if_else(pc.is_nan(column), None, column)


def refuse_other_places(gallery: str, old: pa.Table, new: pa.Table) -> None:
    """Raise InputError where an id of a data set is that of a tile elsewhere in the gallery.

    Ids of two data sets that do not come from the world grid may be equal by chance.
    """
    rows = rows_of(old["id"].to_numpy(), new["id"].to_numpy())
    both = np.flatnonzero(rows >= 0)
    if not len(both):
        return
    ours = old.take(rows[both])
    theirs = new.take(both)
    metres = metres_between(
        ours["lat"].to_numpy(),
        ours["lon"].to_numpy(),
        theirs["lat"].to_numpy(),
        theirs["lon"].to_numpy(),
    )
    sizes = pc.fill_null(ours["size_m"], SAME_PLACE_M).to_numpy()
    far = np.flatnonzero(metres > sizes)
    if len(far):
        first = far[0]
        raise InputError(
            f"{len(far)} ids of the data set are those of tiles elsewhere in {gallery}: tile"
            f" {theirs['id'][first].as_py()} lies {metres[first]:,.0f} m from the one of that id"
            " there; cut both regions on the world grid (`s4g convert imagery`), give the new tiles"
            " other ids, or remove those of the gallery first"
        )


def refresh_rows(old: pa.Table, new: pa.Table, *, copies_images: bool) -> pa.Table:
    """Return rows of a data set whose images are unchanged: old embeddings, new attributes.

    new: rows whose ids `old` has. Copied images stay where they are.
    """
    rows = rows_of(old["id"].to_numpy(), new["id"].to_numpy())
    same = old.take(rows)
    kept = ["digest", "embedded_in"]
    if copies_images:
        kept.extend(["uri", "offset", "length"])
    columns = [(same if name in kept else new)[name] for name in SCHEMA.names]
    return pa.table(columns, SCHEMA)


def have_moved(old: pa.Table, new: pa.Table) -> Bools:
    """Return which rows of `new`, whose ids `old` has, have other coordinates there."""
    same = old.take(rows_of(old["id"].to_numpy(), new["id"].to_numpy()))
    moved = np.zeros(len(new), bool)
    for name in ("lat", "lon"):
        moved |= same[name].to_numpy() != new[name].to_numpy()
    return moved


def shorten_paths(rows: pa.Table, gallery: str, root: str) -> pa.Table:
    """Return rows whose paths below or beside the folder of images, `root`, are relative to it."""
    column = SCHEMA.get_field_index("uri")
    paths = shorten(rows["uri"], list_prefixes(gallery, root))
    return rows.set_column(column, SCHEMA.field("uri"), paths)


def merge_rows(old: pa.Table, *others: pa.Table) -> pa.Table:
    """Put rows in place of those of the same id, or add them; sorted by id."""
    brought: Ints = np.sort(np.concatenate([other["id"].to_numpy() for other in others]))
    kept = rows_of(brought, old["id"].to_numpy()) < 0
    table = pa.concat_tables([old.filter(pa.array(kept)), *others])
    return table.take(pc.sort_indices(table["id"])).combine_chunks()
