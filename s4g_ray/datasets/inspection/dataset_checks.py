"""Check a data set: run all checks, and collect a finding of each (ok, note or fault)."""

from __future__ import annotations

import math

import numpy as np

from s4g_ray.data.dataset import open_dataset
from s4g_ray.data.sphere import EARTH_RADIUS_M
from s4g_ray.datasets.inspection.coordinate_checks import (
    describe_extents,
    measure_distances_to_place,
)
from s4g_ray.datasets.inspection.count_checks import (
    compare_published_counts,
    count_rows,
    describe_columns,
    describe_counts,
    match_places,
)
from s4g_ray.datasets.inspection.findings import Inspection
from s4g_ray.datasets.inspection.image_checks import (
    choose_sample,
    describe_decoding,
    describe_missing_files,
    find_plain_images,
    find_repeated_images,
    inspect_content,
)
from s4g_ray.datasets.inspection.image_files import decode_images, find_missing_files
from s4g_ray.datasets.inspection.inventory import Inventory
from s4g_ray.datasets.inspection.leakage_checks import find_leakage
from s4g_ray.datasets.inspection.part_checks import compare_parts
from s4g_ray.datasets.inspection.value_range import find_unfit_range
from s4g_ray.errors import InputError
from s4g_ray.progress import Update, ignore


def inspect_dataset(
    uri: str,
    *,
    decode: bool = False,
    leak_radius_m: float = 25.0,
    num_threads: int = 16,
    on_progress: Update = ignore,
) -> Inspection:
    """Check a data set's rows and image files; decode a sample of them, or all with `decode`.

    `on_progress` counts folders while they are listed, then images while they are decoded. Raises
    InputError for the errors of open_dataset, and for an impossible radius or number of threads.
    """
    if not 0 <= leak_radius_m <= math.pi * EARTH_RADIUS_M:
        most = math.pi * EARTH_RADIUS_M
        raise InputError(f"--leak-radius-m {leak_radius_m:g} is not within 0..{most:.0f} metres")
    if num_threads < 1:
        raise InputError(f"--threads {num_threads} is below 1; give at least one thread")
    dataset = open_dataset(uri)
    inventory = Inventory.read(dataset)
    counts = count_rows(inventory, np.arange(len(inventory.ids)))
    missing = find_missing_files(inventory.paths, num_threads=num_threads, on_progress=on_progress)
    findings = [compare_parts(dataset.uri, num_threads=num_threads)]
    findings.append(describe_columns(dataset, inventory))
    findings.append(describe_counts(inventory, counts))
    findings.extend(compare_published_counts(dataset.name, counts))
    findings.extend(match_places(inventory))
    findings.append(describe_extents(inventory))
    findings.extend(measure_distances_to_place(inventory))
    findings.append(describe_missing_files(inventory, missing))
    first = inventory.first_of_images()
    rows = first[~np.isin(inventory.files[first], list(missing))]
    if not decode:
        rows = choose_sample(inventory, rows)
    decoded = decode_images(inventory, rows, num_threads=num_threads, on_progress=on_progress)
    if decode:
        findings.extend(inspect_content(inventory, rows, decoded))
    else:
        findings.append(describe_decoding(inventory, rows, decoded, "sampled image"))
        findings.extend(find_plain_images(inventory, rows, decoded))
    if inventory.values.stretch is not None:
        findings.extend(find_unfit_range(inventory, rows))
    findings.extend(find_repeated_images(inventory))
    findings.extend(find_leakage(inventory, leak_radius_m))
    return Inspection(dataset.uri, dataset.name, tuple(findings))
