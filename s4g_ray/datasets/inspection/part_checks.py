"""Compare the Parquet parts of a data set with the sha256 that its dataset.json names."""

from __future__ import annotations

from s4g_ray.amounts import count_noun
from s4g_ray.data.format.header import COPY_AGAIN, HEADER, DatasetHeader, DatasetPart
from s4g_ray.datasets.inspection.findings import Finding, take_first
from s4g_ray.datasets.inspection.image_files import run_in_parallel
from s4g_ray.progress import ignore
from s4g_ray.storage import files


def compare_parts(uri: str, *, num_threads: int) -> Finding:
    """Read all parts of a data set, and compare each with its sha256.

    Names, sizes and numbers of rows are compared when the data set is opened.
    """
    parts = DatasetHeader.read(uri).parts

    def differs(part: DatasetPart) -> bool:
        return files.fingerprint(files.read_bytes(files.join(uri, part.name))) != part.sha256

    # each is in memory as a whole: few at a time
    results = run_in_parallel(differs, parts, num_threads=min(num_threads, 4), on_progress=ignore)
    altered = [part.name for part, differ in zip(parts, results, strict=True) if differ]
    total = count_noun(len(parts), "Parquet part")
    values = {"parts": len(parts), "altered": len(altered)}
    if not altered:
        return Finding("ok", "parts", f"{total}, all with the sha256 of {HEADER}", values=values)
    text = f"{len(altered):,} of {total} altered since they were written; {COPY_AGAIN}"
    return Finding("fault", "parts", text, take_first(altered), values)
